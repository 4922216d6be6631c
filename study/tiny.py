"""Make a foundation of the tiny model anew, with two processes; docs/tiny tells what came out.

    python -m study.tiny gp-l      # 4 minutes of two cores; gp-vl: the same again, virl-l and virl-vl: 10
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.ranges import command_line, one_of
from harness.terminal import command
from harness.tiny import FOUNDATIONS

HERE = Path(__file__).parents[1]


def routes(steps):
    """Return the flags for steps of routes and views; the rate rises in the first 31.5."""
    return f"--task virl-vl --steps {steps} --warmup {31.5 / steps}"


# Cards with pictures go on from the words; in navigation eyes come first, from street views to describe.
EYES = "--task virl-vl --describe --steps 400 --batch-size 64 --lr-schedule cosine --warmup 0.05 --eval-hands 0"
STAGES = {"gp-l": ["--task gp-l"], "gp-vl": ["--task gp-vl"],
          "virl-l": [EYES, routes(350)], "virl-vl": [EYES, routes(245)]}


def main():
    parser = command_line("python -m study.tiny", "Make a foundation of the built-in tiny model anew.")
    parser.add_argument("name", type=one_of(tuple(STAGES)), metavar="|".join(STAGES))
    name = parser.parse_args().name
    model = FOUNDATIONS / "gp-l" if name == "gp-vl" else "tiny"
    with tempfile.TemporaryDirectory() as folder:
        for k, stage in enumerate(STAGES[name]):
            out = Path(folder) / str(k)
            launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
            train = [sys.executable, *launcher, HERE / "train.py", "--algo", "pretrain"]
            subprocess.run([*train, "--model", model, *stage.split(), "--out", out], check=True)
            model = out / "final"
        shutil.copytree(model, FOUNDATIONS / name, dirs_exist_ok=True)
    print(f"the foundation is in {FOUNDATIONS / name}")


if __name__ == "__main__":
    command(main)
