"""Markdown tables of groups of runs. A group is one way to learn on one task, with a record per seed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from envs import GAMES, TASKS
from harness.ranges import SettingError
from study import records

# The paper's own results, %: (task, set) -> init, SFT, RL at equal compute (its figures 5 to 7).
PAPER = {
    ("gp-l", "rule-ood"): (11.5, 3.4, 15.0), ("gp-vl", "rule-ood"): (11.2, 5.6, 14.2),
    ("gp-vl", "visual-ood"): (23.6, 13.7, 41.2), ("virl-l", "rule-ood"): (80.8, 1.3, 91.8),
    ("virl-vl", "rule-ood"): (35.7, 2.5, 45.0), ("virl-vl", "visual-ood"): (16.7, 11.1, 77.8)}
TITLES = {"id": "ID", "rule-ood": "rule-OOD"}


@dataclass(frozen=True)
class Group:
    task: str
    name: str                  # of the way to learn
    records: list

    @property
    def sets(self):
        return list(self.records[0]["curve"][0]["eval"])

    @property
    def metric(self):
        """Name the game's headline."""
        return headline_of(self.task)

    def at(self, k, name):
        """Return the k-th evaluations of all seeds on one set."""
        return [record["curve"][k]["eval"][name] for record in self.records]

    def rate(self, k, name):
        """Return (rate, standard error) of the headline metric there, in %."""
        return records.rate(self.at(k, name), self.metric)

    def mean(self, key):
        return np.mean([record[key] for record in self.records])


def headline_of(task, name=""):
    """Name the metric that the paper tells of a task and set: success of cards, per-step accuracy of
    navigation, but success on another look."""
    return "success" if name == "visual-ood" else GAMES[task.split("-")[0]].headline


def by_task(groups):
    """Return {task: {name: its group}}."""
    found = {}
    for group in groups:
        found.setdefault(group.task, {})[group.name] = group
    return found


def read_runs(folders):
    """Group run folders by task and algorithm. ValueError for one that cannot stand in the same table."""
    groups, tested = {}, {}
    for folder in map(Path, folders):
        if not (folder / "log.jsonl").exists():
            raise SettingError(f"plot {folder}: expected a folder that train.py wrote, with a log.jsonl")
        record = records.of_run(folder.name, folder)
        try:
            kind = record["config"]["task"], record["config"]["algo"]
            sets = [sorted((name, *(len(results[key]) for key in records.OF_EACH))
                           for name, results in point["eval"].items()) for point in record["curve"]]
            known = tested.setdefault((kind[0], TASKS[kind[0]]), sets[:1])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{folder}: a log of another version ({reason}); leave it out") from None
        if not sets or any(one != known[0] for one in sets):
            what = "evaluated on other sets or hands than the run before" if sets else "not evaluated yet"
            raise ValueError(f"{folder}: {what}; leave it out")
        groups.setdefault(kind, []).append(record)
    return [Group(task, algo, found) for (task, algo), found in sorted(groups.items())]


# ------------------------------------------------------------------------------------------------------------

def markdown(head, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def with_error(numbers, sign=""):
    return "{:{sign}.1f} ± {:.1f}".format(*numbers, sign=sign)


def cell(after, metric, before=None):
    """Write a rate, and in brackets its change from other evaluations, hand by hand."""
    change = f" ({with_error(records.change(after, before, metric), '+')})" if before else ""
    return with_error(records.rate(after, metric)) + change


def headline(groups):
    """Show a row per task and set: init, then SFT and PPO with the change from init, and the paper's own
    numbers."""
    rows = []
    for task, known in by_task(groups).items():
        one = next(iter(known.values()))
        other = "first" if one.metric == "success" else "success"
        for name, metric in ((name, metric) for name in one.sets for metric in (one.metric, other)):
            cells = [cell(known[algo].at(-1, name), metric, known[algo].at(0, name)) if algo in known else "-"
                     for algo in ("sft", "ppo")]
            theirs = PAPER.get((task, name), ()) if metric == headline_of(task, name) else ()
            init = cell(one.at(0, name)[:1], metric)
            rows.append([f"{task}, {name}", metric.replace("_", "-"), init, *cells,
                         ", ".join(map(str, theirs))])
    head = ["task, tested on", "what", "init", "SFT (change)", "PPO (change)", "paper: init, SFT, RL"]
    width = 6 if any(row[-1] for row in rows) else 5           # the paper has nothing to say on other shifts
    return markdown(head[:width], [row[:width] for row in rows])


# Columns of `explained`: factor, and where a probe tells the number.
MEASURED = {
    "KL(init ∥ policy), nats an answer": (1, "forward_kl_answer"),
    "KL(policy ∥ init)": (1, "reverse_kl_answer"),
    "weights changed, %": (100, "weights", "changed", "all"),
    "distance of the head, %": (100, "weights", "distance", "head"),
    "distance of attention, %": (100, "weights", "distance", "attention"),
    "entropy, nats a token": (1, "id", "entropy"),
    "tokens an answer": (1, "id", "length"),
    "pass@1, %": (100, "id", "pass@1"), "pass@8, %": (100, "id", "pass@8"),
    "pass@8 on rule-ood, %": (100, "rule-ood", "pass@8")}


def measured(point, factor, *path):
    """Return a number of an evaluation's probe; NaN where the log has null."""
    found = point["probe"]
    for key in path:
        found = found[key]
    return np.nan if found is None else factor * found


def explained(groups):
    """Show what a probe measured before and after, on the training game but for the last column; a way is the
    distance from init by init's norm. Of several seeds the mean, in brackets the lowest and the highest."""
    def spread(points, where):
        values = [x for x in (measured(point, *where) for point in points) if not np.isnan(x)]
        if not values:
            return "-"
        return f"{np.mean(values):.3g}" + f" [{min(values):.3g}, {max(values):.3g}]" * (len(values) > 1)

    rows = []
    for task, known in by_task(groups).items():
        finals = {name: [record["curve"][-1] for record in group.records] for name, group in known.items()}
        first = next(iter(known.values())).records[0]["curve"][0]
        for name, points in ({"init": [first]} | finals).items():
            rows.append([task, name, *(spread(points, where) for where in MEASURED.values())])
    return markdown(["task", "", *MEASURED], rows)


def changes(groups):
    """Show a row per group and set: before, after, the change hand by hand, and what it took."""
    rows = []
    for task, known in by_task(groups).items():
        for name in dict.fromkeys(name for group in known.values() for name in group.sets):
            for group in (group for group in known.values() if name in group.sets):
                change = records.change(group.at(-1, name), group.at(0, name), group.metric)
                rows.append([f"{task}, {name}", group.name, str(len(group.records)),
                             with_error(group.rate(0, name)), with_error(group.rate(-1, name)),
                             with_error(change, "+"), f"{group.mean('counted_tflops'):.1f}"])
    return markdown(["task, tested on", "arm", "seeds", "before", "after", "change", "TFLOPs"], rows)


def ends(group, reference=None):
    """Write the rates that a group ends with; in brackets the change from what a reference with as many seeds
    ends with."""
    if not group:
        return [""] * len(TITLES)
    comparable = reference and reference is not group and len(reference.records) == len(group.records)
    return [cell(group.at(-1, name), group.metric, reference.at(-1, name) if comparable else None)
            for name in TITLES]


def begins(known):
    """Write the rates that the groups of a task begin with."""
    one = next(iter(known.values()))
    return [cell(one.at(0, name)[:1], one.metric) for name in TITLES]


def algo_of(variant):
    return "sft" if variant.startswith("SFT") else "ppo"


def variants(groups):
    """Show a row per variant: rates, the change from the preset of the same algorithm, what a run took."""
    tasks = by_task(groups)
    names = dict.fromkeys(group.name for group in groups)
    head = ["", "variant", *(f"{task} {title}" for task in tasks for title in TITLES.values())]
    rows = [["", "init", *sum(map(begins, tasks.values()), []), "", "", ""]]
    for name in names:
        preset = next(other for other in names if algo_of(other) == algo_of(name))
        cells = sum((ends(known.get(name), known.get(preset)) for known in tasks.values()), [])
        for key, unit, digits in (("counted_tflops", 1, 1), ("seconds", 60, 1), ("memory_gb", 1, 2)):
            cells.append(" / ".join(f"{known[name].mean(key) / unit:.{digits}f}"
                                    for known in tasks.values() if name in known))
        rows.append([*name.split(": "), *cells])
    return markdown([*head, "TFLOPs", "minutes", "GB"], rows)
