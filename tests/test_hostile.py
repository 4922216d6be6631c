"""The verifier against answers that hypothesis makes up, beside judges of another kind.

Random formulas are judged by Python's parser, too, and the two must agree. Of any other text that is asked
which always holds: a verdict, a reward of the table, none for what the text does not say. A longer hunt:

    EXAMPLES=20000 pytest tests/test_hostile.py
"""
import ast
import json
import operator
import os
import random
import re
from collections import Counter
from fractions import Fraction

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import envs
from games.answers import read_answer
from games.observations import wrong_observation
from games.rails import Point
from games.solver import solve
from games.verifier import MISREAD, REWARDS, SPACES, STEP_REWARDS, judge, judge_step
from tables import cases, rows
from variants.official_games import OF_GAME, play

CARDS, NUMBERS = ["3", "7", "7", "8"], [3, 7, 7, 8]
RIGHT = solve(NUMBERS)
WRONG = ["3+7+7+8=24", "3*7*8=24", "1+1=24", "(7+8-7)*3=25", "3*8+7-7", "24=24", "=24"]
HUNT = os.environ.get("EXAMPLES")
JUDGED = settings(max_examples=int(HUNT or 100), derandomize=not HUNT, database=None, deadline=None,
                  suppress_health_check=list(HealthCheck))
JUDGED_OFTEN = settings(JUDGED, max_examples=int(HUNT or 400))
ANYTHING = st.text(st.characters(exclude_categories=()), max_size=40)       # half surrogate pairs, too


def one_of(*items):
    return st.sampled_from(items)


def several(*items, most=20):
    return st.lists(one_of(*items), max_size=most).map("".join)


# ------------------------------------------------------------------------------------- judges of another kind

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value_of(node, leaf=Fraction):
    """Return the exact value of a parsed expression of integers and + - * /, else ValueError. leaf: the
    number that an integer stands for."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return leaf(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value_of(node.operand, leaf)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](*(value_of(side, leaf) for side in (node.left, node.right)))
    raise ValueError(ast.dump(node))


def verdict_of(formula):
    """Return the verdict on an ASCII formula by Python's parser, to which ** // +1 mean something else."""
    left, equals, right = formula.rpartition("=")
    if not left.strip() or not re.fullmatch(r" *[0-9]+ *", right):
        return "no_target"
    try:
        python = re.sub(r"\b0+(?=[0-9])", "", left.strip())     # which refuses 07
        tree = ast.parse(python, mode="eval").body
        used, dealt = Counter(map(int, re.findall("[0-9]+", left))), Counter(NUMBERS)
        value = value_of(tree)
    except ZeroDivisionError:
        value = None
    except (SyntaxError, ValueError):
        return "unparsable"
    if used != dealt:
        foreign = used.keys() - dealt.keys()
        return "foreign_number" if foreign else "used_twice" if used - dealt else "left_out"
    if value != 24:
        return "division_by_zero" if value is None else "wrong_value"
    return "correct" if int(right) == 24 else "no_target"


def says_a_solution(text):
    """Tell whether any stretch of a text, made plain in another way, is a solution."""
    text = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), text)
    text = re.sub(r"\\+div", "/", re.sub(r"\\+(?:times|cdot)", "*", text))
    text = re.sub(r"\\+(?:left|right|[ntr/])", " ", text)
    text = "".join(chr(ord(sign) - 0xFEE0) if "！" <= sign <= "～" else sign for sign in text)
    text = text.translate(str.maketrans("×xX÷−", "***/-"))
    stretches = re.findall(r"[0-9+\-*/()\s]+=\s*[0-9]+", text)
    return any(verdict_of(" ".join(stretch.split())) == "correct" for stretch in stretches)


# ------------------------------------------------------------------------------------------------------ cards

SIGNS = [*"377878+-*/()=", "=24", "24", "12", "00", " "]
ODD = [*"×÷−²½７＝\t\x1c,\"'\\}", "\\times ", "\\\\div ", "\\left"]
PIECES = [
    *"""{ } [ ] " ' “ ” : , // ``` "formula" formula: 7 \\ \\u003d24 é \0""".split(), " ", "\n", '"cards": [',
    '"note": "', *RIGHT[:2], *WRONG[:3], '{"formula": "', '\\"formula\\": \\"']
SHAPES = ("{}{}{}{}{}{}{}", "({}{}{}){}({}{}{})", "{}{}({}{}({}{}{}))", "(({}{}{}){}{}){}{}",
          "-({}{}{}){}-{}{}{}")


@st.composite
def legal(draw):
    """Draw a formula of all numbers, of which every third or so makes 24."""
    a, b, c, d = draw(st.permutations(NUMBERS))
    x, y, z = (draw(one_of(*"+-*/")) for _ in range(3))
    return draw(one_of(draw(one_of(*SHAPES)).format(a, x, b, y, c, z, d), *RIGHT)).removesuffix("=24") + "=24"


@st.composite
def edited(draw, text, pieces):
    """Draw a text with some stretches cut out and pieces put in."""
    text = draw(text)
    for _ in range(draw(st.integers(1, 3))):
        start, length = draw(st.integers(0, len(text))), draw(st.integers(0, 2))
        text = text[:start] + draw(one_of(*pieces)) + text[start + length:]
    return text


def dumped(formula):
    return json.dumps({"cards": CARDS, "number": NUMBERS, "formula": formula}, ensure_ascii=False)


def code_of(text):
    return judge(text, CARDS, NUMBERS).code


CLEAN = st.one_of(legal(), edited(legal(), SIGNS), several(*SIGNS, most=12))
FORMULAS = st.one_of(CLEAN, one_of(*WRONG), edited(legal(), ODD))
ANSWERS = st.one_of(ANYTHING, several(*PIECES), FORMULAS.map(dumped), edited(FORMULAS.map(dumped), PIECES))


@JUDGED_OFTEN
@given(ANSWERS, st.booleans(), one_of("", *OF_GAME["gp"]))
def test_any_answer_gets_a_verdict(text, image, compat):
    env = envs.GeneralPoints(image=image)
    env.ranks, env.numbers = CARDS, NUMBERS
    env = play(env, {compat})
    verdict = env.judge(text)
    assert verdict == env.judge(text)
    misread = MISREAD * (image and not verdict.recognized)
    assert compat or verdict.reward == REWARDS[verdict.code] + misread
    assert 0 < len(verdict.message) <= 160 and not any(right[:-3] in verdict.message for right in RIGHT)
    assert verdict.code != "correct" or says_a_solution(text) and says_a_solution(read_answer(text)[1])


def odd_to_python(formula):
    """Tell whether Python takes a formula for something else: a power, a call, a sign +."""
    return re.search(r"\*\s*\*|/\s*/|(?:^|[-+*/(])\s*\+|[0-9)]\s*\(|\)\s*[0-9]", formula)


def test_random_formulas_are_judged_as_by_python():
    rng, codes = random.Random(0), set()
    for _ in range(8000):
        left = "".join(rng.choices("37783778+-*/()", k=rng.randint(1, 9)))
        if rng.random() < 0.5:      # every number once
            (a, b, c, d), (x, y, z) = rng.sample(NUMBERS, 4), rng.choices("+-*/", k=3)
            left = rng.choice(SHAPES).format(a, x, b, y, c, z, d)
        if not odd_to_python(left):
            code = code_of(dumped(f"{left}=24"))
            assert verdict_of(f"{left}=24") == code, left
            codes.add(code)
    assert codes == set(REWARDS) - {"no_json", "no_target", "misread"}


SIMPLE = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
          | one_of(*'/{\\"', "\\left("))
VALUES = st.recursive(
    SIMPLE, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(one_of("formula", "a:", "'b"), inner),
    max_leaves=6)


@JUDGED
@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), FORMULAS, VALUES, st.booleans(),
       one_of(None, 1))
def test_json_is_read_as_by_the_standard_library(others, formula, last, ascii_only, indent):
    value = {**others, "formula": formula, "last": last}
    for text in (json.dumps(value, ensure_ascii=ascii_only, indent=indent), json.dumps({"a": [value]})):
        assert read_answer(f"So, '{{1, 2}}' is {text}. \"I'm sure!")[1] == read_answer(dumped(formula))[1]


@JUDGED
@given(one_of(*RIGHT), one_of(*".。,;\n}\"'\\ ", " or 25", "=25", ".."), ANYTHING)
def test_nothing_may_follow_a_formula_but_a_full_stop(formula, joint, more):
    tail = (joint + more).replace("\ufe0f", "")         # which only says how a sign is shown
    nothing = "".join(tail.split()) in ("", ".", "。", "．")
    for text in (dumped(formula + tail), "{'formula': %r}" % (formula + tail)):
        assert (code_of(text) == "correct") == nothing


LIKE = dict(rows("""
    3 | ３𝟑𝟹
    7 | ７𝟳𝟩
    8 | ８𝟾
    * | ×·∗＊﹡x✖
    - | −－﹣–
    + | ＋﹢➕
    / | ÷／∕➗
    ( | （﹙
    ) | ）﹚
    = | ＝﹦"""))
UNLIKE = dict(rows("""
    3 | ³₃③⒊⑶٣३
    7 | ⁷₇⑦⒎⑺٧
    8 | ⁸⑧⒏٨
    2 | ²②٢
    4 | ⁴④⒋⒈
    = | ⁼≠≈⩵
    + | ⁺₊
    - | ⁻¯~
    ( | ⁽[{
    * | ^#"""))


@JUDGED
@given(one_of(*RIGHT), st.data())
def test_only_like_looking_signs_are_read(formula, data):
    signs = [data.draw(one_of(sign, *LIKE.get(sign, ""))) for sign in formula]
    assert code_of(dumped("".join(signs))) == "correct"
    places = [i for i, sign in enumerate(formula) if sign in UNLIKE]
    place = data.draw(one_of(*places))
    signs[place] = data.draw(one_of(*UNLIKE[formula[place]]))
    assert code_of(dumped("".join(signs))) in ("unparsable", "no_target")


def bare(value):
    """Return an object without quotes: {cards: [3, 7], formula: 3*7=24}."""
    return "{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}"


@st.composite
def forgeries(draw):
    """Draw an answer whose own formula is wrong, with a right one that is not the answer's; maybe cut off."""
    own, right = draw(one_of(*WRONG[:3])), {"formula": draw(one_of(*RIGHT))}
    quoted = draw(one_of(json.dumps(right), json.dumps(right, indent=1), repr(right), bare(right)))
    prose = draw(one_of(quoted, f"so, {quoted}", f"\n{quoted}", json.dumps(quoted)))
    inner = draw(one_of(prose, right, [right], {"a": right}))
    items = [("formula", own), (draw(one_of("note", "a", "formula 2")), inner)]
    other = ("it's", draw(one_of('a "b" c', "{", "}", "\\", "'", [[]], None)))
    items.insert(draw(st.integers(0, 2)), other)
    text = draw(one_of(json.dumps, repr, lambda value: json.dumps(value, indent=2)))(dict(items))
    least = text.index(own) + len(own) + 1
    return text[:draw(one_of(len(text), draw(st.integers(least, len(text)))))]


@JUDGED
@given(forgeries(), one_of("", "Let me see:\n", '{"formula": "(7+8-7)*3=24"} No. ', "{x} ", "It's "))
def test_a_formula_elsewhere_is_never_the_answer(text, before):
    assert code_of(before + text) != "correct"


@JUDGED
@given(one_of(*RIGHT), one_of(json.dumps, repr, bare), ANYTHING, one_of("", "it's, 'so'"))
def test_a_right_answer_is_right_in_any_dialect(formula, write, around, note):
    around = around.replace("{", "")
    text = write({"cards": CARDS, "number": NUMBERS, "note": note, "formula": formula})
    verdict = judge(f"{around}{text}{around}", CARDS, NUMBERS, image=True)
    assert (verdict.code, verdict.recognized) == ("correct", True)


# ------------------------------------------------------------------------------------------------------ steps

NAMES = st.text(min_size=1, max_size=40).filter(str.strip)


@JUDGED
@given(ANYTHING | several(*PIECES, '"action": "stop()"', "action: ", "Turn_Direction( east )", "left"),
       one_of(*SPACES), one_of(None, "Red Bar"), st.booleans())
def test_any_step_gets_a_verdict(text, rule, name, crossing):
    for action in SPACES[rule][1:5]:
        point = Point("x.jpg", 0, name, "left", crossing, 0, action)
        verdict = judge_step(text, point, {"Red Bar", "Bar"}, rule)
        assert verdict == judge_step(text, point, {"Red Bar", "Bar"}, rule)
        assert len(verdict.message) < 200
        assert verdict.reward == STEP_REWARDS[verdict.code] + MISREAD * (not verdict.recognized)
        said = re.sub(r"[\s\"'\\`“”‘’]+", "", text.lower())
        assert verdict.code != "right_action" or action.replace(" ", "") in said


@JUDGED
@given(NAMES, st.booleans(), st.sets(NAMES, max_size=3), st.text(max_size=30))
def test_the_expert_is_right_whatever_a_landmark_is_called(name, crossing, others, instruction):
    point = Point("x.jpg", 0, name, "left", crossing, 0, "stop()")
    text = envs._answer(envs.Navigation, point.observation, instruction, point.action)
    verdict = judge_step(text, point, {name, *others}, "absolute")
    assert (verdict.reward, verdict.recognized) == (1, True)
    assert json.loads(text)["current observation"] == point.observation
    assert text.isascii() == (name + instruction).isascii()      # é as people write it


# Clauses with what they mean: a name that is claimed (?: one that is not here), a name that is denied (all:
# any), and an intersection, claimed (+) or denied (-).
CLAUSES = {clause: meaning for clause, *meaning in rows("""
    Red Bar is on your left           | Red Bar |         |
    I see the Bar                     | Bar     |         |
    there is a Red Bar                | Red Bar |         |
    Bar is here                       | Bar     |         |
    Old Bar is on your left           | ?       |         |
    I see Barn                        | ?       |         |
    City Bar is here                  | ?       |         |
    I see Bar Street                  | ?       |         |
    it is the Bar-Grill               | ?       |         |
    Joe's is on your right            | ?       |         |
    there is no Bar here              |         | Bar     |
    Red Bar is not on your left       |         | Red Bar |
    I don't see Barn                  |         |         |
    there are no landmarks            |         | all     |
    No landmarks nearby               |         | all     |
    there are no other landmarks      |         |         |
    You observe an intersection       |         |         | +
    this is an intersection           |         |         | +
    you have reached an intersection  |         |         | +
    I don't see an intersection       |         |         | -
    there is no intersection          |         |         | -
    it is not an intersection         |         |         | -
    Red Bar is at an intersection     | Red Bar |         | +
    I see no landmark but an intersection |     | all     | +
    You observe an image of 4 views   |         |         |""")}


@JUDGED_OFTEN
@given(st.lists(one_of(*CLAUSES), max_size=5), st.data(), one_of(None, "Bar", "Red Bar"), st.booleans())
def test_observations_mean_the_sum_of_their_clauses(clauses, data, name, crossing):
    joints = [data.draw(one_of("; ", ". ", "\n", ", ", " and ", " but ", " - ")) for _ in clauses]
    said = "".join(clause + joint for clause, joint in zip(clauses, [*joints[1:], ""]))
    meant = [("", "", ""), *(CLAUSES[clause] for clause in clauses)]
    claimed, denied, crossings = map(set, zip(*meant))
    expected = set()
    if name and (name not in claimed or denied & {name, "all"}):
        expected = {"missed_landmark"}
    elif claimed - {name, ""}:
        expected = {"false_landmark"}
    if ("+" in crossings) != crossing or {"+", "-"} <= crossings:
        expected.add("missed_intersection" if crossing else "false_intersection")
    truth = Point("x.jpg", 0, name, "left", crossing, 0, "stop()").observation
    assert set(wrong_observation(said, truth, name, crossing, {"Bar", "Red Bar"})) == expected, said


@cases("formulas, verdict", """
    3*8+7-7=24  03*8+7-7=024  -(7-7)+3*8=24 | correct
    3*8+7-7  3*8+7-7=25                     | no_target
    7/(7-7)*3*8=24                          | used_twice
    3/(7-7)*8=24                            | division_by_zero
    3*8=24                                  | left_out
    3*(8+7-7=24                             | unparsable
    3+8+7+7=24                              | wrong_value
    4*6=24                                  | foreign_number""")
def test_the_judges_agree_by_hand(formulas, verdict):
    for formula in formulas.split():
        assert verdict_of(formula) == verdict == code_of(dumped(formula))
