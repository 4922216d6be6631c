"""Bring back what the released code does differently, by name, or all of it: --compat official.

    torchrun train.py --task gp-l --algo ppo --advantage gae --samples 1 --hands 256 --compat official

Each switch says what it does and why the default differs: a game's own in envs.COMPAT, the rest here.
`python -m variants.official` lists all.
"""
from functools import lru_cache

from envs import COMPAT, EXHAUSTED
from harness.terminal import command

SIXTH = {
    "sixth-attempt":
        "after the last judged attempt one more answer is drawn, which nobody judges, gets -1 and is trained "
        "on; here that -1 goes to the answer that used up the attempts",
}
OF_GAME = {game: {**SIXTH, **own} for game, own in COMPAT.items()}
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


class SixthAttempt:
    """A game with one more answer after the last attempt: nobody judges it, and it alone costs EXHAUSTED."""

    def __init__(self, game):
        self.game, self.attempts = game, game.attempts

    def __getattr__(self, name):
        return getattr(self.game, name)

    def reset(self, seed):
        self.game.attempts = self.attempts + 1
        return self.game.reset(seed)

    def demonstrate(self, seed, mistakes=0):
        self.game.attempts = self.attempts
        return self.game.demonstrate(seed, mistakes)

    def step(self, text):
        if self.game.attempt != self.attempts:
            return self.game.step(text)
        observation, _, _, truncated, info = self.game.step("")     # wrong in any game, whatever was said
        info |= {"verdict": "unjudged", "message": "", "recognized": False, "translated": False}
        arrived = "point" in info and info["point"] == len(self.game.points) - 1
        return observation, EXHAUSTED, arrived, truncated, info


@lru_cache
def switches(text):
    """Return the names in --compat. "official": all."""
    return NAMES if text == "official" else frozenset(filter(None, text.split(",")))


def of_game(text, game):
    """Return those that the game itself takes."""
    return switches(text) & COMPAT[game].keys()


def wrap(game, text):
    """Return the game, with the sixth attempt if it is among the names in --compat."""
    return SixthAttempt(game) if "sixth-attempt" in switches(text) else game


def main():
    from harness.ranges import command_line
    command_line("python -m variants.official", "List what --compat takes, and what each does.").parse_args()
    tables = {f"--task {game}-*": table for game, table in OF_GAME.items()}
    for part, table in (tables | {"--algo ppo": PPO}).items():
        print(part, *(f"  {name}\n      {line}" for name, line in table.items()), sep="\n")


if __name__ == "__main__":
    command(main)
