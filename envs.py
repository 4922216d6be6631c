"""The games: deal, show, judge, and an expert to learn from. No torch and no model in here.

GeneralPoints (paper, section 4.1 and appendix A): four playing cards, in words or as an image; use each exactly once
with + - * / ( ) to make 24. A game has gymnasium's shape: `reset(seed)` deals, `step(text)` judges an answer; what
the model must be told next comes back as chat messages. Try it:

    python -c "import envs; g = envs.GeneralPoints(); print(g.reset(0)[0].messages[0]['content']); print(g.oracle())"
"""
import json
import math
import random
import re
import string
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = ("spades", "clubs", "hearts", "diamonds")
FACES = ("J", "Q", "K")
LOOKS = {"black": SUITS[:2], "red": SUITS[2:], "all": SUITS}

# The verdicts, in the order in which they are tried: the first that applies is the only one (paper, appendix A).
REWARDS = {
    "no_json": -3.0,            # no JSON object with a formula
    "no_target": -3.0,          # no right-hand side, or the left side makes the target and the right side denies it
    "unparsable": -3.0,         # not an expression of integers, + - * / and ( )
    "foreign_number": -2.0,     # a number that was not dealt
    "used_twice": -3.0,         # a dealt number used more often than it was dealt
    "left_out": -3.0,           # a dealt number not used
    "division_by_zero": -3.0,
    "wrong_value": -1.0,        # a legal formula, whatever it claims to equal, that misses the target
    "correct": 5.0,
}
MISREAD = -1.5      # on top, image tasks only: the answer's "cards" are not the dealt ones, in any order
EXHAUSTED = -1.0    # on top, when the last attempt fails

# str.format templates; load_prompts() replaces any of them. A literal brace is doubled.
_ANSWER = ('Answer with one JSON object: {{"cards": [the four ranks, as in "A", "10", "Q"], "number": [their values], '
           '"formula": "an equation that ends in ={target}"}}')
_RULE = " with + - * / and parentheses, to make {target}. A counts as 1. {rule} Other cards count as printed.\n"
PROMPTS = {
    "gp-l": "Use the values of the four cards, each exactly once," + _RULE + "Cards: {cards}\n" + _ANSWER,
    "gp-vl": "The image shows four playing cards. Use their values, each exactly once," + _RULE + _ANSWER,
    "rule_same": "J, Q and K all count as {J}.",                    # {rule}, when the three are worth the same
    "rule_each": "J counts as {J}, Q as {Q} and K as {K}.",         # {rule}, otherwise
    "no_json": "There is no JSON with a formula.",
    "no_target": "The formula must end in ={target}.",
    "unparsable": "The formula cannot be read.",
    "foreign_number": "{number} is not one of the numbers.",
    "used_twice": "{number} is used too often.",
    "left_out": "{number} is left out.",
    "division_by_zero": "The formula divides by zero.",
    "wrong_value": "The formula gives {number}, not {target}.",
    "misread": "The cards are misread.",
    "correct": "Correct.",
}


@dataclass
class Observation:
    """What the model must be told next. A content is a str, or Hugging Face's list of image and text parts."""
    messages: list[dict]    # [{"role": "user", "content": ...}]; empty when the episode is over
    fresh: bool             # True: they start a new conversation; False: they continue the current one


@dataclass
class Verdict:
    """What the verifier thinks of one answer."""
    reward: float
    message: str        # one or two short sentences for the model
    recognized: bool    # the answer's "cards" are the dealt ranks, in any order
    translated: bool    # the answer's "number" are the dealt values, in any order (reported, never rewarded)
    code: str           # a key of REWARDS


# ---------------------------------------------------------------------------------------------------- prompts, rules

def _fields(template):
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def check_prompts(prompts, source="prompts"):
    """PROMPTS with some templates replaced. ValueError that names `source` and the key: an unknown key, not a
    template, a field that its default has not, or a task prompt ("gp-...") that lacks a field of its default."""
    for key, template in prompts.items():
        if key not in PROMPTS:
            raise ValueError(f"{source}: unknown key {key!r}, expected one of {', '.join(PROMPTS)}")
        fields = _fields(PROMPTS[key])
        try:
            missing = fields - _fields(template) if key.startswith("gp-") else None
            template.format(**dict.fromkeys(fields | {"target"}, ""))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: {key!r} is not a template with fields {sorted(fields | {'target'})} "
                             f"and {{{{ }}}} for braces: {error}") from None
        if missing:
            raise ValueError(f"{source}: {key!r} lacks the fields {sorted(missing)}")
    return {**PROMPTS, **prompts}


def load_prompts(path):
    """Templates from a JSON file {key: template}, the defaults elsewhere; ValueError (one line) if it is bad."""
    try:
        with open(path, encoding="utf-8") as file:
            prompts = json.load(file)
    except ValueError as error:     # not JSON, or not UTF-8
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(prompts, dict):
        raise ValueError(f"{path}: expected a JSON object of templates, got {type(prompts).__name__}")
    return check_prompts(prompts, str(path))


def face_values(rule):
    """{"J": 10, "Q": 10, "K": 10} for "10", {"J": 11, "Q": 12, "K": 13} for "11-12-13"."""
    parts = str(rule).split("-")
    if len(parts) not in (1, 3) or not all(re.fullmatch("[1-9][0-9]{0,5}", part) for part in parts):
        raise ValueError(f"rule {rule!r}: expected one positive integer for J, Q and K, as in '10', "
                         "or three, as in '11-12-13'")
    return dict(zip(FACES, map(int, parts * (3 // len(parts)))))


def card_values(ranks, rule):
    """The values of `ranks` (a list of RANKS) under `rule`: A is 1, a number card its number, J, Q, K by the rule."""
    values = {"A": 1, **face_values(rule)}
    return [values[rank] if rank in values else int(rank) for rank in ranks]


# ------------------------------------------------------------------------------------------------------------ solver

def arith(a, op, b):
    """Exact `a op b` on fractions held as reduced pairs (n, d > 0), which are much faster than Fraction.
    None stands for undefined, and stays undefined."""
    if a is None or b is None or (op == "/" and b[0] == 0):
        return None
    (n, d), (m, e) = a, b
    if op in "+-":
        n, d = (n * e + m * d if op == "+" else n * e - m * d), d * e
    else:
        n, d = (n * m, d * e) if op == "*" else (n * e, d * m)
    g = math.gcd(n, d) if d > 0 else -math.gcd(n, d)
    return n // g, d // g


# An expression is (kind, operands, inverse operands): kind "+" is a sum less its inverses, "*" a product over its
# inverses, "" a number. Operands are sorted strings, so equal up to commuting and associating means equal.

def _text(expression):
    kind, operands, inverses = expression
    inverse = "-" if kind == "+" else "/"
    return kind.join(operands) + "".join(inverse + operand for operand in inverses)


def _operands(expression, kind):
    """(operands, inverses) of an expression looked at as a sum ("+") or as a product ("*")."""
    if expression[0] == kind:
        return expression[1:]
    text = _text(expression)
    return ((f"({text})" if expression[0] == "+" else text,), ())


def _join(a, op, b):
    kind = "+" if op in "+-" else "*"
    (p, q), (r, s) = _operands(a, kind), _operands(b, kind)
    if op in "-/":
        r, s = s, r
    return kind, tuple(sorted(p + r)), tuple(sorted(q + s))


def _splits(numbers):
    """The distinct ways to deal a sorted tuple into two non-empty sorted tuples, each in both orders."""
    masks = range(1, 2 ** len(numbers) - 1)
    return {tuple(tuple(n for i, n in enumerate(numbers) if mask >> i & 1 == side) for side in (1, 0))
            for mask in masks}


@lru_cache(maxsize=2048)
def _reachable(numbers):
    """{value: the set of expressions that make it} over all ways to use up a sorted tuple of numbers. Values below
    zero are left out, and nothing is lost: where x-y is negative, y-x and the opposite sign one step later will do."""
    if len(numbers) == 1:
        return {(numbers[0], 1): {("", (str(numbers[0]),), ())}}
    table = {}
    for left, right in _splits(numbers):
        for v, ways_v in _reachable(left).items():
            for w, ways_w in _reachable(right).items():
                for op in "+-*/" if left <= right else "-/":
                    value = arith(v, op, w)
                    if value is not None and value[0] >= 0:
                        table.setdefault(value, set()).update(_join(a, op, b) for a in ways_v for b in ways_w)
    return table


def _last_steps(numbers, target):
    """Yield (expressions, op, expressions) for every last operation that makes the target. Meeting in the middle:
    a value v of the smaller part leaves one other value w for each operation, and that is looked up."""
    t = (target, 1)
    for small, large in _splits(numbers):
        others = _reachable(large) if len(small) <= len(large) else {}
        for v, ways in _reachable(small).items() if others else ():
            for op, w in (("+", arith(t, "-", v)), ("-", arith(v, "-", t)),        # v op w = t
                          ("*", arith(t, "/", v)), ("/", arith(v, "/", t))):
                if w in others and arith(v, op, w) == t:
                    yield ways, op, others[w]
            for op, w in (("-", arith(t, "+", v)), ("/", arith(t, "*", v))):       # w op v = t
                if w in others and arith(w, op, v) == t:
                    yield others[w], op, ways


@lru_cache(maxsize=1 << 16)
def _solvable(numbers, target):
    return numbers == (target,) or any(True for _ in _last_steps(numbers, target))


@lru_cache(maxsize=1 << 14)
def _solve(numbers, target):
    found = {_text(_join(a, op, b)) for left, op, right in _last_steps(numbers, target) for a in left for b in right}
    return tuple(f"{text}={target}" for text in sorted(found | ({str(target)} if numbers == (target,) else set())))


def solve(numbers, target=24):
    """All formulas ("(10-2)*(1+2)=24") that use each of `numbers` (positive integers) exactly once and make the
    positive integer `target`, sorted. They are exact, and distinct up to commuting and associating: a-(b-c)
    and c+a-b are one; no step goes below zero, so (a-b)*(c-d) and (b-a)*(d-c) are one too. Empty if there is none.
    Four numbers take about a millisecond, six about a second."""
    return list(_solve(tuple(sorted(numbers)), target))


# ---------------------------------------------------------------------------------------------------------- verifier

_SIGNS = str.maketrans({**dict.fromkeys("xX×·•∙⋅∗✕✖", "*"), **dict.fromkeys("÷∕⁄", "/"),
                        **dict.fromkeys("−–—‐‑－", "-"), "＋": "+", "（": "(", "）": ")", "＝": "="})
_NAMES = {"ACE": "A", "T": "10", "TEN": "10", "JACK": "J", "QUEEN": "Q", "KING": "K"}
_QUOTE = r"""[\\"'`“”‘’]{0,2}"""
_LIST = r"[\[(]([^\])}]{0,400})"
_FORMULA = _QUOTE + r"""([^"'`“”‘’}\n,\\]*)"""
_LEVELS = {"+": 1, "-": 1, "*": 2, "/": 2}
MAX_FORMULA = 200   # characters; bounds the parser's recursion and the size of its integers


def _field(text, key, value):
    """The last value of `key` in something like JSON, or None. A field starts after { , ] or a line break, so that
    prose is not taken for one; [ \\t] and not \\s there, or 100k line breaks would cost 100k scans of the rest."""
    found = re.findall(r"[{,\]\n][ \t]*" + _QUOTE + key + _QUOTE + r"\s*:\s*" + value, text, re.IGNORECASE)
    return found[-1] if found else None


def read_answer(text):
    """(cards, number, formula) of an answer in any quotes, fences or surroundings; None for a field that is not
    there. `cards` are ranks in capitals ("A", "10", "Q"), `number` strings, `formula` has plain signs."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text).replace("\\/", "/")
    cards, number = _field(text, "cards", _LIST), _field(text, "number", _LIST)
    formula = _field(text, "formula", _FORMULA) if "{" in text else None
    if cards is not None:   # "Ace of Spades", 'q', 10, T
        words = [re.search("[A-Z0-9]+", item.upper()) for item in cards.split(",") if item.strip()]
        cards = [_NAMES.get(word[0], word[0]) if word else "" for word in words]
    number = number and [item.strip(" \\\"'") for item in number.split(",") if item.strip()]
    return cards, number, formula and formula.translate(_SIGNS).strip()


def _evaluate(tokens, level=1):
    """Take an expression off the end of `tokens` (last token first) by precedence climbing; its value as in arith.
    ValueError if there is none. Nesting is bounded by MAX_FORMULA."""
    token = tokens.pop() if tokens else ""
    if token == "(":
        value = _evaluate(tokens)
        if not tokens or tokens.pop() != ")":
            raise ValueError("unbalanced parentheses")
    elif token == "-":      # a sign binds more tightly than any operation
        value = arith((0, 1), "-", _evaluate(tokens, 3))
    elif token.isdecimal():
        value = (int(token), 1)
    else:
        raise ValueError(f"unexpected {token!r}")
    while tokens and _LEVELS.get(tokens[-1], 0) >= level:
        op = tokens.pop()
        value = arith(value, op, _evaluate(tokens, _LEVELS[op] + 1))
    return value


def _judge_formula(formula, numbers, target):
    """(code, the number its message mentions or None) for a formula (None: there is none)."""
    if formula is None:
        return "no_json", None
    left, _, right = formula.rpartition("=")
    if not left or not right.strip().isdecimal():
        return "no_target", None
    if len(formula) > MAX_FORMULA:
        return "unparsable", None
    tokens = re.findall(r"[0-9]+|\S", left)
    rest = tokens[::-1]
    try:
        value = _evaluate(rest)
        if rest:
            raise ValueError("something follows the expression")
    except ValueError:
        return "unparsable", None
    used, dealt = Counter(int(token) for token in tokens if token.isdecimal()), Counter(numbers)
    for code, wrong in (("foreign_number", used.keys() - dealt.keys()), ("used_twice", used - dealt),
                        ("left_out", dealt - used)):
        if wrong:
            return code, str(min(wrong))
    if value is None:
        return "division_by_zero", None
    if value != (target, 1):
        return "wrong_value", f"{value[0]}/{value[1]}" if value[1] > 1 else str(value[0])
    return ("correct", None) if int(right) == target else ("no_target", None)


def judge(text, cards, numbers, target=24, image=False, prompts=PROMPTS):
    """The verdict on any text whatever, never an exception.

    cards: dealt ranks; numbers: their values; image: whether misread cards cost MISREAD. Rewards: see REWARDS."""
    read_cards, read_numbers, formula = read_answer(text)
    code, number = _judge_formula(formula, numbers, target)
    recognized = sorted(read_cards or []) == sorted(cards)
    translated = sorted(read_numbers or []) == sorted(map(str, numbers))
    if number and len(number) > 12:
        number = number[:11] + "…"
    reward, message = REWARDS[code], prompts[code].format(number=number, target=target)
    if image and not recognized:
        reward, message = reward + MISREAD, f"{prompts['misread'].format(target=target)} {message}"
    return Verdict(reward, message, recognized, translated, code)


# ----------------------------------------------------------------------------------------------------- GeneralPoints

def _one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} {value!r}: expected one of {', '.join(map(repr, allowed))}")


def _positive(name, value):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} {value!r}: expected a positive integer")


def _random_formula(numbers, target, rng):
    """Some formula of all `numbers` that claims to make the target and does not."""
    while True:
        parts = [((n, 1), ("", (str(n),), ())) for n in numbers]
        while len(parts) > 1:
            (v, a), (w, b) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
            op = rng.choice("++--**/")
            parts.append((arith(v, op, w), _join(a, op, b)))
        value, expression = parts[0]
        if value is not None and value != (target, 1):
            return f"{_text(expression)}={target}"


def _answer(cards, numbers, formula):
    return json.dumps({"cards": list(cards), "number": list(numbers), "formula": formula})


class GeneralPoints:
    """The card game of the paper's section 4.1: gp-l, or gp-vl with `image=True`.

    rule: what J, Q, K count as ("10", "11-12-13", ...); look: the suits dealt ("black", "red", "all"); deal: "any"
    hand or those with a "face" card (the paper's rule-OOD); target: a positive integer; attempts: answers judged an
    episode; size: (width, height) of the image in pixels; prompts: see load_prompts. Bad values are ValueErrors."""
    answer_key = "formula"      # the JSON key that holds the final answer: PPO weights the tokens before it by 0.5

    def __init__(self, *, image=False, rule="10", look="black", target=24, deal="any", attempts=5, size=(1200, 1200),
                 prompts=None):
        _one_of("look", look, tuple(LOOKS))
        _one_of("deal", deal, ("any", "face"))
        for name, value in (("target", target), ("attempts", attempts), ("size", size[0]), ("size", size[1])):
            _positive(name, value)
        self.image, self.rule, self.look, self.deal = image, str(rule), look, deal
        self.target, self.attempts, self.size = int(target), int(attempts), tuple(size)
        self.prompts = check_prompts(prompts or {})
        self.values = dict(zip(RANKS, card_values(RANKS, rule)))
        self.deck = [(rank, suit) for suit in LOOKS[look] for rank in RANKS]
        self.attempt = None     # judged so far; None: no episode is running

    def reset(self, seed):
        """Deal the hand that belongs to `seed` (an int >= 0): (observation, info about the hand). RuntimeError if
        hand after hand is unsolvable."""
        if seed < 0:    # random.Random would take it for -seed
            raise ValueError(f"seed {seed!r}: expected an integer >= 0")
        self.rng = random.Random(int(seed))
        for _ in range(10_000):
            self.hand = self.rng.sample(self.deck, 4)
            self.cards = [rank for rank, _ in self.hand]
            self.numbers = [self.values[rank] for rank in self.cards]
            wanted = self.deal == "any" or set(FACES) & set(self.cards)
            if wanted and _solvable(tuple(sorted(self.numbers)), self.target):
                break
        else:
            raise RuntimeError(f"no solvable hand in 10000: rule {self.rule}, look {self.look}, target {self.target}")
        self.pick, self.attempt = self.rng.random(), 0
        info = {"cards": self.cards, "suits": [suit for _, suit in self.hand], "numbers": self.numbers}
        return Observation([{"role": "user", "content": self._prompt()}], fresh=True), info

    def _prompt(self):
        faces, target = {face: self.values[face] for face in FACES}, self.target
        rule = "rule_same" if len(set(faces.values())) == 1 else "rule_each"
        rule = self.prompts[rule].format(**faces, target=target)
        text = self.prompts["gp-vl" if self.image else "gp-l"].format(target=target, rule=rule, cards=self.cards)
        if not self.image:
            return text
        return [{"type": "image", "image": draw_hand(self.hand, self.size)}, {"type": "text", "text": text}]

    def step(self, text):
        """Judge one answer: (observation, reward, terminated, truncated, info). Any string is taken. A right answer
        terminates the episode, the last wrong one truncates it; after that RuntimeError until the next reset."""
        if self.attempt is None:
            raise RuntimeError("no episode is running: call reset(seed) first")
        self.attempt += 1
        verdict = judge(text, self.cards, self.numbers, self.target, self.image, self.prompts)
        correct = verdict.code == "correct"
        truncated = not correct and self.attempt == self.attempts
        info = {"verdict": verdict.code, "message": verdict.message, "correct": correct, "attempt": self.attempt,
                "recognized": verdict.recognized, "translated": verdict.translated}
        messages = [{"role": "user", "content": verdict.message}]
        if correct or truncated:
            messages, self.attempt = [], None
        return Observation(messages, fresh=False), verdict.reward + EXHAUSTED * truncated, correct, truncated, info

    def oracle(self):
        """The expert's answer to the current hand; which of the solutions is the seed's choice."""
        formulas = _solve(tuple(sorted(self.numbers)), self.target)
        return _answer(self.cards, self.numbers, formulas[int(self.pick * len(formulas))])

    def demonstrate(self, seed, mistakes=0):
        """An expert's dialogue as chat messages: the prompt, `mistakes` wrong answers ("train": False) each with the
        verifier's message, and the right answer ("train": True). With mistakes these are the sub-optimal dialogues
        of the paper's section 5. ValueError unless 0 <= mistakes < attempts."""
        if not 0 <= mistakes < self.attempts:
            raise ValueError(f"mistakes {mistakes!r}: expected 0 to {self.attempts - 1}, one less than attempts")
        dialogue = self.reset(seed)[0].messages
        for _ in range(mistakes):
            wrong = self._mistake()
            dialogue += [{"role": "assistant", "content": wrong, "train": False}, *self.step(wrong)[0].messages]
        return dialogue + [{"role": "assistant", "content": self.oracle(), "train": True}]

    def _mistake(self):
        """A plausible wrong answer: mostly arithmetic that misses the target, at times other numbers than dealt, a
        card misread (image tasks), an answer cut short."""
        rng, cards = self.rng, list(self.cards)
        if self.image and rng.random() < 0.25:
            cards[rng.randrange(4)] = rng.choice(RANKS)
        numbers = [self.values[rank] for rank in cards]
        used, kind = list(numbers), rng.random()
        if kind < 0.12:         # one number gives way to another: mostly one that was not dealt, at times a second use
            used[rng.randrange(4)] = rng.randint(1, 13)
        elif kind < 0.17:
            used.pop(rng.randrange(4))
        answer = _answer(cards, numbers, _random_formula(used, self.target, rng))
        return answer[:rng.randrange(1, len(answer))] if kind > 0.98 else answer


# ------------------------------------------------------------------------------------------------------------- cards
# Every card is drawn once, 1000 x 1400 pixels, and scaled down. Shapes are polygons (N, 2), y downwards.

def _oval(x, y, rx, ry=None):
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + (ry or rx) * np.sin(t)], 1)


def _bar(x, y, width, height):
    return [(x + i * width / 2, y + j * height / 2) for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))]


COLORS = {"table": (0x35, 0x65, 0x4D), "paper": (253, 253, 250), "line": (40, 40, 60), "edge": (150, 150, 150),
          "gold": (244, 196, 72), "skin": (248, 218, 188), "steel": (196, 206, 216), "wood": (150, 100, 60),
          "leaf": (70, 130, 80), "lip": (190, 60, 60), "J": (206, 150, 66), "Q": (124, 70, 34), "K": (110, 100, 94)}
BLACK, RED = {"ink": (16, 16, 20), "robe": (48, 76, 150)}, {"ink": (206, 18, 32), "robe": (178, 38, 46)}
# rank: (rows of the two side columns, rows of the middle column), from -1, the highest, to 1, the lowest
PIPS = {"A": ((), (0,)), "2": ((), (-1, 1)), "3": ((), (-1, 0, 1)), "4": ((-1, 1), ()), "5": ((-1, 1), (0,)),
        "6": ((-1, 0, 1), ()), "7": ((-1, 0, 1), (-1 / 2,)), "8": ((-1, 0, 1), (-1 / 2, 1 / 2)),
        "9": ((-1, -1 / 3, 1 / 3, 1), (0,)), "10": ((-1, -1 / 3, 1 / 3, 1), (-2 / 3, 2 / 3))}
# The upper half of a court card, from back to front: hair, robe and face, then headgear and what the hand carries.
LOCKS = {"J": [_oval(500, 370, 132, 120), _oval(395, 440, 45), _oval(605, 440, 45)],
         "Q": [_oval(500, 430, 150, 195)], "K": [_oval(500, 375, 128, 140)]}
BUST = [("robe", [(372, 500), (628, 500), (760, 560), (806, 705), (194, 705), (240, 560)]),
        ("gold", [(290, 540), (330, 524), (340, 705), (270, 705)]),
        ("gold", [(710, 540), (670, 524), (660, 705), (730, 705)]),
        ("gold", [(420, 500), (580, 500), (610, 705), (390, 705)]),
        ("paper", [(366, 505), (420, 462), (500, 545), (580, 462), (634, 505), (500, 625)]),
        ("skin", _oval(500, 372, 90, 116))]
REGALIA = {
    "J": [("gold", _oval(610, 195, 80, 26)), ("robe", _oval(500, 250, 142, 72)), ("gold", _bar(500, 290, 256, 36)),
          ("wood", _bar(738, 480, 18, 440)), ("steel", [(738, 140), (778, 250), (738, 300), (698, 250)])],
    "Q": [("gold", [(402, 290), (370, 205), (436, 240), (500, 180), (564, 240), (630, 205), (598, 290)]),
          ("paper", _bar(500, 284, 208, 26)), ("paper", _oval(370, 205, 17)), ("paper", _oval(500, 180, 17)),
          ("paper", _oval(630, 205, 17)), ("leaf", _bar(738, 480, 12, 440)), ("ink", _oval(738, 247, 32)),
          ("ink", _oval(776, 285, 32)), ("ink", _oval(738, 323, 32)), ("ink", _oval(700, 285, 32)),
          ("gold", _oval(738, 285, 22))],
    "K": [("K", _oval(500, 440, 96, 120)), ("skin", _oval(500, 352, 84, 94)),
          ("gold", [(392, 292), (352, 160), (432, 222), (500, 130), (568, 222), (648, 160), (608, 292)]),
          ("robe", _bar(500, 284, 232, 36)), ("ink", _oval(352, 160, 15)), ("ink", _oval(500, 130, 15)),
          ("ink", _oval(648, 160, 15)), ("steel", [(722, 690), (722, 250), (737, 200), (752, 250), (752, 690)]),
          ("gold", _bar(737, 520, 120, 28))]}
FEATURES = [_oval(464, 358, 10), _oval(536, 358, 10), _bar(464, 332, 40, 6), _bar(536, 332, 40, 6),
            [(500, 360), (488, 402), (506, 402)]]
INDEX_ONLY = 120    # pixels: a card less high than this shows its rank and suit large, and nothing else


def _suit_shapes(suit):
    """The polygons that make up a suit mark, in the box -0.5..0.5."""
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    y = 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t) - 13 * np.cos(t)
    heart = np.stack([16 * np.sin(t) ** 3, y - 2.5], 1) / 30
    stem = [(-0.03, 0), (0.03, 0), (0.06, 0.3), (0.18, 0.5), (-0.18, 0.5), (-0.06, 0.3)]
    return {"spades": [heart * (0.9, -0.88) + (0, -0.06), stem],
            "clubs": [_oval(0, -0.26, 0.23), _oval(-0.25, 0.1, 0.23), _oval(0.25, 0.1, 0.23), _oval(0, 0, 0.1), stem],
            "hearts": [heart],
            "diamonds": [[(0, -0.52), (0.2, -0.23), (0.39, 0), (0.2, 0.23), (0, 0.52), (-0.2, 0.23), (-0.39, 0),
                          (-0.2, -0.23)]]}[suit]


def _fill(draw, shapes, color, x=0, y=0, scale=1, outline=None):
    """Fill polygons scaled by `scale` (a number or (x, y) factors) and moved to (x, y)."""
    for shape in shapes:
        draw.polygon([tuple(point) for point in (np.array(shape) * scale + (x, y)).tolist()], color, outline, 5)


def _glyph(card, rank, color, x, y, width, height):
    """Write a rank `height` high and at most `width` wide, its top centre at (x, y)."""
    font = ImageFont.load_default(500)
    left, top, right, bottom = font.getbbox(rank, stroke_width=12)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), rank, 255, font, stroke_width=12)
    mask = mask.resize((min(width, round(mask.width * height / mask.height)), height), Image.Resampling.LANCZOS)
    card.paste(color, (x - mask.width // 2, y), mask)


def _draw_face(card, rank, mark, colors):
    """Indices in two corners; pips, the lower ones upside down, or a framed bust and its half turn."""
    draw = ImageDraw.Draw(card)
    _glyph(card, rank, colors["ink"], 98, 55, 150, 150)
    _fill(draw, mark, colors["ink"], 98, 285, 120)
    if rank in FACES:
        _fill(draw, mark, colors["ink"], 268, 182, 124)
        for name, shape in [*((rank, lock) for lock in LOCKS[rank]), *BUST, *REGALIA[rank]]:
            _fill(draw, [shape], colors[name], outline=colors["line"])
        _fill(draw, FEATURES, colors["line"])
        _fill(draw, [_oval(500, 432, 26, 8)], colors["lip"])
        _fill(draw, mark, colors["ink"], 500, 655, 72)
    card.paste(card.crop((0, 0, 1000, 700)).rotate(180), (0, 700))
    if rank in FACES:
        draw.rectangle((190, 690, 809, 709), colors["gold"], colors["line"], 5)
        draw.rectangle((190, 100, 809, 1299), None, colors["line"], 8)
        return
    sides, middle = PIPS[rank]
    size = 480 if rank == "A" else 200
    for x, row in [(x, row) for x in (315, 685) for row in sides] + [(500, row) for row in middle]:
        _fill(draw, mark, colors["ink"], x, 700 + 470 * row, (size, size if row <= 0 else -size))


@lru_cache(maxsize=256)
def draw_card(rank, suit, height):
    """One card as an RGBA image, `height` pixels high and 5/7 as wide, transparent outside its round corners."""
    colors, mark = {**COLORS, **(RED if suit in LOOKS["red"] else BLACK)}, _suit_shapes(suit)
    card, corners = Image.new("RGB", (1000, 1400), colors["paper"]), Image.new("L", (1000, 1400))
    if height < INDEX_ONLY:
        _glyph(card, rank, colors["ink"], 500, 90, 860, 660)
        _fill(ImageDraw.Draw(card), mark, colors["ink"], 500, 1070, 520)
    else:
        _draw_face(card, rank, mark, colors)
        ImageDraw.Draw(card).rounded_rectangle((0, 0, 999, 1399), 70, None, colors["edge"], 6)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, 999, 1399), 70, 255)
    card.putalpha(corners)
    return card.resize((round(height / 1.4), height), Image.Resampling.BOX)


def draw_hand(hand, size):
    """A hand [(rank, suit), ...] side by side on the green table: an RGB image of `size` (width, height) pixels."""
    width, height = size
    card_height = max(7, int(min(0.96 * height, 1.4 * 0.9 * width / len(hand))))
    canvas = Image.new("RGB", (width, height), COLORS["table"])
    for i, (rank, suit) in enumerate(hand):
        card = draw_card(rank, suit, card_height)
        canvas.paste(card, (round((i + 0.5) * width / len(hand) - card.width / 2), (height - card.height) // 2), card)
    return canvas
