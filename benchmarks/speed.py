"""Measure PPO updates of the tiny model, next to those of an older commit; then sampling (generate.py).

    python -m benchmarks.speed --against 9745e38 --json speed.json

The cases: cards in words and as pictures, from the init checkpoint, on one thread and on two, on a machine
that is quiet or has one core busy ("+1"). Each run is a process of its own. The two commits take turns,
update by update, so that other load on the machine affects both alike. Medians after an update that warms up:
seconds of rollout, of learning and of both, the share of padding in what is learnt from, peak memory. "to
old": seconds of rollout plus learning, divided by the older commit's; "to one": divided by the same code's on
one thread of the quiet machine. Takes an hour.
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
from benchmarks.measure import columns, head, machine, save, show, take_turns
from harness import WAITING
from harness.ranges import FILE, command_line, integer, text
from harness.terminal import command

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = "--algo ppo --device cpu --eval-hands 0 --probe-hands 0 --save-every 1000"
MEDIANS = columns("rollout_seconds 15.2f, update_seconds 14.2f, both 6.2f, padding 7.1%, GB 5.2f")
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
    return metrics | {"both": metrics["rollout_seconds"] + metrics["update_seconds"]}


def measure(roots, updates, threads, busy, settings):
    """Let the code in each root make updates, in turns -> {name of the root: {metric: median}}."""
    env = {name: value for name, value in os.environ.items() if name not in WAITING}       # each has its own
    env["OMP_NUM_THREADS"] = threads
    with ExitStack() as stack:
        out = stack.enter_context(tempfile.TemporaryDirectory())
        words = "-P", ROOT / "benchmarks/updates.py", *f"{SETTINGS} {settings}".split(), "--out"
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
    parser.add_argument("--against", type=text("a commit"), default="HEAD", metavar="COMMIT")
    parser.add_argument("--updates", type=integer(1), default=5, help="that count, in each case (default: 5)")
    parser.add_argument("--json", type=FILE, metavar="FILE")
    args = parser.parse_args(argv)
    rows, one = [], {}
    with tempfile.TemporaryDirectory() as old:
        archive = f"{old}/archive.tar"
        subprocess.check_call(["git", "-C", ROOT, "archive", "-o", archive, args.against])
        shutil.unpack_archive(archive, old, filter="data")
        head(COLUMNS)
        for task, busy, threads in itertools.product(("gp-l", "gp-vl"), ("", "+1"), "12"):
            found = measure({"now": ROOT, args.against: old}, args.updates, threads, busy, f"--task {task}")
            for name, row in found.items():
                rows.append(row | {"task": task, "threads": threads + busy, "commit": name,
                                   "to old": row["both"] / found[args.against]["both"],
                                   "to one": row["both"] / one.setdefault((task, name), row["both"])})
                show(rows[-1], COLUMNS)
    rates = {threads: generate.main(["--threads", threads]) for threads in "12"}
    save(args.json, machine() | {"updates": rows, "generate": rates})


if __name__ == "__main__":
    command(main)
