"""The command line and the run around the learning: resuming, stopping, errors, ranks, and the shape of the code."""

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

import envs
import train
from harness import tiny
from harness.settings import apply_preset
from distributed import checkpoint
from distributed.checkpoint import Checkpoints
from games import cities, rails, routes
from model import Llama
from study import __main__ as study
from harness.settings import Args, GAME_SETTINGS
from variants import ESTIMATORS

HERE = Path(train.__file__).parent
SHORT = {              # what makes a run short, by its algorithm
    "ppo": ["--hands", "4", "--samples", "1", "--eval-every", "0", "--probe-hands", "0"],
    "sft": ["--batch-size", "4", "--eval-every", "0", "--probe-hands", "0"],
    "pretrain": ["--batch-size", "4", "--eval-every", "0"], "eval": []}


def quick(*argv):
    """Return the command line of a short run, in which `argv` has the last word; a resumed one is as it was."""
    words = list(map(str, argv))
    if "--resume" in words:
        return ["--device", "cpu", *words]
    algo = words[words.index("--algo") + 1] if "--algo" in words else "ppo"
    return ["--device", "cpu", "--eval-hands", "4", "--max-new-tokens", "8", *SHORT[algo], *words]


def run(*argv):
    train.main(quick(*argv))


def command(*argv, launcher=(sys.executable,), **kwargs):
    return subprocess.Popen([*launcher, str(HERE / "train.py"), *quick(*argv)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **kwargs)


def records(folder, event):
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def learnt(folder, *events):
    """What was logged of each step (or evaluation) but for times and memory, as text."""
    measured = {"seconds", "tokens_per_second", "rollout_seconds", "update_seconds", "rollout_tokens_per_second", "memory_gb"}
    return json.dumps([{k: v for k, v in r.items() if k not in measured} for event in events for r in records(folder, event)])


def weights(folder):
    return Llama.from_pretrained(folder).state_dict()


CASES = [(task, algo) for task in ("gp-l", "gp-vl", "virl-l", "virl-vl") for algo in ("sft", "ppo")]


@pytest.mark.parametrize("task, algo", CASES)
def test_a_run_leaves_what_it_promises(small, tmp_path, capsys, task, algo):
    out = tmp_path / "run"
    transcripts = ["--transcript-every", 1] if algo == "ppo" else []
    run("--task", task, "--algo", algo, "--model", small[0], "--steps", 2, "--out", out, *transcripts)
    start, steps, evals = records(out, "start")[0], records(out, "step"), records(out, "eval")
    assert start["config"]["task"] == task and start["hardware"] and [r["step"] for r in steps] == [1, 2]
    sets = {"id", "rule-ood"} | ({"visual-ood"} if task.endswith("vl") else set())
    assert [set(r["eval"]) for r in evals] == [sets, sets] and evals[0]["eval"]["id"]["n"] == 4
    assert 0 == evals[0]["tflops"] < steps[0]["tflops"] < steps[1]["tflops"]
    assert (out / "checkpoints/step_000002/record.json").exists() and weights(out / "final")
    assert "left" in capsys.readouterr().out
    if algo == "ppo":
        said = (out / "transcripts/step_000001.txt").read_text()
        assert "[user]" in said and "[assistant]" in said and "[reward]" in said
        assert (out / "transcripts/step_000001.png").exists() == task.endswith("vl")
        assert steps[0]["drawn_vs_scored"] < 1e-4


@pytest.mark.parametrize("task, algo, more", [(*case, []) for case in CASES] + [
    ("gp-l", "sft", ["--sft-loss", "iw-sft"]), ("gp-l", "sft", ["--sft-loss", "psft", "--minibatches", 2]),
    ("gp-l", "ppo", ["--kl-coef", 0.1, "--lora-rank", 2])])
def test_resumed_equals_uninterrupted(small, tmp_path, task, algo, more):
    """Bit for bit on CPU: the weights and what was logged. What is compared with the start of the run still is."""
    common = ["--task", task, "--algo", algo, "--model", small[0], "--lr-schedule", "constant", "--lr", "1e-3", *more]
    run(*common, "--steps", 4, "--out", tmp_path / "whole")
    run(*common, "--steps", 2, "--out", tmp_path / "parts")
    run("--steps", 4, "--out", tmp_path / "parts", "--resume", "--override")
    a, b = weights(tmp_path / "whole/final"), weights(tmp_path / "parts/final")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert learnt(tmp_path / "whole", "step") == learnt(tmp_path / "parts", "step")


def test_in_bfloat16_every_step_sees_the_one_before(small, tmp_path, monkeypatch):
    """As on CUDA, where autocast remembers what it cast; without its memory the same comes out."""
    for remembers in (True, False):
        monkeypatch.setattr("train.autocast", lambda *args: torch.autocast("cpu", torch.bfloat16, cache_enabled=remembers))
        run("--task", "gp-vl", "--algo", "ppo", "--model", small[0], "--steps", 2, "--lr", "1e-2", "--critic", "shared", "--out", tmp_path / str(remembers))
    assert learnt(tmp_path / "True", "step") == learnt(tmp_path / "False", "step")
    assert records(tmp_path / "True", "step")[0]["approx_kl"] > 1e-4              # over four minibatches the policy moved


@pytest.mark.parametrize("task, algo", [("gp-vl", "sft"), ("gp-vl", "ppo"), ("virl-vl", "ppo")])
def test_two_ranks_equal_one(small, tmp_path, working_folder, task, algo):
    """Same hands, same draws, same weights after three updates, whether one process learns or two."""
    common = ["--task", task, "--algo", algo, "--model", small[0], "--steps", 3, "--lr", "1e-3", "--adam-eps", "1e-3",
              "--minibatches", 1]                               # a large eps: no step out of rounding noise
    common += ["--temperature", 1] if algo == "ppo" else []
    run(*common, "--out", tmp_path / "one")
    two = command(*common, "--out", tmp_path / "two", cwd=working_folder,
                  launcher=(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    output, _ = two.communicate(timeout=120)
    assert two.returncode == 0, output
    a, b = weights(tmp_path / "one/final"), weights(tmp_path / "two/final")
    start = weights(small[0])
    assert max((a[n] - start[n]).abs().max() for n in a) > 1e-4         # it did learn
    assert all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)
    names = ["nll"] if algo == "sft" else ["reward", "policy_loss", "value_loss", "entropy"]
    for x, y in zip(records(tmp_path / "one", "step"), records(tmp_path / "two", "step"), strict=True):
        assert [x[n] for n in names] == pytest.approx([y[n] for n in names], abs=1e-4)
        assert x["tflops"] == pytest.approx(y["tflops"])
        assert x["flops"] == y["flops"] and x["counted_tflops"] == y["counted_tflops"]             # also where a rank passes for the other's sake


def test_sigterm_saves_and_ends_cleanly(small, tmp_path):
    process = command("--task", "gp-l", "--algo", "sft", "--model", small[0], "--steps", 100000, "--out", tmp_path / "run", "--eval-hands", 0)
    log = tmp_path / "run/log.jsonl"
    while not (log.exists() and '"step": 3' in log.read_text()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in output
    newest = Checkpoints(tmp_path / "run/checkpoints").newest()
    assert newest.name == f"step_{records(tmp_path / 'run', 'step')[-1]['step']:06d}"


def test_every_argument_is_used():
    """A key that nothing reads does not exist."""
    text = "".join(file.read_text() for file in (*HERE.glob("*.py"), *HERE.glob("[dhv]*/*.py")))
    for name in Args.__dataclass_fields__:
        assert f"args.{name}" in text or name in GAME_SETTINGS, name
    for name in GAME_SETTINGS:
        assert any(name in inspect.signature(game).parameters for game in envs.GAMES.values()), name


def test_presets_fill_everything():
    for preset, algo in itertools.product(("tiny", "paper"), ("ppo", "sft", "eval")):
        args = apply_preset(Args(task="gp-vl", algo=algo, preset=preset), 128)
        needed = {"ppo": ["hands", "clip", "critic"], "sft": ["batch_size"], "eval": []}[algo]
        needed += ["steps", "lr", "betas"] if algo != "eval" else ["eval_hands", "max_new_tokens"]
        assert all(getattr(args, name) is not None for name in needed)


def test_an_existing_run_is_not_overwritten(small, tmp_path, capsys):
    run("--algo", "sft", "--model", small[0], "--steps", 1, "--out", tmp_path / "run")
    with pytest.raises(SystemExit):
        run("--algo", "sft", "--model", small[0], "--steps", 1, "--out", tmp_path / "run")
    assert f"--out {tmp_path / 'run'}: expected a folder without a run" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_half_written(small, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "fingerprint", full)
    with pytest.raises(SystemExit, match="No space left"):
        run("--algo", "sft", "--model", small[0], "--steps", 1, "--out", out)
    assert not list(out.glob("checkpoints/*")) and not (out / "final").exists()


def test_old_checkpoints_go(small, tmp_path):
    run("--algo", "sft", "--model", small[0], "--steps", 4, "--save-every", 1, "--keep", 3, "--out", tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step_000002", "step_000003", "step_000004"]


def test_eval_of_a_checkpoint(small, tmp_path):
    run("--algo", "eval", "--task", "gp-vl", "--model", small[0], "--out", tmp_path, "--eval-sets", "id,id-face,rule-ood,visual-ood")
    saved = json.loads((tmp_path / "eval.json").read_text())
    assert set(saved["eval"]) == {"id", "id-face", "rule-ood", "visual-ood"} and saved["hardware"]


def test_tiny_makes_its_init_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny, "INIT_STEPS", 1)
    for repeat, rule in enumerate(["10", "10", "11-12-13"]):                # a rule of its own has an init of its own
        run("--task", "gp-vl", "--algo", "sft", "--steps", 1, "--rule", rule)
        assert ("making its init checkpoint" in capsys.readouterr().out) == (repeat != 1)
    assert len(list(Path("runs").glob("init-gp-vl-*/final/model.safetensors"))) == 2
    assert sorted(p.name for p in Path("runs").glob("gp-*")) == ["gp-vl-sft", "gp-vl-sft-2", "gp-vl-sft-3"]


@pytest.mark.parametrize("task", ["gp-vl", "virl-l"])
def test_a_foundation_is_made_from_nothing(tmp_path, task):
    train.main(["--task", task, "--algo", "pretrain", "--steps", "1", "--batch-size", "2", "--eval-hands", "0", "--eval-every", "0",
                "--device", "cpu", "--out", str(tmp_path / "run")])
    assert Llama.from_pretrained(tmp_path / "run/final").config.hidden_size == 128


def test_routes_of_ones_own(small, tmp_path, capsys):
    """A folder in the released format: pictures on disk and nothing that could draw them."""
    folder = cities.build("milan", tmp_path / "city")
    infos = folder / "route_infos.json"
    infos.write_text(json.dumps([json.loads(infos.read_text())[0][:2], 2]))
    shown = [routes.pictures_of(route) for route in routes.load(str(folder)).routes]
    for panorama in set(shown[0] + shown[1]):
        cities.draw(panorama)
    (folder / "city.json").unlink()
    common = ["--task", "virl-vl", "--algo", "sft", "--model", small[0], "--steps", 1, "--routes", folder]
    run(*common, "--out", tmp_path / "one")
    run(*common, "--ood-routes", folder, "--out", tmp_path / "two")
    evals = [records(tmp_path / name, "eval")[0]["eval"] for name in ("one", "two")]
    assert [set(sets) for sets in evals] == [{"id", "rule-ood"}, {"id", "rule-ood", "visual-ood"}] and evals[0]["id"]["n"] == 2    # not 4
    bad = next(panorama for panorama in shown[1] if panorama not in shown[0])
    Path(bad).write_bytes(Path(bad).read_bytes()[:-100])
    for cache in (routes.load, rails.known_routes):
        cache.cache_clear()
    with pytest.raises(SystemExit):
        run(*common, "--out", tmp_path / "three")
    said = capsys.readouterr().err
    assert all(word in said for word in ("--routes", "route 1 of", bad, "truncated", "--skip-bad-routes"))
    run(*common, "--skip-bad-routes", "--out", tmp_path / "three")
    assert "skipped 1 bad routes" in capsys.readouterr().out


def test_plot(small, tmp_path, monkeypatch, capsys):
    run("--algo", "sft", "--model", small[0], "--steps", 1, "--out", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)               # as if it were not installed
    study.main(["plot", "run"])
    assert "pip install" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib")
    study.main(["plot", "run"])
    assert (tmp_path / "success.png").stat().st_size > 5000


def test_the_readmes_own_estimator_runs(small, tmp_path, monkeypatch, capsys):
    """The example as printed."""
    readme = (HERE / "README.md").read_text().split("## Change it")[1].split("\n## ")[0]
    code, command = re.findall(r"```(?:python|bash)\n(.*?)```", readme, re.S)
    monkeypatch.chdir(tmp_path)
    Path(re.search(r"# (\S+)", code)[1]).write_text(code)
    monkeypatch.setitem(ESTIMATORS, "best-to-come", None)                # so that it is gone again after this test
    run(*command.split()[2:], "--model", small[0], "--steps", 2, "--out", tmp_path / "run")
    assert records(tmp_path / "run", "start")[0]["config"]["advantage"] == "best-to-come"
    with pytest.raises(SystemExit):
        run("--resume", "--out", tmp_path / "run")                                 # the folder alone runs no code
    assert "--custom mine.py; to run that file again, give --custom" in capsys.readouterr().err
    run("--resume", "--out", tmp_path / "run", "--custom", "mine.py")
