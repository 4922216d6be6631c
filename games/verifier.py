"""Judge an answer to either game: a reward, and a message for the model. Text is parsed, never run.

    python -c "from games.verifier import judge; print(judge('{formula: 4*6=24}', ['4', '6'], [4, 6]))"
"""
import re
from collections import Counter
from dataclasses import dataclass

from games.answers import MAX_FORMULA, read_answer, read_step
from games.compass import COMPASS
from games.observations import wrong_observation
from games.prompts import PROMPTS
from games.solver import arith

# The first verdict that applies, in this order, is the only one (appendix A); a false right side comes last.
REWARDS = {
    "no_json": -3.0,            # no JSON object with a formula
    "no_target": -3.0,          # no right-hand side, or one that denies the target that the left side makes
    "unparsable": -3.0,         # not an expression of integers, + - * / and ( )
    "foreign_number": -2.0,     # a number that was not dealt
    "used_twice": -3.0,         # a dealt number used more often than it was dealt
    "left_out": -3.0,           # a dealt number not used
    "division_by_zero": -3.0,
    "wrong_value": -1.0,        # a legal formula, whatever it claims to equal, that misses the target
    "correct": 5.0,
    "misread": -1.5,            # on top: "cards" of an image, in any order, are untrue
}
STEP_REWARDS = {"no_action": -1.0, "unknown_action": -1.0, "wrong_action": -1.0, "right_action": 1.0}
MISREAD = REWARDS["misread"]    # on top there, too: "current observation" is untrue
TURNS = ("left", "right", "slightly left", "slightly right")
# rule -> its action space, all actions that it knows
SPACES = {rule: ("forward()", "stop()", *(f"turn_direction({x})" for x in words))
          for rule, words in (("absolute", COMPASS), ("relative", TURNS))}


@dataclass
class Verdict:
    """The verifier's judgement of one answer."""
    reward: float
    message: str        # short sentences for the model
    recognized: bool    # "cards" are the dealt ranks, in any order; "current observation" is true
    code: str           # of REWARDS, STEP_REWARDS


_LEVELS = {"+": 1, "-": 1, "*": 2, "/": 2}


def compute(tokens, arith=arith):
    """Return the value (n, d) of an expression, None where it divides by zero.

    ValueError if it is none. MAX_FORMULA bounds the nesting."""
    rest = tokens[::-1]

    def climb(level):
        """Take an expression off the end of `rest` by precedence climbing; return its value."""
        token = rest.pop() if rest else ""
        if token == "(":
            value = climb(1)
            if not rest or rest.pop() != ")":
                raise ValueError("unbalanced parentheses")
        elif token == "-":      # a sign binds more tightly than any operation
            value = arith((0, 1), "-", climb(3))
        elif token.isascii() and token.isdecimal():
            value = (int(token), 1)
        else:
            raise ValueError(f"unexpected {token!r}")
        while rest and _LEVELS.get(rest[-1], 0) >= level:
            op = rest.pop()
            value = arith(value, op, climb(_LEVELS[op] + 1))
        return value

    value = climb(1)
    if rest:
        raise ValueError(f"unexpected {rest[-1]!r}")
    return value


def number_faults(tokens, numbers):
    """Return {code: the smallest number concerned} of what is wrong with the numbers in a formula."""
    used, dealt = Counter(map(int, filter(str.isdecimal, tokens))), Counter(numbers)
    found = {"foreign_number": used.keys() - dealt.keys(), "used_twice": used - dealt,
             "left_out": dealt - used}
    return {code: str(min(wrong)) for code, wrong in found.items() if wrong}


def fault(formula, numbers, target):
    """Return the verdict on a formula (None: there is none): (code, the number that its message mentions)."""
    if formula is None:
        return "no_json", ""
    left, _, right = formula.rpartition("=")
    if not left or not re.fullmatch(r"\s*[0-9]+", right):
        return "no_target", ""
    if len(formula) > MAX_FORMULA:
        return "unparsable", ""
    tokens = re.findall(r"[0-9]+|\S", left)
    try:
        value = compute(tokens)
    except ValueError:
        return "unparsable", ""
    if wrong := number_faults(tokens, numbers):
        return next(iter(wrong.items()))
    if value is None:
        return "division_by_zero", ""
    if value != (target, 1):
        return "wrong_value", "/".join(map(str, value)).removesuffix("/1")
    return "correct" if int(right) == target else "no_target", ""


def judge(text, cards, numbers, target=24, image=False, prompts=PROMPTS,
          faults=lambda *said: [fault(*said)], rewards=REWARDS):
    """Return the verdict on any text whatever, never an exception.

    cards: dealt ranks; numbers: their values; image: whether misread cards cost more; faults: what is wrong
    with a formula, in the paper one thing alone; rewards: their sum is given."""
    read_cards, formula = read_answer(text)
    recognized = sorted(read_cards or []) == sorted(cards)
    found = faults(formula, numbers, target)
    told = [("misread", "")] * (image and not recognized) + found
    # A message is read by the model: a number of 200 digits is cut.
    short = lambda number: number if len(number) <= 12 else number[:11] + "…"
    message = [prompts[code].format(number=short(number), target=target) for code, number in told]
    return Verdict(sum(rewards[code] for code, _ in told), " ".join(dict.fromkeys(message)),
                   recognized, found[0][0])


def judge_step(text, point, landmarks, rule, prompts=PROMPTS):
    """Return the verdict on any text whatever, never an exception.

    point: the truth; landmarks: all names of the route; rule: of SPACES. Rewards (appendix B): +1 or -1 for
    the action and, on top, MISREAD for an observation that misses the landmark or the intersection or claims
    a wrong one."""
    observation, action = read_step(text)
    wrong = wrong_observation(observation, point.observation, point.landmark, point.intersection, landmarks)
    code = ("no_action" if action is None else "right_action" if action == point.action else
            "wrong_action" if action in SPACES[rule] else "unknown_action")
    message = " ".join(prompts[key].format(target="") for key in [*wrong, code])
    return Verdict(STEP_REWARDS[code] + MISREAD * bool(wrong), message, not wrong, code)
