"""Do the runs of an experiment, as many at once as there are cores, then print its table and draw its figure.

    python -m study main                     # go on where it was stopped; with the records in git nothing is missing, and it only draws
    python -m study all --plan               # what is there, what is missing, how long that will take
    python -m study main --records runs/mine --seeds 0               # measure anew
    python -m study main --model Llama-3.2-11B-Vision-Instruct --ranks 8 --seeds 0         # the same questions to a real model

The folder of records gets a page, README.md, with all experiments that were begun. With --model the paper's presets hold, runs go one after the
other, each on --ranks GPUs, and everything lies under runs/study-MODEL. Arms with numbers in their flags (steps, learning rates:
study/experiments.py) are meant for the tiny model.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

from harness.files import write_atomically
from harness.ranges import FOLDER, command_line, integer, one_of, several, shown
from harness.terminal import command, visible
from study import compat, records, shifts, variants
from study.experiments import ARMS, Experiment
from study.runner import Runner

EXPERIMENTS = {name: Experiment(*what) for name, what in ARMS.items()} | {"shifts": shifts, "variants": variants, "compat": compat}
DOCS = Path("docs/study")
SEEDS = 100            # a table looks for runs of the seeds below


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


def page(folder):
    """All experiments that were begun, as Markdown: question, what was found (NAME.md, written by hand), figures, table, what it was measured on."""
    found, parts = records.read(folder), ["# The study\n\nEach part is written by the command above it, from the records beside this page. "
                                          "± is one standard error for which seeds and hands are both samples (study/records.py)."]
    for name, experiment in EXPERIMENTS.items():
        if not (folder / f"{name}.jsonl").exists():
            continue
        mine = [found[run.name] for run in experiment.runs(range(SEEDS)) if run.name in found]
        seeds, commits, hardware = (sorted({str(what) for what in whats}) for whats in zip(*(
            (record["config"]["seed"], record["commit"] or "unknown", record["hardware"]) for record in mine)))
        says = folder / f"{name}.md"
        findings = [says.read_text(encoding="utf-8").strip()] if says.exists() else []
        pictures = [f"![{file.stem}]({file.name})" for file in (folder / f"{name}.png", *sorted(folder.glob(f"{name}-*.png"))) if file.exists()]
        parts.append("\n\n".join([f"## {name}\n\n{experiment.question}\n\n`python -m study {name}`", *findings, *pictures, experiment.table(found),
                                  f"*Seeds {', '.join(seeds)}; {' and '.join(hardware)}; commit {', '.join(commits)}.*"]))
    return "\n\n".join(parts) + "\n"


def wanted(name, args):
    """The runs of an experiment that the command line asks for."""
    runs = EXPERIMENTS[name].runs([int(seed) for seed in args.seeds.split(",")])
    return [at_scale(run, args.model, args.ranks) for run in chosen(runs, args.only)]


def do(name, args, folder, root):
    """One experiment. Returns the names of runs that failed."""
    experiment = EXPERIMENTS[name]
    runner = Runner(wanted(name, args), root, folder / f"{name}.jsonl", 1 if args.ranks > 1 else args.workers)
    if args.plan:
        missing = runner.missing()
        print(*(f"{'missing' if run in missing else 'there  '}  {run.name}  train.py {' '.join(run.argv)}" for run in runner.runs), sep="\n")
        runner.report()
        return []
    failed, found = runner.work(), records.read(folder)
    print(experiment.table(found))
    if hasattr(experiment, "plot"):
        try:
            experiment.plot(found, folder / f"{name}.png")
        except ImportError:
            print("no figure, which needs matplotlib: pip install -e '.[plot]'")
    write_atomically(folder / "README.md", page(folder))
    print(f"wrote {folder / 'README.md'}")
    return failed


def main(argv=None):
    questions = "\n".join(f"    {name:12}{experiment.question}" for name, experiment in EXPERIMENTS.items())
    parser = command_line("python -m study", f"{__doc__}\nexperiments:\n{questions}")
    parser.add_argument("experiment", type=one_of(("all", *EXPERIMENTS)), help="all, or one of the above")
    parser.add_argument("--seeds", type=several(integer(0, SEEDS - 1)), default="0,1,2",
                        help="of training, joined by commas (default: %(default)s)")
    parser.add_argument("--model", help="init checkpoint to begin with instead of the tiny model's")
    parser.add_argument("--ranks", type=integer(1), default=1,
                        help="processes of each run, by torchrun (default: %(default)s)")
    parser.add_argument("--records", type=FOLDER, help="folder of the records, a file per experiment and a "
                        f"line per run, with figures and page (default: {DOCS})")
    parser.add_argument("--runs", type=FOLDER, help="folder of the runs (default: runs/study)")
    parser.add_argument("--workers", type=integer(1), default=os.cpu_count(),
                        help="runs at once, each on one thread (default: all cores, %(default)s)")
    parser.add_argument("--only", default="", help="runs whose name holds this, and what they need")
    parser.add_argument("--plan", action="store_true",
                        help="say what is missing and how long it will take, do nothing")
    args = parser.parse_args(argv)
    names = EXPERIMENTS if args.experiment == "all" else [args.experiment]
    names = [name for name in names if wanted(name, args)]
    if not names:
        parser.error(f"--only {shown(args.only)}: expected part of the name of a run of {args.experiment}; "
                     "--plan lists them")
    if args.model and not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model {shown(args.model)}: expected a folder with a config.json")
    own = args.model and Path("runs") / f"study-{Path(args.model).name}"
    folder, root = Path(args.records or own or DOCS), Path(args.runs or own or "runs/study")
    signal.signal(signal.SIGINT, signal.default_int_handler)           # which a shell's & turns off
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = [run for name in names for run in do(name, args, folder, root)]
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        sys.exit(f"python -m study: error: {visible(str(error))}")
    if failed:
        sys.exit(f"without {len(failed)} runs that failed: {', '.join(failed)}")


if __name__ == "__main__":
    command(main)
