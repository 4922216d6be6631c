"""Do the runs of an experiment, as many at once as there are cores, then print its table and draw its figure.

    python -m study main                     # go on where it was stopped; with the records in git nothing is missing, and it only draws
    python -m study main --plan              # what is there, what is missing
    python -m study main --records runs/mine.jsonl --seeds 0         # measure anew
    python -m study main --model Llama-3.2-11B-Vision-Instruct --ranks 8 --seeds 0         # the same questions to a real model

With --model the paper's presets hold, runs go one after the other, each on --ranks GPUs, and everything lies under runs/study-MODEL. Arms
with numbers in their flags (steps, learning rates: study/experiments.py) are meant for the tiny model.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from study import compat, records, variants
from study.experiments import ARMS, Experiment
from study.runner import Runner

EXPERIMENTS = {name: Experiment(arms) for name, arms in ARMS.items()} | {"variants": variants, "compat": compat}


def at_scale(run, model, ranks):
    """The run with another model where it would take the tiny one, on so many ranks."""
    argv = run.argv + ("--model", model) if model and "--model" not in run.argv else run.argv
    return dataclasses.replace(run, argv=argv, ranks=max(ranks, run.ranks))


def chosen(runs, only):
    """Runs whose name holds a text, and what they need."""
    names = set()
    for run in reversed(runs):
        if only in run.name or run.name in names:
            names |= {run.name, *run.after}
    return [run for run in runs if run.name in names]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS))
    parser.add_argument("--seeds", default="0,1,2", help="of training, joined by commas (default: %(default)s)")
    parser.add_argument("--model", help="init checkpoint to begin with instead of the tiny model's")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run, by torchrun (default: %(default)s)")
    parser.add_argument("--records", type=Path, help="file of records, a line a run (default: docs/study/EXPERIMENT.jsonl)")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/study)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once, each on one thread (default: all cores, %(default)s)")
    parser.add_argument("--only", default="", help="runs whose name holds this, and what they need")
    parser.add_argument("--plan", action="store_true", help="say what is missing, do nothing")
    args = parser.parse_args(argv)
    experiment, own = EXPERIMENTS[args.experiment], args.model and Path("runs") / f"study-{Path(args.model).name}"
    file = args.records or (own or Path("docs/study")) / f"{args.experiment}.jsonl"
    runs = [at_scale(run, args.model, args.ranks) for run in experiment.runs([int(seed) for seed in args.seeds.split(",")])]
    runner = Runner(chosen(runs, args.only), args.runs or own or Path("runs/study"), file, 1 if args.ranks > 1 else args.workers)
    if args.plan:
        print(*(f"{'missing' if run in runner.missing() else 'there  '}  {run.name}  train.py {' '.join(run.argv)}" for run in runner.runs), sep="\n")
        return
    try:
        failed = runner.work()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    found = records.read(file)
    text = experiment.table(found)
    print(text)
    file.with_suffix(".md").write_text(text + "\n")
    print(f"wrote {file.with_suffix('.md')}")
    if hasattr(experiment, "plot"):
        try:
            experiment.plot(found, file.with_suffix(".png"))
        except ImportError:
            sys.exit("the figure needs matplotlib: pip install -e '.[plot]'")
        print(f"wrote {file.with_suffix('.png')}")
    if failed:
        sys.exit(f"without {len(failed)} runs that failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
