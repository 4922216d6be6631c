"""Measure PPO updates of the tiny model, next to those of an older commit; without train.py's options then
sampling (generate.py), too.

    python -m benchmarks.speed --against 9745e38
    python -m benchmarks.speed --against 9745e38 --tasks gp-l --threads 1 \\
        --model FOLDER --hands 32 --samples 8

The cases: cards in words and as pictures, on one thread and on two, on a machine that is quiet or has one
core busy ("+1"). Other options are train.py's, for both commits: give the same --model, --hands and
--samples, as the built-in ones may differ. Each run is a process of its own. The two commits take turns,
update by update, so that other load on the machine affects both alike; with one thread, seconds are those
that the process computed. Medians after an update that warms up: seconds of rollout and of learning,
microseconds of both per token of the conversations, the share of padding in what is learnt from, peak memory.
"to old": these microseconds divided by the older commit's, which deals other hands; "to one": divided by the
same code's in the first case of the task. All cases take an hour.
"""
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks import generate
from benchmarks.measure import columns, head, machine, show, take_turns
from harness import WAITING
from harness.ranges import command_line, integer
from harness.terminal import command

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = "--algo ppo --device cpu --eval-hands 0 --probe-hands 0 --save-every 1000"
MEDIANS = columns("rollout_seconds 15.2f, update_seconds 14.2f, us/token 8.1f, padding 7.1%, GB 5.2f")
COLUMNS = columns("task 5, threads 7, commit 10") | MEDIANS | columns("to old 6.2f, to one 6.2f")


def start(stack, *words, **how):
    """Start a Python process that ends with the stack."""
    process = stack.enter_context(subprocess.Popen([sys.executable, *words], **how))
    stack.callback(process.kill)
    return process


def update(run, i):
    """Let a run of updates.py make one -> its metrics."""
    print(file=run.stdin, flush=True)
    metrics = json.loads(next(line for line in run.stdout if line.startswith("{")))
    seconds = metrics["rollout_seconds"] + metrics["update_seconds"]
    return metrics | {"us/token": 1e6 * seconds / metrics["rollout_tokens"]}


def measure(roots, updates, threads, settings):
    """Let the code in each root make updates, in turns -> {name of the root: {metric: median}}."""
    env = {name: value for name, value in os.environ.items() if name not in WAITING}       # each has its own
    env["OMP_NUM_THREADS"], _, busy = threads.partition("+")
    with ExitStack() as stack:
        out = stack.enter_context(tempfile.TemporaryDirectory())
        words = "-P", ROOT / "benchmarks/updates.py", *SETTINGS.split(), *settings, "--out"
        runs = {name: start(stack, *words, f"{out}/{name}", env=env | {"PYTHONPATH": root},
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                for name, root in roots.items()}
        if busy:
            start(stack, "-c", "while True: pass")
        found = take_turns({name: partial(update, run) for name, run in runs.items()}, updates)
    return {name: {metric: statistics.median(each[metric] for each in times) for metric in MEDIANS}
            for name, times in found.items()}


def main(argv=None):
    parser = command_line("python -m benchmarks.speed", __doc__)
    parser.add_argument("--tasks", default="gp-l,gp-vl")
    parser.add_argument("--threads", default="1,2,1+1,2+1")
    parser.add_argument("--against", default="HEAD", metavar="COMMIT")
    parser.add_argument("--updates", type=integer(1), default=5, help="that count, in each case (default: 5)")
    args, settings = parser.parse_known_args(argv)
    one = {}
    print(machine())
    with tempfile.TemporaryDirectory() as old:
        archive = f"{old}/archive.tar"
        subprocess.check_call(["git", "-C", ROOT, "archive", "-o", archive, args.against])
        shutil.unpack_archive(archive, old, filter="data")
        head(COLUMNS)
        for task, threads in itertools.product(args.tasks.split(","), args.threads.split(",")):
            found = measure({"now": ROOT, args.against: old}, args.updates, threads,
                            ["--task", task, *settings])
            for name, row in found.items():
                cost = row["us/token"]
                show(row | {"task": task, "threads": threads, "commit": name,
                            "to old": cost / found[args.against]["us/token"],
                            "to one": cost / one.setdefault((task, name), cost)}, COLUMNS)
    for threads in "" if settings else "12":
        generate.main(["--threads", threads])


if __name__ == "__main__":
    command(main)
