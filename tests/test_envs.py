"""GeneralPoints: the solver against brute force, verdicts by hand, deals, dialogues, templates, cards. Every
reward is worked by hand from the paper's appendix A; test_hostile.py lets Python's own parser judge, too."""
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
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import envs
from envs import Env, GeneralPoints
from games import cards
from games.answers import read_answer
from games.cards import RANKS
from games.prompts import PROMPTS, load_prompts
from games.solver import solve
from games.verifier import judge
from tables import cases, lines, numbers, raises, rows
from test_hostile import OPERATORS, value_of

SMALL = dict(image=True, size=(56, 14))


@cases("game", envs.GAMES.values())
def test_a_game_has_all_that_the_contract_lists(game):
    methods = [name for name in vars(Env) if not name.startswith("_")]
    assert {"reset", "step", "oracle", "demonstrate", "shifts", "broad"} <= set(methods)
    assert all(hasattr(game(), name) for name in [*Env.__annotations__, *methods])
    assert {"rule", "look"} <= set(game.kinds) <= set(game.__dataclass_fields__)


def values_of(ranks, rule):
    return [cards.card_values(rule)[rank] for rank in ranks]


# ----------------------------------------------------------------------------------------------------- solver

def at_two_points(numbers):
    """Return {number: (itself, a random one)}: formulas that agree at the second are the same function."""
    rng = random.Random(5)
    return {n: (Fraction(n), Fraction(rng.getrandbits(64))) for n in sorted(set(numbers))}


def evaluate(text, numbers):
    """Return a formula's value and its value at random numbers, by Python's parser."""
    tree, leaves = ast.parse(text, mode="eval").body, at_two_points(numbers)
    return tuple(value_of(tree, lambda n: leaves[n][point]) for point in (0, 1))


@lru_cache(maxsize=None)
def brute_force(parts, target):
    """Return the values at random numbers of all ways to make the target, two parts at a time."""
    found = {value for made, value in parts if made == target and len(parts) == 1}
    for i, j in itertools.permutations(range(len(parts)), 2):
        rest = [part for k, part in enumerate(parts) if k not in (i, j)]
        for operation in OPERATORS.values():
            try:
                made = tuple(map(operation, parts[i], parts[j]))
            except ZeroDivisionError:
                continue
            found |= brute_force(tuple(sorted([*rest, made])), target)
    return found


def random_hands(count, distinct):
    rng = random.Random(count)
    return [tuple(rng.sample(range(1, 14), 4) if distinct else rng.choices(range(1, 14), k=4))
            for _ in range(count)]


@cases("target, hands", [
    (24, random_hands(14, True)), (24, random_hands(13, False)),
    *((24, [tuple(map(int, hand.split())) for hand in row]) for row in rows("""
    3 3 8 8 | 1 5 5 5 | 1 1 1 1 | 5 5 7 24
    1 1 1 1 1 | 9 10 10 10 10 | 1 1 9 10 10 | 1 1 2 2 2 | 2 9 9 9 10""")),
    *((target, random_hands(count, True)) for target, count in ((10, 5), (37, 6), (1, 4)))])
def test_solver_finds_what_brute_force_finds(target, hands):
    for hand in hands:
        formulas, leaves = solve(hand, target), at_two_points(hand)
        results = [evaluate(formula.removesuffix(f"={target}"), hand) for formula in formulas]
        assert all(value == target for value, _ in results) and len(formulas) == len(set(formulas))
        for formula in formulas:
            assert Counter(map(int, re.findall("[0-9]+", formula.partition("=")[0]))) == Counter(hand)
        functions = {value for _, value in results}
        assert functions == brute_force(tuple(sorted(leaves[n] for n in hand)), target), hand
        if len(set(hand)) == 4:     # four different numbers: one function of them, one formula
            assert len(formulas) == len(functions), hand


@cases("highest, solvable", [(13, 1362), (10, 566)])
def test_known_counts_of_solvable_hands(highest, solvable):
    hands = list(itertools.combinations_with_replacement(range(1, highest + 1), 4))
    assert sum(bool(solve(hand, 24)) for hand in hands) == solvable


@cases("hand, target, formulas", """
    24      | 24 | 24=24
    23      | 24 |
    4 6     | 24 | 4*6=24
    8 3 8 3 | 24 | 8/(3-8/3)=24
    2 2     | 1  | 2/2=1
    1 2 3   | 6  | 1*2*3=6 1+2+3=6 2*3/1=6""")
def test_small_cases_by_hand(hand, target, formulas):
    assert solve(map(int, hand.split()), int(target)) == formulas.split()


def test_formulas_have_no_parentheses_to_spare():
    for hand in random_hands(30, False):
        for left in (formula.removesuffix("=24") for formula in solve(hand, 24)):
            stack = []
            for i, character in enumerate(left):
                if character == "(":
                    stack.append(i)
                elif character == ")":      # without this pair the formula is another function
                    opened = stack.pop()
                    bare = left[:opened] + left[opened + 1:i] + left[i + 1:]
                    assert evaluate(bare, hand)[1] != evaluate(left, hand)[1], left


# ------------------------------------------------------------------------------------------------------ deals

@cases("look, suits", """
    black | spades clubs
    red   | hearts diamonds
    all   | spades clubs hearts diamonds""")
def test_hands_come_from_one_deck_and_are_solvable(look, suits):
    env, seen = GeneralPoints(look=look, rule="11-12-13"), set()
    for seed in range(400):
        _, info = env.reset(seed)
        hand = set(zip(info["cards"], info["suits"]))
        assert len(hand) == 4 and solve(info["numbers"], 24)
        assert info["numbers"] == values_of(info["cards"], "11-12-13")
        seen |= hand
    # Every card of the look turns up, no other does.
    assert seen == set(itertools.product(RANKS, suits.split()))


def test_face_deal():
    for deal, holds in (("face", all), ("any", lambda faces: not all(faces))):
        assert holds(set("JQK") & set(GeneralPoints(deal=deal).reset(seed)[1]["cards"]) for seed in range(60))


@cases("rule, values", """
    10       | 1 10 10 10 10 7
    11-12-13 | 1 10 11 12 13 7
    5        | 1 10 5 5 5 7""")
def test_values_and_rules(rule, values):
    assert values_of("A 10 J Q K 7".split(), rule) == numbers(values)


@cases("game, message, settings", """
    gp   | rule 'ten': expected | {"rule": "ten"}
    gp   | rule '10-11': expected | {"rule": "10-11"}
    gp   | rule '0': expected | {"rule": "0"}
    gp   | rule '-5': expected | {"rule": "-5"}
    gp   | rule '1-2-3-4': expected | {"rule": "1-2-3-4"}
    gp   | rule '': expected        | {"rule": ""}
    gp   | rule '9999999': expected | {"rule": "9999999"}
    gp   | rule 'ten': expected | {"judged_rule": "ten"}
    gp   | look green: expected     | {"look": "green"}
    gp   | deal faces: expected     | {"deal": "faces"}
    gp   | target 0: expected       | {"target": 0}
    gp   | target 2.5: expected     | {"target": 2.5}
    gp   | target True: expected    | {"target": True}
    gp   | attempts 0: expected     | {"attempts": 0}
    gp   | size 0,56: expected      | {"size": (0, 56)}
    gp   | size 224,-1: expected    | {"size": (224, -1)}
    gp   | cards 2: expected        | {"cards": 2}
    gp   | cards 6: expected        | {"cards": 6}
    gp   | cards 5: expected        | {"cards": "5"}
    gp   | style upside-down: expected | {"style": "upside-down"}
    virl | rule 10: expected        | {"rule": "10"}
    virl | judged_rule 10: expected | {"judged_rule": "10"}
    virl | wording 5: expected      | {"wording": "5"}
    virl | attempts 0: expected     | {"attempts": 0}
    virl | size 0: expected         | {"size": 0}
    virl | after_failure cry: expected | {"after_failure": "cry"}""")
def test_bad_settings_are_named(game, message, settings):
    raises(message, envs.GAMES[game], **ast.literal_eval(settings))


def test_impossible_requests_are_refused():
    env = GeneralPoints()
    raises("reset", env.step, "?", error=RuntimeError)
    raises("seed", env.reset, -1)
    for mistakes in (-1, 5):
        raises("mistakes", env.demonstrate, 0, mistakes)
    raises("target 1000000", GeneralPoints(target=10 ** 6).reset, 0)


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
    digests = {subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, check=True, capture_output=True,
                              text=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in "12"}
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
    for part in (str(info["cards"]), *'30 11 12 13 "cards" "number" "formula" =30'.split()):
        assert part in message["content"]
    assert "all count as 10" in GeneralPoints().reset(3)[0].messages[0]["content"]
    image, text = GeneralPoints(image=True, size=(224, 56)).reset(3)[0].messages[0]["content"]
    assert image["type"] == "image" and image["image"].size == (224, 56)
    assert text["type"] == "text" and "24" in text["text"] and "['" not in text["text"]


# --------------------------------------------------------------------------------------------------- verdicts

def answer(formula, cards=("A", "2", "3", "4"), number=(1, 2, 3, 4)):
    return json.dumps({"cards": list(cards), "number": list(number), "formula": formula})


def verdict(text, image=False):
    return judge(text, ["A", "2", "3", "4"], [1, 2, 3, 4], 24, image)


@cases("formulas, reward, code, message", """
    1*2*3*4=24  (1+3)*(2+4)=24           | 5  | correct          | Correct.
    ((1))*2*(3*4)=24  -1*2*3*-4=24       | 5  | correct          | Correct.
    1+2+3+4=24  1+2+3+4=10               | -1 | wrong_value      | The formula gives 10, not 24.
    1/2/3/4=24                           | -1 | wrong_value      | The formula gives 1/24, not 24.
    1-2*3*4=24                           | -1 | wrong_value      | The formula gives -23, not 24.
    7+2+3+4=24                           | -2 | foreign_number   | 7 is not one of the numbers.
    24=24                                | -2 | foreign_number   | 24 is not one of the numbers.
    9/(3-3)=24                           | -2 | foreign_number   | 9 is not one of the numbers.
    12*(3-1)=24                          | -2 | foreign_number   | 12 is not one of the numbers.
    4*3*2*1*1=24  1/(4/(3-2-1))=24       | -3 | used_twice       | 1 is used too often.
    1/(2-2)=24                           | -3 | used_twice       | 2 is used too often.
    2*3*4=24                             | -3 | left_out         | 1 is left out.
    4/(3-2-1)=24                         | -3 | division_by_zero | The formula divides by zero.
    1*2*3*4  1*2*3*4=25  =24  1*2*3*4=6*4 | -3 | no_target       | The formula must end in =24.
                                         | -3 | no_target        | The formula must end in =24.
    1*2*3*4=24=24  (1*2*3*4=24           | -3 | unparsable       | The formula cannot be read.
    1*2*3*4)=24  1*2*(3*4))(=24  ()=24   | -3 | unparsable       | The formula cannot be read.
    1*2*3 4=24  1 2*3*4=24  2(3)(4)=24   | -3 | unparsable       | The formula cannot be read.
    1**2*3*4=24  4!*(3-2)*1=24  1+=24    | -3 | unparsable       | The formula cannot be read.
    2.0*3*4*1=24  A*2*3*4=24             | -3 | unparsable       | The formula cannot be read.
    """)
def test_rewards_and_messages(formulas, reward, code, message):
    for formula in re.split(" {2,}", formulas):
        result = verdict(answer(formula))
        assert (result.reward, result.code, result.message) == (float(reward), code, message)
        assert result.recognized


def test_undefined_stays_undefined():      # x / (y / 0) is not 0
    cards, numbers = ["2", "2", "3", "4"], [2, 2, 3, 4]
    assert judge(answer("3/(4/(2-2))=24"), cards, numbers, 24).code == "division_by_zero"


@cases("cards", ["A 2 3 4", "4 3 2 A", "A 2 3 5", "A 2 3", "A 2 3 4 4", "1 2 3 4"])
def test_misread_cards_cost_more_on_image_tasks_only(cards):
    right = set(cards) == set("A 2 3 4") and len(cards) == 7
    for formula, reward in (("1+2+3+4=24", -1.0), ("1*2*3*4=24", 5.0)):
        text, image = (verdict(answer(formula, cards.split()), image) for image in (False, True))
        assert text.reward == reward and image.reward == reward - (0 if right else 1.5)
        assert text.recognized == image.recognized == right
        assert ("misread" in image.message) == (not right) and "misread" not in text.message


def test_number_is_not_judged():
    assert verdict(answer("1*2*3*4=24", number=(1, 2, 3, 5))).reward == 5


# @ stands for cards and numbers.
@cases("text", lines(r"""
    {'cards': ['A', '2', '3', '4'], 'number': [1, 2, 3, 4], 'formula': '1*2*3*4=24'}
    {"cards": [A, 2, 3, 4], "number": [1, 2, 3, 4], "formula": "1*2*3*4=24",}
    {"cards": ["A", "2", "3", "4",], "number": [1, 2, 3, 4,], "formula": "1*2*3*4=24",↵}
    ```json↵{↵  "cards": ["A", "2", "3", "4"],↵  "number": [1, 2, 3, 4],↵  "formula": "1*2*3*4=24"↵}↵```
    {↵"cards": ["Ace of Spades", "2", "3♣", "4"],↵number: ["1", 2, 3, 4], "formula": "1*2*3*4=24"↵}
    Think (formula: 1+2).↵{↵@,↵"formula": "1 * 2 * 3 * 4 = 24"↵}↵The formula: it uses all.
    {cards: (a, 2, 3, 4), number: (1, 2, 3, 4), formula: 1×2·3*4=24}
    {"cards": ["4","3","2","A"], "number": [4,3,2,1], "formula": "4 x 3 X 2 ÷ 1 = 24"}
    {"cards": ["4","3","2","a"], "number": [4,3,2,1], "formula": "−1×（−2）×3×4=24"}
    {"formula": "1*2*3*4=24", "number": [1, 2, 3, 4], "cards": ["A", "2", "3", "4"]}
    {"answer": {"x": {@, "formula": "1*2*3*4=24"}}}
    {"cards": ["A", "2", "3", "4"] "number": [1, 2, 3, 4] "formula": "1*2*3*4\u003d24"}
    {@, "formula": "2*3*4\/1=24"}
    "{\"cards\": [\"A\", \"2\", \"3\", \"4\"], \"number\": [1, 2, 3, 4], \"formula\": \"1*2*3*4=24\"}"
    {“cards”: [“A”, “2”, “3”, “4”], “number”: [1, 2, 3, 4], “formula”: “1*2*3*4=24”}
    {"Cards": ["A", "2", "3", "4"], "Number": [1, 2, 3, 4], "FORMULA": "1*2*3*4=24"}
    {@, "formula": "1*2*3*4=24
    {@, "formula": "１*２*３*４=24"}
    First {"cards": ["K"], "formula": "1=24"}, no: {@, "formula": "1*2*3*4=24"}""", "\r\n"))
def test_any_dialect_is_read(text):
    text = text.replace("@", '"cards": ["A", "2", "3", "4"], "number": [1, 2, 3, 4]')
    result = verdict(text, image=True)
    assert (result.code, result.reward, result.recognized) == ("correct", 5, True)


def test_names_of_cards_are_read():
    text = answer("10+10+4=24", cards=["ten", "T", "Queen", "jack of hearts", "KING", "q"])
    assert read_answer(text)[0] == "10 10 Q J K Q".split()


def long(*units, before=""):
    return [before + unit * (100_000 // len(unit)) for unit in units]


HOSTILE = [
    *' None null \0 { } [] {} formula \ud800 \\ud800\\u0000 9**9**9 {"formula" {"formula":'.split(" "),
    *'{"formula":null} {"formula":["1*2*3*4=24"]} {"cards":null,"number":{},"formula":{}}'.split(),
    '{"cards": [' + "[" * 1000 + "]" * 1000 + '], "formula": "1"}',
    *long(*'a ( { [ " , \\ \\u {"a": {"formula": {"cards":[ {"formula"'.split(), "\0", "\n", "\n\t"),
    *long(" ", before="{"), *long(" ", before='{"formula"'), *long("\n", before='{"cards":'),
    *long("=", before='{"formula": "'), *long("A,", before='{"cards": ['),
    *(answer(f"{left}=24") for left in [
        *"9**9**9 ٣*² ² 1//0 1e5 0x18 __import__('os').system('true') １*２*３*４".split(), "9" * 100_000,
        "*".join(["99"] * 60), *("(" * n + "1" + ")" * n for n in (95, 100_000)), "x" * 150,
        *("-" * n + "1" for n in (190, 100_000))]),
    *map(answer, ["1=" + "9" * 100_000, "1*2*3*4=" + "0" * 5000 + "24", "{0.__class__}{target}=24",
                  "1*2*3*4=24\0"])]


@cases("text", HOSTILE, ids=range(len(HOSTILE)))
@cases("image", [False, True])
def test_hostile_text_gets_a_verdict(text, image):
    env = GeneralPoints(image=image, size=(56, 14))
    env.reset(1)
    observation, reward, terminated, truncated, info = env.step(text)
    assert reward in ({-4.5, -3.5} if image else {-3, -2}) and not terminated and not truncated
    assert not info["correct"] and 0 < len(observation.messages[0]["content"]) <= 80


# --------------------------------------------------------------------------------------------------- episodes

def test_wrong_then_right():
    env = GeneralPoints()
    env.reset(7)
    wrong = answer(f"{'+'.join(map(str, env.numbers))}=24", env.ranks, env.numbers)
    observation, *outcome, info = env.step(wrong)
    assert outcome == [-1, False, False] and info["verdict"] == "wrong_value" and info["attempt"] == 1
    assert not observation.fresh
    assert observation.messages == [{"role": "user", "content": info["message"]}]
    assert info["message"] == f"The formula gives {sum(env.numbers)}, not 24."
    observation, *outcome, info = env.step(env.oracle())
    assert outcome == [5, True, False] and observation.messages == [] and info["attempt"] == 2
    assert info["correct"] and info["recognized"]
    raises("reset", env.step, wrong, error=RuntimeError)


def test_running_out_of_attempts_costs_one_more():
    env = GeneralPoints(attempts=3)
    env.reset(0)
    outcomes = [env.step("?")[1:4] for _ in range(3)]
    assert outcomes == [(-3, False, False), (-3, False, False), (-4, False, True)]
    raises("reset", env.step, env.oracle(), error=RuntimeError)
    env.reset(0)        # and the last attempt may be right
    assert [env.step(text)[1:4] for text in ("?", "?", env.oracle())][2] == (5, True, False)


@cases("target, rule", [(24, "10"), (24, "11-12-13"), (7, "5"), (100, "11-12-13")])
def test_the_oracle_is_right_and_does_not_change_its_mind(target, rule):
    env, chosen = GeneralPoints(target=target, rule=rule, **SMALL), set()
    for seed in range(60):
        env.reset(seed)
        text = env.oracle()
        assert text == env.oracle() and "\n" not in text
        parsed = json.loads(text)
        formula = parsed["formula"]
        assert list(parsed.items()) == [("cards", env.ranks), ("number", env.numbers), ("formula", formula)]
        chosen.add(solve(env.numbers, target).index(formula))
        assert env.step(text)[1:4] == (5, True, False)
    assert len(chosen) > 1      # not always the first solution


def replayed(seeds, **settings):
    """Return info of the mistakes in demonstrations, of seed % 5 each, which another game judges alike."""
    env, replay = (GeneralPoints(**settings) for _ in range(2))
    found = []
    for seed in seeds:
        mistakes = seed % 5
        prompt, *dialogue = env.demonstrate(seed, mistakes)
        assert [prompt] == replay.reset(seed)[0].messages
        assert [turn["role"] for turn in dialogue] == ["assistant", "user"] * mistakes + ["assistant"]
        assert [turn["train"] for turn in dialogue[::2]] == [False] * mistakes + [True]
        for turn, reply in zip(dialogue[::2], dialogue[1::2]):
            observation, reward, terminated, _, info = replay.step(turn["content"])
            assert observation.messages == [reply] and reward < 0 and not terminated
            found.append(info)
        assert replay.step(dialogue[-1]["content"])[1:4] == (5, True, False)
    return found


@cases("image", [False, True])
def test_demonstrations_replay(image):
    mistakes = replayed(range(150), image=image, look="all", size=(56, 14))
    codes = Counter(info["verdict"] for info in mistakes)
    assert codes["wrong_value"] > len(mistakes) / 2
    assert {"foreign_number", "used_twice", "left_out"} <= set(codes), codes
    # A text answer cut short may lack its cards, too.
    assert (sum(not info["recognized"] for info in mistakes) > 30) == image


# ---------------------------------------------------------------------------------------------------- prompts

def test_load_prompts_replaces_what_it_names(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('{"gp-l": "{{go}} {cards} {rule} {target}", "wrong_value": "{number}!", '
                    '"rule_same": "={J}"}', encoding="utf-8")
    env = GeneralPoints(prompts=load_prompts(path), attempts=2)
    observation, info = env.reset(0)
    assert observation.messages[0]["content"] == f"{{go}} {info['cards']} =10 24"
    wrong = answer("+".join(map(str, env.numbers)) + "=24")
    assert env.step(wrong)[0].messages[0]["content"] == f"{sum(env.numbers)}!"
    assert env.prompts["misread"] == PROMPTS["misread"]


@cases("content, key", [
    *rows("""
    {"gp-x": "hi"} | 'gp-x'
    {"gp-l": "{rule} {target}"} | cards
    {"gp-vl": "{rule} {target} {cards}"} | gp-vl
    {"wrong_value": "{value}"} | 'wrong_value'
    {"wrong_value": "{"} | 'wrong_value'
    {"wrong_value": "{}"} | 'wrong_value'
    {"wrong_value": "{number.__class__.x}"} | 'wrong_value'
    {"rule_each": 5} | 'rule_each'
    ["gp-l"] | object
    { | JSON
    \udcff | JSON
    {"wrong_value": "{number:999999999}"} | knows the fields
    {"wrong_value": "{number:>9}"} | knows the fields
    {"wrong_value": "{number:{target}}"} | knows the fields
    {"wrong_value": "{target!r:>9}"} | knows the fields
    {"wrong_value": "{number!r}"} | knows the fields
    {"wrong_value": "{number[0]}"} | knows the fields
    {"wrong_value": "{number.real}"} | knows the fields
    {"wrong_value": "{0}"} | knows the fields
    {"wrong_value": "{ number }"} | knows the fields
    {"describe": "{target:{target:999999999}}"} | 'describe'
    {"gp-l": "{rule:{target}} {target} {cards}"} | 'rule:{target}'"""),
    ("[" * 100_000, "JSON"),
    ('{"%s": "x"}' % ("k" * 900), "unknown key 'kkk")])
def test_bad_templates_are_named_in_one_line(tmp_path, content, key):
    path = tmp_path / "prompts.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert raises(key, load_prompts, path, longest=1000).startswith(str(path))


# ------------------------------------------------------------------------------------------------------ cards

def face_of(rank, suit, height):
    """Return the (height, width, 3) integers of a card laid on white."""
    card = cards.draw_card(rank, suit, height)
    white = Image.new("RGB", card.size, "white")
    white.paste(card, mask=card)
    return np.asarray(white, int)


def differs(a, b):
    """Return where two pictures differ plainly, not by rounding."""
    return np.abs(a - b).max(axis=2) > 60


ALL_CARDS = list(itertools.product(cards.RANKS, cards.LOOKS["all"]))
TABLE = np.array((0x35, 0x65, 0x4D))


@cases("height", [36, 53, 240])
def test_every_card_has_a_face_of_its_own(height):
    faces = [face_of(*card, height) for card in ALL_CARDS]
    assert {face.shape for face in faces} == {(height, round(height / 1.4), 3)}
    assert all(differs(face, other).mean() > 0.005 for face, other in itertools.combinations(faces, 2))


@cases("height", [36, 53, 353])
def test_hearts_and_diamonds_are_red_the_others_black(height):
    for rank, suit in ALL_CARDS:
        red, green, blue = np.moveaxis(face_of(rank, suit, height), 2, 0)
        ink_red = (red > 150) & (green < 60) & (blue < 80)
        ink_black = np.maximum(np.maximum(red, green), blue) < 40
        assert (ink_red.mean() > 0.02) == (suit in ("hearts", "diamonds")), (rank, suit)
        assert (ink_black.mean() > 0.02) == (suit in ("spades", "clubs")), (rank, suit)


@cases("rank", "A 2 5 8 10".split())
def test_pips_count_the_rank(rank):
    """Connected blobs of ink on a large face: the pips, two index suits and the index characters (1 and 0 for
    a 10)."""
    ink, blobs = Image.fromarray(face_of(rank, "hearts", 700)[:, :, 1] < 100).convert("L"), 0
    while box := ink.getbbox():
        column = np.flatnonzero(np.asarray(ink)[box[1]])[0]
        ImageDraw.floodfill(ink, (column, box[1]), 0)
        blobs += 1
    assert blobs == int(rank.replace("A", "1")) + 2 + 2 * len(rank)


# The others have a pip in the middle, or one too many above it.
@cases("rank", "2 4 10 J Q K".split())
def test_cards_look_the_same_upside_down(rank):
    face = face_of(rank, "clubs", 700)
    assert differs(face, face[::-1, ::-1]).mean() < 0.004


HAND = [("Q", "spades"), ("4", "clubs"), ("J", "hearts"), ("7", "diamonds"), ("K", "clubs")]


# Five are as large as four where the height is what limits both.
@cases("sizes", ["4 224 56 53", "5 224 56 53", "4 112 112 35", "4 1200 1200 378", "5 1200 1200 302"])
def test_a_hand_lies_on_the_table_in_order(sizes):
    """Of a number of cards on a picture of some width and height, each is so high."""
    count, *size, height = map(int, sizes.split())
    hand = HAND[:count]
    image = np.asarray(cards.draw_hand(hand, size), int)
    assert image.shape == (size[1], size[0], 3)
    cloth = (image == TABLE).all(axis=2)
    assert cloth[:, [0, -1]].all() and cloth[[0, -1]].all() and (~cloth.all(axis=1)).sum() == height
    # Columns without a card are between each two, and at both ends.
    starts = np.flatnonzero(np.diff(cloth.all(axis=0).astype(int)) == -1)
    assert len(starts) == count and np.diff(starts) == pytest.approx(size[0] / count, abs=1)
    hand[2] = ("9", "clubs")
    columns = np.flatnonzero((np.asarray(cards.draw_hand(hand, size)) != image).any(axis=(0, 2)))
    assert size[0] * 2 / count <= columns.min() and columns.max() < size[0] * 3 / count


def test_nothing_is_drawn_for_text(monkeypatch):
    monkeypatch.setattr(envs, "draw_hand", None)
    assert GeneralPoints().demonstrate(0, 4)[-1]["train"]
    with pytest.raises(TypeError):      # the same call would draw if this were an image task
        GeneralPoints(image=True).reset(0)
