"""Tables and figures of runs, from their logs.

    python train.py --plot runs/gp-l-sft runs/gp-l-ppo
"""

import json
import math
from pathlib import Path

from envs import GAMES


def read_runs(runs):
    """Run folders -> {(task, algo): [curve of each seed]}; a curve is a list of (TFLOPs, {set: results})."""
    curves = {}
    for run in map(Path, runs):
        if not (run / "log.jsonl").exists():
            raise ValueError(f"--plot: {run} holds no log.jsonl; give folders that train.py wrote")
        records = [json.loads(line) for line in open(run / "log.jsonl")]
        config = next(r["config"] for r in records if r["event"] == "start")
        curve = [(r["tflops"], r["eval"]) for r in records if r["event"] == "eval" and r["eval"]]
        curves.setdefault((config["task"], config["algo"]), []).append(curve)
    return curves


def pooled(curves, k, name, metric):
    """Over the seeds of one algorithm, at their k-th evaluation: (mean TFLOPs, rate in %, standard error in %).

    All seeds play the same hands, so more seeds do not make more hands: the error is that of a single seed's hands, or
    that of the mean of the seeds if it is larger.
    """
    points = [curve[k] for curve in curves if k < len(curve)]
    rates = [results[name][metric] for _, results in points]
    mean, error = sum(rates) / len(rates), sum(results[name][metric + "_se"] for _, results in points) / len(points)
    if len(rates) > 1:
        error = max(error, math.sqrt(sum((r - mean) ** 2 for r in rates) / (len(rates) - 1) / len(rates)))
    return sum(x for x, _ in points) / len(points), 100 * mean, 100 * error


def table(curves):
    """Markdown, a table a game: init and the end of each algorithm; success, and (per answer) per-step accuracy or success at the first try."""
    lines = []
    for game in sorted({task.split("-")[0] for task, _ in curves}):
        other = {"gp": "first", "virl": "per_step"}[game]
        lines += ["", "| task | tested on | " + " | ".join(f"{what}: success ({other.replace('_', '-')})" for what in ("init", "SFT", "PPO")) + " |", "|---|---|---|---|---|"]
        for task in sorted({task for task, _ in curves if task.startswith(game)}):
            known = {algo: curves[task, algo] for algo in ("sft", "ppo") if (task, algo) in curves}
            cell = lambda c, k, name: "{:.1f} ± {:.1f} ({:.1f} ± {:.1f})".format(*pooled(c, k, name, "success")[1:], *pooled(c, k, name, other)[1:])
            for name in next(iter(known.values()))[0][0][1]:
                cells = [cell(next(iter(known.values())), 0, name)]
                cells += [cell(known[algo], min(map(len, known[algo])) - 1, name) if algo in known else "-" for algo in ("sft", "ppo")]
                lines.append(f"| {task} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def plot(runs, file="success.png"):
    """The game's headline metric against training compute: a row a task, a column an evaluation set. Seeds thin, their mean thick. Prints
    the table, too."""
    curves = read_runs(runs)
    print(table(curves))
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("--plot needs matplotlib for the figure: pip install -e '.[plot]'") from None
    tasks = sorted({task for task, _ in curves})
    columns = list(dict.fromkeys(name for group in curves.values() for name in group[0][0][1]))
    figure, axes = plt.subplots(len(tasks), len(columns), figsize=(3.6 * len(columns), 2.3 * len(tasks)), squeeze=False, sharey=True)
    for (task, algo), group in sorted(curves.items()):
        color = {"ppo": "#0072B2", "sft": "#D55E00"}.get(algo, "#666666")           # told apart by the colour-blind, too
        metric = GAMES[task.split("-")[0]].headline
        for axis, name in zip(axes[tasks.index(task)], columns):
            if name not in group[0][0][1]:
                axis.set_visible(False)
                continue
            for curve in group:
                axis.plot([x for x, _ in curve], [100 * r[name][metric] for _, r in curve], color=color, lw=0.7, alpha=0.45)
            x, y, error = zip(*[pooled(group, k, name, metric) for k in range(min(map(len, group)))])
            axis.errorbar(x, y, yerr=error, color=color, lw=2, marker="o", ms=3.5, capsize=2, label=f"{algo.upper()} ({len(group)} seeds)")
            axis.set(title=f"{task}: {name}", xlabel="training compute (TFLOPs)")
            axis.grid(alpha=0.3)
    for task, row in zip(tasks, axes):
        row[0].set_ylabel(f"{GAMES[task.split('-')[0]].headline.replace('_', '-')} (%)")
        row[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    print(f"wrote {file}")
