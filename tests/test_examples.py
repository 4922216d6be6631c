"""The pages hold together: the third game in docs/examples is judged, played and trained on, the walkthrough
runs from a fresh kernel, and links lead somewhere."""

import re
import runpy
from pathlib import Path

import nbclient
import nbformat
import pytest

import envs
import train
from test_train import records, run

HERE = Path(train.__file__).parent
FILE = HERE / "docs/examples/countdown.py"
PAGES = [*HERE.glob("*.md"), *HERE.glob("[!.]*/**/*.md")]


@pytest.fixture
def registered(monkeypatch):
    """Let a run register the game, and forget it afterwards."""
    yield
    envs.GAMES.pop("countdown", None)
    envs.TASKS.pop("countdown-l", None)


def test_countdown_is_short_and_its_expert_right():
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= 80
    game = runpy.run_path(str(FILE))["Countdown"]
    for settings in game.shifts("3", "small", False).values():
        env = game(**settings)
        for seed in range(20):
            *_, wrong, message, right = env.demonstrate(seed, mistakes=2)
            assert "Correct" not in message["content"] and right["train"] and not wrong["train"]
            env.reset(seed)
            assert env.step("?")[1:4] == (-3, False, False)
            assert env.step(right["content"])[1:4] == (5, True, False)


def test_a_run_learns_from_it(small, tmp_path, registered):
    common = ["--custom", FILE, "--task", "countdown-l", "--lr", "1e-2", "--warmup", 0, "--eval-hands", 2]
    run(*common, "--algo", "sft", "--model", small[0], "--steps", 6, "--out", tmp_path / "sft")
    steps = records(tmp_path / "sft", "step")
    assert steps[-1]["nll"] < steps[0]["nll"] - 0.2
    run(*common, "--algo", "ppo", "--model", tmp_path / "sft/final", "--steps", 1, "--out", tmp_path / "ppo")
    assert set(records(tmp_path / "ppo", "eval")[-1]["eval"]) == {"id", "rule-ood"}


def test_a_foundation_is_made_of_it(tmp_path, registered):
    run("--custom", FILE, "--task", "countdown-l", "--algo", "pretrain", "--steps", 1, "--batch-size", 4,
        "--eval-hands", 0, "--out", tmp_path / "foundation")
    assert (tmp_path / "foundation/final/model.safetensors").exists()


def test_the_walkthrough_runs(tmp_path, monkeypatch):
    """In a folder of its own: it keeps its init checkpoint in runs/, where a later run would find it."""
    (tmp_path / "train.py").symlink_to(HERE / "train.py")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    notebook = nbformat.read(HERE / "docs/walkthrough.ipynb", 4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HERE)))
def test_links_lead_somewhere(page):
    """A link to a line leads to the function that it names, one to a heading to a heading."""
    for text, link in re.findall(r"\[([^]]*)\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            lines = target.read_text(encoding="utf-8").splitlines()
            name = text.strip("`").split(".")[-1]
            places = [f"L{i}" for i, line in enumerate(lines, 1) if f"def {name}(" in line]
            titles = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                      for line in lines if line.startswith("#")]
            assert anchor in (places if re.fullmatch(r"L\d+", anchor) else titles), f"{link}: {places}"
