"""Does a list of runs, as many at once as there are cores, each on one thread; goes on where it was stopped; says what is left.

A run is a command line of train.py and the name of its folder. What is left of it is its folder and a line in a file of records. Nothing else is
remembered, so that stopping (Ctrl-C saves each run) and starting again, or with other runs, does only what is missing; and with the records
alone, as they come from git, nothing is done again.
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

from harness.files import Lock
from study import records

TRAIN = (sys.executable, str(Path(__file__).resolve().parents[1] / "train.py"))


@dataclass(frozen=True)
class Run:
    """name: of its folder, ending in -SEED; argv: what train.py is given but for --out, {root} for the folder of all runs; after: names of runs
    that it needs; ranks: processes, by torchrun."""
    name: str
    argv: tuple
    after: tuple = ()
    ranks: int = 1

    @property
    def kind(self):
        return kind(self.name)


def kind(name):
    """A run's name without the seed: runs of a kind take about the same time."""
    return re.sub(r"-\d+$", "", name)


@dataclass
class Runner:
    """Where runs lie, and what is under way. Of runs in `runs` that others need and that come before them, the weights are needed, too."""
    runs: list
    root: Path
    file: Path                                         # of records; what others in its folder hold is known, too
    workers: int = os.cpu_count()
    command: tuple = TRAIN
    going: dict = field(default_factory=dict)          # name: (process, when it was started)
    failed: set = field(default_factory=set)
    seconds: dict = field(default_factory=dict)        # kind: [seconds that its runs took]

    def __post_init__(self):
        known = records.read(self.file.parent)
        self.recorded, self.seconds = set(known), {}
        for name, record in known.items():
            if "seconds" in record:                    # of an evaluation alone nothing is told
                self.seconds.setdefault(kind(name), []).append(record["seconds"])

    def done(self, name):
        """A run has ended well if its last file is there."""
        return (self.root / name / "final").exists() or (self.root / name / "eval.json").exists()

    def note(self, run):
        """Record a run that has ended well."""
        if self.done(run.name) and run.name not in self.recorded:
            records.append(self.file, records.of_run(run.name, self.root / run.name))
            self.recorded.add(run.name)

    def missing(self):
        """Runs that have no record, and those whose weights they need and that are not there."""
        needed = set()
        for run in reversed(self.runs):
            if run.name not in self.recorded or (run.name in needed and not self.done(run.name)):
                needed |= {run.name, *run.after}
        return [run for run in self.runs if run.name in needed and not self.done(run.name)]

    def ready(self):
        """Runs that can start now, in order. One whose needs failed never can."""
        return [run for run in self.missing() if run.name not in self.going and run.name not in self.failed and all(map(self.done, run.after))]

    def start(self, run):
        folder = self.root / run.name
        folder.parent.mkdir(parents=True, exist_ok=True)
        resume = ["--resume"] if (folder / "log.jsonl").exists() else []
        with open(f"{folder}.output", "ab") as output:
            python, script = self.command
            torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.ranks)) if run.ranks > 1 else ()
            argv = [word.format(root=self.root) for word in run.argv]
            process = subprocess.Popen([python, *torchrun, script, *argv, "--out", str(folder), *resume], stdout=output, stderr=subprocess.STDOUT,
                                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.going[run.name] = process, time.time()

    def collect(self):
        """Take note of runs that have ended."""
        for run in self.runs:
            if run.name in self.going and self.going[run.name][0].poll() is not None:
                _, began = self.going.pop(run.name)
                self.note(run)
                if self.done(run.name):
                    self.seconds.setdefault(run.kind, []).append(time.time() - began)
                else:
                    self.failed.add(run.name)
                    print(f"{run.name} failed; see {self.root / run.name}.output", flush=True)

    def left(self):
        """Seconds until all is done, from how long runs of the same kind (or else all) took; None before any has ended."""
        mean = lambda times: sum(times) / len(times)
        if not self.seconds:
            return None
        usual = lambda run: mean(self.seconds.get(run.kind) or [mean(times) for times in self.seconds.values()])
        waiting = sum(usual(run) for run in self.missing() if run.name not in self.going and run.name not in self.failed)
        under_way = sum(max(0.0, usual(run) - time.time() + self.going[run.name][1]) for run in self.runs if run.name in self.going)
        return (waiting + under_way) / self.workers

    def report(self):
        left = self.left()
        print(f"{len(self.runs) - len(self.missing())} of {len(self.runs)} runs done; now {', '.join(self.going) or 'none'}"
              + (f"; about {int(left) // 3600}:{int(left) // 60 % 60:02d} hours left" if left is not None else ""), flush=True)

    def work(self, pause=1.0):
        """Do all runs. Returns the names of those that failed, or that needed one that did. On Ctrl-C every
        run saves, then KeyboardInterrupt. Held if another process works in the same folders."""
        if all(run.name in self.recorded for run in self.runs) and not self.missing():
            return []
        with ExitStack() as stack:
            for folder in {folder.resolve() for folder in (self.root, self.file.parent)}:
                lock = Lock(folder, "--runs and --records")
                stack.callback(lock.release)
            self.__post_init__()                       # another process may have done some of it meanwhile
            for run in self.runs:
                self.note(run)
            return self.work_alone(pause)

    def work_alone(self, pause):
        try:
            while self.going or self.ready():
                for run in self.ready()[:self.workers - len(self.going)]:
                    self.start(run)
                    self.report()
                time.sleep(pause)
                self.collect()
        finally:
            for process, _ in self.going.values():
                process.send_signal(signal.SIGTERM)
            for process, _ in self.going.values():
                process.wait()
        return [run.name for run in self.missing()]
