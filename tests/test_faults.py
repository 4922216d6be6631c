"""Faults that do no harm: killed at any moment, a rank that dies, numbers that are not finite, a full disk,
contradictions."""

import functools
import json
import multiprocessing
import os
import pkgutil
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

import train  # noqa: E402
from distributed.checkpoint import Checkpoints  # noqa: E402
from tables import rows  # noqa: E402
from test_shard import saved_tensors  # noqa: E402
from test_train import equal, learnt, records, weights  # noqa: E402
from variants import SFT_LOSSES  # noqa: E402
from variants.sft_losses import SFTLoss  # noqa: E402

GAME = "--task gp-l --attempts 2 --max-new-tokens 8 --eval-hands 4 --device cpu"
SHORT = f"{GAME} --minibatches 2 --eval-every 3 --save-every 1 --lr 1e-3 --steps 4"
COMMON = {"sft": f"--algo sft --batch-size 4 {SHORT}", "ppo": f"--algo ppo --hands 4 --samples 1 {SHORT}"}


def words(*argv):
    """Return a command line as a list, of which each argument may be several words."""
    return " ".join(map(str, argv)).split()


# ------------------------------------------------------------------------------------------------------------
# Killed at any moment: a process kills itself at the n-th call of something, is started again with --resume,
# and is compared

# What is called, and how often in the whole run of SFT, of PPO.
MOMENTS = """
    rollout.generate                        | 0  | 20
    torch.optim.AdamW.step                  | 8  | 8
    torch.Tensor.backward                   | 8  | 8
    llama.folders.save_file                 | 5  | 5
    pathlib.Path.rename                     | 4  | 4
    distributed.checkpoint.remove           | 8  | 8
    harness.folder.RunFolder.log            | 8  | 8
    model.Llama.save_pretrained             | 1  | 1
"""


def work(argv, log, moment=None, n=None, limit=None):
    """Do what a child does: train, and kill itself as it is about to call something for the n-th time; in the
    middle of a line if that is the log. limit: bytes beyond which a file cannot grow."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "a")
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if moment:
        real, calls = pkgutil.resolve_name(moment), []

        def deadly(*args, **kwargs):
            calls.append(None)
            if len(calls) == n:
                if moment.endswith("log") and n > 1:
                    with open(args[0].log_file, "a") as file:
                        file.write('{"event": "step", "st')
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        mock.patch(moment, deadly).start()
    train.main(argv)


def child(argv, log, **how):
    """Run `work` in a process of its own. Return its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])                  # so that a child starts in no time
    process = context.Process(target=work, args=(words(argv), str(log)), kwargs=how)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    """Return a function: algo -> folder of a run without faults."""
    @functools.cache
    def run(algo):
        out = tmp_path_factory.mktemp("uninterrupted") / "run"
        output = out.parent / "output"
        assert child(f"--model {small[0]} {COMMON[algo]} --out {out}", output) == 0, output.read_text()
        return out
    return run


def assert_same(a, b):
    """Two runs are the same bit for bit: log, weights, and the last checkpoint with its optimizer."""
    assert learnt(a, "step", "eval") == learnt(b, "step", "eval")
    assert equal(weights(a / "final"), weights(b / "final"))
    assert equal(*(saved_tensors(run / "checkpoints/step_000004") for run in (a, b)))
    names = [path.name for path in sorted((a / "checkpoints").iterdir())]      # older: of a kill in the end
    assert names[-2:] == ["step_000003", "step_000004"]


RANDOM = random.Random(2501)
KILLS = [(algo, moment, RANDOM.randint(1, int(calls))) for moment, *counts in rows(MOMENTS)
         for algo, calls in zip(COMMON, counts) for _ in range(1 + (int(calls) > 4)) if int(calls)]


@pytest.mark.parametrize("algo, moment, n", KILLS)
def test_killed_and_resumed_equals_uninterrupted(small, tmp_path, uninterrupted, algo, moment, n):
    out, output = tmp_path / "run", tmp_path / "output"
    argv = f"--model {small[0]} {COMMON[algo]} --out {out}"
    assert child(argv, output, moment=moment, n=n) == -signal.SIGKILL, output.read_text()
    started = (out / "log.jsonl").exists()
    # It knows its settings.
    assert child(f"--resume --out {out}" if started else argv, output) == 0, output.read_text()
    assert_same(out, uninterrupted(algo))


def test_a_full_disk_stops_a_run_that_can_go_on(small, tmp_path, uninterrupted):
    """Files cannot grow beyond 40 kB: the log can be written, a checkpoint cannot."""
    out, output = tmp_path / "run", tmp_path / "output"
    argv = f"--model {small[0]} {COMMON['sft']} --out {out}"
    assert child(argv, output, moment="torch.optim.AdamW.step", n=5) == -signal.SIGKILL
    before = list((out / "checkpoints").glob("step_*"))
    assert before and child(f"{argv} --resume", output, limit=40_000) == 1
    said = output.read_text()
    assert "could not be saved" in said and "File too large" in said and "Traceback" not in said
    assert list((out / "checkpoints").glob("step_*")) == before
    assert child(f"{argv} --resume", output) == 0
    assert_same(out, uninterrupted("sft"))


# ------------------------------------------------------------------------------------------------------------
# Contradictions

@pytest.fixture
def half(tmp_path, uninterrupted):
    """Return a run that ended before its last step and has two checkpoints."""
    shutil.copytree(uninterrupted("ppo"), tmp_path / "run")
    (tmp_path / "run/final/model.safetensors").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize("typed, has", rows("""
    --lr 0.002   | --lr 0.001
    --task gp-vl | --task gp-l
    --steps 9    | --steps 4
    --gamma 0.5  | --gamma 0.9
"""))
def test_settings_that_contradict_the_run_are_refused(half, typed, has, capsys):
    with pytest.raises(SystemExit):
        train.main(words("--resume --out", half, typed))
    said = f"{has}, not {typed.split()[1]}; leave it out, or add --override"
    assert said in capsys.readouterr().err


def test_a_run_goes_on_with_other_settings_if_told_so(half):
    train.main(words("--resume --steps 5 --gamma 0.5 --override --device cpu --out", half))
    resumed = records(half, "start")[-1]
    assert resumed["step"] == 4 and resumed["config"]["gamma"] == 0.5 and resumed["config"]["lr"] == 1e-3
    assert [r["step"] for r in records(half, "step")] == [1, 2, 3, 4, 5]


def test_eval_of_a_checkpoint_is_that_of_its_final_weights(half, tmp_path, uninterrupted):
    found, sets = [], "id,id-face,rule-ood"
    for model in (half / "checkpoints/step_000004", uninterrupted("ppo") / "final"):
        out = tmp_path / model.name
        train.main(words("--algo eval --eval-sets", sets, GAME, "--model", model, "--out", out))
        found.append(json.loads((out / "eval.json").read_text()))
    one, other = found
    assert one["eval"] == other["eval"] and ",".join(one["eval"]) == sets and one["hardware"]


# ------------------------------------------------------------------------------------------------------------
# Numbers that are not finite

def broken(when):
    """Return an SFT loss that is NaN in some steps."""
    calls = []

    def loss(logprobs, *_):
        calls.append(None)
        return -logprobs * (float("nan") if len(calls) in when else 1.0)
    return SFTLoss(loss)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(small, tmp_path, monkeypatch):
    monkeypatch.setitem(SFT_LOSSES, "nll", broken({2, 3, 5, 6}))
    train.main(words("--model", small[0], COMMON["sft"], "--eval-hands 0 --minibatches 1 --steps 7 --keep 7",
                     "--max-skipped 3 --out", tmp_path / "run"))
    assert [r["skipped"] for r in records(tmp_path / "run", "step")] == [0, 1, 2, 2, 3, 4, 4]
    saved = [saved_tensors(path) for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert [equal(a, b) for a, b in zip(saved, saved[1:])] == [True, True, False, True, True, False]
    train.main(words("--resume --override --steps 8 --out", tmp_path / "run"))
    assert len([*(tmp_path / "run/checkpoints").iterdir()]) == 7           # --keep is remembered


@pytest.mark.parametrize("task, algo", [("gp-vl", "sft"), ("virl-vl", "ppo")])
def test_many_in_a_row_stop_the_run(small, tmp_path, monkeypatch, task, algo):
    real = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: real(loss * float("inf")))
    with pytest.raises(SystemExit, match="2 steps in a row without a finite"):
        train.main(words("--model", small[0], COMMON[algo], "--task", task, "--max-skipped 2 --eval-hands 0",
                         "--out", tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------------
# Several ranks. As a script this file is what torchrun starts: it runs `train.py` with a fault on the second.

def faulty_rank(fault, argv):
    """Train, with a fault. die: the second rank is killed at its fifth optimizer step (two an update), once.
    nan: its second loss is not a number."""
    second = os.environ.get("RANK") == "1"
    torch.set_num_threads(1)
    if fault == "die" and second and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        work(argv, os.devnull, "torch.optim.AdamW.step", 5)
    if fault == "nan":
        SFT_LOSSES["nll"] = broken({2} if second else {})
    train.main(argv)


def start(fault, *argv, ranks=2, restarts=0):
    """Start ranks of SFT without evaluation."""
    launcher = f"-m torch.distributed.run --nproc-per-node {ranks} --standalone --max-restarts {restarts}"
    learner = words(launcher * (ranks > 1), __file__, fault, COMMON["sft"], "--eval-hands 0", *argv)
    return subprocess.Popen([sys.executable, *learner], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def torchrun(*argv, **how):
    """Return the exit code of two ranks, and what was said."""
    process = start(*argv, **how)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def test_a_rank_that_dies_ends_the_job_and_a_restart_resumes(small, tmp_path):
    ended, restarted, whole = (f"--model {small[0]} --out {tmp_path / name}" for name in ("a", "b", "c"))
    code, said = torchrun("die", ended)
    assert code != 0 and "rank 0: lost another rank" in said and f"--resume --out {tmp_path / 'a'}" in said
    assert "Signal 9" in said                                  # torchrun's own word on the second
    code, said = torchrun("die", restarted, restarts=1)
    assert code == 0, said
    # The second checkpoint may not have had its name yet.
    assert [r["step"] for r in records(tmp_path / "b", "start")] in ([0, 1], [0, 2])
    code, said = torchrun("none", whole)
    assert code == 0, said
    assert_same(tmp_path / "b", tmp_path / "c")
    code, said = torchrun("none", whole, restarts=1)           # does not resume another launch's run
    assert code != 0 and "expected a folder without a run" in said
    assert len(records(tmp_path / "c", "start")) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_ends_cleanly(small, tmp_path, ranks):
    out = tmp_path / "run"
    process = start("none", "--model", small[0], "--steps 100000 --save-every 50000 --out", out, ranks=ranks)
    while not ((out / "log.jsonl").exists() and len(records(out, "step")) > 2):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert "continue with --resume" in said and (process.returncode == 0 or ranks == 2)
    assert Checkpoints(out / "checkpoints").newest().name == f"step_{records(out, 'step')[-1]['step']:06d}"


@pytest.mark.parametrize("sharded", ["on", "off"])
def test_all_ranks_skip_the_step_of_one(small, tmp_path, sharded):
    code, said = torchrun("nan", "--model", small[0], "--minibatches 1 --shard", sharded,
                          "--out", tmp_path / "run")
    assert code == 0, said
    assert [r["skipped"] for r in records(tmp_path / "run", "step")] == [0, 1, 1, 1]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run/final").values())


if __name__ == "__main__":
    faulty_rank(sys.argv[1], sys.argv[2:])
