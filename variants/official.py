"""Bring back what the released code does differently, by name, or all of it: --compat official.

    torchrun train.py --task gp-l --algo ppo --advantage gae --samples 1 --hands 256 --compat official

Each switch says what it does and why the default differs: a game's own in official_games.py, PPO's here.
`python -m variants.official` lists all.
"""
from dataclasses import dataclass
from functools import lru_cache

from harness.ranges import arg, command_line, one_of, several
from harness.terminal import command
from variants.official_games import OF_GAME, play

PPO = {
    "leaking-gae":
        "an episode that used up its attempts does not end the chain: the value and the advantage of the "
        "next, unrelated hand flow into it (GAE over turns); nothing of the next hand can be due to this one",
    "first-token-unscored":
        "the first token of an answer counts neither in its log-prob nor in its gradient; it was sampled "
        "like all others",
    "bf16-logprobs":
        "log-probs are rounded to bfloat16 before they are summed to a turn's: steps of up to 0.1 against a "
        "clip range of 0.1",
    "ratio-10":
        "where a ratio exceeds 10, the clipped surrogate alone counts, whose gradient is zero outside of the "
        "range even where it would lead back (--loss ppo); the released code looks for such a ratio in a "
        "micro-batch, which holds one turn",
    "rank-advantages":
        "each rank normalises the advantages of its own episodes; the mean and deviation of a rank depend on "
        "how many there are",
}
NAMES = frozenset(PPO).union(*OF_GAME.values())


@dataclass
class OfficialSettings:
    """Settings that bring back the released code."""
    compat: str = arg("", several(one_of(("official", *sorted(NAMES)))),
                      "behaviours of the released code, by name, joined by commas, or official: all (python "
                      "-m variants.official lists them)")
    after_failure: str = arg(None, one_of(("end", "walk-on")),
                             "virl: what follows a point that stays wrong, the end of the episode (default, "
                             "the paper) or the next point")


@lru_cache
def switches(text):
    """Return the names in --compat. "official": all."""
    return NAMES if text == "official" else frozenset(filter(None, text.split(",")))


def wrap(game, text):
    """Return the game with what --compat changes in it."""
    return play(game, switches(text))


def main():
    command_line("python -m variants.official", "List what --compat takes, and what each does.").parse_args()
    tables = {f"--task {game}-*": table for game, table in OF_GAME.items()}
    for part, table in (tables | {"--algo ppo": PPO}).items():
        print(part, *(f"  {name}\n      {line}" for name, line in table.items()), sep="\n")


if __name__ == "__main__":
    command(main)
