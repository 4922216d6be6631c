"""A third game is one file: the example in docs/examples is judged, played and trained on."""

import json
import runpy
from pathlib import Path

import pytest

import envs
import train
from test_train import records, run

FILE = Path(train.__file__).parent / "docs/examples/countdown.py"
Countdown = runpy.run_path(str(FILE))["Countdown"]


@pytest.fixture
def registered(monkeypatch):
    """Let a run register the game, and forget it afterwards."""
    for table in (envs.GAMES, envs.TASKS):
        for name, entry in list(table.items()):
            monkeypatch.setitem(table, name, entry)
    yield
    envs.GAMES.pop("countdown", None)
    envs.TASKS.pop("countdown-l", None)


def test_the_expert_solves_what_is_dealt():
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= 80
    for rule in ("5", "7"):
        game = Countdown(rule=rule)
        for seed in range(200):
            game.reset(seed)
            observation, reward, terminated, truncated, info = game.step(game.oracle())
            assert (reward, terminated, truncated, info["success"]) == (5.0, True, False, True)
            assert not observation.messages


@pytest.mark.parametrize("formula, code", [
    ("(3+4)*2=14", "correct"), ("3*4+2=14", "correct"), ("3+4=7", "wrong_value"), ("(3+4)*2", "no_target"), ("7*2=14", "foreign_number"),
    ("4+4+3*2=14", "foreign_number"), ("(3+4)*2=15", "no_target"), ("", "no_target"), ("(" * 300, "no_target")])
def test_judged_by_hand(formula, code):
    game = Countdown()
    game.reset(0)
    game.numbers, game.target = [2, 3, 4, 9], 14
    assert game.step(json.dumps({"formula": formula}))[4]["verdict"] == code


def test_learns_from_it(small, tmp_path, registered):
    common = ["--custom", FILE, "--task", "countdown-l", "--lr", "1e-2", "--warmup", 0, "--eval-hands", 2]
    run(*common, "--algo", "sft", "--model", small[0], "--steps", 6, "--out", tmp_path / "sft")
    steps = records(tmp_path / "sft", "step")
    assert steps[-1]["nll"] < steps[0]["nll"] - 0.2
    run(*common, "--algo", "ppo", "--model", tmp_path / "sft/final", "--steps", 1, "--out", tmp_path / "ppo")
    assert set(records(tmp_path / "ppo", "eval")[-1]["eval"]) == {"id", "rule-ood"}
