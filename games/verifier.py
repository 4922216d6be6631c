"""Judge an answer to either game: a reward, and a message for the model. Text is parsed, never run.

    python -c "from games.verifier import judge; print(judge('{formula: 4*6=24}', ['4', '6'], [4, 6]))"
"""
import re
from collections import Counter
from dataclasses import dataclass
from operator import add, mul, sub, truediv

from games.answers import MAX_FORMULA, read_answer, read_step
from games.compass import COMPASS
from games.observations import fold, wrong_observation
from games.prompts import PROMPTS
from games.solver import arith

# The verdicts, in the order in which they are tried: the first that applies is the only one (appendix A).
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
}
# What the released code charges: once per misplaced sign or number, once per kind of wrong number. A formula
# without such a fault costs 1 if it has no value: a parenthesis stays open, or it divides by zero.
ADDED = {**REWARDS, "used_twice": -2.0, "left_out": -2.0, "division_by_zero": -1.0, "unfinished": -1.0}
STEP_REWARDS = {"no_action": -1.0, "unknown_action": -1.0, "wrong_action": -1.0, "right_action": 1.0}
MISREAD = -1.5      # on top: "cards" (of an image, in any order) or "current observation" are untrue

TURNS = ("left", "right", "slightly left", "slightly right")
SPACES = {rule: ("forward()", "stop()", *(f"turn_direction({x})" for x in words))
          for rule, words in (("absolute", COMPASS), ("relative", TURNS))}


@dataclass
class Verdict:
    """What the verifier thinks of one answer."""
    reward: float
    message: str        # one or two short sentences for the model
    recognized: bool    # "cards" are the dealt ranks, in any order; "current observation" is true
    translated: bool    # "number" are the dealt values; "current instruction" is right (never rewarded)
    code: str           # of REWARDS, STEP_REWARDS; with compat also misread, unfinished, float_miss


_LEVELS = {"+": 1, "-": 1, "*": 2, "/": 2}
# How the released code's solver writes its solutions (n: a number, o: a sign): with at most one pair of
# parentheses, or with two, around two pairs of numbers.
_LISTED = re.compile(r"(?!\(n(on)+\)$)(no)*(n|\(n(on)+\))(on)*|\(non\)o\(non\)(on)*")


def _float_arith(a, op, b):
    """Return what arith is in Python's own numbers, held as (value, 1): 8/(3-8/3) makes 23.99999999999999."""
    if a is None or b is None or (op == "/" and b[0] == 0):
        return None
    return {"+": add, "-": sub, "*": mul, "/": truediv}[op](a[0], b[0]), 1


def _evaluate(tokens, level=1, arith=arith):
    """Take an expression off the end of `tokens` (last token first) by precedence climbing; return its value.

    ValueError if there is none. MAX_FORMULA bounds the nesting."""
    token = tokens.pop() if tokens else ""
    if token == "(":
        value = _evaluate(tokens, 1, arith)
        if not tokens or tokens.pop() != ")":
            raise ValueError("unbalanced parentheses")
    elif token == "-":      # a sign binds more tightly than any operation
        value = arith((0, 1), "-", _evaluate(tokens, 3, arith))
    elif token.isdecimal():
        value = (int(token), 1)
    else:
        raise ValueError(f"unexpected {token!r}")
    while tokens and _LEVELS.get(tokens[-1], 0) >= level:
        op = tokens.pop()
        value = arith(value, op, _evaluate(tokens, _LEVELS[op] + 1, arith))
    return value


def _misplaced(tokens):
    """Count the tokens that cannot follow the one before. As in the released code there is no minus sign."""
    count, open_, before = 0, 0, ""
    # A number and ( begin a value, all else follows one.
    for token in tokens:
        value_before = before.isdecimal() or before == ")"
        wrong = value_before == (token.isdecimal() or token == "(") or token == ")" and not open_
        open_ += 0 if wrong else (token == "(") - (token == ")")
        count, before = count + wrong, token
    return count


def _number_faults(tokens, numbers):
    """Return [(code, the smallest number concerned)] of what is wrong with the numbers in a formula."""
    # As in the released code a number used twice counts only where none is foreign.
    used, dealt = Counter(int(token) for token in tokens if token.isdecimal()), Counter(numbers)
    foreign = used.keys() - dealt.keys()
    twice = () if foreign else used - dealt
    found = {"foreign_number": foreign, "used_twice": twice, "left_out": dealt - used}
    return [(code, str(min(wrong))) for code, wrong in found.items() if wrong]


def _value_fault(tokens, value, target, floats):
    """Return (code, number) of a formula of the right numbers that makes `value`; None if that is right."""
    made = _evaluate(tokens[::-1], arith=_float_arith) if floats else value
    if made == (target, 1):
        return None
    shape = re.sub(r"[0-9]+", "n", re.sub(r"[-+*/]", "o", "".join(tokens)))
    if value == (target, 1) and _LISTED.fullmatch(shape):
        return "float_miss", None
    return "wrong_value", f"{value[0]}/{value[1]}" if value[1] > 1 else str(value[0])


def _faults(formula, numbers, target, compat):
    """Return [(code, the number that its message mentions or None)], never empty, of all that is wrong with a
    formula (None: there is none), or that it is right. The first is the paper's verdict."""
    if formula is None:
        return [("no_json", None)]
    left, _, right = formula.rpartition("=")
    if not left or not re.fullmatch(r"\s*[0-9]+", right):
        return [("no_target", None)]
    if len(formula) > MAX_FORMULA or re.search(r"[^0-9\s()*/+-]", left):    # nothing else is looked at
        return [("unparsable", None)]
    tokens = re.findall(r"[0-9]+|\S", left)
    rest = tokens[::-1]
    # Numbers are looked at in a formula that cannot be evaluated, too: "added-penalties" counts both.
    try:
        value = _evaluate(rest)
        unfinished = bool(rest)
    except ValueError:
        unfinished = True
    unreadable = _misplaced(tokens) if "added-penalties" in compat else unfinished
    faults = [("unparsable", None)] * unreadable + _number_faults(tokens, numbers)
    if faults:
        return faults
    if unfinished:
        return [("unfinished", None)]
    if value is None:
        return [("division_by_zero", None)]
    wrong = _value_fault(tokens, value, target, "float-equality" in compat)
    return [wrong or ("correct" if int(right) == target else "no_target", None)]


def judge(text, cards, numbers, target=24, image=False, prompts=PROMPTS, compat=frozenset()):
    """Return the verdict on any text whatever, never an exception.

    cards: dealt ranks; numbers: their values; image: whether misread cards cost MISREAD; compat: names of
    envs.COMPAT["gp"]. Rewards: see REWARDS."""
    read_cards, read_numbers, formula = read_answer(text)
    added = "added-penalties" in compat
    faults = _faults(formula, numbers, target, compat)[:None if added else 1]
    price = {"float_miss": 0.0, **(ADDED if added else REWARDS)}
    recognized = sorted(read_cards or []) == sorted(cards)
    translated = sorted(read_numbers or []) == sorted(map(str, numbers))
    # A message is read by the model: a number of 200 digits is cut.
    short = lambda number: number if number is None or len(number) <= 12 else number[:11] + "…"
    told = [prompts[code].format(number=short(number), target=target) for code, number in faults]
    reward, message = sum(price[code] for code, _ in faults), " ".join(dict.fromkeys(told))
    if image and not recognized:
        misread = prompts["misread"].format(target=target)
        if "misread-first" in compat:
            return Verdict(MISREAD, misread, recognized, translated, "misread")
        reward, message = reward + MISREAD, f"{misread} {message}"
    return Verdict(reward, message, recognized, translated, faults[0][0])


def judge_step(text, point, sentence, landmarks, rule, prompts=PROMPTS):
    """Return the verdict on any text whatever, never an exception.

    point: the truth; sentence: the instruction to follow there; landmarks: all names of the route; rule: of
    SPACES. Rewards (appendix B): +1 or -1 for the action and, on top, MISREAD for an observation that misses
    the landmark or the intersection or claims a wrong one."""
    observation, instruction, action = read_step(text)
    wrong = wrong_observation(observation, point.observation, point.landmark, point.intersection, landmarks)
    code = ("no_action" if action is None else "right_action" if action == point.action else
            "wrong_action" if action in SPACES[rule] else "unknown_action")
    message = " ".join(prompts[key].format(target="") for key in [*wrong, code])
    translated = instruction is not None and fold(instruction) == fold(sentence)
    return Verdict(STEP_REWARDS[code] + MISREAD * bool(wrong), message, not wrong, translated, code)
