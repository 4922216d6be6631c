"""Choose the folder of a run, lock it, and write its files.

    runs/NAME/config.json       the settings
    runs/NAME/log.jsonl         a line of JSON for every start, step and evaluation
    runs/NAME/transcripts/      episodes for people to read
    runs/NAME/checkpoints/      step_N/: distributed/checkpoint.py
    runs/NAME/final/            an ordinary Hugging Face folder
"""

import dataclasses
import json
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path

import torch

from distributed import checkpoint
from distributed.processes import first
from harness.files import lock, read_lines, replace, to_json, write_atomically
from harness.ranges import SettingError, UserError, shown
from harness.settings import resumed
from harness.terminal import visible
from llama.folders import read_json, write_file
from variants import lora

LOG = "log.jsonl"
LINE = {"event": str, "step": int}                             # what each of its lines has


# ------------------------------------------------------------------------------------------------------------
# Its choice

def choose(args, processes, held):
    """Return the folder of a run, --out or else runs/TASK-ALGO, and whether a run is resumed there. It is
    locked while `held`, an ExitStack, is open: no other process may write there meanwhile.

    Workers that torchrun starts again resume the run that they began. The ones before may not be gone yet,
    and NFS takes 90 s to forget a host that died.
    """
    folder = Path(args.out or f"runs/{args.task}-{args.algo}")
    if args.resume and not (folder / LOG).exists():
        raise SettingError(f"--resume: expected a run in {shown(folder)}")
    held.enter_context(lock(folder, patience=120 if processes.restarted else 0))
    there = read_lines(folder / LOG, LINE) if processes.restarted and (folder / LOG).exists() else []
    resume = args.resume or any(line.get("launch") == processes.launch for line in there)
    # A new run would drop its checkpoints as older than those of a run whose log is gone.
    if not resume and any((folder / left).exists() for left in (LOG, "checkpoints")):
        raise SettingError(f"--out {shown(folder)}: expected a folder without a run or its checkpoints; "
                           "--resume goes on with it, another --out begins one")
    return str(folder), resume


def git_commit():
    """Return the commit of the code, with a + where its Python differs; None outside a git checkout.

    Other files say nothing of the code: the study appends its records to some that git tracks.
    """
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parents[1], capture_output=True,
                              encoding="utf-8", errors="replace").stdout.strip()

    if shutil.which("git") and (commit := git("rev-parse", "--short", "HEAD")):
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return commit + "+" * bool(changed)


# ------------------------------------------------------------------------------------------------------------
# Its files

class RunFolder:
    """The folder in --out, which `choose` has locked."""

    def __init__(self, args, processes):
        self.path, self.processes = Path(args.out), processes
        self.log_file = self.path / LOG
        self.checkpoints = checkpoint.Checkpoints(self.path / "checkpoints", processes.rank)

    def resume(self, args, typed):
        """Find what a run goes on from -> (its newest checkpoint or None, its settings)."""
        newest = first(self.checkpoints.newest)
        # without one it was stopped before the first
        config = read_json(newest, "record.json")["config"] if newest else read_json(self.path, "config.json")
        return newest, resumed(args, typed, config, newest or self.path / "config.json")

    def start(self, args, step):
        """Open the log; on resuming, drop what was logged after the checkpoint."""
        self.checkpoints.keep = args.keep

        def begin():
            self.path.mkdir(parents=True, exist_ok=True)
            lines = read_lines(self.log_file, LINE) if step else []
            kept = [to_json(line) + "\n" for line in lines if line["step"] <= step]
            write_atomically(self.path / "config.json", to_json(dataclasses.asdict(args), indent=2))
            write_atomically(self.log_file, "".join(kept))

        first(begin)
        self.log(event="start", step=step, config=dataclasses.asdict(args), commit=git_commit(),
                 hardware=self.processes.hardware, launch=self.processes.launch,
                 time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def log(self, **record):
        """Append one JSON line."""
        if self.processes.rank:
            return
        try:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(to_json(record) + "\n")
        except OSError as error:
            raise UserError(f"{self.log_file}: cannot be written ({error.strerror}); make room, and "
                            f"--resume --out {self.path} goes on from the last checkpoint") from None

    def save(self, trainer, step):
        """Begin to write a checkpoint, while training goes on."""
        def model_and_tokenizer(folder):
            write_file(folder, "config.json", json.dumps(trainer.model.config.to_dict(), indent=2))
            trainer.processor.save_pretrained(folder)

        tensors = checkpoint.tensors_of(trainer.module, trainer.optimizers)
        self.checkpoints.save(step, tensors, trainer.record(step), model_and_tokenizer)

    def save_final(self, model, processor, args):
        """Write final/ under a temporary name, then rename it. Adapters are merged into the weights, here and
        in `model`. A foundation is kept in bfloat16: it lies in git."""
        aside, final = self.path / ".final", self.path / "final"
        first(lambda: (checkpoint.remove(aside), processor.save_pretrained(aside)))
        if args.shard != "on":
            lora.merge(model.float())                          # see load.halve_frozen
            if args.algo == "pretrain":
                model.to(torch.bfloat16)
        model.save_pretrained(aside, self.processes.rank)
        self.processes.barrier()
        first(lambda: (checkpoint.remove(final), aside.rename(final)))

    def transcript(self, step, episode):
        """Write one episode as a person would like to read it, and the pictures it was about."""
        if self.processes.rank:
            return
        folder = self.path / "transcripts"
        folder.mkdir(exist_ok=True)
        text = "\n\n".join(f"[{who}]\n{said}" for who, said in episode.transcript)
        write_atomically(folder / f"step_{step:06d}.txt", visible(text) + "\n")
        for k, image in enumerate(episode.pictures):
            file = folder / f"step_{step:06d}{f'_{k + 1}' if k else ''}.png"
            replace(file, partial(image.save, format="PNG"))
