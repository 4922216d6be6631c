"""The runner: what is missing, in the right order, no more at once than allowed, on after a stop."""

import json
import sys
import time

import pytest

from study.runner import Run, Runner

# Stands for train.py: notes when it ran, and leaves what its first argument says.
SCRIPT = """
import json, os, sys, time
how, out = sys.argv[1], sys.argv[sys.argv.index("--out") + 1]
begin = time.time()
os.makedirs(out, exist_ok=True)
open(out + "/log.jsonl", "a").write("{}\\n")
time.sleep(0.2)
if how == "fail":
    sys.exit(1)
if how == "stop" and "--resume" not in sys.argv:
    import signal
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    while not stopped:
        time.sleep(0.05)
    sys.exit(0)
open(out + "/times", "w").write(json.dumps([begin, time.time()]))
os.mkdir(out + "/final")
"""


@pytest.fixture
def runner(tmp_path):
    (tmp_path / "fake.py").write_text(SCRIPT)
    return lambda runs, workers=2: Runner(runs, tmp_path / "runs", workers, (sys.executable, str(tmp_path / "fake.py")))


def times(runner, name):
    return json.loads((runner.root / name / "times").read_text())


def test_runs_wait_for_what_they_need_and_for_a_free_core(runner):
    runs = [Run("b-0", ("ok",), after=("a-0",)), Run("a-0", ("ok",))] + [Run(f"c-{i}", ("ok",)) for i in range(4)]
    work = runner(runs)
    assert work.work(0.02) == []
    spans = {run.name: times(work, run.name) for run in runs}
    assert spans["a-0"][1] <= spans["b-0"][0]
    for begin, _ in spans.values():
        assert sum(b <= begin < e for b, e in spans.values()) <= 2


def test_what_is_done_is_not_done_again(runner):
    work = runner([Run("a-0", ("ok",)), Run("b-0", ("ok",))])
    work.work(0.02)
    before = times(work, "a-0")
    again = runner([Run("a-0", ("ok",)), Run("c-0", ("ok",))])
    assert again.work(0.02) == [] and times(again, "a-0") == before and again.done("c-0")


def test_one_that_fails_stops_only_those_that_need_it(runner, capsys):
    work = runner([Run("a-0", ("fail",)), Run("b-0", ("ok",), after=("a-0",)), Run("c-0", ("ok",))])
    assert work.work(0.02) == ["a-0", "b-0"]
    assert work.done("c-0") and "a-0 failed; see" in capsys.readouterr().out


def test_after_ctrl_c_runs_are_saved_and_resumed(runner, monkeypatch):
    work = runner([Run("a-0", ("stop",))])
    real = time.sleep

    def interrupt(seconds):
        real(0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr("study.runner.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        work.work(0.02)
    assert work.going["a-0"][0].returncode == 0                # it ended by itself, when told to
    monkeypatch.undo()
    again = runner([Run("a-0", ("stop",))])
    assert again.work(0.02) == []


def test_time_left_is_from_runs_of_the_same_kind(runner):
    runs = [Run("fast-0", ()), Run("fast-1", ()), Run("slow-0", ()), Run("new-0", ())]
    work = runner(runs)
    assert work.left() is None
    work.seconds = {"fast": [10.0, 20.0], "slow": [100.0]}
    assert work.left() == pytest.approx((15 + 15 + 100 + (15 + 100) / 2) / 2)
