"""Do the runs of an experiment, as many at once as there are cores; print its table, draw its figures.

    python -m study main                     # continue where it stopped; runs recorded in git are not redone
    python -m study all --plan               # what is there, what is missing, how long that will take
    python -m study main --records runs/mine --seeds 0               # measure anew
    python -m study main --model Llama-3.2-11B-Vision-Instruct --ranks 8 --seeds 0      # ask a real model
    python -m study plot runs/gp-l-sft runs/gp-l-ppo                 # success against compute, of your runs

The folder of records gets a page, README.md, with all experiments that were begun. With --model the paper's
presets hold, runs go one after the other, each on --ranks GPUs, and everything lies under runs/study-MODEL.
Runs that set a number of steps or a learning rate (study/experiments.py) are meant for the tiny model.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

from harness.files import write_atomically
from harness.ranges import command_line, integer, one_of, several, shown, text
from harness.terminal import command
from study import figures, records, tables
from study.experiments import EXPERIMENTS, SEEDS
from study.runner import Runner, with_needs

DOCS = Path("docs/study")
PAGE = """# The study

Each part is written by the command above it, from the records beside this page. ± is one standard error, \
which counts both seeds and hands as samples (study/records.py)."""


# game -> algorithm -> how a run of the tiny model is tested
FINER = {"gp": {"eval": "--eval-hands 500", "sft": "--eval-hands 500 --eval-every 105",
                "ppo": "--eval-hands 500 --eval-every 10"},
         "virl": {"eval": "--eval-hands 200", "sft": "--eval-hands 200 --eval-every 42",
                  "ppo": "--eval-hands 200 --eval-every 15"}}


def at_scale(run, model, ranks):
    """Return the run with another model where it would take the tiny one, on so many ranks.

    The tiny one is tested on more hands than by its preset, and oftener: that is for a first look.
    """
    argv = run.argv
    if not model:
        finer = FINER["gp" if "gp-" in argv[1] else "virl"]    # argv: --task TASK ...
        for algo in {*finer} & {*argv}:
            argv = (*finer[algo].split(), *argv)               # of two the later wins: an arm's own
    elif "--model" not in argv:
        argv += "--model", model
    return dataclasses.replace(run, argv=argv, ranks=ranks)


def chosen(runs, only):
    """Return the runs whose name holds a text, and what they need."""
    return with_needs(runs, lambda name, needed: only in name or name in needed)


def page(folder):
    """Write all experiments that were begun as Markdown: question, what was found (NAME.md, by hand),
    figures, table, what it was measured on."""
    found, parts = records.read(folder), [PAGE]
    for name, experiment in EXPERIMENTS.items():
        if not (folder / f"{name}.jsonl").exists():
            continue
        mine = [record for group in experiment.groups(found) for record in group.records]
        seeds, hardware, commits = (sorted({str(fact(record)) for record in mine}) for fact in (
            lambda record: record["name"].rpartition("-")[2], lambda record: record["hardware"],
            lambda record: record["commit"] or "unknown"))
        findings = [file.read_text(encoding="utf-8").strip() for file in folder.glob(f"{name}.md")]
        pictures = [*folder.glob(f"{name}.png"), *sorted(folder.glob(f"{name}-*.png"))]
        parts += [f"## {name}", experiment.question, f"`python -m study {name}`", *findings,
                  *(f"![{file.stem}]({file.name})" for file in pictures), experiment.table(found),
                  f"*Seeds {', '.join(seeds)}; {' and '.join(hardware)}; commit {', '.join(commits)}.*"]
    return "\n\n".join(parts) + "\n"


def wanted(name, args):
    """Return the runs of an experiment that the command line asks for."""
    runs = EXPERIMENTS[name].runs([int(seed) for seed in args.seeds.split(",")])
    return [at_scale(run, args.model, args.ranks) for run in chosen(runs, args.only)]


def do(name, args, folder, root):
    """Do one experiment. Return the names of runs that failed."""
    workers = 1 if args.model or args.ranks > 1 else args.workers
    runner = Runner(wanted(name, args), root, folder / f"{name}.jsonl", workers)
    if args.plan:
        missing = runner.missing()
        for run in runner.runs:
            print("missing" if run in missing else "there  ", f" {run.name}  train.py {' '.join(run.argv)}")
        runner.report()
        return []
    failed, found = runner.work(), records.read(folder)
    print(EXPERIMENTS[name].table(found))
    draw(EXPERIMENTS[name].plot, found, folder / f"{name}.png")
    write_atomically(folder / "README.md", page(folder))
    print(f"wrote {folder / 'README.md'}")
    return failed


def draw(figure, found, file):
    """Draw a figure, where that is possible."""
    try:
        figure(found, file)
    except ImportError:
        print("no figure, which needs matplotlib: pip install -e '.[plot]'")


def plot(folders):
    """Print the table of run folders, and draw success.png."""
    groups = tables.read_runs(folders)
    print(f"{tables.headline(groups)}\n\ndrawing success.png", flush=True)
    draw(figures.draw, groups, "success.png")


def main(argv=None):
    questions = "\n".join(f"    {name:12}{experiment.question}" for name, experiment in EXPERIMENTS.items())
    parser = command_line("python -m study", f"{__doc__}\nexperiments:\n{questions}")
    parser.add_argument("experiment", type=one_of(("all", "plot", *EXPERIMENTS)),
                        help="all, plot, or one of the above")
    parser.add_argument("folders", nargs="*", metavar="RUN", help="folders of runs, of plot")
    parser.add_argument("--seeds", type=several(integer(0, SEEDS[-1])), default="0,1,2",
                        help="of training, joined by commas (default: %(default)s)")
    parser.add_argument("--model", type=text("a folder with a config.json",
                                             lambda name: (Path(name) / "config.json").is_file()),
                        help="init checkpoint to begin with instead of the tiny model's")
    parser.add_argument("--ranks", type=integer(1), default=1,
                        help="processes of each run, by torchrun (default: %(default)s)")
    parser.add_argument("--records", type=text("a folder"),
                        help="folder of the records, a file per experiment and a line per run, with figures "
                        f"and page (default: {DOCS})")
    parser.add_argument("--runs", type=text("a folder"), help="folder of the runs (default: runs/study)")
    parser.add_argument("--workers", type=integer(1), default=os.cpu_count(),
                        help="runs at once, each on one thread (default: all cores, %(default)s)")
    parser.add_argument("--only", default="", help="runs whose name holds this, and what they need")
    parser.add_argument("--plan", action="store_true",
                        help="say what is missing and how long it will take, do nothing")
    args = parser.parse_args(argv)
    if bool(args.folders) != (args.experiment == "plot"):
        parser.error("RUN ...: expected with plot, and with plot alone")
    names = {"all": EXPERIMENTS, "plot": []}.get(args.experiment, [args.experiment])
    names = [name for name in names if wanted(name, args)]
    if not names and not args.folders:
        parser.error(f"--only {shown(args.only)}: expected part of the name of a run of {args.experiment}; "
                     "--plan lists them")
    own = args.model and Path("runs") / f"study-{Path(args.model).name}"
    folder, root = Path(args.records or own or DOCS), Path(args.runs or own or "runs/study")
    for name in (signal.SIGINT, signal.SIGTERM):               # a shell's & turns the first off
        signal.signal(name, signal.default_int_handler)
    try:
        if args.folders:
            return plot(args.folders)
        failed = [run for name in names for run in do(name, args, folder, root)]
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if failed:
        sys.exit(f"without {len(failed)} runs that failed: {', '.join(failed)}")


if __name__ == "__main__":
    command(main)
