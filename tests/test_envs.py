"""GeneralPoints: the solver against brute force, the verifier against Python's own parser and against nonsense, deals,
dialogues, templates and cards. Every reward is worked by hand from the paper's appendix A."""
import ast
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envs
from envs import GeneralPoints
from games import cards, solver
from games.answers import read_answer
from games.cards import RANKS
from games.prompts import PROMPTS, load_prompts
from games.solver import solve
from games.verifier import REWARDS, judge

PRIME = 2 ** 61 - 1


def values_of(ranks, rule):
    return [cards.card_values(rule)[rank] for rank in ranks]


# ---------------------------------------------------------------------------------------------- independent arithmetic

def apply(op, a, b):
    """(exact value, fingerprint mod PRIME) of a op b. Equal fingerprints: the same function of the four numbers."""
    if op == "/":
        return (a[0] / b[0], a[1] * pow(b[1], -1, PRIME) % PRIME)
    return {"+": (a[0] + b[0], (a[1] + b[1]) % PRIME), "-": (a[0] - b[0], (a[1] - b[1]) % PRIME),
            "*": (a[0] * b[0], a[1] * b[1] % PRIME)}[op]


def evaluate(text, leaves):
    """The pair of apply() for a formula, by Python's parser; numbers are looked up in `leaves`."""
    operators = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}

    def walk(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return leaves[node.value]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value, fingerprint = walk(node.operand)
            return -value, -fingerprint % PRIME
        if not isinstance(node, ast.BinOp) or type(node.op) not in operators:
            raise SyntaxError(text)
        return apply(operators[type(node.op)], walk(node.left), walk(node.right))
    return walk(ast.parse(text, mode="eval").body)


class AnyNumber(dict):
    """Leaves for evaluate() where only the exact value matters."""
    def __missing__(self, n):
        return Fraction(n), n


def fingerprints(numbers):
    rng = random.Random(5)
    return {n: (Fraction(n), rng.randrange(1, PRIME)) for n in sorted(set(numbers))}


def brute_force(numbers, target):
    """Fingerprints of every way to make the target: all orders, all operators, all five shapes of four numbers."""
    leaves, found = fingerprints(numbers), set()
    for order in set(itertools.permutations(numbers)):
        a, b, c, d = (leaves[n] for n in order)
        for x, y, z in itertools.product("+-*/", repeat=3):
            for shape in (lambda: apply(z, apply(y, apply(x, a, b), c), d),
                          lambda: apply(z, apply(x, a, apply(y, b, c)), d),
                          lambda: apply(y, apply(x, a, b), apply(z, c, d)),
                          lambda: apply(x, a, apply(z, apply(y, b, c), d)),
                          lambda: apply(x, a, apply(y, b, apply(z, c, d)))):
                try:
                    value, fingerprint = shape()
                except (ZeroDivisionError, ValueError):     # ValueError: no inverse mod PRIME (b - b)
                    continue
                if value == target:
                    found.add(fingerprint)
    return found


# -------------------------------------------------------------------------------------------------------------- solver

def random_hands(count, distinct):
    rng = random.Random(count)
    return [tuple(rng.sample(range(1, 14), 4) if distinct else rng.choices(range(1, 14), k=4)) for _ in range(count)]


@pytest.mark.parametrize("target, hands", [
    (24, random_hands(14, True)), (24, random_hands(13, False)),
    (24, [(3, 3, 8, 8), (1, 5, 5, 5), (1, 1, 1, 1), (5, 5, 7, 24)]),
    (10, random_hands(5, True)), (37, random_hands(6, True)), (1, random_hands(4, True))])
def test_solver_finds_what_brute_force_finds(target, hands):
    for hand in hands:
        formulas, leaves = solve(hand, target), fingerprints(hand)
        results = [evaluate(formula.removesuffix(f"={target}"), leaves) for formula in formulas]
        assert all(value == target for value, _ in results)
        for formula in formulas:
            assert Counter(map(int, re.findall("[0-9]+", formula.partition("=")[0]))) == Counter(hand)
        assert {fingerprint for _, fingerprint in results} == brute_force(hand, target), hand
        assert len(formulas) == len(set(formulas))
        if len(set(hand)) == 4:     # four different numbers: one function of them, one formula
            assert len(formulas) == len({fingerprint for _, fingerprint in results}), hand


@pytest.mark.parametrize("highest, solvable", [(13, 1362), (10, 566)])
def test_known_counts_of_solvable_hands(highest, solvable):
    hands = list(itertools.combinations_with_replacement(range(1, highest + 1), 4))
    assert sum(solver.solvable(hand, 24) for hand in hands) == solvable
    assert all(solver.solvable(hand, 24) == bool(solve(hand, 24)) for hand in hands)


@pytest.mark.parametrize("numbers, target, formulas", [
    ([24], 24, ["24=24"]), ([23], 24, []), ([4, 6], 24, ["4*6=24"]), ([8, 3, 8, 3], 24, ["8/(3-8/3)=24"]),
    ([2, 2], 1, ["2/2=1"]), ([1, 2, 3], 6, ["1*2*3=6", "1+2+3=6", "2*3/1=6"])])
def test_small_cases_by_hand(numbers, target, formulas):
    assert solve(numbers, target) == formulas


def test_more_than_four_numbers():
    numbers = [2, 3, 5, 7, 11]
    formulas = solve(numbers, 24)
    assert "(2+3)*7-11=24" not in formulas and len(formulas) > 10
    for formula in formulas:
        left = formula.removesuffix("=24")
        assert evaluate(left, fingerprints(numbers))[0] == 24
        assert sorted(map(int, re.findall("[0-9]+", left))) == numbers


def test_formulas_have_no_parentheses_to_spare():
    for hand in random_hands(30, False):
        for left in (formula.removesuffix("=24") for formula in solve(hand, 24)):
            pairs, stack = [], []
            for i, character in enumerate(left):
                if character == "(":
                    stack.append(i)
                elif character == ")":
                    pairs.append((stack.pop(), i))
            leaves = fingerprints(hand)
            for i, j in pairs:      # without this pair the formula is another function
                bare = left[:i] + left[i + 1:j] + left[j + 1:]
                assert evaluate(bare, leaves)[1] != evaluate(left, leaves)[1], left


# --------------------------------------------------------------------------------------------------------------- deals

@pytest.mark.parametrize("look, suits", [("black", {"spades", "clubs"}), ("red", {"hearts", "diamonds"}),
                                         ("all", {"spades", "clubs", "hearts", "diamonds"})])
def test_hands_come_from_one_deck_and_are_solvable(look, suits):
    env, seen = GeneralPoints(look=look, rule="11-12-13"), set()
    for seed in range(400):
        _, info = env.reset(seed)
        hand = list(zip(info["cards"], info["suits"]))
        assert len(set(hand)) == 4
        assert info["numbers"] == values_of(info["cards"], "11-12-13") and solve(info["numbers"], 24)
        seen |= set(hand)
    assert seen == set(itertools.product(RANKS, suits))     # every card of the look turns up, no other does


def test_face_deal():
    faces = [bool(set("JQK") & set(GeneralPoints(deal=deal).reset(seed)[1]["cards"]))
             for deal in ("face", "any") for seed in range(60)]
    assert all(faces[:60]) and not all(faces[60:])


def test_values_and_rules():
    assert values_of(["A", "10", "J", "Q", "K", "7"], "10") == [1, 10, 10, 10, 10, 7]
    assert values_of(["A", "10", "J", "Q", "K", "7"], "11-12-13") == [1, 10, 11, 12, 13, 7]
    assert values_of(["J", "Q", "K"], "5") == [5, 5, 5]


@pytest.mark.parametrize("argument", [
    {"rule": "ten"}, {"rule": "10-11"}, {"rule": "0"}, {"rule": "-5"}, {"rule": "1-2-3-4"}, {"rule": ""},
    {"rule": "9" * 9000}, {"look": "green"}, {"deal": "faces"}, {"target": 0}, {"target": 2.5},
    {"target": True}, {"attempts": 0}, {"size": (0, 56)}, {"size": (224, -1)}])
def test_bad_arguments_are_named(argument):
    (name, _), = argument.items()
    with pytest.raises(ValueError, match=f"^{name} .*expected"):
        GeneralPoints(**argument)


def test_an_impossible_target_is_reported():
    with pytest.raises(RuntimeError, match="target 1000000"):
        GeneralPoints(target=10 ** 6).reset(0)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed"):
        GeneralPoints().reset(-1)


SCRIPT = """
import hashlib, envs
text = ""
for image in (False, True):
    env = envs.GeneralPoints(image=image, rule="11-12-13", look="all", deal="face", size=(112, 28))
    for seed in range(25):
        for message in env.demonstrate(seed, seed % 4):
            content = message["content"]
            if isinstance(content, list):
                content = content[1]["text"] + hashlib.sha256(content[0]["image"].tobytes()).hexdigest()
            text += message["role"] + content
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_the_same_seed_is_the_same_episode_in_any_process():
    root = Path(envs.__file__).parent
    digests = {subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, check=True, capture_output=True, text=True,
                              env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert len(digests) == 1 and len(digests.pop().strip()) == 64


def test_seeds_differ_and_an_earlier_episode_leaves_no_trace():
    env = GeneralPoints()
    first = [env.demonstrate(seed, 3) for seed in range(20)]
    assert [env.demonstrate(seed, 3) for seed in reversed(range(20))] == first[::-1]
    assert len({str(dialogue) for dialogue in first}) == 20


def test_prompts_state_the_task():
    observation, info = GeneralPoints(target=30, rule="11-12-13").reset(3)
    (message,) = observation.messages
    assert observation.fresh and message["role"] == "user"
    for part in (str(info["cards"]), "30", "11", "12", "13", '"cards"', '"number"', '"formula"', "=30"):
        assert part in message["content"]
    assert "all count as 10" in GeneralPoints().reset(3)[0].messages[0]["content"]
    image, text = GeneralPoints(image=True, size=(224, 56)).reset(3)[0].messages[0]["content"]
    assert image["type"] == "image" and image["image"].size == (224, 56)
    assert text["type"] == "text" and "24" in text["text"] and not re.search(r"\['", text["text"])


# ------------------------------------------------------------------------------------------------------------- verdicts

def answer(formula, cards=("A", "2", "3", "4"), number=(1, 2, 3, 4)):
    return json.dumps({"cards": list(cards), "number": list(number), "formula": formula})


def verdict(text, image=False):
    return judge(text, ["A", "2", "3", "4"], [1, 2, 3, 4], 24, image)


@pytest.mark.parametrize("formula, reward, code, message", [
    ("1*2*3*4=24", 5, "correct", "Correct."),
    ("(1+3)*(2+4)=24", 5, "correct", "Correct."),
    ("((1))*2*(3*4)=24", 5, "correct", "Correct."),
    ("-1*2*3*-4=24", 5, "correct", "Correct."),
    ("1+2+3+4=24", -1, "wrong_value", "The formula gives 10, not 24."),
    ("1+2+3+4=10", -1, "wrong_value", "The formula gives 10, not 24."),
    ("1/2/3/4=24", -1, "wrong_value", "The formula gives 1/24, not 24."),
    ("1-2*3*4=24", -1, "wrong_value", "The formula gives -23, not 24."),
    ("7+2+3+4=24", -2, "foreign_number", "7 is not one of the numbers."),
    ("24=24", -2, "foreign_number", "24 is not one of the numbers."),
    ("9/(3-3)=24", -2, "foreign_number", "9 is not one of the numbers."),
    ("4*3*2*1*1=24", -3, "used_twice", "1 is used too often."),
    ("2*3*4=24", -3, "left_out", "1 is left out."),
    ("1/(2-2)=24", -3, "used_twice", "2 is used too often."),
    ("4/(3-2-1)=24", -3, "division_by_zero", "The formula divides by zero."),
    ("1/(4/(3-2-1))=24", -3, "used_twice", "1 is used too often."),
    ("1*2*3*4", -3, "no_target", "The formula must end in =24."),
    ("1*2*3*4=25", -3, "no_target", "The formula must end in =24."),
    ("=24", -3, "no_target", "The formula must end in =24."),
    ("1*2*3*4=6*4", -3, "no_target", "The formula must end in =24."),
    ("", -3, "no_target", "The formula must end in =24."),
    ("1*2*3*4=24=24", -3, "unparsable", "The formula cannot be read."),
    ("(1*2*3*4=24", -3, "unparsable", "The formula cannot be read."),
    ("1*2*3*4)=24", -3, "unparsable", "The formula cannot be read."),
    ("1*2*(3*4))(=24", -3, "unparsable", "The formula cannot be read."),
    ("1*2*3 4=24", -3, "unparsable", "The formula cannot be read."),
    ("12*(3-1)=24", -2, "foreign_number", "12 is not one of the numbers."),
    ("1 2*3*4=24", -3, "unparsable", "The formula cannot be read."),
    ("2(3)(4)=24", -3, "unparsable", "The formula cannot be read."),
    ("1**2*3*4=24", -3, "unparsable", "The formula cannot be read."),
    ("4!*(3-2)*1=24", -3, "unparsable", "The formula cannot be read."),
    ("2.0*3*4*1=24", -3, "unparsable", "The formula cannot be read."),
    ("A*2*3*4=24", -3, "unparsable", "The formula cannot be read."),
    ("()=24", -3, "unparsable", "The formula cannot be read."),
    ("1+=24", -3, "unparsable", "The formula cannot be read."),
])
def test_rewards_and_messages(formula, reward, code, message):
    result = verdict(answer(formula))
    assert (result.reward, result.code, result.message, result.recognized) == (reward, code, message, True)


def test_undefined_stays_undefined():      # x / (y / 0) is not 0
    cards, numbers = ["2", "2", "3", "4"], [2, 2, 3, 4]
    assert judge(answer("3/(4/(2-2))=24"), cards, numbers, 24).code == "division_by_zero"


def test_fractions_are_exact():
    assert judge(answer("8/(3-8/3)=24"), ["3", "3", "8", "8"], [3, 3, 8, 8], 24).reward == 5


@pytest.mark.parametrize("cards, wrong, right", [
    (["A", "2", "3", "4"], -1.0, 5.0), (["4", "3", "2", "A"], -1.0, 5.0), (["A", "2", "3", "5"], -2.5, 3.5),
    (["A", "2", "3"], -2.5, 3.5), (["A", "2", "3", "4", "4"], -2.5, 3.5), (["1", "2", "3", "4"], -2.5, 3.5)])
def test_misread_cards_cost_more_on_image_tasks_only(cards, wrong, right):
    for formula, reward in (("1+2+3+4=24", wrong), ("1*2*3*4=24", right)):
        text, image = verdict(answer(formula, cards)), verdict(answer(formula, cards), image=True)
        assert image.reward == reward and text.reward == {True: 5, False: -1}["*" in formula]
        assert text.recognized == image.recognized == (reward in (-1, 5))
        assert ("misread" in image.message) == (not image.recognized) and "misread" not in text.message


def test_no_answer_on_an_image_task_is_also_misread():
    assert verdict("nothing").reward == -3 and verdict("nothing", image=True).reward == -4.5


def test_number_is_reported_and_not_rewarded():
    good, bad = verdict(answer("1*2*3*4=24")), verdict(answer("1*2*3*4=24", number=(1, 2, 3, 5)))
    assert good.translated and not bad.translated and good.reward == bad.reward == 5


LENIENT = [
    "{'cards': ['A', '2', '3', '4'], 'number': [1, 2, 3, 4], 'formula': '1*2*3*4=24'}",
    '{"cards": [A, 2, 3, 4], "number": [1, 2, 3, 4], "formula": "1*2*3*4=24",}',
    '{"cards": ["A", "2", "3", "4",], "number": [1, 2, 3, 4,], "formula": "1*2*3*4=24",\n}',
    '```json\n{\n  "cards": ["A", "2", "3", "4"],\n  "number": [1, 2, 3, 4],\n  "formula": "1*2*3*4=24"\n}\n```',
    'Let me think (formula: 1+2).\r\n{\r\n"cards": ["Ace of Spades", "2", "3♣", "4"],\r\n'
    '"number": ["1","2","3","4"],\r\n"formula": "1 * 2 * 3 * 4 = 24"\r\n}\r\nThe formula: it uses all.',
    '{cards: (a, 2, 3, 4), number: (1, 2, 3, 4), formula: 1×2·3*4=24}',
    '{"cards": ["4","3","2","A"], "number": [4,3,2,1], "formula": "4 x 3 X 2 ÷ 1 = 24"}',
    '{"cards": ["4","3","2","a"], "number": [4,3,2,1], "formula": "−1×（−2）×3×4=24"}',
    '{"formula": "1*2*3*4=24", "number": [1, 2, 3, 4], "cards": ["A", "2", "3", "4"]}',
    '{"answer": {"x": {"cards": ["A", "2", "3", "4"], "number": [1, 2, 3, 4], "formula": "1*2*3*4=24"}}}',
    '{"cards": ["A", "2", "3", "4"] "number": [1, 2, 3, 4] "formula": "1*2*3*4\\u003d24"}',
    '{"cards": ["A", "2", "3", "4"], "number": [1, 2, 3, 4], "formula": "2*3*4\\/1=24"}',
    json.dumps('{"cards": ["A", "2", "3", "4"], "number": [1, 2, 3, 4], "formula": "1*2*3*4=24"}'),
    '{“cards”: [“A”, “2”, “3”, “4”], “number”: [1, 2, 3, 4], “formula”: “1*2*3*4=24”}',
    '{"Cards": ["A", "2", "3", "4"], "Number": [1, 2, 3, 4], "FORMULA": "1*2*3*4=24"}',
    '{"cards": ["A", "2", "3", "4"], "number": [1, 2, 3, 4], "formula": "1*2*3*4=24',
    'First {"cards": ["K"], "number": [10], "formula": "1=24"}, no: {"cards": ["A", "2", "3", "4"], "number": '
    '[1, 2, 3, 4], "formula": "1*2*3*4=24"}']


@pytest.mark.parametrize("text", LENIENT)
def test_any_dialect_is_read(text):
    result = verdict(text, image=True)
    assert (result.code, result.reward, result.recognized, result.translated) == ("correct", 5, True, True)


def test_names_of_cards_are_read():
    text = answer("10+10+4=24", cards=["ten", "T", "Queen", "jack of hearts", "KING", "q"])
    assert read_answer(text)[0] == ["10", "10", "Q", "J", "K", "Q"]


HOSTILE = [
    "", "None", "null", "\0", "\0" * 1000, "{", "}", "[]", "{}", '{"formula"', '{"formula":',
    '{"formula": null}', '{"formula": ["1*2*3*4=24"]}', '{"cards": null, "number": {}, "formula": {}}',
    "formula", "\ud800", "\\ud800\\u0000", "9**9**9", answer("9**9**9=24"), answer("9" * 100_000 + "=24"),
    answer("1=" + "9" * 100_000), answer("1*2*3*4=" + "0" * 5000 + "24"),
    answer("*".join(["99"] * 60) + "=24"), answer("٣*²=24"), answer("²=24"),
    answer("(" * 100_000 + "1" + ")" * 100_000 + "=24"), answer("(" * 95 + "1" + ")" * 95 + "=24"),
    answer("-" * 190 + "1=24"), answer("-" * 100_000 + "1=24"), "(" * 100_000, "{" * 100_000, "[" * 100_000,
    '{"a":' * 50_000, '{"formula":' * 10_000, '{"cards":[' * 10_000, '{"formula"' * 10_000, "\n" * 100_000,
    "\n\t" * 50_000, "{" + " " * 100_000, '{"formula"' + " " * 100_000, '{"cards":' + "\n" * 100_000,
    '"' * 100_000, "\\" * 100_000, "\\u" * 50_000, "," * 100_000, '{"formula": "' + "=" * 100_000,
    '{"cards": [' + "A," * 50_000 + "]}", '{"cards": [' + "[" * 1000 + "]" * 1000 + '], "formula": "1"}',
    "a" * 100_000, answer("x" * 150 + "=24"), answer("__import__('os').system('true')=24"),
    answer("{0.__class__}{target}=24"), answer("1//0=24"), answer("1*2*3*4=24\0"), answer("1e5=24"),
    answer("0x18=24"), answer("１*２*３*４=24")]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("image", [False, True])
def test_hostile_text_gets_a_verdict(text, image):
    env = GeneralPoints(image=image, size=(56, 14))
    env.reset(1)
    observation, reward, terminated, truncated, info = env.step(text)
    assert reward in ({-4.5, -3.5} if image else {-3, -2}) and not terminated and not truncated and not info["correct"]
    assert 0 < len(observation.messages[0]["content"]) <= 80


def test_full_width_digits_count_as_digits():
    assert verdict(answer("１*２*３*４=24")).code == "correct"


def test_random_formulas_are_judged_as_python_judges_them():
    rng, codes = random.Random(0), Counter()
    for _ in range(8000):
        left = "".join(rng.choice(["1", "2", "3", "4", "1", "2", "3", "4", "+", "-", "*", "/", "(", ")"])
                       for _ in range(rng.randint(1, 9)))
        if rng.random() < 0.5:      # every number once
            a, b, c, d = rng.sample("1234", 4)
            x, y, z = rng.choices("+-*/", k=3)
            left = rng.choice([f"{a}{x}{b}{y}{c}{z}{d}", f"{a}{x}({b}{y}{c}{z}{d})", f"-({a}{x}{b}){y}({c}{z}{d})"])
        if "//" in left or "**" in left or re.search(r"(^|[-+*/(])\+", left) or re.search(r"[0-9]\(|\)[0-9(]", left):
            continue                # Python means something else by these
        try:
            value = evaluate(left, AnyNumber())[0]
        except ZeroDivisionError:
            value = None
        except SyntaxError:
            assert verdict(answer(left + "=24")).code in ("unparsable", "foreign_number"), left
            codes["unparsable"] += 1
            continue
        used, dealt = Counter(map(int, re.findall("[0-9]+", left))), Counter([1, 2, 3, 4])
        expected = ("foreign_number" if set(used) - set(dealt) else "used_twice" if used - dealt
                    else "left_out" if dealt - used else "division_by_zero" if value is None
                    else "correct" if value == 24 else "wrong_value")
        result = verdict(answer(left + "=24"))
        assert result.code == expected and (expected != "wrong_value" or f" {value}," in result.message), left
        codes[expected] += 1
    assert set(codes) == {"unparsable", "foreign_number", "used_twice", "left_out", "division_by_zero", "correct",
                          "wrong_value"}, codes


def test_mutations_never_crash_leak_or_pass_for_right():
    rng, env, codes = random.Random(1), GeneralPoints(look="all"), Counter()
    alphabet = "0123456789+-*/()=\"'{}[],: \nAJQKx÷\0\\é"
    for seed in range(150):
        env.reset(seed)
        right, solutions = env.oracle(), [formula.partition("=")[0] for formula in solve(env.numbers, 24)]
        for _ in range(20):
            text = list(right)
            for _ in range(rng.choice([1, 1, 2, 5])):
                i = rng.randrange(len(text))
                text[i:i + rng.randint(0, 2)] = rng.choice(alphabet)
            text = "".join(text)
            result = judge(text, env.ranks, env.numbers, 24)
            codes[result.code] += 1
            assert result.reward == REWARDS[result.code]
            assert len(result.message) <= 80 and not any(solution in result.message for solution in solutions)
            if result.code == "correct":        # then Python agrees
                left = read_answer(text)[2].partition("=")[0]
                used = list(map(int, re.findall("[0-9]+", left)))
                stripped = re.sub(r"0*([1-9])", r"\1", left.replace(" ", ""))
                assert sorted(used) == sorted(env.numbers) and evaluate(stripped, fingerprints(used))[0] == 24
    assert codes["correct"] > 100 and len(codes) >= 7, codes


def test_random_strings_get_a_verdict():
    rng = random.Random(2)
    for _ in range(2000):
        text = "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x11000)]))
                       for _ in range(rng.randrange(60)))
        for wrapped in (text, '{"formula": "' + text, '{"cards": [' + text + '], "formula": "' + text + '=24"}'):
            assert verdict(wrapped, image=True).reward in {-4.5, -3.5}


# ------------------------------------------------------------------------------------------------------------- episodes

def test_wrong_then_right():
    env = GeneralPoints()
    env.reset(7)
    wrong = answer(f"{'+'.join(map(str, env.numbers))}=24", env.ranks, env.numbers)
    observation, *outcome, info = env.step(wrong)
    assert outcome == [-1, False, False] and info["verdict"] == "wrong_value" and info["attempt"] == 1
    assert not observation.fresh and observation.messages == [{"role": "user", "content": info["message"]}]
    assert info["message"] == f"The formula gives {sum(env.numbers)}, not 24."
    observation, *outcome, info = env.step(env.oracle())
    assert outcome == [5, True, False] and observation.messages == [] and info["attempt"] == 2
    assert info["correct"] and info["recognized"] and info["translated"]
    with pytest.raises(RuntimeError, match="reset"):
        env.step(wrong)


def test_running_out_of_attempts_costs_one_more():
    env = GeneralPoints(attempts=3)
    env.reset(0)
    outcomes = [env.step("?")[1:4] for _ in range(3)]
    assert outcomes == [(-3, False, False), (-3, False, False), (-4, False, True)]
    with pytest.raises(RuntimeError, match="reset"):
        env.step(env.oracle())
    env.reset(0)
    assert env.step(env.oracle())[1:4] == (5, True, False)


def test_the_last_attempt_may_be_right():
    env = GeneralPoints(attempts=2)
    env.reset(0)
    env.step("?")
    assert env.step(env.oracle())[1:4] == (5, True, False)


def test_step_before_reset_is_an_error():
    with pytest.raises(RuntimeError, match="reset"):
        GeneralPoints().step("?")


@pytest.mark.parametrize("target, rule", [(24, "10"), (24, "11-12-13"), (7, "5"), (100, "11-12-13")])
def test_the_oracle_is_right_and_does_not_change_its_mind(target, rule):
    env, chosen = GeneralPoints(target=target, rule=rule, image=True, size=(56, 14)), set()
    for seed in range(60):
        env.reset(seed)
        text = env.oracle()
        assert text == env.oracle() and "\n" not in text
        parsed = json.loads(text)
        assert list(parsed) == ["cards", "number", "formula"] and parsed["cards"] == env.ranks
        assert parsed["number"] == env.numbers and " " not in parsed["formula"]
        formulas = solve(env.numbers, target)
        chosen.add(formulas.index(parsed["formula"]))
        assert env.step(text)[1:4] == (5, True, False)
    assert len(chosen) > 1      # not always the first solution


@pytest.mark.parametrize("image", [False, True])
def test_demonstrations_replay(image):
    env = GeneralPoints(image=image, look="all", size=(56, 14))
    replay, codes, misread = GeneralPoints(image=image, look="all", size=(56, 14)), Counter(), 0
    for seed in range(150):
        dialogue = env.demonstrate(seed, mistakes=seed % 5)
        prompt = replay.reset(seed)[0].messages
        assert [turn["role"] for turn in dialogue] == ["user", "assistant"] * (seed % 5 + 1)
        assert dialogue[:1] == prompt
        answers = dialogue[1::2]
        assert [turn["train"] for turn in answers] == [False] * (seed % 5) + [True]
        for turn, reply in zip(answers, dialogue[2::2]):
            observation, reward, terminated, _, info = replay.step(turn["content"])
            assert observation.messages == [reply] and reward < 0 and not terminated
            codes[info["verdict"]] += 1
            misread += not info["recognized"]
        assert replay.step(answers[-1]["content"])[1:4] == (5, True, False)
    assert codes["wrong_value"] > sum(codes.values()) / 2
    assert {"foreign_number", "used_twice", "left_out"} <= set(codes), codes
    assert (misread > 30) == image      # a text answer cut short may lack its cards, too


@pytest.mark.parametrize("mistakes", [-1, 5])
def test_too_many_mistakes_are_refused(mistakes):
    with pytest.raises(ValueError, match="mistakes"):
        GeneralPoints().demonstrate(0, mistakes)


# -------------------------------------------------------------------------------------------------------------- prompts

def test_load_prompts_replaces_what_it_names(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"gp-l": "{{go}} {cards} {rule} {target}", "wrong_value": "{number}!",
                                "rule_same": "={J}"}))
    env = GeneralPoints(prompts=load_prompts(path), attempts=2)
    observation, info = env.reset(0)
    assert observation.messages[0]["content"] == f"{{go}} {info['cards']} =10 24"
    wrong = answer("+".join(map(str, env.numbers)) + "=24")
    assert env.step(wrong)[0].messages[0]["content"] == f"{sum(env.numbers)}!"
    assert env.prompts["misread"] == PROMPTS["misread"]


@pytest.mark.parametrize("content, key", [
    ('{"gp-x": "hi"}', "'gp-x'"), ('{"gp-l": "{rule} {target}"}', "cards"),
    ('{"gp-vl": "{rule} {target} {cards}"}', "gp-vl"), ('{"wrong_value": "{value}"}', "'wrong_value'"),
    ('{"wrong_value": "{"}', "'wrong_value'"), ('{"wrong_value": "{}"}', "'wrong_value'"),
    ('{"wrong_value": "{number.__class__.x}"}', "'wrong_value'"), ('{"rule_each": 5}', "'rule_each'"),
    ('["gp-l"]', "object"), ("{", "JSON"), ("\udcff", "JSON"),
    ('{"wrong_value": "{number:999999999}"}', "a plain {name}"),
    ('{"wrong_value": "{number:>9}"}', "a plain {name}"),
    ('{"wrong_value": "{number:{target}}"}', "a plain {name}"),
    ('{"wrong_value": "{target!r:>9}"}', "a plain {name}"),
    ('{"wrong_value": "{number!r}"}', "a plain {name}"), ('{"wrong_value": "{number[0]}"}', "a plain {name}"),
    ('{"wrong_value": "{number.real}"}', "a plain {name}"), ('{"wrong_value": "{0}"}', "a plain {name}"),
    ('{"wrong_value": "{ number }"}', "a plain {name}"),
    ('{"describe": "{target:{target:999999999}}"}', "'describe'"), ('{"correct": "\\ud800"}', "'correct'"),
    ('{"correct": "%s"}' % ("x" * 20_001), "20001 characters"),
    ('{"wrong_value": "%s"}' % ("{number}" * 51), "51 fields"), ("[" * 100_000, "JSON"),
    ('{"correct": "%s"}' % ("x" * 2 ** 20), "1048576 bytes"),
    ('{"%s": "x"}' % ("k" * 900), "unknown key 'kkk")])
def test_bad_templates_are_named_in_one_line(tmp_path, content, key):
    path = tmp_path / "prompts.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as error:
        load_prompts(path)
    message = str(error.value)
    assert message.startswith(str(path)) and key in message and "\n" not in message


# ---------------------------------------------------------------------------------------------------------------- cards

def face_of(rank, suit, height):
    """(height, width, 3) integers of a card laid on white."""
    card = cards.draw_card(rank, suit, height)
    white = Image.new("RGB", card.size, "white")
    white.paste(card, mask=card)
    return np.asarray(white, int)


ALL_CARDS = list(itertools.product(cards.RANKS, cards.LOOKS["all"]))


@pytest.mark.parametrize("height", [36, 53, 240])
def test_every_card_has_a_face_of_its_own(height):
    faces = {card: face_of(*card, height) for card in ALL_CARDS}
    for (card, face), (other, twin) in itertools.combinations(faces.items(), 2):
        assert face.shape == (height, round(height / 1.4), 3)
        different = np.abs(face - twin).max(axis=2) > 60       # plainly, not by rounding
        assert different.mean() > 0.005, (card, other)


@pytest.mark.parametrize("height", [36, 53, 353])
def test_hearts_and_diamonds_are_red_the_others_black(height):
    for rank, suit in ALL_CARDS:
        face = face_of(rank, suit, height).reshape(-1, 3)
        ink_red = ((face[:, 0] > 150) & (face[:, 1] < 60) & (face[:, 2] < 80)).sum()
        ink_black = (face.max(axis=1) < 40).sum()
        assert (ink_red > 0.02 * len(face)) == (suit in ("hearts", "diamonds")), (rank, suit)
        assert (ink_black > 0.02 * len(face)) == (suit in ("spades", "clubs")), (rank, suit)


def test_pips_count_the_rank():
    """Connected blobs of ink on a large face: the pips, two index suits and the index characters (1 and 0 for a 10)."""
    for rank in ("A", "2", "5", "8", "10"):
        ink = face_of(rank, "hearts", 700)[:, :, 1] < 100
        blobs, todo = 0, {tuple(point) for point in np.argwhere(ink)}
        while todo:
            blobs, stack = blobs + 1, [todo.pop()]
            while stack:
                y, x = stack.pop()
                near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & todo
                todo -= near
                stack.extend(near)
        pips = 1 if rank == "A" else int(rank)
        assert blobs == pips + 2 + 2 * len(rank), rank


def test_cards_look_the_same_upside_down():
    for rank in ("2", "4", "10", "J", "Q", "K"):     # the others have a pip in the middle or one too many above it
        face = face_of(rank, "clubs", 700)
        assert (np.abs(face - face[::-1, ::-1]).max(axis=2) > 60).mean() < 0.004, rank


@pytest.mark.parametrize("size", [(1200, 1200), (224, 56), (112, 112)])
def test_a_hand_lies_on_the_table_in_order(size):
    hand = [("A", "spades"), ("10", "clubs"), ("Q", "hearts"), ("7", "diamonds")]
    image = np.asarray(cards.draw_hand(hand, size))
    assert image.shape == (size[1], size[0], 3)
    changed = hand[:2] + [("K", "hearts")] + hand[3:]
    columns = np.flatnonzero((np.asarray(cards.draw_hand(changed, size)) != image).any(axis=(0, 2)))
    assert tuple(image[0, 0]) == (0x35, 0x65, 0x4D)
    assert size[0] / 2 <= columns.min() and columns.max() < size[0] * 3 / 4
    assert not (image[:, :2] - image[0, 0]).any() and not (image[:1] - image[0, 0]).any()   # inside the canvas


def test_cards_fill_the_small_tiles():
    image = np.asarray(cards.draw_hand([("8", "spades")] * 4, (224, 56)), int)
    for tile in np.split(image, 4, axis=1):
        card = np.argwhere(np.abs(tile - (0x35, 0x65, 0x4D)).max(axis=2) > 60)
        (top, left), (bottom, right) = card.min(axis=0), card.max(axis=0)
        assert bottom - top >= 50 and 34 <= right - left <= 45


def test_nothing_is_drawn_for_text(monkeypatch):
    monkeypatch.setattr(envs, "draw_hand", None)
    env = GeneralPoints(image=False)
    assert env.demonstrate(0, 4)[-1]["train"]
    with pytest.raises(TypeError):      # the same call would draw if this were an image task
        GeneralPoints(image=True).reset(0)
