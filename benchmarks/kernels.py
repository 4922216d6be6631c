"""Measure what the kernels gain on this machine, next to all that could stand in their place.

    python -m benchmarks.kernels                               # on a GPU at the sizes of the 11B model
    python -m benchmarks.kernels --only decode logprob --json bench.json

Every implementation must first agree with float64. Then they take turns, so that a busy moment hits all, each
on another set of inputs than the time before. Preparing masks and compiling are not timed. A row of the table
holds

    ms         median. On a GPU between two events, after a write of 1 GiB that empties the L2 cache and lets
               the host run ahead. On a CPU with one thread it is the time that the process computed, so that
               other processes do not count.
    rate       of the FLOPs or bytes that the task needs, counted the same for all: results that nobody needs
               and results computed twice do not count
    ceiling    the least time in which this machine could do it, as a share of ms. First the rates of a large
               matrix product and of a large copy are measured. Whichever of FLOPs and bytes takes longer at
               these rates is the ceiling; the rate is in its unit.
    MiB        most memory beyond inputs and results while it ran (for backward: also forward), with the dense
               mask if it needs one
    error      of the worst row of all results (and gradients), relative to the length of that row, or of the
               mean row if that is longer; a result is wrong and gets no time if its error is beyond rounding
               and beyond twice that of the naive form
    ratio      ms over those of ours: above 1 is slower

or says "no:" and why it cannot run the case.
"""
import ctypes
import importlib.metadata
import os
import platform
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch

from benchmarks.rivals import LARGE, ON_REQUEST, SETS, SMALL, Refused, attention_cases, logprob_cases
from harness.files import to_json
from harness.folder import git_commit
from harness.ranges import FILE, command_line
from harness.terminal import command
from kernels import use_triton

# Errors that always pass. Scores, probabilities and results rounded to bfloat16 are off by some units of
# 2^-8, float32 sums of thousands of terms by many of 2^-24. A wrong mask or a lost block is off by 0.1 and
# more. Larger errors pass at the level of PyTorch's own: see `allowed`.
BOUND = {torch.bfloat16: 0.05, torch.float32: 1e-4}


# ------------------------------------------------------------------------------------------------------------
# Measuring


def attempt(row, run):
    """Return run(), or None and write the reason into the row: a rival's error is its result.

    Ours may only be wrong or lack memory.
    """
    try:
        return run()
    except Exception as error:
        row["no"], row["message"] = reason(error), str(error)
        if row["implementation"] == "ours" and row["no"] not in ("out of memory", "result is wrong"):
            raise


def reason(error):
    """Say in three words why something did not run."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return "out of memory"
    if isinstance(error, ImportError):
        return "not installed here"
    if "No available kernel" in text or "No viable backend" in text:
        return "backend declines it"
    return text if isinstance(error, Refused) else f"raises {type(error).__name__} here"


def sample(begin, finish, device):
    """Return the milliseconds of finish(begin())."""
    state = begin()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.zeros(2**30, dtype=torch.uint8, device=device)
        start.record()
        finish(state)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    before = clock()
    kept = finish(state)                                       # noqa: F841, freed after the clock is read
    return (clock() - before) * 1000


def take_turns(runs, rounds, seconds, device, guard=lambda name, run: run()):
    """{name: round -> (begin, finish)} -> {name: milliseconds of each round}.

    The first round warms up and is forgotten. A name drops out where guard gives None instead of
    milliseconds.
    """
    times, stop = {name: [] for name in runs}, time.monotonic() + seconds
    for i in range(rounds + 1):
        for name in list(times):
            times[name].append(guard(name, partial(sample, *runs[name](i), device)))
            if times[name][-1] is None:
                del times[name]
        if i >= 3 and time.monotonic() > stop:
            break
    return {name: found[1:] for name, found in times.items()}


def peak_memory(run, device):
    """Return the bytes that `run` held at most, beyond what was there before and what it returns; None if
    unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak = partial(torch.cuda.max_memory_allocated, device)
    elif os.access("/proc/self/clear_refs", os.W_OK):          # Linux
        ctypes.CDLL(None).malloc_trim(0)                       # else freed memory, kept, would hide new
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")     # the peak starts again from here
        status = Path("/proc/self/status")
        peak = lambda: 1024 * int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    else:
        return None
    before, found = peak(), run()
    return max(0, peak() - before - sum(x.nbytes for x in found))


def worst_error(found, exact):
    """Return `error` of the table; NaN if there is one."""
    worst = []
    for x, y in zip(found, exact):
        x, y = (tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1).split(4096) for tensor in (x, y))
        mean = (sum(part.square().sum() for part in y) / sum(len(part) for part in y)).sqrt()
        worst += [((a.to(b.dtype) - b).norm(dim=1) / b.norm(dim=1).clamp(min=mean)).max()
                  for a, b in zip(x, y)]
    return float(torch.stack(worst).max())


def allowed(case, name, level):
    """Return the largest error that passes; `level` is that of the naive form.

    PyTorch adds the `terms` of a softmax one after another, each rounded to 2^-24 of the sum so far, and p
    - 1 of a likely token magnifies what is off: with a vocabulary of 128256 beyond BOUND. So the naive form
    may be off by such a sum, and the others by twice its error.
    """
    bound = BOUND[case.sets[0][1][0].dtype]
    return bound + case.terms * 2**-24 if name == "naive" else max(bound, 2 * level)


def examine(case, row, prepare, exact, device, bound):
    """Prepare, check and weigh one implementation -> it, ready for timing."""
    (args, wanted, upstream), way = case.sets[0], prepare()

    def run():
        return case.finish(way, args, wanted, upstream, case.begin(way, args))

    found = [x.detach() for x in run()]
    if case.real is not None:
        found[0] = found[0].masked_fill(~case.real[:, :, None, None], 0)
    row["error"] = worst_error(found, exact)
    if not row["error"] <= bound:                              # NaN is not, either
        raise Refused("result is wrong")
    del found
    mask, extra = getattr(way, "keywords", {}).get("mask"), peak_memory(run, device)
    row["extra_bytes"] = extra if mask is None or extra is None else extra + mask.nbytes
    return way


def bench(case, device, ceilings, rounds, seconds):
    """Return the rows of a case."""
    try:
        exact, precision = case.exact(torch.float64), "float64"
    except torch.OutOfMemoryError:
        exact, precision = case.exact(torch.float32), "float32"
    rows = {name: dict(case=case.name, part=case.part, implementation=name, against=precision)
            for name in case.ways}
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()                 # it gives up on functions that it compiled for too many shapes
    ready, level = {}, 0
    for name in sorted(rows, key=lambda name: name != "naive"):        # the others are held against it
        bound = allowed(case, name, level)
        way = attempt(rows[name], partial(examine, case, rows[name], case.ways[name], exact, device, bound))
        if way:
            ready[name] = way
            level = rows[name]["error"] if name == "naive" else level
    del exact

    def turn(way, i):
        args, wanted, upstream = case.sets[i % SETS]
        return partial(case.begin, way, args), partial(case.finish, way, args, wanted, upstream)

    runs = {name: partial(turn, way) for name, way in ready.items()}
    times = take_turns(runs, rounds, seconds, device, lambda name, run: attempt(rows[name], run))
    kinds = (case.flops, ceilings["flops"], "TFLOP/s"), (case.bytes, ceilings["bytes"], "GB/s")
    work, ceiling, unit = max(kinds, key=lambda kind: kind[0] / kind[1])
    for name, found in times.items():
        ms = statistics.median(found)
        rate, ratio = 1000 * work / ms, ms / statistics.median(times["ours"]) if "ours" in times else None
        rows[name] |= dict(ms=ms, all_ms=found, flops=case.flops, bytes=case.bytes, rate=rate, unit=unit,
                           ceiling=rate / ceiling, ratio=ratio)
    return list(rows.values())


def measure_ceilings(device, dtype, quick):
    """Return the FLOPs per second of a large product, the bytes per second (read and written) of a large
    copy."""
    n, size = (8192, 2**30) if device.type == "cuda" else (512, 2**26) if quick else (1536, 2**28)
    pairs = [torch.randn(2, n, n, device=device).to(dtype) for _ in range(SETS)]
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    runs = {"flops": lambda i: (lambda: pairs[i % SETS], lambda pair: pair[0] @ pair[1]),
            "bytes": lambda i: (lambda: source, target.copy_)}
    work = {"flops": 2 * n**3, "bytes": 2 * size}
    times = take_turns(runs, 20, 2, device)
    return {name: 1000 * work[name] / statistics.median(found) for name, found in times.items()}


# ------------------------------------------------------------------------------------------------------------
# The table

COLUMNS = {"case": 22, "implementation": 24, "ms": 8, "rate": 15, "ceiling": 7, "MiB": 6, "error": 7,
           "ratio": 5}                         # and their widths
UNITS = {"TFLOP/s": 1e12, "GB/s": 1e9}


def print_cells(cells):
    """Print a line of the table; a column that is not in `cells` stays empty."""
    line = " | ".join(cells.get(name, "").ljust(width) for name, width in COLUMNS.items())
    print(f"| {line} |", flush=True)


def show(rows):
    """Print rows with a time or a wrong result, then the rest by reason."""
    refused = {}
    for row in rows:
        case, name, no = f"{row['case']} {row['part']}", row["implementation"], "no: " + row.get("no", "")
        if "error" not in row:
            refused.setdefault((case, no), []).append(name)
            continue
        cells = {"case": case, "implementation": name, "ms": no,
                 "error": f"{row['error']:.1e}" + f" of {row['against']}" * (row["against"] != "float64")}
        if row.get("extra_bytes") is not None:
            cells["MiB"] = f"{row['extra_bytes'] / 2**20:.1f}"
        if "ms" in row:
            unit = row["unit"]
            cells |= {"ms": f"{row['ms']:.4g}", "rate": f"{row['rate'] / UNITS[unit]:.3g} {unit}",
                      "ceiling": f"{row['ceiling']:.0%}"}
            if row["ratio"]:
                cells["ratio"] = f"{row['ratio']:.2f}"
        print_cells(cells)
    for (case, no), names in refused.items():
        print_cells({"case": case, "implementation": "; ".join(names), "ms": no})


def describe(device, dtype, quick):
    """Return the hardware, versions and commit that the numbers come from."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    cpu = info.split("model name\t: ")[1].split("\n")[0] if "model name\t: " in info else platform.machine()
    packages = {found.name.replace("_", "-"): found.version for found in importlib.metadata.distributions()}
    gpu = device.type == "cuda"
    return {"hardware": torch.cuda.get_device_name(device) if gpu else cpu,
            "threads": torch.get_num_threads(),
            "type": str(dtype).removeprefix("torch."),
            "sizes": "large" if gpu and not quick else "small",
            "ours": "kernels" if use_triton(torch.empty(0, device=device)) else "twins",
            "commit": git_commit(),
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "CUDA": torch.version.cuda,
            "HIP": torch.version.hip,
            **{name: packages.get(name)
               for name in ("triton", "pytorch-triton", "liger-kernel", "cut-cross-entropy")}}


def main(argv=None):
    parser = command_line("python -m benchmarks.kernels", __doc__)
    parser.add_argument("--only", nargs="+", metavar="CASE", default=[],
                        help=f"cases by name or first word. On a GPU: {', '.join(LARGE)}. "
                             f"On a CPU: {', '.join(SMALL)}; "
                             f"{', '.join(ON_REQUEST)} takes minutes and runs only when named")
    parser.add_argument("--json", type=FILE, metavar="FILE",
                        help="write all numbers there, with hardware, versions and commit")
    parser.add_argument("--quick", action="store_true",
                        help="small sizes on a GPU, too, and three rounds: shows that all runs")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the naive forms on a CPU, too (needs a C++ compiler)")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")                            # backends explain at length why they decline
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    dtype, sizes = torch.bfloat16 if gpu else torch.float32, LARGE if gpu and not args.quick else SMALL
    unknown = [word for word in args.only if not any(word in (name, name.split("-")[0]) for name in sizes)]
    if unknown:
        parser.error(f"--only {unknown[0]}: expected one of {', '.join(sizes)}")
    machine, ceilings = describe(device, dtype, args.quick), measure_ceilings(device, dtype, args.quick)
    print(", ".join(f"{name}: {value}" for name, value in machine.items() if value is not None))
    print(f"ceilings: {ceilings['flops'] / 1e12:.4g} TFLOP/s (product), "
          f"{ceilings['bytes'] / 1e9:.4g} GB/s (copy)\n")
    print_cells({name: name for name in COLUMNS})
    print_cells({name: "-" * width for name, width in COLUMNS.items()})
    rows, asked = [], args.only or set(sizes) - ON_REQUEST
    for name in [name for name in sizes if name in asked or name.split("-")[0] in args.only]:
        build = logprob_cases if len(sizes[name]) == 3 else attention_cases
        for case in build(name, sizes[name], device, dtype, args.compile or gpu):
            found = bench(case, device, ceilings, *((3, 0) if args.quick else (50, 2)))
            show(found)
            rows += found
    if args.json:
        found = {"machine": machine, "ceilings": ceilings, "rows": rows}
        Path(args.json).write_text(to_json(found, indent=1), encoding="utf-8")
    wrong = [f"{row['case']} {row['part']}" for row in rows
             if row["implementation"] == "ours" and row.get("no") == "result is wrong"]
    if wrong:
        sys.exit(f"our result is wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    command(main)
