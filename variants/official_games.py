"""The games as the released code plays them: its deals, its verdicts and its names for left and right.

    python -c "from variants import official_games as o; print(o.unwrapped_turn(350, 10))"

The games do not know this file: `play` replaces how they deal cards, judge answers and name directions.
"""
import re
from dataclasses import replace
from functools import partial
from operator import add, mul, sub, truediv

from envs import EXHAUSTED, GeneralPoints, Navigation
from games.answers import MAX_FORMULA
from games.cards import FACES
from games.rails import name_turn
from games.verifier import MISREAD, REWARDS, compute, fault, judge, number_faults

# Behaviours by game, and why the default differs.
#
# sixth-attempt: after the last judged attempt one more answer is drawn, which nobody judges, gets -1 and is
#     trained on. Here that -1 goes to the answer that used up the attempts.
# added-penalties: the penalties of all that is wrong with a formula add up: 3 per misplaced sign or number
#     (also a minus sign), 2 if a number was not dealt or else is used too often, 2 if one is left out;
#     without any of these a formula that has no value costs 1. In the paper an answer has one verdict.
# misread-first: misread cards (image tasks) cost 1.5 and the formula is not judged. In the paper they cost
#     1.5 more.
# iid-deck: four independent draws of rank and suit, so that a card can be dealt twice, one of them from the
#     face cards alone where a face is wanted. The paper deals from a deck.
# float-equality: whether a formula makes the target is decided in floating point. Where that misses, as of
#     8/(3-8/3)=24, the answer gets 0 and the message '.'. The default is exact.
# unwrapped-angles: a turn is named by new heading less old, from 350 to 10 degrees 'left'. It is slightly
#     right.
OF_GAME = {"gp": ("sixth-attempt", "added-penalties", "misread-first", "iid-deck", "float-equality"),
           "virl": ("sixth-attempt", "unwrapped-angles")}


class SixthAttempt:
    """A game with one more answer after the last attempt: nobody judges it, and it alone costs EXHAUSTED."""

    def __init__(self, game):
        self.game, self.attempts = game, game.attempts
        game.attempts += 1

    def __getattr__(self, name):
        return getattr(self.game, name)

    def step(self, text):
        if self.game.attempt != self.attempts:
            return self.game.step(text)
        observation, _, _, truncated, info = self.game.step("")     # wrong in any game, whatever was said
        info |= {"verdict": "unjudged", "message": "", "recognized": False}
        arrived = "point" in info and info["point"] == len(self.game.points) - 1
        return observation, EXHAUSTED, arrived, truncated, info


def play(game, names):
    """Return the game with the behaviours in `names` that it has (see OF_GAME)."""
    if isinstance(game, GeneralPoints):
        game.judge = partial(judge_as_released, game, names)
        if "iid-deck" in names:
            game.draw = partial(draw_independently, game)
    if isinstance(game, Navigation) and "unwrapped-angles" in names:
        game.turn = unwrapped_turn
    return SixthAttempt(game) if "sixth-attempt" in names else game


def unwrapped_turn(old, new):
    """Return the word for the turn from heading `old` to `new`, as if it never passed north."""
    return name_turn(new - old)


def draw_independently(game):
    """Return a hand of cards each drawn from the whole deck, with a face among them where one is wanted."""
    last = [card for card in game.deck if game.deal == "any" or card[0] in FACES]
    hand = game.rng.choices(game.deck, k=game.cards - 1) + game.rng.choices(last)
    return game.rng.sample(hand, game.cards)        # shuffled


# A formula without a misplaced sign or a wrong number costs 1 if it has no value: a parenthesis stays open,
# or it divides by zero.
ADDED = {"used_twice": -2.0, "left_out": -2.0, "division_by_zero": -1.0, "unfinished": -1.0}


def judge_as_released(game, names, text):
    """Return the verdict on an answer to a GeneralPoints; see verifier.judge."""
    rewards = REWARDS | {"float_miss": 0.0} | (ADDED if "added-penalties" in names else {})
    verdict = judge(text, game.ranks, game.numbers, game.target, game.image, game.prompts,
                    partial(find_faults, names), rewards)
    if "misread-first" in names and game.image and not verdict.recognized:
        message = game.prompts["misread"].format(target=game.target)
        return replace(verdict, reward=MISREAD, message=message, code="misread")
    return verdict


def find_faults(names, formula, numbers, target):
    """Return [(code, number that its message mentions)] of all that is charged for; see verifier.fault."""
    first = fault(formula, numbers, target)
    # Of a formula with other signs nothing else is looked at.
    if not re.fullmatch(r"[0-9\s()*/+-]+=\s*[0-9]+", formula or "") or len(formula) > MAX_FORMULA:
        return [first]
    left, _, right = formula.rpartition("=")
    tokens = re.findall(r"[0-9]+|\S", left)
    if "added-penalties" in names:
        wrong = number_faults(tokens, numbers)
        if "foreign_number" in wrong:
            wrong.pop("used_twice", None)       # costs nothing then
        if found := [("unparsable", "")] * misplaced(tokens) + [*wrong.items()]:
            return found
        if first[0] == "unparsable":
            return [("unfinished", "")]
    if "float-equality" in names and first[0] in ("correct", "no_target", "wrong_value"):
        if compute(tokens, float_arith) == (target, 1):
            return [("correct" if int(right) == target else "no_target", "")]
        if first[0] != "wrong_value":       # but exactly it makes the target
            return [("float_miss", "")]
    return [first]


def float_arith(a, op, b):
    """Return what solver.arith does in Python's own numbers, held as (value, 1): 8/(3-8/3) makes
    23.99999999999999."""
    if not a or not b or op == "/" and b[0] == 0:
        return None
    return {"+": add, "-": sub, "*": mul, "/": truediv}[op](a[0], b[0]), 1


def misplaced(tokens):
    """Count the tokens that cannot follow the one before. As in the released code there is no minus sign."""
    count, open_, before = 0, 0, ""
    # A number and ( begin a value, all else follows one.
    for token in tokens:
        value_before = before.isdecimal() or before == ")"
        wrong = value_before == (token.isdecimal() or token == "(") or token == ")" and not open_
        open_ += 0 if wrong else (token == "(") - (token == ")")
        count, before = count + wrong, token
    return count
