"""Make a foundation of the tiny model anew, with two processes; docs/tiny tells what came out.

    python -m study.tiny gp-l      # 4 minutes on two cores; gp-vl: 4 more, virl-l: 13, virl-vl: 12
"""

import shutil
import subprocess
import sys
import tempfile

from harness.ranges import command_line, one_of
from harness.terminal import command
from harness.tiny import FOUNDATIONS


def routes(steps):
    """Return the flags for steps of routes and views; the rate rises in the first 31.5."""
    return f"--model {{folder}}/0/final --task virl-vl --steps {steps} --warmup {31.5 / steps}"


# Cards with pictures go on from the words; in navigation eyes come first, from street views to describe.
EYES = ("--model tiny --task virl-vl --describe --steps 400 --batch-size 64 --lr-schedule cosine "
        "--warmup 0.05 --eval-hands 0")
STAGES = {"gp-l": ["--model tiny --task gp-l"], "gp-vl": ["--model docs/tiny/gp-l --task gp-vl"],
          "virl-l": [EYES, routes(350)], "virl-vl": [EYES, routes(245)]}
TRAIN = "-m torch.distributed.run --standalone --nproc-per-node 2 train.py --algo pretrain"


def main():
    parser = command_line("python -m study.tiny", "Make a foundation of the built-in tiny model anew.")
    parser.add_argument("name", type=one_of(tuple(STAGES)), metavar="|".join(STAGES))
    name, root = parser.parse_args().name, FOUNDATIONS.parents[1]
    with tempfile.TemporaryDirectory() as folder:
        for k, stage in enumerate(STAGES[name]):
            words = f"{TRAIN} {stage} --out {{folder}}/{k}".format(folder=folder).split()
            subprocess.run([sys.executable, *words], cwd=root, check=True)
        shutil.copytree(f"{folder}/{k}/final", FOUNDATIONS / name, dirs_exist_ok=True)
    print(f"the foundation is in {FOUNDATIONS / name}")


if __name__ == "__main__":
    command(main)
