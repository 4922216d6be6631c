"""Do a list of runs, as many at once as there are cores, each on one thread; go on where it was stopped; say
what is left.

A run is a command line of train.py and the name of its folder. It leaves its folder and a line in a file of
records. Nothing else is remembered. After a stop (Ctrl-C saves each run), a new start, with the same runs or
others, does only what is missing. With the records alone, as they come from git, nothing is done again.
"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from harness.files import lock
from study import records

TRAIN = (sys.executable, str(Path(__file__).resolve().parents[1] / "train.py"))


@dataclass(frozen=True)
class Run:
    """name: of its folder, ending in -SEED; argv: what train.py is given but for --out, {root} for the folder
    of all runs; after: names of runs that it needs; ranks: processes, by torchrun."""
    name: str
    argv: tuple
    after: tuple = ()
    ranks: int = 1


def kind(name):
    """Return a run's name without the seed: runs of a kind take about the same time."""
    return re.sub(r"-\d+$", "", name)


@dataclass
class Runner:
    """Where runs lie, and what is under way. Of runs in `runs` that others need and that come before them,
    the weights are needed, too."""
    runs: list
    root: Path
    file: Path                                     # of records; what others in its folder hold is known, too
    workers: int = os.cpu_count()
    command: tuple = TRAIN
    going: dict = field(default_factory=dict)      # name: (process, when it was started)
    failed: set = field(default_factory=set)

    def __post_init__(self):
        self.recorded, self.seconds = set(), {}        # kind: [seconds that its runs took]
        for name, record in records.read(self.file.parent).items():
            self.recorded.add(name)
            if "seconds" in record:                    # of an evaluation alone nothing is told
                self.seconds.setdefault(kind(name), []).append(record["seconds"])

    def done(self, name):
        """Tell whether a run has ended well: its last file is there."""
        return (self.root / name / "final").exists() or (self.root / name / "eval.json").exists()

    def note(self, run):
        """Record a run that has ended well."""
        if self.done(run.name) and run.name not in self.recorded:
            records.append(self.file, records.of_run(run.name, self.root / run.name))
            self.recorded.add(run.name)

    def missing(self):
        """Return runs that have no record, and those whose weights they need and that are not there."""
        needed = set()
        for run in reversed(self.runs):
            if run.name not in self.recorded or (run.name in needed and not self.done(run.name)):
                needed |= {run.name, *run.after}
        return [run for run in self.runs if run.name in needed and not self.done(run.name)]

    def waiting(self):
        """Return missing runs that were not begun."""
        return [run for run in self.missing() if run.name not in {*self.going, *self.failed}]

    def ready(self):
        """Return runs that can start now, in order. One whose needs failed never can."""
        return [run for run in self.waiting() if all(map(self.done, run.after))]

    def start(self, run):
        folder, argv = self.root / run.name, [word.format(root=self.root) for word in run.argv]
        folder.parent.mkdir(parents=True, exist_ok=True)
        resume = ["--resume"] if (folder / "log.jsonl").exists() else []
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {run.ranks}".split()
        python, script = self.command
        words = [python, *(torchrun if run.ranks > 1 else ()), script, *argv, "--out", str(folder), *resume]
        with open(f"{folder}.output", "ab") as output:
            process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT,
                                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.going[run.name] = process, time.time()

    def collect(self):
        """Take note of runs that have ended."""
        for run in self.runs:
            if run.name in self.going and self.going[run.name][0].poll() is not None:
                _, began = self.going.pop(run.name)
                self.note(run)
                if self.done(run.name):
                    self.seconds.setdefault(kind(run.name), []).append(time.time() - began)
                else:
                    self.failed.add(run.name)
                    print(f"{run.name} failed; see {self.root / run.name}.output", flush=True)

    def left(self):
        """Return seconds until all is done, from how long runs of the same kind (or else all) took; None
        before any has ended."""
        if not self.seconds:
            return None
        average = fmean(map(fmean, self.seconds.values()))
        usual = lambda name: fmean(self.seconds.get(kind(name), [average]))
        waiting = sum(usual(run.name) for run in self.waiting())
        under_way = sum(max(0.0, usual(name) - time.time() + began)
                        for name, (_, began) in self.going.items())
        return (waiting + under_way) / self.workers

    def report(self):
        done, left = len(self.runs) - len(self.missing()), self.left()
        left = "" if left is None else f"; about {int(left) // 3600}:{int(left) // 60 % 60:02d} hours left"
        now = ", ".join(self.going) or "none"
        print(f"{done} of {len(self.runs)} runs done; now {now}{left}", flush=True)

    def work(self, pause=1.0):
        """Do all runs. Return the names of those that failed, or that needed one that did. On Ctrl-C every
        run saves, then KeyboardInterrupt. Held if another process works in the same folders."""
        if all(run.name in self.recorded for run in self.runs) and not self.missing():
            return []
        with ExitStack() as stack:
            for folder in {folder.resolve() for folder in (self.root, self.file.parent)}:
                stack.enter_context(lock(folder, "--runs and --records"))
            self.__post_init__()                       # another process may have done some of it meanwhile
            for run in self.runs:
                self.note(run)
            stack.callback(self.stop)
            while self.going or self.ready():
                for run in self.ready()[:self.workers - len(self.going)]:
                    self.start(run)
                    self.report()
                time.sleep(pause)
                self.collect()
        return [run.name for run in self.missing()]

    def stop(self):
        """Tell what is under way to save and end, and wait for it."""
        for process, _ in self.going.values():
            process.send_signal(signal.SIGTERM)
        for process, _ in self.going.values():
            process.wait()
