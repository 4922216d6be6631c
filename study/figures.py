"""Tables and figures of groups of runs: what one way to learn made of one task, a record a seed (study/records.py).

    python train.py --plot runs/gp-l-sft runs/gp-l-ppo
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from envs import GAMES
from games.prompts import TASKS
from harness.ranges import SettingError
from study import records

# The paper's own results, %: (task, set) -> init, SFT, RL at equal compute (its figures 5 to 7).
PAPER = {
    ("gp-l", "rule-ood"): (11.5, 3.4, 15.0), ("gp-vl", "rule-ood"): (11.2, 5.6, 14.2), ("gp-vl", "visual-ood"): (23.6, 13.7, 41.2),
    ("virl-l", "rule-ood"): (80.8, 1.3, 91.8), ("virl-vl", "rule-ood"): (35.7, 2.5, 45.0), ("virl-vl", "visual-ood"): (16.7, 11.1, 77.8)}
# Okabe and Ito's, which the colour-blind tell apart.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442", "#999999")


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
        """The game's headline: success of cards, per-step accuracy of navigation, as in the paper's figures."""
        return GAMES[self.task.split("-")[0]].headline

    def at(self, k, name):
        """The k-th evaluations of all seeds on one set."""
        return [record["curve"][k]["eval"][name] for record in self.records]


def read_runs(folders):
    """Group run folders by task and algorithm. ValueError for one that cannot stand in the same table."""
    groups, tested = {}, {}
    for folder in map(Path, folders):
        if not (folder / "log.jsonl").exists():
            raise SettingError(f"--plot {folder}: expected a folder that train.py wrote, with a log.jsonl")
        record = records.of_run(folder.name, folder)
        try:
            kind = record["config"]["task"], record["config"]["algo"]
            sets = [sorted((name, *(len(results[key]) for key in records.OF_EACH))
                           for name, results in point["eval"].items()) for point in record["curve"]]
            known = tested.setdefault(TASKS[TASKS.index(kind[0])], sets[:1])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"--plot: {folder}: a log of another version ({reason}); leave it out") from None
        if not sets or any(one != known[0] for one in sets):
            what = "evaluated on other sets or hands than the run before" if sets else "not evaluated yet"
            raise ValueError(f"--plot: {folder}: {what}; leave it out")
        groups.setdefault(kind, []).append(record)
    return [Group(task, algo, found) for (task, algo), found in sorted(groups.items())]


def with_error(numbers, sign=""):
    return "{:{sign}.1f} ± {:.1f}".format(*numbers, sign=sign)


def pyplot():
    """matplotlib's, drawing into files."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def headline(groups):
    """Markdown: a row a task and set; init, then SFT and PPO with the change from init, hand by hand, and the paper's own numbers."""
    groups, rows = list(groups), [["task, tested on", "what", "init", "SFT (change)", "PPO (change)", "paper: init, SFT, RL"], ["---"] * 6]
    for task in dict.fromkeys(group.task for group in groups):
        known = {group.name: group for group in groups if group.task == task}
        any_one = next(iter(known.values()))
        for name in any_one.sets:
            for metric in {"success": ("success", "first"), "per_step": ("per_step", "success")}[any_one.metric]:
                cells = [with_error(records.rate(any_one.at(0, name)[:1], metric))]
                for algo in ("sft", "ppo"):
                    cells.append("-" if algo not in known else with_error(records.rate(known[algo].at(-1, name), metric)) + " ("
                                 + with_error(records.change(known[algo].at(-1, name), known[algo].at(0, name), metric), "+") + ")")
                theirs = ", ".join(map(str, PAPER.get((task, name), ()))) if metric == any_one.metric else ""
                rows.append([f"{task}, {name}", metric.replace("_", "-"), *cells, theirs])
    width = 6 if any(row[-1] for row in rows[2:]) else 5            # the paper has nothing to say on other shifts
    return "\n".join("| " + " | ".join(row[:width]) + " |" for row in rows)


def verdict(groups):
    """One line: on how many of the paper's shifts SFT falls and PPO rises, as the paper's do, beyond two standard errors of the change."""
    found = {"as in the paper": [], "within two standard errors of no change": [], "the other way": []}
    for group in groups:
        for name in group.sets:
            if (group.task, name) in PAPER and group.name in ("sft", "ppo"):
                change, error = records.change(group.at(-1, name), group.at(0, name), group.metric)
                along = change * (1 if group.name == "ppo" else -1) / error
                how = list(found)[1 if abs(along) <= 2 else 0 if along > 0 else 2]
                found[how].append(f"{group.name.upper()} on {group.task} {name}")
    total = sum(map(len, found.values()))
    return f"Of the paper's {total} directions (SFT falls, RL rises), " + "; ".join(
        f"{len(which)} {how}" + (f" ({', '.join(which)})" if which else "") for how, which in found.items()) + "."


# Columns of `explained`: factor, and where a probe tells the number.
MEASURED = {
    "KL(init ∥ policy), nats an answer": (1, "forward_kl_answer"),
    "KL(policy ∥ init)": (1, "reverse_kl_answer"),
    "weights changed, %": (100, "weights", "changed", "all"),
    "way of the head, %": (100, "weights", "distance", "head"),
    "way of attention, %": (100, "weights", "distance", "attention"),
    "entropy, nats a token": (1, "id", "entropy"),
    "tokens an answer": (1, "id", "length"),
    "pass@1, %": (100, "id", "pass@1"), "pass@8, %": (100, "id", "pass@8"),
    "pass@8 on rule-ood, %": (100, "rule-ood", "pass@8")}


def measured(point, factor, *path):
    """A number of an evaluation's probe (study/explain.py); NaN where the log has null."""
    found = point["probe"]
    for key in path:
        found = found[key]
    return np.nan if found is None else factor * found


def explained(groups):
    """Markdown: what a probe measured before and after, on the training game but for the last column; a way is
    the distance from init by init's norm. Of several seeds the mean, in brackets the lowest and the highest."""
    def cell(points, where):
        values = [x for x in (measured(point, *where) for point in points) if not np.isnan(x)]
        if not values:
            return "-"
        return f"{np.mean(values):.3g}" + (f" [{min(values):.3g}, {max(values):.3g}]" if len(values) > 1 else "")

    lines = ["| task | | " + " | ".join(MEASURED) + " |", "|" + "---|" * (len(MEASURED) + 2)]
    for task in dict.fromkeys(group.task for group in groups):
        known = [group for group in groups if group.task == task]
        rows = [("init", [known[0].records[0]["curve"][0]])]
        rows += [(group.name, [record["curve"][-1] for record in group.records]) for group in known]
        for name, points in rows:
            cells = [cell(points, where) for where in MEASURED.values()]
            lines.append("| " + " | ".join([task, name, *cells]) + " |")
    return "\n".join(lines)


def table(groups):
    """Markdown: a row a group and set; before, after, the change hand by hand, and what it took."""
    lines = ["| task, tested on | arm | seeds | before | after | change | TFLOPs |", "|---|---|---|---|---|---|---|"]
    for task, name in dict.fromkeys((group.task, name) for group in groups for name in group.sets):
        for group in groups:
            if group.task == task and name in group.sets:
                before, after, metric = group.at(0, name), group.at(-1, name), group.metric
                lines.append(f"| {task}, {name} | {group.name} | {len(group.records)} | " + " | ".join([
                    with_error(records.rate(before, metric)), with_error(records.rate(after, metric)),
                    with_error(records.change(after, before, metric), "+"), f"{np.mean([r['counted_tflops'] for r in group.records]):.1f}"]) + " |")
    return "\n".join(lines)


def draw(groups, file):
    """The headline metric against training compute: a row a task, a column a set; seeds thin, their mean thick with its standard error."""
    panels(groups, file, "training compute (TFLOPs)", curve)


def scatter(groups, file, label, x):
    """The headline metric against something else that was measured at the same time, x(point of a curve, set): every evaluation of every
    seed, the later the larger."""
    def points(axis, group, name, color):
        known = [(k, point) for record in group.records for k, point in enumerate(record["curve"])]
        axis.scatter([x(point, name) for _, point in known], [records.rate([point["eval"][name]], group.metric)[0] for _, point in known],
                     s=[12 + 12 * k for k, _ in known], color=color, alpha=0.6, lw=0, label=group.name)
    panels(groups, file, label, points)


def tradeoff(groups, file):
    """The headline metric on each other set against the same on ID: what is lost, or gained, there by the time so much is learnt here."""
    def path(axis, group, name, color):
        for record in group.records:
            x, y = (records.rate([record["curve"][-1]["eval"][of]], group.metric)[0] for of in ("id", name))
            axis.plot(x, y, ".", color=color, ms=5, alpha=0.5)
        steps = range(min(len(record["curve"]) for record in group.records))
        (x, dx), (y, dy) = (zip(*[records.rate(group.at(k, of), group.metric) for k in steps]) for of in ("id", name))
        axis.plot(x, y, color=color, lw=1.2, alpha=0.7)
        axis.errorbar(x[-1], y[-1], xerr=dx[-1], yerr=dy[-1], color=color, marker="o", ms=5, capsize=2, label=group.name)
    panels(groups, file, "the same on ID (%)", path, leave_out="id")


def panels(groups, file, label, fill, leave_out=""):
    """A row a task, a column a set but the one to leave out, each filled by fill(axis, group, set, color)."""
    plt = pyplot()
    tasks, names = (list(dict.fromkeys(found)) for found in (
        [group.task for group in groups], [name for group in groups for name in group.sets if name != leave_out]))
    color = {"sft": COLORS[0], "ppo": COLORS[1]}
    color |= dict(zip([name for name in dict.fromkeys(group.name for group in groups) if name not in color], COLORS[2:] + COLORS[:2]))
    figure, axes = plt.subplots(len(tasks), len(names), figsize=(3.6 * len(names), 2.3 * len(tasks)), squeeze=False, sharey="row")
    for axis in axes.flat:
        axis.set_visible(False)
    for group in groups:
        for axis, name in zip(axes[tasks.index(group.task)], names):
            if name in group.sets:
                axis.set_visible(True)
                axis.set(title=f"{group.task}: {name}", xlabel=label)
                axis.grid(alpha=0.3)
                fill(axis, group, name, color[group.name])
    legends = []
    for task, row in zip(tasks, axes):
        row[0].set_ylabel(GAMES[task.split("-")[0]].headline.replace("_", "-") + " (%)")
        last = [axis for axis in row if axis.get_visible()][-1]
        legends.append(last.legend(*row[0].get_legend_handles_labels(), fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0)))
        legends[-1].set_in_layout(False)                            # beside the panels, none of which moves for it
    figure.tight_layout()
    figure.savefig(file, dpi=150, bbox_inches="tight", bbox_extra_artists=legends)
    plt.close(figure)


def curve(axis, group, name, color):
    for record in group.records:
        points = [(point["counted_tflops"], records.rate([point["eval"][name]], group.metric)[0]) for point in record["curve"]]
        axis.plot(*zip(*points), color=color, lw=0.7, alpha=0.45, marker=".", ms=3)
    steps = range(min(len(record["curve"]) for record in group.records))
    x = [np.mean([record["curve"][k]["counted_tflops"] for record in group.records]) for k in steps]
    y, error = zip(*[records.rate(group.at(k, name), group.metric) for k in steps])
    axis.errorbar(x, y, yerr=error, color=color, lw=2, marker="o", ms=3.5, capsize=2,
                  label=f"{group.name} ({len(group.records)} seed{'s' * (len(group.records) > 1)})")


def finals(groups, file):
    """Bars, a panel a task: init, SFT and PPO at the end on each set, with standard errors, each seed as a point, and as a line what the paper has."""
    plt, groups = pyplot(), list(groups)
    tasks = list(dict.fromkeys(group.task for group in groups))
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks), 0.5 + 0.6 * max(len(group.sets) for group in groups)), squeeze=False)
    for task, axis in zip(tasks, axes[0]):
        known = {group.name: group for group in groups if group.task == task}
        any_one = next(iter(known.values()))
        bars = [("init", "#999999", {name: any_one.at(0, name)[:1] for name in any_one.sets})]
        bars += [(algo, COLORS[k], {name: known[algo].at(-1, name) for name in any_one.sets}) for k, algo in enumerate(("sft", "ppo")) if algo in known]
        for k, (label, color, evaluations) in enumerate(bars):
            rows = [row + 0.27 * (k - 1) for row in range(len(evaluations))]
            rates, errors = zip(*[records.rate(of_set, any_one.metric) for of_set in evaluations.values()])
            axis.barh(rows, rates, 0.25, xerr=errors, color=color, label=label, error_kw={"lw": 1, "capsize": 2})
            for row, (name, of_set) in zip(rows, evaluations.items()):
                seeds = [records.rate([one], any_one.metric)[0] for one in of_set]
                axis.plot(seeds, [row] * len(seeds), ".", color="black", ms=3, alpha=0.6)
                if (task, name) in PAPER:
                    paper, = axis.plot(2 * [PAPER[task, name][k]], [row - 0.12, row + 0.12], color="black", ls=":", lw=1.5)
                    paper.set_label("the paper's" if label == bars[-1][0] else None)
        axis.set_yticks(range(len(any_one.sets)), any_one.sets, fontsize=8)
        axis.set(title=task, xlabel=f"{any_one.metric.replace('_', '-')} (%)", xlim=(0, 100), ylim=(len(any_one.sets) - 0.5, -0.5))
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def plot(folders, file="success.png"):
    """--plot: the table and the figure of run folders."""
    groups = read_runs(folders)
    print(headline(groups))
    try:
        draw(groups, file)
    except ImportError:
        raise ValueError("--plot needs matplotlib for the figure: pip install -e '.[plot]'") from None
    print(f"wrote {file}")
