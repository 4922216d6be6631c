"""The command line and the run around the learning: resuming, stopping, errors, ranks."""

import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from distributed import checkpoint
from envs import GAMES
from games import cities, rails, routes
from harness import tiny
from harness.settings import GAME_SETTINGS, Args, apply_preset
from model import Llama
from study import __main__ as study
from variants import ESTIMATORS

HERE = Path(train.__file__).parent
SHORT = {              # what makes a run short, by its algorithm
    "ppo": "--hands 4 --samples 1 --eval-every 0 --probe-hands 0",
    "sft": "--batch-size 4 --eval-every 0 --probe-hands 0",
    "pretrain": "--batch-size 4 --eval-every 0", "eval": ""}
MEASURED = ("seconds", "tokens_per_second", "rollout_seconds", "update_seconds", "rollout_tokens_per_second",
            "memory_gb")


def quick(*argv):
    """Return the command line of a short run, in which `argv` has the last word; a resumed one is as it
    was."""
    words = list(map(str, argv))
    if "--resume" in words:
        return ["--device", "cpu", *words]
    algo = words[words.index("--algo") + 1] if "--algo" in words else "ppo"
    return [*"--device cpu --eval-hands 4 --max-new-tokens 8".split(), *SHORT[algo].split(), *words]


def run(*argv):
    train.main(quick(*argv))


def command(*argv, launcher=(sys.executable,), **kwargs):
    return subprocess.Popen([*launcher, str(HERE / "train.py"), *quick(*argv)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            **kwargs)


def records(folder, event):
    """Return what was logged of each "step" or evaluation ("eval") or of the "start"."""
    lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return [record for record in found if record["event"] == event]


def learnt(folder, *events):
    """Return the same but for times and memory, as text."""
    return json.dumps([{k: v for k, v in record.items() if k not in MEASURED}
                       for event in events for record in records(folder, event)])


def weights(folder):
    return Llama.from_pretrained(folder).state_dict()


def in_parts(folder, *argv, stops=(2, 4)):
    """Run in one go, and again with an end and a resume at each of the `stops`: the weights and the log are
    the same, bit for bit on CPU. Return the folder of the first."""
    whole, parts = folder / "whole", folder / "parts"
    argv = "--lr-schedule", "constant", "--lr", "1e-3", *argv
    run(*argv, "--steps", stops[-1], "--out", whole)
    run(*argv, "--steps", stops[0], "--out", parts)
    for steps in stops[1:]:
        run("--steps", steps, "--out", parts, "--resume", "--override")
    a, b = weights(whole / "final"), weights(parts / "final")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert learnt(whole, "step") == learnt(parts, "step")
    return whole


def on_two_ranks(folder, cwd, model, *argv, two=()):
    """Make three steps from `model` on one rank and on two: the same hands, draws, weights and metrics.
    Return [(record of one, record of two)] of the steps. two: what the latter are told in addition."""
    settings = "--steps 3 --lr 1e-3 --lr-schedule constant --minibatches 1".split()
    argv = *settings, "--adam-eps", "1e-3", "--model", model, *argv            # no step out of rounding noise
    run(*argv, "--out", folder / "one")
    launcher = sys.executable, "-m", *"torch.distributed.run --standalone --nproc-per-node 2".split()
    ranks = command(*argv, *two, "--out", folder / "two", cwd=cwd, launcher=launcher)
    output, _ = ranks.communicate(timeout=300)
    assert ranks.returncode == 0, output
    start, a, b = (weights(path) for path in (model, folder / "one/final", folder / "two/final"))
    assert max((a[name] - start[name]).abs().max() for name in a) > 1e-4       # it did learn
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    steps = list(zip(records(folder / "one", "step"), records(folder / "two", "step"), strict=True))
    for x, y in steps:
        names = {"nll", "reward", "policy_loss", "value_loss", "entropy", "kl_reference"} & set(x)
        assert [x[name] for name in names] == pytest.approx([y[name] for name in names], abs=1e-4)
    return steps


TASKS = "gp-l", "gp-vl", "virl-l", "virl-vl"
CASES = list(itertools.product(TASKS, ("sft", "ppo")))


@pytest.mark.parametrize("task, algo", CASES)
def test_a_run_leaves_what_it_promises(small, tmp_path, capsys, task, algo):
    out = tmp_path / "run"
    transcripts = ["--transcript-every", 1] if algo == "ppo" else []
    run("--task", task, "--algo", algo, "--model", small[0], "--steps", 2, "--out", out, *transcripts)
    [start], steps, evals = (records(out, event) for event in ("start", "step", "eval"))
    assert start["config"]["task"] == task and start["hardware"] and [r["step"] for r in steps] == [1, 2]
    sets = {"id", "rule-ood"} | ({"visual-ood"} if task.endswith("vl") else set())
    assert [set(r["eval"]) for r in evals] == [sets, sets] and evals[0]["eval"]["id"]["n"] == 4
    assert 0 == evals[0]["tflops"] < steps[0]["tflops"] < steps[1]["tflops"]
    assert (out / "checkpoints/step_000002/record.json").exists() and weights(out / "final")
    assert "left" in capsys.readouterr().out
    if algo == "ppo":
        said = (out / "transcripts/step_000001.txt").read_text(encoding="utf-8")
        assert all(f"[{who}]" in said for who in ("user", "assistant", "reward"))
        assert (out / "transcripts/step_000001.png").exists() == task.endswith("vl")
        assert steps[0]["drawn_vs_scored"] < 1e-4


@pytest.mark.parametrize("task, algo, more", [(*case, "") for case in CASES] + [
    ("gp-l", "sft", "--sft-loss iw-sft"), ("gp-l", "sft", "--sft-loss psft --minibatches 2"),
    ("gp-l", "ppo", "--kl-coef 0.1 --lora-rank 2")])
def test_resumed_equals_uninterrupted(small, tmp_path, task, algo, more):
    """Also what is compared with the start of the run."""
    in_parts(tmp_path, "--task", task, "--algo", algo, "--model", small[0], *more.split())


def test_in_bfloat16_every_step_sees_the_one_before(small, tmp_path, monkeypatch):
    """As on CUDA, where autocast remembers what it cast; without its memory the same comes out."""
    for remembers in (True, False):
        monkeypatch.setattr(train, "autocast", lambda *args: torch.autocast(
            "cpu", torch.bfloat16, cache_enabled=remembers))
        run("--task", "gp-vl", "--model", small[0], "--steps", 2, "--lr", "1e-2", "--critic", "shared",
            "--out", tmp_path / str(remembers))
    assert learnt(tmp_path / "True", "step") == learnt(tmp_path / "False", "step")
    assert records(tmp_path / "True", "step")[0]["approx_kl"] > 1e-4       # over four minibatches it moved


@pytest.mark.parametrize("task, algo", [("gp-vl", "sft"), ("gp-vl", "ppo"), ("virl-vl", "ppo")])
def test_two_ranks_equal_one(small, tmp_path, working_folder, task, algo):
    """Of FLOPs, too, and where a rank passes for the other's sake."""
    warm = ["--temperature", 1] if algo == "ppo" else []
    for x, y in on_two_ranks(tmp_path, working_folder, small[0], "--task", task, "--algo", algo, *warm):
        assert x["tflops"] == pytest.approx(y["tflops"])
        assert x["flops"] == y["flops"] and x["counted_tflops"] == y["counted_tflops"]


def test_sigterm_saves_and_ends_cleanly(small, tmp_path):
    out = tmp_path / "run"
    process = command("--algo", "sft", "--model", small[0], "--steps", 10**5, "--out", out, "--eval-hands", 0)
    log = out / "log.jsonl"
    while not (log.exists() and '"step": 3' in log.read_text(encoding="utf-8")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in output
    newest = checkpoint.Checkpoints(out / "checkpoints").newest()
    assert newest.name == f"step_{records(out, 'step')[-1]['step']:06d}"


def test_every_argument_is_used():
    """A key that nothing reads does not exist."""
    files = [*HERE.glob("*.py"), *HERE.glob("[dhv]*/*.py")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    for name in Args.__dataclass_fields__:
        assert f"args.{name}" in text or name in GAME_SETTINGS, name
    parameters = {name for game in GAMES.values() for name in inspect.signature(game).parameters}
    assert set(GAME_SETTINGS) <= parameters


@pytest.mark.parametrize("preset", ["tiny", "paper"])
@pytest.mark.parametrize("algo, needed", [
    ("ppo", "hands clip critic steps lr betas"), ("sft", "batch_size steps lr betas"),
    ("eval", "eval_hands max_new_tokens")])
def test_presets_fill_everything(preset, algo, needed):
    args = apply_preset(Args(task="gp-vl", algo=algo, preset=preset), 128)
    assert all(getattr(args, name) is not None for name in needed.split())


def test_an_existing_run_is_not_overwritten(small, tmp_path, capsys):
    one_step = "--algo", "sft", "--model", small[0], "--steps", 1, "--out", tmp_path / "run"
    run(*one_step)
    with pytest.raises(SystemExit):
        run(*one_step)
    assert f"--out {tmp_path / 'run'}: expected a folder without a run" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_half_written(small, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "fingerprint", full)
    with pytest.raises(SystemExit, match="No space left"):
        run("--algo", "sft", "--model", small[0], "--steps", 1, "--out", tmp_path)
    assert not list(tmp_path.glob("checkpoints/*")) and not (tmp_path / "final").exists()


def test_old_checkpoints_go(small, tmp_path):
    run("--algo", "sft", "--model", small[0], "--steps", 4, "--save-every", 1, "--keep", 3, "--out", tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [f"step_00000{i}" for i in (2, 3, 4)]


def test_eval_of_a_checkpoint(small, tmp_path):
    sets = "id,id-face,rule-ood,visual-ood"
    run("--algo", "eval", "--task", "gp-vl", "--model", small[0], "--out", tmp_path, "--eval-sets", sets)
    saved = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert set(saved["eval"]) == set(sets.split(",")) and saved["hardware"]


def test_tiny_makes_its_init_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny, "INIT_STEPS", 1)
    for repeat, rule in enumerate(["10", "10", "11-12-13"]):   # a rule of its own has an init of its own
        run("--task", "gp-vl", "--algo", "sft", "--steps", 1, "--rule", rule)
        assert ("making its init checkpoint" in capsys.readouterr().out) == (repeat != 1)
    assert len(list(Path("runs").glob("init-gp-vl-*/final/model.safetensors"))) == 2
    assert sorted(map(str, Path("runs").glob("gp-*"))) == [f"runs/gp-vl-sft{n}" for n in ("", "-2", "-3")]


@pytest.mark.parametrize("task", ["gp-vl", "virl-l"])
def test_a_foundation_is_made_from_nothing(tmp_path, task):
    run("--task", task, "--algo", "pretrain", "--steps", 1, "--batch-size", 2, "--eval-hands", 0,
        "--out", tmp_path)
    assert Llama.from_pretrained(tmp_path / "final").config.hidden_size == 128


def test_routes_of_ones_own(small, tmp_path, capsys):
    """A folder in the released format: pictures on disk and nothing that could draw them."""
    folder = cities.build("milan", tmp_path / "city")
    infos = folder / "route_infos.json"
    first = json.loads(infos.read_text(encoding="utf-8"))[0][:2]
    infos.write_text(json.dumps([first, 2]), encoding="utf-8")
    shown = [set(routes.pictures_of(route)) for route in routes.load(str(folder)).routes]
    for panorama in shown[0] | shown[1]:
        cities.draw(panorama)
    (folder / "city.json").unlink()
    own = "--task", "virl-vl", "--algo", "sft", "--model", small[0], "--steps", 1, "--routes", folder
    for more, sets in ([], {"id", "rule-ood"}), (["--ood-routes", folder], {"id", "rule-ood", "visual-ood"}):
        run(*own, *more, "--out", tmp_path / f"with{len(more)}")
        results = records(tmp_path / f"with{len(more)}", "eval")[0]["eval"]
        assert set(results) == sets and results["id"]["n"] == 2        # routes, not 4
    bad = Path(min(shown[1] - shown[0]))
    bad.write_bytes(bad.read_bytes()[:-100])
    for cache in (routes.load, rails.known_routes):
        cache.cache_clear()
    with pytest.raises(SystemExit):
        run(*own, "--out", tmp_path / "bad")
    said = capsys.readouterr().err
    words = "--routes", "route 1 of", str(bad), "truncated", "--skip-bad-routes"
    assert all(word in said for word in words)
    run(*own, "--skip-bad-routes", "--out", tmp_path / "bad")
    assert "skipped 1 bad routes" in capsys.readouterr().out


def test_plot(small, tmp_path, monkeypatch, capsys):
    run("--algo", "sft", "--model", small[0], "--steps", 1, "--out", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)       # as if it were not installed
        study.main(["plot", "run"])
        assert "pip install" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    study.main(["plot", "run"])
    assert (tmp_path / "success.png").stat().st_size > 5000


def test_the_readmes_own_estimator_runs(small, tmp_path, monkeypatch, capsys):
    """The example as printed."""
    readme = (HERE / "README.md").read_text(encoding="utf-8").split("## Change it")[1].split("\n## ")[0]
    code, command = re.findall(r"```(?:python|bash)\n(.*?)```", readme, re.S)
    monkeypatch.chdir(tmp_path)
    Path(re.search(r"# (\S+)", code)[1]).write_text(code, encoding="utf-8")
    monkeypatch.setitem(ESTIMATORS, "best-to-come", None)      # so that it is gone again after this test
    run(*command.split()[2:], "--model", small[0], "--steps", 2, "--out", "run")
    assert records("run", "start")[0]["config"]["advantage"] == "best-to-come"
    with pytest.raises(SystemExit):
        run("--resume", "--out", "run")                        # the folder alone runs no code
    assert "--custom mine.py; to run that file again, give --custom" in capsys.readouterr().err
    run("--resume", "--out", "run", "--custom", "mine.py")
