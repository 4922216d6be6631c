"""List what the tiny model learns before post-training: a mixture of games, as pairs of a share and the
settings of a game.

    python -c "from games import foundation; print(*foundation.cards()[:4], sep='\\n')"

It stands for what the paper's Llama brings along. It is broad: the rule and the look of post-training are a
few cases among many.
"""
import random

TESTED_RULES = "5", "7", "10", "11-12-13"      # those of GeneralPoints.shifts
TESTED_TARGETS = 12, 20, 24, 36


def cards():
    """Return the mixture for GeneralPoints: 102 rules, many targets, all suits, in words and as pictures in
    many inks, two thirds of which are only to be read.

    Of what `shifts` tests it holds the two rules that are compared, no other rule and no other target. Their
    weights make the same deal about as hard under either.
    """
    rng = random.Random("rules of the foundation")
    rules = dict.fromkeys("-".join(str(rng.randint(1, 20)) for _ in range(rng.choice((1, 3))))
                          for _ in range(300))
    rules = [rule for rule in rules if rule not in TESTED_RULES]
    targets = [target for target in range(10, 37) if target not in TESTED_TARGETS]
    games = [(0.15, {"rule": "10"}), (0.25, {"rule": "11-12-13", "deal": "face"})]
    games += [(0.4 / 60, {"rule": rule, "deal": "face"}) for rule in rules[:60]]
    games += [(0.2 / 40, {"rule": rule, "target": rng.choice(targets)}) for rule in rules[60:100]]
    everything, seen = {"look": "all", "held_out": None}, {"image": True, "style": "varied"}
    return [(2.0, everything | seen | {"describe": True})] + [
        (weight, everything | game | way) for weight, game in games for way in ({"image": False}, seen)]


def navigation():
    """Return the mixture for Navigation: both action spaces, several cities, words and pictures."""
    ways = [(1.0, {"image": False}), (0.5, {"image": True}), (0.5, {"image": True, "hide_landmarks": True})]
    looks = "new-york", "broad"
    return [(1.5, {"image": True, "describe": True, "look": look}) for look in looks] + [
        (weight, way | {"rule": rule, "look": look})
        for weight, way in ways for rule in ("absolute", "relative") for look in looks]
