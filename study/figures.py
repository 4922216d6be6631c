"""Figures of groups of runs. A group is one way to learn on one task, with a record per seed. Most figures
have a row per task and a panel per evaluation set.

    python -m study plot runs/gp-l-sft runs/gp-l-ppo
"""

from statistics import fmean

from study import records
from study.tables import PAPER, by_task, headline_of

# Okabe and Ito's, which the colour-blind tell apart.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442", "#999999")
COLOR = {"sft": COLORS[0], "ppo": COLORS[1]}


def draw(groups, file):
    """Draw the headline metric against training compute: seeds thin, their mean thick with its standard
    error."""
    for axis, group, name, color in panels(groups, file, "training compute (TFLOPs)"):
        for record in group.records:
            x = [point["counted_tflops"] for point in record["curve"]]
            y = [rate_at(group, [point], name)[0] for point in record["curve"]]
            axis.plot(x, y, color=color, lw=0.7, alpha=0.45, marker=".", ms=3)
        points = shared(group)
        y, error = zip(*(rate_at(group, of_all, name) for of_all in points))
        axis.errorbar([fmean(point["counted_tflops"] for point in of_all) for of_all in points], y,
                      yerr=error, color=color, lw=2, marker="o", ms=3.5, capsize=2,
                      label=f"{group.name} ({len(group.records)} seed{'s' * (len(group.records) > 1)})")


def recognition(groups, file):
    """Draw the headline metric against the share of cards, or of observations, that were read right: every
    evaluation of every seed, the later the larger."""
    for axis, group, name, color in panels(groups, file, "cards or observations read right (%)"):
        drawn = [(100 * point["eval"][name]["recognized"], rate_at(group, [point], name)[0], 12 + 12 * k)
                 for record in group.records for k, point in enumerate(record["curve"])]
        axis.scatter(*zip(*drawn), color=color, alpha=0.6, lw=0, label=group.name)


def tradeoff(groups, file):
    """Draw the headline metric on each other set against the same on ID: what is lost, or gained, there by
    the time so much is learnt here."""
    for axis, group, name, color in panels(groups, file, "the same on ID (%)", leave_out="id"):
        for record in group.records:
            axis.plot(*(rate_at(group, record["curve"][-1:], of)[0] for of in ("id", name)),
                      ".", color=color, ms=5, alpha=0.5)
        (x, dx), (y, dy) = (zip(*(rate_at(group, points, of) for points in shared(group)))
                            for of in ("id", name))
        axis.plot(x, y, color=color, lw=1.2, alpha=0.7)
        axis.errorbar(x[-1], y[-1], xerr=dx[-1], yerr=dy[-1], color=color, marker="o", ms=5, capsize=2,
                      label=group.name)


def glance(groups, file):
    """Draw what SFT and PPO change: on each shift, beside the paper's change (pale); and on hands of cards
    whose numbers training dealt, beside those that it never did (pale)."""
    from matplotlib.figure import Figure                       # not all have it

    known = {(group.task, name): by_task(groups)[group.task] for group in groups for name in group.sets}
    parts = {f"{title} (pale: the paper)": [row for row in PAPER if row[0].startswith(game) and row in known]
             for title, game in (("cards", "gp"), ("navigation", "virl"))}
    parts["numbers seen (pale: unseen)"] = [
        (task, name) for task, name in known if (task, f"{name}-unseen") in known]
    parts = {title: rows for title, rows in parts.items() if rows}
    figure = Figure((4.2 * len(parts), 3.4))
    for axis, (title, rows) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items()):
        for k, (task, name) in enumerate(rows):
            for i, algo in enumerate(COLOR):
                if group := known[task, name].get(algo):
                    paper = PAPER.get((task, name), (0, 0, 0))
                    pale = (paper[1 + i] - paper[0], 0) if "paper" in title else group.change(
                        f"{name}-unseen")
                    for j, (change, error) in enumerate((group.change(name), pale)):
                        axis.barh(-k - 0.38 * i - 0.17 * j, change, 0.16, xerr=error, color=COLOR[algo],
                                  alpha=0.4 if j else 1, label=None if k + j else algo.upper())
        axis.set_yticks([-k - 0.28 for k in range(len(rows))], map("\n".join, rows))
        axis.axvline(0, c="k")
        axis.set(title=title, xlabel="change from init (points)")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def rate_at(group, points, name):
    """Return the headline metric on a set at these points, one of each seed, and its error."""
    return records.rate([point["eval"][name] for point in points], group.metric)


def shared(group):
    """Return the points of the seeds after each step at which two of them have one, or the only seed."""
    at = {}
    for record in group.records:
        for point in record["curve"]:
            at.setdefault(point["step"], []).append(point)
    return [at[step] for step in sorted(at) if len(at[step]) >= min(2, len(group.records))]


def panels(groups, file, label, leave_out=""):
    """Yield (axis, group, set, color) for each panel and group to draw in it: a row per task, a column per
    set but the one to leave out. Then add the legends and write the figure."""
    from matplotlib.figure import Figure                       # not all have it

    tasks, others = by_task(groups), [group.name for group in groups if group.name not in COLOR]
    sets = list(dict.fromkeys(name for group in groups for name in group.sets if name != leave_out))
    color = COLOR | dict(zip(dict.fromkeys(others), COLORS[2:] + COLORS[:2]))
    figure, legends = Figure((3.6 * len(sets), 2.3 * len(tasks))), []
    axes = figure.subplots(len(tasks), len(sets), squeeze=False, sharey="row")
    for (task, known), row in zip(tasks.items(), axes):
        for axis, name in zip(row, sets):
            shown = [group for group in known.values() if name in group.sets]
            axis.set_visible(bool(shown))
            axis.set(title=f"{task}: {name}", xlabel=label)
            axis.grid(alpha=0.3)
            for group in shown:
                yield axis, group, name, color[group.name]
        seen = [axis for axis in row if axis.get_visible()]
        seen[0].set_ylabel(f"{headline_of(task).replace('_', '-')} (%)")
        seen[0].tick_params(labelleft=True)
        legends.append(seen[-1].legend(*seen[0].get_legend_handles_labels(), fontsize=7, loc="upper left",
                                       bbox_to_anchor=(1.02, 1.0)))
        legends[-1].set_in_layout(False)                       # beside the panels, none of which moves for it
    figure.tight_layout()
    figure.savefig(file, dpi=150, bbox_inches="tight", bbox_extra_artists=legends)
