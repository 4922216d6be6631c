"""Several instances of a game as one, so that training mixes rules evenly.

    Mixed([GeneralPoints(rule="10"), GeneralPoints(rule="5")]).reset(seed)
"""
from games.seeds import derive


class Mixed:
    """Instances of a game of which the seed chooses one, so that all samples of a hand agree."""

    def __init__(self, games):
        self.games, self.game = games, games[0]

    def _choose(self, seed):
        # Not by the generator of the game, which starts from the seed itself: the first card would tell.
        self.game = self.games[derive("game", seed) % len(self.games)]
        return self.game

    def reset(self, seed):
        return self._choose(seed).reset(seed)

    def demonstrate(self, seed, mistakes=0):
        return self._choose(seed).demonstrate(seed, mistakes)

    def __getattr__(self, name):
        """Pass on all else, from step() to answer_key: it is that of the game being played."""
        return getattr(self.game, name)
