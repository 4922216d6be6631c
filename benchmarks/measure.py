"""Measure how long functions take, in turns, and describe the machine."""
import importlib.metadata
import math
import platform
import time
from pathlib import Path

import torch

from harness.files import to_json
from harness.folder import git_commit

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def milliseconds(run, *args):
    """Return the milliseconds of run(*args).

    On a GPU between two events, after a write of 1 GiB that empties the L2 cache and lets the host run ahead.
    On a CPU with one thread it is the time that the process computed, so that other processes do not count.
    """
    if GPU:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.zeros(2**30, dtype=torch.uint8, device=DEVICE)
        start.record()
        run(*args)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    before = clock()
    kept = run(*args)                                          # noqa: F841, freed after the clock is read
    return (clock() - before) * 1000


def take_turns(runs, rounds, seconds=math.inf):
    """Call all runs again and again, {name: function -> its time} -> {name: times}.

    They take turns, so that a busy moment hits all. The first round warms up and is forgotten; after
    `seconds`, three more are enough.
    """
    times, stop = {name: [] for name in runs}, time.monotonic() + seconds
    for i in range(rounds + 1):
        for name in runs:
            times[name].append(runs[name]())
        if i >= 3 and time.monotonic() > stop:
            break
    return {name: found[1:] for name, found in times.items()}


def machine():
    """Return the hardware, versions and commit that numbers come from."""
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    versions = {found.name: found.version for found in importlib.metadata.distributions()
                if found.name in ("triton", "transformers")}
    return {"hardware": torch.cuda.get_device_name() if GPU else cpu,
            "threads": torch.get_num_threads(),
            "commit": git_commit(),
            "Python": platform.python_version(),
            "torch": torch.__version__} | versions


def columns(text):
    """Read "name format, ..." -> {name of a column: the format of its numbers}."""
    return dict(part.rsplit(" ", 1) for part in text.split(", "))


def head(columns):
    """Print the head of a table."""
    show({name: name for name in columns}, columns)
    show({name: "-" * int(form.split(".")[0]) for name, form in columns.items()}, columns)


def show(row, columns):
    """Print a line of the table. A column that is not in the row stays empty."""
    cells = []
    for name, form in columns.items():
        value = row.get(name)
        if value is None or isinstance(value, str):
            value, form = value or "", form.split(".")[0]
        cells.append(f"{value:<{form}}")
    print(f"| {' | '.join(cells)} |", flush=True)


def save(file, result):
    """Write a result as JSON, if there is a file to write to."""
    if file:
        Path(file).write_text(to_json(result, indent=1), encoding="utf-8")
