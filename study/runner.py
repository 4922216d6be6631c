"""Do a list of runs, as many at once as there are cores, each on one thread; go on where it was stopped; say
what is left.

A run is a command line of train.py and the name of its folder. It leaves its folder and a line in a file of
records. Nothing else is remembered. After a stop (Ctrl-C saves each run), a new start, with the same runs or
others, does only what is missing. A run of which there is only the record, as in a fresh clone, is done again
only if another needs its weights.
"""

import os
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from harness.files import append_line, lock
from study import records

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


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
    return name.rpartition("-")[0]


def with_needs(runs, asked):
    """Return the runs for which asked(name, names that others need), and those that they need, in order."""
    needed = set()
    for run in reversed(runs):                                 # what is needed comes before
        if asked(run.name, needed):
            needed |= {run.name, *run.after}
    return [run for run in runs if run.name in needed]


@dataclass
class Runner:
    """Where runs lie, and what is under way. Of runs in `runs` that others need and that come before them,
    the weights are needed, too."""
    runs: list
    root: Path
    file: Path                                     # of records; what others in its folder hold is known, too
    workers: int = os.cpu_count()
    script: Path = TRAIN
    going: dict = field(default_factory=dict)      # name: (process, when it was started)
    begun: set = field(default_factory=set)        # names, also of those that failed

    def __post_init__(self):
        known = records.read(self.file.parent)
        self.recorded, self.seconds = {*known}, defaultdict(list)      # kind: [seconds that its runs took]
        for name, record in known.items():
            if "seconds" in record:                    # of an evaluation alone nothing is told
                self.seconds[kind(name)].append(record["seconds"])

    def done(self, name):
        """Tell whether a run has ended well: its last file is there."""
        return (self.root / name / "final").exists() or (self.root / name / "eval.json").exists()

    def note(self, name):
        """Record a run that has ended well."""
        if self.done(name) and name not in self.recorded:
            append_line(self.file, records.of_run(name, self.root / name))
            self.recorded.add(name)

    def missing(self):
        """Return runs that have no record, and those whose weights they need and that are not there."""
        again = lambda name, needed: name not in self.recorded or (name in needed and not self.done(name))
        return [run for run in with_needs(self.runs, again) if not self.done(run.name)]

    def ready(self):
        """Return missing runs that can start now, in order. One whose needs failed never can."""
        return [run for run in self.missing()
                if run.name not in self.begun and all(map(self.done, run.after))]

    def start(self, run):
        folder, argv = self.root / run.name, [word.format(root=self.root) for word in run.argv]
        resume = ["--resume"] if (folder / "log.jsonl").exists() else []
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {run.ranks}".split()
        words = [sys.executable, *(torchrun if run.ranks > 1 else ()), str(self.script), *argv,
                 "--out", str(folder), *resume]
        with open(f"{folder}.output", "ab") as output:
            process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT,
                                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.going[run.name] = process, time.time()
        self.begun.add(run.name)

    def collect(self):
        """Take note of runs that have ended."""
        for name, (process, began) in list(self.going.items()):
            if process.poll() is not None:
                del self.going[name]
                self.note(name)
                if self.done(name):
                    self.seconds[kind(name)].append(time.time() - began)
                else:
                    print(f"{name} failed; see {self.root / name}.output", flush=True)

    def left(self):
        """Return about how many seconds the missing runs take, as those of the same kind (or else all) took;
        None before any has ended."""
        if not self.seconds:
            return None
        average = fmean(map(fmean, self.seconds.values()))
        usual = (fmean(self.seconds.get(kind(run.name), [average])) for run in self.missing())
        return sum(usual) / self.workers

    def report(self):
        done, now, left = len(self.runs) - len(self.missing()), ", ".join(self.going) or "none", self.left()
        left = "" if left is None else f"; about {int(left) // 3600}:{int(left) // 60 % 60:02d} hours left"
        print(f"{done} of {len(self.runs)} runs done; now {now}{left}", flush=True)

    def work(self, pause=1.0):
        """Do all runs. Return the names of those that failed, or that needed one that did. On Ctrl-C every
        run saves, then KeyboardInterrupt. Held if another process works in the same folders."""
        names = [run.name for run in self.runs]
        if self.recorded.issuperset(names) and not self.missing():
            return []
        with ExitStack() as stack:
            for folder in {folder.resolve() for folder in (self.root, self.file.parent)}:
                stack.enter_context(lock(folder, "--runs and --records"))
            self.__post_init__()                       # another process may have done some of it meanwhile
            for name in names:
                self.note(name)
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
            process.terminate()
        for process, _ in self.going.values():
            process.wait()
