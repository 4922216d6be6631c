"""Do the runs of an experiment, as many at once as there are cores, then print its table and draw its figure.

    python -m study main                     # go on where it was stopped; with the records in git nothing is missing, and it only draws
    python -m study main --plan              # what is there, what is missing
    python -m study main --records runs/mine.jsonl --seeds 0         # measure anew
"""

import argparse
import os
import sys
from pathlib import Path

from study import compat, records, variants
from study.experiments import ARMS, Experiment
from study.runner import Runner

EXPERIMENTS = {name: Experiment(arms) for name, arms in ARMS.items()} | {"variants": variants, "compat": compat}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS))
    parser.add_argument("--seeds", default="0,1,2", help="of training, joined by commas (default: %(default)s)")
    parser.add_argument("--records", type=Path, help="file of records, a line a run (default: docs/study/EXPERIMENT.jsonl)")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once, each on one thread (default: the number of cores, %(default)s)")
    parser.add_argument("--only", default="", help="runs whose name holds this, and what they need")
    parser.add_argument("--plan", action="store_true", help="say what is missing, do nothing")
    args = parser.parse_args(argv)
    experiment = EXPERIMENTS[args.experiment]
    file = args.records or Path("docs/study") / f"{args.experiment}.jsonl"
    runs = experiment.runs([int(seed) for seed in args.seeds.split(",")])
    wanted = [run for run in runs if args.only in run.name]
    needed = {name for run in wanted for name in run.after}
    runner = Runner([run for run in runs if run in wanted or run.name in needed], args.runs, file, args.workers)
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
