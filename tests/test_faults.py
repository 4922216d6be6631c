"""Faults that do no harm: killed at any moment, a rank that dies, numbers that are not finite, a full disk, damage, contradictions."""

import functools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import sft  # noqa: E402
import train  # noqa: E402
from distributed import checkpoint  # noqa: E402
from test_shard import saved_tensors  # noqa: E402
from test_train import learnt, records, weights  # noqa: E402

GAME = ["--task", "gp-l", "--attempts", "2", "--max-new-tokens", "8", "--eval-hands", "4", "--device", "cpu"]
LEARN = ["--minibatches", "2", "--eval-every", "3", "--save-every", "1", "--lr", "1e-3", "--steps", "4",
         "--probe-hands", "0"]
COMMON = {             # the settings of a short run, by its algorithm
    "sft": ["--algo", "sft", "--batch-size", "4", *GAME, *LEARN],
    "ppo": ["--algo", "ppo", "--hands", "4", "--samples", "1", *GAME, *LEARN]}


# ---------------------------------------------------------------------------------------------------------------------
# Killed at any moment: a process kills itself at the n-th call of something, is started again with --resume, and is compared

MOMENTS = {                                    # name: (object, attribute, calls in the whole run, of SFT and of PPO)
    "in a rollout": ("ppo", "generate", 0, 20),
    "before the optimizer steps": ("torch.optim.AdamW", "step", 8, 8),
    "in a backward pass": ("torch.Tensor", "backward", 8, 8),
    "as a checkpoint's slices are written": ("distributed.checkpoint", "save_file", 4, 4),
    "as its files are listed": ("distributed.checkpoint", "fingerprint", 24, 24),
    "before it gets its name": ("pathlib.Path", "rename", 4, 4),
    "as old ones go": ("distributed.checkpoint", "remove", 8, 8),
    "before a line of the log": ("train.RunFolder", "log", 8, 8),
    "in the final folder": ("model.Llama", "save_pretrained", 1, 1),
}


def resolve(name):
    """'torch.optim.AdamW' -> the object."""
    parts = name.split(".")
    start = __import__(parts[0])
    return functools.reduce(getattr, parts[1:], start)


def work(argv, log, moment=None, n=None, tear=False, limit=None):
    """What a child does: train, and kill itself as it is about to call something for the n-th time. tear: in the middle of a line of
    the log. limit: bytes beyond which a file cannot grow."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "a")
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if moment:
        owner, name = resolve(MOMENTS[moment][0]), MOMENTS[moment][1]
        real, calls = getattr(owner, name), []

        def deadly(*args, **kwargs):
            calls.append(None)
            if len(calls) == n:
                if tear:
                    with open(args[0].log_file, "a") as file:
                        file.write('{"event": "step", "st')
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(owner, name, deadly)
    train.main(argv)


def child(argv, log, **how):
    """Run `work` in a process of its own. Returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])                                  # so that a child starts in no time
    process = context.Process(target=work, args=([str(word) for word in argv], str(log)), kwargs=how)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    """algo -> folder of a run without faults."""
    @functools.cache
    def run(algo):
        out = tmp_path_factory.mktemp("uninterrupted") / "run"
        output = out.parent / "output"
        assert child(["--model", small[0], *COMMON[algo], "--out", out], output) == 0, output.read_text()
        return out
    return run


def assert_same(a, b):
    """Two runs are the same bit for bit: log, weights, and the last checkpoint with its optimizer."""
    for event in ("step", "eval"):
        assert learnt(a, event) == learnt(b, event)
    for load, where in ((weights, "final"), (saved_tensors, "checkpoints/step_000004")):
        ours, theirs = load(a / where), load(b / where)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [path.name for path in sorted((a / "checkpoints").iterdir())] == ["step_000003", "step_000004"]


RANDOM = random.Random(2501)
KILLS = [(algo, moment, RANDOM.randint(1, calls)) for moment, (_, _, *counts) in MOMENTS.items()
         for algo, calls in zip(("sft", "ppo"), counts) for _ in range(1 + (calls > 4)) if calls]


@pytest.mark.parametrize("algo, moment, n", KILLS)
def test_killed_and_resumed_equals_uninterrupted(small, tmp_path, uninterrupted, algo, moment, n):
    argv = ["--model", small[0], *COMMON[algo], "--out", tmp_path / "run"]
    assert child(argv, tmp_path / "output", moment=moment, n=n, tear="log" in moment and n > 1) == -signal.SIGKILL
    started = (tmp_path / "run/log.jsonl").exists()
    again = ["--resume", "--out", tmp_path / "run"] if started else argv       # it knows its settings
    assert child(again, tmp_path / "output") == 0, (tmp_path / "output").read_text()
    assert_same(tmp_path / "run", uninterrupted(algo))


def test_a_full_disk_stops_a_run_that_can_go_on(small, tmp_path, uninterrupted):
    """Files cannot grow beyond 40 kB: the log can be written, a checkpoint cannot."""
    argv = ["--model", small[0], *COMMON["sft"], "--out", tmp_path / "run"]
    assert child(argv, tmp_path / "output", moment="before the optimizer steps", n=5) == -signal.SIGKILL
    before = [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")]
    assert before and child([*argv, "--resume"], tmp_path / "output", limit=40_000) == 1
    said = (tmp_path / "output").read_text()
    assert "could not be saved" in said and "File too large" in said and "Traceback" not in said
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == before
    assert child([*argv, "--resume"], tmp_path / "output") == 0
    assert_same(tmp_path / "run", uninterrupted("sft"))


# ---------------------------------------------------------------------------------------------------------------------
# Damage and contradictions

@pytest.fixture
def half(small, tmp_path, uninterrupted):
    """A run that ended before its last step and has two checkpoints."""
    shutil.copytree(uninterrupted("ppo"), tmp_path / "run")
    (tmp_path / "run/final/model.safetensors").unlink()
    return tmp_path / "run"


def resume(out, *argv):
    train.main(["--resume", "--out", str(out), "--device", "cpu", *map(str, argv)])


def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(half, uninterrupted):
    slices = half / "checkpoints/step_000004/rank_0.safetensors"
    content = bytearray(slices.read_bytes())
    content[len(content) // 2] ^= 1
    slices.write_bytes(content)
    with pytest.raises(SystemExit, match=r"step_000004: damaged: rank_0.safetensors is not what was written; remove it.*step_000003"):
        resume(half)
    shutil.rmtree(half / "checkpoints/step_000004")
    assert child(["--resume", "--out", half], half / "output") == 0
    assert_same(half, uninterrupted("ppo"))


def test_a_foreign_folder_is_refused(small, half):
    shutil.copytree(small[0], half / "checkpoints/step_000005")
    with pytest.raises(SystemExit, match="step_000005: damaged: it has no list of its files; remove it.*step_000004"):
        resume(half)


@pytest.mark.parametrize("typed, words", [(["--lr", "2e-3"], "--lr 0.001, not 0.002"), (["--task", "gp-vl"], "--task gp-l, not gp-vl"),
                                          (["--steps", "9"], "--steps 4, not 9"), (["--gamma", "0.5"], "--gamma 0.9, not 0.5")])
def test_settings_that_contradict_the_run_are_refused(half, typed, words, capsys):
    with pytest.raises(SystemExit):
        resume(half, *typed)
    assert f"{words}; leave it out, or add --override" in capsys.readouterr().err


def test_a_run_goes_on_with_other_settings_if_told_so(half):
    resume(half, "--steps", 5, "--gamma", 0.5, "--override")
    resumed = records(half, "start")[-1]
    assert resumed["step"] == 4 and resumed["config"]["gamma"] == 0.5 and resumed["config"]["lr"] == 1e-3
    assert [r["step"] for r in records(half, "step")] == [1, 2, 3, 4, 5]


def test_a_checkpoint_can_be_another_runs_model(half, tmp_path, uninterrupted):
    newest = half / "checkpoints/step_000004"
    common = ["--algo", "eval", *GAME]
    for name, model in (("checkpoint", newest), ("final", uninterrupted("ppo") / "final")):
        train.main([*common, "--model", str(model), "--out", str(tmp_path / name)])
    a, b = (json.loads((tmp_path / name / "eval.json").read_text())["eval"] for name in ("checkpoint", "final"))
    assert a == b


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite

def broken(when):
    """An SFT loss that is NaN in some steps."""
    calls = []

    def loss(logprobs, *_):
        calls.append(None)
        return -logprobs * (float("nan") if len(calls) in when else 1.0)
    return sft.Loss(loss)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sft.LOSSES, "nll", broken({1}))
    common = ["--model", small[0], *COMMON["sft"], "--eval-hands", 0, "--lr-schedule", "constant", "--warmup", 0,
              "--minibatches", 1]
    train.main(list(map(str, [*common, "--steps", 1, "--out", tmp_path / "one"])))
    start = weights(small[0])
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(tmp_path / "one/final").items())
    assert records(tmp_path / "one", "step")[0]["skipped"] == 1
    monkeypatch.setitem(sft.LOSSES, "nll", broken({2, 3, 5, 6}))
    train.main(list(map(str, [*common, "--steps", 7, "--max-skipped", 3, "--out", tmp_path / "more"])))
    assert [r["skipped"] for r in records(tmp_path / "more", "step")] == [0, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("task, algo", [("gp-vl", "sft"), ("virl-vl", "ppo")])
def test_many_in_a_row_stop_the_run_and_show_the_batch(small, tmp_path, monkeypatch, task, algo):
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss, real=torch.Tensor.backward: real(loss * float("inf")))
    with pytest.raises(SystemExit, match="2 steps in a row without a finite.*broken_step_00000") as stop:
        train.main(list(map(str, ["--model", small[0], *COMMON[algo], "--task", task, "--max-skipped", 2,
                                  "--eval-hands", 0, "--out", tmp_path / "run"])))
    folder = Path(str(stop.value.code).split()[-1])
    batch = json.loads((folder / "rank_0.json").read_text())
    assert len(batch) == 4 and (folder / "rank_0_0.png").exists()
    said = batch[0]["ids"] if algo == "sft" else batch[0]["conversations"][0]["ids"]
    assert "\n" in small[2].decode(said)


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks. As a script this file is what torchrun starts: FAULT runs `train.py` with a fault on the second rank.

def faulty_rank(fault, argv):
    """die: the second rank is killed at its fifth optimizer step (two an update), once. nan: its second loss is not a number."""
    second, first_life = os.environ["RANK"] == "1", os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    torch.set_num_threads(1)
    if fault == "die" and second and first_life:
        work(argv, os.devnull, "before the optimizer steps", 5)
    if fault == "nan":
        sft.LOSSES["nll"] = broken({2} if second else {})
    train.main(argv)


def start(fault, *argv, restarts=0):
    """Two ranks."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--max-restarts", str(restarts),
                             __file__, fault, *map(str, argv)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def torchrun(fault, *argv, restarts=0):
    """Exit code of two ranks, and what was said."""
    process = start(fault, *argv, restarts=restarts)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def test_a_rank_that_dies_ends_the_job_and_a_restart_resumes(small, tmp_path):
    common = ["--model", small[0], *COMMON["sft"], "--eval-hands", 0]
    code, said = torchrun("die", *common, "--out", tmp_path / "ended")
    assert code != 0 and "rank 0: lost another rank" in said and f"--resume --out {tmp_path / 'ended'}" in said
    assert "Signal 9" in said                                                  # torchrun's own word on the second
    code, said = torchrun("die", *common, "--out", tmp_path / "restarted", restarts=1)
    assert code == 0, said
    assert [r["step"] for r in records(tmp_path / "restarted", "start")] in ([0, 1], [0, 2])     # the second may not have had its name yet
    code, said = torchrun("none", *common, "--out", tmp_path / "whole")
    assert code == 0, said
    assert_same(tmp_path / "restarted", tmp_path / "whole")
    code, said = torchrun("none", *common, "--out", tmp_path / "whole", restarts=1)      # a restart does not resume another launch's run
    assert code != 0 and "expected a folder without a run" in said
    assert len(records(tmp_path / "whole", "start")) == 1


def test_sigterm_to_torchrun_saves_the_last_step(small, tmp_path):
    out = tmp_path / "run"
    process = start("none", "--model", small[0], *COMMON["sft"], "--eval-hands", 0, "--steps", 100_000,
                    "--save-every", 50_000, "--out", out)
    while not ((out / "log.jsonl").exists() and len(records(out, "step")) > 2):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert "continue with --resume" in said
    assert checkpoint.Checkpoints(out / "checkpoints").newest().name == f"step_{records(out, 'step')[-1]['step']:06d}"


@pytest.mark.parametrize("sharded", ["on", "off"])
def test_all_ranks_skip_the_step_of_one(small, tmp_path, sharded):
    code, said = torchrun("nan", "--model", small[0], *COMMON["sft"], "--eval-hands", 0, "--minibatches", 1,
                          "--shard", sharded, "--out", tmp_path / "run")
    assert code == 0, said
    assert [r["skipped"] for r in records(tmp_path / "run", "step")] == [0, 1, 1, 1]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run/final").values())


if __name__ == "__main__":
    faulty_rank(sys.argv[1], sys.argv[2:])
