"""List the variants: python -m variants"""

from harness.ranges import command_line
from harness.terminal import command
from variants import ESTIMATORS, LOSSES, SFT_LOSSES
from variants.official import OF_GAME, PPO


def main(argv=None):
    command_line("python -m variants", "List the variants of the algorithms.").parse_args(argv)
    for flag, table in {"--advantage": ESTIMATORS, "--loss": LOSSES, "--sft-loss": SFT_LOSSES}.items():
        print(flag)
        for name, entry in table.items():
            function = getattr(entry.f, "func", entry.f)       # of a functools.partial
            of = f" (of a {entry.unit}; mean over {entry.mean})" if getattr(entry, "unit", None) else ""
            print(f"  {name}{of}\n      {' '.join(function.__doc__.split(chr(10) * 2)[0].split())}")
    tables = {f"--compat, --task {game}-*": table for game, table in OF_GAME.items()}
    for part, table in (tables | {"--compat, --algo ppo": PPO}).items():
        print(part, *(f"  {name}\n      {line}" for name, line in table.items()), sep="\n")


if __name__ == "__main__":
    command(main)
