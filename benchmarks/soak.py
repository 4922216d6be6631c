"""Train on two ranks for half an hour while one of them, chosen by chance, is killed every minute or so.

    python -m benchmarks.soak --minutes 30

torchrun starts them again and they resume. At the end the run must hold every update once, and its weights
must be those of a run that nobody disturbed, bit for bit. Prints that, and by how much the memory of the
latter grew after a quarter of its updates; also to docs/soak.json.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import machine
from harness.ranges import above, command_line, integer
from harness.terminal import command
from model import Llama

ROOT = Path(__file__).resolve().parents[1]


def start(out, steps):
    """Start torchrun with two ranks of a small gp-vl PPO run, each on one thread."""
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1000".split()
    argv = "--task gp-vl --algo ppo --shard on --hands 8 --samples 2 --eval-hands 0 --save-every 5"
    return subprocess.Popen([sys.executable, *torchrun, ROOT / "train.py", *argv.split(),
                             "--model", ROOT / "docs/tiny/gp", "--steps", str(steps), "--out", out],
                            stdout=open(f"{out}.output", "a", encoding="utf-8"), stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def ranks(torchrun):
    """Return the process ids of its workers."""
    tasks = Path(f"/proc/{torchrun.pid}/task")
    children = [task / "children" for task in tasks.iterdir()]
    return [int(pid) for file in children for pid in file.read_text(encoding="utf-8").split()]


def records(out, event="step"):
    """Read what the run logged of an event; nothing where it has not logged yet."""
    log = out / "log.jsonl"
    lines = map(json.loads, log.read_text(encoding="utf-8").splitlines() if log.exists() else ())
    return [line for line in lines if line["event"] == event]


def learnt(out):
    """Read the log of all updates but for times and memory."""
    return [{name: value for name, value in line.items() if "second" not in name and "memory" not in name}
            for line in records(out)]


def watch(torchrun, out, minutes):
    """Kill ranks until the run ends -> [(minutes, updates done)] of the kills, and minutes of the end."""
    rng, begun, kills = random.Random(0), time.time(), []
    due = rng.uniform(40, 100)
    while torchrun.poll() is None:
        time.sleep(1)
        now = time.time() - begun
        if due < now < 60 * minutes and ranks(torchrun):
            os.kill(rng.choice(ranks(torchrun)), signal.SIGKILL)
            kills.append((round(now / 60, 2), len(records(out))))
            due = now + rng.uniform(40, 100)
    return kills, round((time.time() - begun) / 60, 1)


def main(argv=None):
    parser = command_line("python -m benchmarks.soak", __doc__)
    parser.add_argument("--minutes", type=above(0), default=30.0, help="how long to kill (default: 30)")
    parser.add_argument("--steps", type=integer(1), default=300, help="updates of the run (default: 300)")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp())
    out, calm = folder / "disturbed", folder / "calm"
    kills, minutes = watch(start(out, args.steps), out, args.minutes)
    _, calm_minutes = watch(start(calm, args.steps), calm, 0)
    memory = [line["memory_gb"] for line in records(calm)]
    ours, theirs = (Llama.from_pretrained(folder / "final").state_dict() for folder in (out, calm))
    result = {
        **machine(),
        "steps": args.steps,
        "minutes": minutes,
        "minutes_undisturbed": calm_minutes,
        "kills": kills,
        "starts": len(records(out, "start")),
        "updates_in_order": [line["step"] for line in records(out)] == list(range(1, args.steps + 1)),
        "same_log": learnt(out) == learnt(calm),
        "same_weights": all(ours[name].equal(theirs[name]) for name in ours),
        "memory_growth": round(memory[-1] / memory[len(memory) // 4] - 1, 4),
    }
    print(json.dumps(result, indent=2))
    (ROOT / "docs/soak.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    if not (result["updates_in_order"] and result["same_log"] and result["same_weights"]):
        sys.exit(f"not the same: see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    command(main)
