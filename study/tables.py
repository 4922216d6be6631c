"""Markdown tables of groups of runs. A group is one way to learn on one task, with a record per seed."""

from dataclasses import dataclass
from itertools import product
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

    def change(self, name):
        """Return (change from the first evaluations to the last, its standard error) of the headline metric
        on a set, in points."""
        return records.change(self.at(-1, name), self.at(0, name), headline_of(self.task, name))

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
        with records.understood(folder):
            task, algo = (record["config"][name] for name in ("task", "algo"))
            sets = [{name: [len(results[key]) for key in records.OF_EACH] for name, results in known.items()}
                    for known in (point["eval"] for point in record["curve"])]
            first = tested.setdefault((task, TASKS[task]), sets[:1])
        if not sets or record["curve"][0]["step"] or any([one] != first for one in sets):
            raise ValueError(f"{folder}: expected an evaluation before its first step, and in all of them "
                             "the sets and hands of the run before; leave it out")
        groups.setdefault((task, algo), []).append(record)
    return [Group(*ways, found) for ways, found in sorted(groups.items())]


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
        one, *_ = known.values()
        other = "first" if one.metric == "success" else "success"
        for name, metric in product(one.sets, (one.metric, other)):
            cells = [cell(known[algo].at(-1, name), metric, known[algo].at(0, name)) if algo in known else "-"
                     for algo in ("sft", "ppo")]
            theirs = PAPER.get((task, name), ()) if metric == headline_of(task, name) else ()
            rows.append([f"{task}, {name}", metric.replace("_", "-"), cell(one.at(0, name)[:1], metric),
                         *cells, ", ".join(map(str, theirs))])
    head = ["task, tested on", "what", "init", "SFT (change)", "PPO (change)", "paper: init, SFT, RL"]
    width = 6 if any(row[-1] for row in rows) else 5           # the paper has nothing to say on other shifts
    return markdown(head[:width], [row[:width] for row in rows])


def changes(groups):
    """Show a row per group and set: before, after, the change hand by hand, and what it took."""
    rows = []
    for task, known in by_task(groups).items():
        for name in dict.fromkeys(name for group in known.values() for name in group.sets):
            for group in known.values():
                if name in group.sets:
                    rows.append([f"{task}, {name}", group.name, str(len(group.records)),
                                 *(cell(group.at(k, name), headline_of(task, name)) for k in (0, -1)),
                                 with_error(group.change(name), "+"), f"{group.mean('counted_tflops'):.1f}"])
    return markdown(["task, tested on", "arm", "seeds", "before", "after", "change", "TFLOPs"], rows)


def variants(groups):
    """Show a row per variant: rates, the change from the preset of the same algorithm (where that has as many
    seeds), what a run took."""
    tasks, presets = by_task(groups), {}
    head = ["", "variant", *(f"{task} {title}" for task in tasks for title in TITLES.values())]
    inits = [next(iter(known.values())) for known in tasks.values()]
    rows = [["", "init", *(cell(one.at(0, name)[:1], one.metric) for one in inits for name in TITLES),
             "", "", ""]]
    for name in dict.fromkeys(group.name for group in groups):
        preset, cells = presets.setdefault(name.startswith("SFT"), name), []   # the first of its algorithm
        for known in tasks.values():
            group, other = known.get(name), known.get(preset)
            compared = group and other and name != preset and len(other.records) == len(group.records)
            cells += [group and cell(group.at(-1, of), group.metric, compared and other.at(-1, of)) or ""
                      for of in TITLES]
        for key, unit, digits in (("counted_tflops", 1, 1), ("seconds", 60, 1), ("memory_gb", 1, 2)):
            cells.append(" / ".join(f"{known[name].mean(key) / unit:.{digits}f}"
                                    for known in tasks.values() if name in known))
        rows.append([*name.split(": "), *cells])
    return markdown([*head, "TFLOPs", "minutes", "GB"], rows)
