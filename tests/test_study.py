"""The runner: what is missing, in the right order, no more at once than allowed, on after a stop. Records,
the errors of their rates, tables and figures."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from harness.files import append_line
from harness.settings import apply_preset, parse
from study import records
from study.__main__ import at_scale, chosen, page
from study.experiments import EXPERIMENTS
from study.figures import shared
from study.runner import Run, Runner
from study.tables import Group
from tables import cases

# Stands for train.py: notes when it ran, and leaves what its first argument says.
SCRIPT = """
import json, os, sys, time
how, out = sys.argv[1], sys.argv[sys.argv.index("--out") + 1]
begin = time.time()
os.makedirs(out, exist_ok=True)
lines = [dict(event="start", config={}, commit="c", hardware="h"),
         dict(event="step", step=1, tflops=2.0, counted_tflops=1.5, flops={}, seconds=3.0, memory_gb=4.0),
         dict(event="eval", step=1, tflops=2.0, eval={"id": dict(solved=[1], right=[3], answers=[40])})]
open(out + "/log.jsonl", "a").write("".join(json.dumps(line) + "\\n" for line in lines))
time.sleep(0.2)
if how == "fail":
    sys.exit(1)
if how == "stop" and "--resume" not in sys.argv:
    import signal
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    open(out + "/listens", "w").close()
    while not stopped:
        time.sleep(0.05)
    sys.exit(0)
open(out + "/times", "w").write(json.dumps([begin, time.time()]))
os.mkdir(out + "/final")
"""
RECORD = {"name": "a-0", "config": {}, "commit": "c", "hardware": "h", "tflops": 2.0, "counted_tflops": 1.5,
          "flops": {}, "seconds": 3.0, "memory_gb": 4.0,
          "curve": [{"step": 1, "tflops": 2.0,
                     "eval": {"id": {"solved": "1", "right": "3", "answers": [40]}}}]}


def runs_of(text):
    """Read runs, NAME or NAME<NEEDED in a word each, or NAME=HOW to end otherwise than well."""
    found = []
    for word in text.split():
        name, _, needed = word.partition("<")
        name, _, how = name.partition("=")
        found.append(Run(name, (how or "ok",), after=(needed,) if needed else ()))
    return found


@pytest.fixture
def runner(tmp_path):
    (tmp_path / "fake.py").write_text(SCRIPT, encoding="utf-8")
    return lambda text: Runner(runs_of(text), tmp_path / "runs", tmp_path / "records.jsonl", 2,
                               tmp_path / "fake.py")


def times(runner, name):
    return json.loads((runner.root / name / "times").read_bytes())


def names(runs):
    return " ".join(run.name for run in runs)


def test_runs_wait_for_what_they_need_and_for_a_free_core(runner):
    work = runner("b-0<a-0 a-0 c-0 c-1 c-2 c-3")
    assert work.work(0.02) == []
    spans = {run.name: times(work, run.name) for run in work.runs}
    assert spans["a-0"][1] <= spans["b-0"][0]
    for begin, _ in spans.values():
        assert sum(b <= begin < e for b, e in spans.values()) <= 2


def test_what_is_recorded_is_not_done_again_unless_its_weights_are_needed_and_gone(runner):
    first = runner("a-0 b-0<a-0")
    first.work(0.02)
    known = records.read(first.file.parent)
    assert [*known] == ["a-0", "b-0"] and known["a-0"] == RECORD
    before, again = times(first, "a-0"), runner("a-0 c-0")
    assert again.work(0.02) == [] and times(again, "a-0") == before and again.done("c-0")
    first.root.rename(first.root.with_name("elsewhere"))
    assert runner("a-0 b-0<a-0").missing() == []
    more = runner("a-0 b-0<a-0 d-0<b-0")
    assert names(more.missing()) == "a-0 b-0 d-0" and more.work(0.02) == []
    assert records.read(first.file.parent).keys() == {"a-0", "b-0", "c-0", "d-0"}


def test_a_folder_name_in_a_command_line_is_filled_in(runner):
    work = runner("a-0")
    work.root.mkdir()                                          # as the lock does
    work.start(Run("a-0", ("ok", "{root}/b-0/final")))
    process, _ = work.going["a-0"]
    assert process.wait() == 0 and process.args[3] == f"{work.root}/b-0/final"


def test_one_that_fails_stops_only_those_that_need_it(runner, capsys):
    work = runner("a-0=fail b-0<a-0 c-0")
    assert work.work(0.02) == ["a-0", "b-0"]
    assert work.done("c-0") and "a-0 failed; see" in capsys.readouterr().out


def test_after_ctrl_c_runs_are_saved_and_resumed(runner, monkeypatch):
    work, real = runner("a-0=stop"), time.sleep

    def interrupt(seconds):
        while not (work.root / "a-0/listens").exists():
            assert work.going["a-0"][0].poll() is None
            real(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr("study.runner.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        work.work(0.02)
    assert work.going["a-0"][0].returncode == 0                # it ended by itself, when told to
    monkeypatch.undo()
    assert runner("a-0=stop").work(0.02) == []


def test_time_left_is_from_runs_of_the_same_kind(runner):
    """Those that others in the folder recorded, too."""
    work = runner("fast-0 fast-1 slow-0 new-0")
    assert work.left() is None
    work.seconds = {"fast": [10.0, 20.0], "slow": [100.0]}
    assert work.left() == pytest.approx((15 + 15 + 100 + (15 + 100) / 2) / 2)
    append_line(work.file.with_name("other.jsonl"), {"name": "a-0", "seconds": 30.0, "curve": []})
    work = runner("a-0 a-1")
    assert names(work.missing()) == "a-1" and work.left() == 15


# ------------------------------------------------------------------------------------------------------------
# Rates and their errors

def test_error_of_a_mean_over_seeds_and_hands():
    """Against the spread of means that are drawn again and again, each from new seeds and new hands."""
    rng = np.random.default_rng(0)

    def scores(seeds, hands, of_seed, of_hand):
        return sum(size * rng.normal(size=shape) for size, shape in (
            (of_seed, (seeds, 1)), (of_hand, (1, hands)), (1, (seeds, hands))))

    for sizes in ((0.0, 1.0), (0.3, 1.0), (0.3, 0.0)):
        drawn = [scores(8, 60, *sizes) for _ in range(400)]
        squares = [records.crossed_error(x) ** 2 for x in drawn]
        assert np.mean(squares) ** 0.5 == pytest.approx(np.std([x.mean() for x in drawn]), rel=0.12)
    one = scores(1, 60, 0, 1)
    assert records.crossed_error(one) == pytest.approx(one.std(ddof=1) / 60**0.5)
    assert records.crossed_error(np.ones((3, 5))) == 0


def results(solved, right, answers):
    return {"solved": solved, "right": right, "answers": answers}


def test_rates_by_hand():
    a = results([1, 1, 0, 0], [1, 1, 0, 0], [1, 2, 5, 4])
    b = results([1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 5])
    rates = [records.rate([a], metric)[0] for metric in ("success", "first", "per_step")]
    assert rates == pytest.approx([50, 25, 100 / 6])
    assert records.rate([a], "success")[1] == pytest.approx(100 * (0.25 / 3) ** 0.5)   # P(1-P)/(N-1)
    assert records.rate([a, b], "success")[0] == 62.5
    # one hand of four differs: 0.5 / sqrt(4)
    assert records.change([b], [a], "success") == (25, pytest.approx(25))
    assert records.change([b, b], [a], "success")[0] == 25                              # all against one
    assert records.change([a, b], [a, b], "per_step") == (0, 0)


def test_hands_are_kept_a_character_each():
    log = results([1, 0], [35, 10], [36, 10])
    kept = records.pack(log)
    assert kept == results("10", "za", [36, 10])
    for evaluation in (log, kept):
        assert records.rate([evaluation], "per_step")[0] == pytest.approx(100 * 45 / 46)


# ------------------------------------------------------------------------------------------------------------
# Experiments

def evaluation(rate, seed):
    solved = (np.random.default_rng(seed).random(50) < rate).astype(int).tolist()
    return {name: results(solved, solved, [2] * 50) | {"recognized": 0.9} for name in ("id", "rule-ood")}


def made_up(runs):
    """Make a record of each run."""
    points = [{"step": k, "tflops": 8.0 * k, "counted_tflops": 8.0 * k} for k in range(2)]
    took = {"tflops": 8.0, "counted_tflops": 8.0, "seconds": 60.0, "memory_gb": 1.0,
            "commit": "abc", "hardware": "a laptop"}
    return {run.name: took | {"name": run.name, "config": {"seed": int(run.name[-1])}, "curve": [
        point | {"eval": evaluation(0.5, 2 * k + j)} for j, point in enumerate(points)]}
            for k, run in enumerate(runs)}


def test_a_name_means_one_command_line():
    known = {}
    for experiment in EXPERIMENTS.values():
        for run in experiment.runs([0, 1]):
            assert known.setdefault(run.name, run) == run


@cases("name", EXPERIMENTS)
def test_every_run_of_an_experiment_is_in_its_table(name):
    experiment = EXPERIMENTS[name]
    runs = experiment.runs([0, 1])
    for k, run in enumerate(runs):                             # once, and after what it needs
        before = {other.name for other in runs[:k]}
        assert run.name not in before and before.issuperset(run.after)
    found = made_up(runs)
    text = experiment.table(found)
    for run, record in found.items():
        other = [point | {"eval": evaluation(1.0, 0)} for point in record["curve"]]
        shown = experiment.table(found | {run: record | {"curve": other}}) != text
        # Curves begin with init's evaluation, too; two experiments test again what main's runs end with.
        again = name in ("shifts", "hands") and f"-{name}-" not in run
        assert shown or again or run.endswith("-init-0") or "-young-" in run, f"{run} is not in the table"
    half = {run: record for run, record in found.items() if run[-2:] != "-1" and "virl-l-ppo" not in run}
    assert len(experiment.table(half).splitlines()) > 5        # what is there so far


@cases("name", EXPERIMENTS)
def test_figures_are_drawn(name, tmp_path):
    pytest.importorskip("matplotlib")
    EXPERIMENTS[name].plot(made_up(EXPERIMENTS[name].runs([0])), tmp_path / "figure.png")
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) == len(EXPERIMENTS[name].figures) and all(size > 10_000 for size in sizes)


@cases("commit", ["abc", None])
def test_page_holds_what_was_begun(tmp_path, commit):
    for record in made_up(EXPERIMENTS["attempts"].runs([0, 2])).values():
        append_line(tmp_path / "attempts.jsonl", record | {"commit": commit})
    (tmp_path / "attempts.png").touch()
    (tmp_path / "attempts.md").write_text("More help.\n", encoding="utf-8")
    text = page(tmp_path)
    assert "## attempts" in text and "## main" not in text
    assert "`python -m study attempts`\n\nMore help.\n\n![attempts](attempts.png)" in text
    assert "| gp-l, id | ppo-1-attempt | 2 |" in text
    assert f"*Seeds 0, 2; a laptop; commit {commit or 'unknown'}.*" in text   # outside of git nobody knows


def test_a_figure_averages_steps_at_which_two_seeds_were_tested():
    curves = [[0, 5, 10], [0, 5, 10], [0, 2, 10]]
    group = Group("gp-l", "sft", [{"curve": [{"step": step} for step in steps]} for steps in curves])
    assert [(points[0]["step"], len(points)) for points in shared(group)] == [(0, 3), (5, 2), (10, 3)]
    assert [points[0]["step"] for points in shared(replace(group, records=group.records[2:]))] == [0, 2, 10]


def test_nothing_is_drawn_of_nothing(tmp_path):
    EXPERIMENTS["main"].plot({}, tmp_path / "figure.png")
    assert not [*tmp_path.iterdir()]


def test_a_real_model_stands_in_for_the_tiny_one():
    runs = [at_scale(run, "Llama", 8) for run in EXPERIMENTS["overfitted"].runs([0])]
    models = {run.name: run.argv[run.argv.index("--model") + 1] for run in runs}
    assert models["gp-l-sft-0"] == models["gp-l-init-0"] == "Llama"
    assert models["gp-l-ppo-after-sft-0"] == "{root}/gp-l-sft-0/final" and {run.ranks for run in runs} == {8}


@pytest.mark.parametrize("name, algo, hands", [
    ("main", "ppo", 500), ("main", "eval", 500), ("no-sft", "pretrain", 0), ("variants", "sft", 500)])
def test_the_study_tests_on_more_hands(name, algo, hands):
    runs = [at_scale(run, "", 1).argv for run in EXPERIMENTS[name].runs([0])]
    args = [apply_preset(parse(argv)[0], 0) for argv in runs if algo in argv and "gp-l" in argv]
    assert {each.eval_hands for each in args} == {hands}


def test_what_chosen_runs_need_is_chosen_too():
    found = chosen(EXPERIMENTS["no-sft"].runs([0, 1]), "from-young-1")
    assert names(found) == "gp-l-init-0 gp-l-young-1 gp-l-ppo-from-young-1"
