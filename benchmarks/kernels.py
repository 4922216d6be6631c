"""Measure what the kernels gain on this machine, next to all that could stand in their place.

    python -m benchmarks.kernels                               # on a GPU at the sizes of the 11B model
    python -m benchmarks.kernels --only decode --json bench.json

Every implementation must first agree with float64. Then they take turns, see benchmarks/measure.py. Preparing
masks and compiling are not timed. A row of the table holds

    ms         median
    rate       of the FLOPs or bytes that the task needs, counted the same for all: results that nobody needs
               and results computed twice do not count
    ceiling    the least time in which this machine could do it, as a share of ms. First the rates of a large
               matrix product and of a large copy are measured. At these rates either the task's
               FLOPs or its bytes take longer. These set the ceiling, and `rate` is given in them.
    MiB        peak memory beyond inputs and results (a backward pass includes its forward pass), plus the
               dense mask if it needs one
    error      of a row of a result or gradient: the norm of what it is off by, divided by the norm of the
               row or by the root mean square of all rows' norms, whichever is larger. The table holds the
               largest. A result whose error is beyond rounding and beyond twice that of the naive form is
               wrong, and gets no time; if it is ours, the benchmark ends.
    ratio      ms over those of ours: above 1 is slower

A row whose implementation cannot run the case says "no:" and why.
"""
import ctypes
import os
import statistics
import warnings
from pathlib import Path

import torch

from benchmarks.measure import DEVICE, GPU, columns, head, machine, milliseconds, save, show, take_turns
from benchmarks.rivals import SIZES, attention_cases, logprob_cases
from harness.ranges import FILE, above, command_line
from harness.terminal import command

# Errors that always pass. Scores, probabilities and results rounded to bfloat16 are off by some units of
# 2^-8, float32 sums of thousands of terms by many of 2^-24. A wrong mask or a lost block is off by 0.1 and
# more. Up to twice the error of the naive form passes, too: see `bench`.
BOUND = {torch.bfloat16: 0.05, torch.float32: 1e-4}


# ------------------------------------------------------------------------------------------------------------
# Measuring


def peak_memory(run):
    """Return the MiB that `run` held at most, beyond what was there before and what it returns.

    None where that is unknown.
    """
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        peak = torch.cuda.max_memory_allocated
    elif os.access("/proc/self/clear_refs", os.W_OK):          # Linux
        ctypes.CDLL(None).malloc_trim(0)                       # else freed memory, kept, would hide new
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")     # the peak starts again from here
        status = Path("/proc/self/status")
        peak = lambda: 1024 * int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    else:
        return None
    before, found = peak(), run()
    return max(0, peak() - before - sum(x.nbytes for x in found)) / 2**20


def worst_error(case, found, exact):
    """Return `error` of the table; NaN if there is one."""
    worst = []
    for x, y, counting in zip(found, exact, (case.real, ..., ..., ...)):
        size, off = y[counting].norm(dim=-1), (x - y)[counting].norm(dim=-1)
        worst.append((off / size.clamp(min=size.square().mean().sqrt())).max())
    return float(torch.stack(worst).max())


class WrongResult(ArithmeticError):
    """An implementation computes something else."""


def examine(case, row, way, exact, bound):
    """Check and weigh one implementation. If it gets no time, write into the row why: a rival's error is its
    result, ours is not."""
    run = lambda: case.prepare(way, *case.inputs)()
    try:
        row["error"] = worst_error(case, run(), exact)
        if not row["error"] <= bound:                          # NaN is not, either
            raise WrongResult(f"{case.name} {case.part}: error {row['error']:.1e}")
    except Exception as error:
        if row["implementation"] == "ours":
            raise
        row["no"], row["message"] = type(error).__name__, str(error)
        return
    mask, row["MiB"] = getattr(way, "keywords", {}).get("mask"), peak_memory(run)
    if mask is not None and row["MiB"] is not None:
        row["MiB"] += mask.nbytes / 2**20


def bench(case, ceilings, seconds):
    """Check and time all ways of a case -> rows of the table."""
    args, upstream = case.inputs
    doubles = [x.detach().double().requires_grad_() if x.requires_grad else x for x in args]
    exact = case.prepare(case.exact, doubles, upstream)()
    rows, turns, bound = {}, {}, BOUND[args[0].dtype]
    for name, way in case.ways.items():
        row = rows[name] = dict(case=case.name, part=case.part, implementation=name)
        examine(case, row, way, exact, bound)
        if "no" not in row:
            turns[name] = lambda way=way: milliseconds(case.prepare(way, args, upstream))
            if name == "naive":
                bound = max(bound, 2 * row["error"])
    times = take_turns(turns, 50, seconds)
    work = {"TFLOP/s": case.flops / 1e12, "GB/s": case.bytes / 1e9}
    unit = max(work, key=lambda unit: work[unit] / ceilings[unit])
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, ms in medians.items():
        rate = 1000 * work[unit] / ms
        rows[name] |= dict(ms=ms, all_ms=times[name], flops=case.flops, bytes=case.bytes, unit=unit,
                           rate=rate, ceiling=rate / ceilings[unit], ratio=ms / medians["ours"])
    for row in rows.values():
        show(row | {"ms": f"no: {row['no']}"} if "no" in row else row, COLUMNS)
    return list(rows.values())


def measure_ceilings(dtype):
    """Return the rates of a large product and of a large copy, which reads and writes."""
    n, size = (8192, 2**30) if GPU else (1536, 2**28)
    a, b = torch.randn(2, n, n, device=DEVICE).to(dtype)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=DEVICE)
    times = take_turns({"TFLOP/s": lambda: milliseconds(torch.mm, a, b),
                        "GB/s": lambda: milliseconds(target.copy_, source)}, 20, 2)
    work = {"TFLOP/s": 2 * n**3 / 1e12, "GB/s": 2 * size / 1e9}
    return {unit: 1000 * work[unit] / statistics.median(found) for unit, found in times.items()}


# ------------------------------------------------------------------------------------------------------------
# The table

COLUMNS = columns("case 15, part 8, implementation 32, ms 8.4g, rate 8.3g, unit 7, ceiling 7.0%, MiB 8.1f, "
                  "error 7.1e, ratio 5.2f")


def main(argv=None):
    parser = command_line("python -m benchmarks.kernels", __doc__)
    parser.add_argument("--only", default="", metavar="CASE",
                        help=f"cases whose name holds this: {', '.join(SIZES)}")
    parser.add_argument("--seconds", type=above(0), default=2, help="for each part of a case (default: 2)")
    parser.add_argument("--json", type=FILE, metavar="FILE",
                        help="write all numbers there, with hardware, versions and commit")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")                            # backends explain at length why they decline
    dtype, names = torch.bfloat16 if GPU else torch.float32, [name for name in SIZES if args.only in name]
    if not names:
        parser.error(f"--only {args.only}: expected part of one of {', '.join(SIZES)}")
    result = {"machine": machine(), "ceilings": measure_ceilings(dtype), "rows": []}
    print(f"{result['machine']}\n{result['ceilings']}\n")
    head(COLUMNS)
    for name in names:
        build = logprob_cases if len(SIZES[name]) == 3 else attention_cases
        for case in build(name, SIZES[name], dtype):
            result["rows"] += bench(case, result["ceilings"], args.seconds)
    save(args.json, result)


if __name__ == "__main__":
    command(main)
