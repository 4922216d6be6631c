"""The command line and the run around the learning: resuming, stopping, errors, ranks."""

import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import harness
import train
from envs import GAMES
from games import cities, rails, routes
from harness import evaluation, tiny
from harness.settings import GAME_SETTINGS, Args, apply_preset
from model import Llama
from study import __main__ as study
from variants import ESTIMATORS

HERE = Path(train.__file__).parent
SHORT = {              # what makes a run short, by its algorithm
    "ppo": "--hands 4 --samples 1 --eval-every 0",
    "sft": "--batch-size 4 --eval-every 0",
    "pretrain": "--batch-size 4 --eval-every 0", "eval": ""}
MEASURED = ("seconds", "tokens_per_second", "rollout_seconds", "update_seconds", "rollout_tokens_per_second",
            "memory_gb")


def quick(*argv):
    """Return the command line of a short run, in which `argv`, each of one word or several, has the last
    word; a resumed one is as it was."""
    words = " ".join(map(str, argv)).split()
    if "--resume" in words:
        return ["--device", "cpu", *words]
    algo = words[words.index("--algo") + 1] if "--algo" in words else "ppo"
    return [*f"--device cpu --eval-hands 4 --max-new-tokens 8 {SHORT[algo]}".split(), *words]


def run(*argv):
    train.main(quick(*argv))


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


def equal(a, b):
    """Compare tensors by name, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def in_parts(folder, *argv, stops=(2, 4)):
    """Run in one go, and again with an end and a resume at each of the `stops`: the weights and the log are
    the same, bit for bit on CPU. Return the folder of the first."""
    whole, parts = folder / "whole", folder / "parts"
    argv = "--lr-schedule constant --lr 1e-3", *argv, "--steps"
    run(*argv, stops[-1], "--out", whole)
    run(*argv, stops[0], "--out", parts)
    for steps in stops[1:]:
        run("--resume --override --steps", steps, "--out", parts)
    assert equal(*(weights(run / "final") for run in (whole, parts)))
    assert learnt(whole, "step") == learnt(parts, "step")
    return whole


def on_two_ranks(folder, cwd, model, *argv, two=""):
    """Make three steps from `model` on one rank and on two, which are told `two` in addition: the same hands,
    draws, weights, metrics and FLOPs."""
    # A large eps: no step out of rounding noise.
    argv = "--steps 3 --lr 1e-3 --lr-schedule constant --minibatches 1 --adam-eps 1e-3 --model", model, *argv
    run(*argv, "--out", folder / "one")
    launcher = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    ranks = subprocess.run([*launcher, HERE / "train.py", *quick(*argv, two, "--out", folder / "two")],
                           capture_output=True, text=True, timeout=300, cwd=cwd,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ranks.returncode == 0, ranks.stderr
    start, a, b = (weights(path) for path in (model, folder / "one/final", folder / "two/final"))
    assert max((a[name] - start[name]).abs().max() for name in a) > 1e-4       # it did learn
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    for x, y in zip(*(json.loads(learnt(folder / name, "step")) for name in ("one", "two")), strict=True):
        assert x.pop("flops") == y.pop("flops") and x == pytest.approx(y, abs=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="needs GNU OpenMP, which says what it has read")
@pytest.mark.parametrize("typed, spins", [({}, 10000), ({"GOMP_SPINCOUNT": "7"}, 7),
                                          ({"OMP_WAIT_POLICY": "active"}, 30000000000)])
def test_threads_spin_briefly_unless_the_user_says_otherwise(typed, spins):
    env = {name: value for name, value in os.environ.items() if name not in harness.WAITING}
    read = subprocess.run([sys.executable, HERE / "train.py", "--help"], capture_output=True, text=True,
                          env=env | typed | {"OMP_DISPLAY_ENV": "VERBOSE"}).stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in read


CASES = list(itertools.product(("gp-l", "gp-vl", "virl-l", "virl-vl"), ("sft", "ppo")))


@pytest.mark.parametrize("task, algo", CASES)
def test_a_run_leaves_what_it_promises(small, tmp_path, capsys, task, algo):
    transcripts = "--transcript-every 1" if algo == "ppo" else ""
    run("--task", task, "--algo", algo, "--model", small[0], "--steps 2 --out", tmp_path, transcripts)
    [start], steps, evals = (records(tmp_path, event) for event in ("start", "step", "eval"))
    assert start["config"]["task"] == task and start["hardware"] and [r["step"] for r in steps] == [1, 2]
    sets = {"id"} | ({"visual-ood"} if task.endswith("vl") else set())
    sets |= {"rule-ood"} | {f"{name}-unseen" for name in sets if task.startswith("gp")}
    assert [set(r["eval"]) for r in evals] == [sets, sets] and evals[0]["eval"]["id"]["n"] == 4
    assert 0 == evals[0]["tflops"] < steps[0]["tflops"] < steps[1]["tflops"]
    assert (tmp_path / "checkpoints/step_000002/record.json").exists() and weights(tmp_path / "final")
    assert "left" in capsys.readouterr().out
    if algo == "ppo":
        said = (tmp_path / "transcripts/step_000001.txt").read_text(encoding="utf-8")
        assert all(f"[{who}]" in said for who in ("user", "assistant", "reward"))
        assert (tmp_path / "transcripts/step_000001.png").exists() == task.endswith("vl")
        assert steps[0]["drawn_vs_scored"] < 1e-4


@pytest.mark.parametrize("task, algo, more", [(*case, "") for case in CASES] + [
    ("gp-l", "sft", "--sft-loss iw-sft"), ("gp-l", "sft", "--sft-loss psft --minibatches 2"),
    ("gp-l", "ppo", "--kl-coef 0.1 --lora-rank 2")])
def test_resumed_equals_uninterrupted(small, tmp_path, task, algo, more):
    """Also what is compared with the start of the run."""
    in_parts(tmp_path, "--task", task, "--algo", algo, "--model", small[0], more)


def test_in_bfloat16_every_step_sees_the_one_before(small, tmp_path, monkeypatch):
    """As on CUDA, where autocast remembers what it cast; without its memory the same comes out."""
    for remembers in (True, False):
        for module in (train, evaluation):
            monkeypatch.setattr(module, "autocast", lambda *args: torch.autocast(
                "cpu", torch.bfloat16, cache_enabled=remembers))
        out = tmp_path / str(remembers)
        run("--task gp-vl --steps 2 --lr 1e-2 --critic shared --model", small[0], "--out", out)
    assert learnt(tmp_path / "True", "step") == learnt(tmp_path / "False", "step")
    assert records(tmp_path / "True", "step")[0]["approx_kl"] > 1e-4       # over four minibatches it moved


def test_two_ranks_equal_one(small, tmp_path, working_folder):
    """With an image per point, and where a rank passes for the other's sake. Other tasks: test_shard.py."""
    on_two_ranks(tmp_path, working_folder, small[0], "--task virl-vl --temperature 1")


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


def test_tiny_makes_its_init_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny, "INIT_STEPS", {"gp": 1})
    for repeat, rule in enumerate(["10", "10", "11-12-13"]):   # a rule of its own has an init of its own
        run("--task gp-vl --algo sft --steps 1 --rule", rule, "--out", f"run{repeat}")
        assert ("making its init checkpoint" in capsys.readouterr().out) == (repeat != 1)
    assert len(list(Path("runs").glob("init-gp-vl-*/final/model.safetensors"))) == 2


@pytest.mark.parametrize("task", ["gp-vl", "virl-l"])
def test_a_foundation_is_made_from_nothing(tmp_path, task):
    run("--task", task, "--algo pretrain --steps 1 --batch-size 2 --eval-hands 0 --out", tmp_path)
    model = Llama.from_pretrained(tmp_path / "final")
    assert model.config.hidden_size == 128 and model.lm_head.weight.dtype == torch.bfloat16


def test_routes_of_ones_own(small, tmp_path, capsys):
    """A folder in the released format: pictures on disk and nothing that could draw them."""
    folder = cities.build("milan", tmp_path / "city")
    infos = folder / "route_infos.json"
    first = json.loads(infos.read_text(encoding="utf-8"))[0][:2]
    infos.write_text(json.dumps([first, 2]), encoding="utf-8")
    shown = [set(routes.pictures_of(route)) for route in routes.load(folder)]
    for panorama in shown[0] | shown[1]:
        cities.draw(panorama)
    (folder / "city.json").unlink()
    own = "--task virl-vl --algo sft --steps 1 --model", small[0], "--routes", folder
    for more, visual in ("", set()), (f"--ood-routes {folder}", {"visual-ood"}):
        out = tmp_path / f"run{len(visual)}"
        run(*own, more, "--out", out)
        results = records(out, "eval")[0]["eval"]
        assert set(results) == {"id", "rule-ood"} | visual and results["id"]["n"] == 2     # routes, not 4
    bad = Path(min(shown[1] - shown[0]))
    bad.write_bytes(bad.read_bytes()[:-100])
    rails.known_routes.cache_clear()
    with pytest.raises(SystemExit) as stop:
        run(*own, "--out", tmp_path / "bad")
    words = "route 1 of", str(bad), "truncated"
    assert all(word in str(stop.value.code) for word in words)


def test_plot(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("--algo sft --steps 1 --out run --model", small[0])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)       # as if it were not installed
        study.main(["plot", "run"])
        assert "pip install" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    study.main(["plot", "run"])
    assert (tmp_path / "success.png").stat().st_size > 5000


def test_the_readmes_own_estimator_runs(small, tmp_path, monkeypatch):
    """The example as printed."""
    readme = (HERE / "README.md").read_text(encoding="utf-8").split("## Change it")[1].split("\n## ")[0]
    code, command = re.findall(r"```(?:python|bash)\n(.*?)```", readme, re.S)
    monkeypatch.chdir(tmp_path)
    Path(re.search(r"# (\S+)", code)[1]).write_text(code, encoding="utf-8")
    monkeypatch.setitem(ESTIMATORS, "best-to-come", None)      # so that it is gone again after this test
    run(*command.split()[2:], "--steps 2 --out run --model", small[0])
    assert records("run", "start")[0]["config"]["advantage"] == "best-to-come"
    run("--resume --out run --custom mine.py")
