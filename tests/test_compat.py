"""Each behaviour of the released games that --compat brings back, worked by hand beside the default."""
import random
import re

import numpy as np
import pytest

import envs
from envs import GeneralPoints, Navigation
from games.answers import read_answer
from games.cards import FACES
from games.rails import relative_turn
from games.routes import Leg, Route
from harness.environments import make_env
from harness.settings import Args, apply_preset
from tables import cases, numbers
from test_envs import HOSTILE as HOSTILE_CARDS
from test_envs import answer
from test_hostile import SHAPES
from test_navigation import HOSTILE as HOSTILE_STEPS
from test_navigation import game, here, place    # noqa: F401 (here is a fixture)
from variants.official import OF_GAME, wrap
from variants.official_games import SixthAttempt, unwrapped_turn


@cases("compat, kind", [("official", SixthAttempt), ("iid-deck", GeneralPoints)])
def test_a_run_plays_by_its_compat(compat, kind):
    env = make_env(apply_preset(Args(task="gp-l", compat=compat), 0))()
    hands = [env.reset(seed)[1] for seed in range(200)]
    assert type(env) is kind and any(len(set(zip(hand["cards"], hand["suits"]))) < 4 for hand in hands)


# ---------------------------------------------------------------------------------------------- sixth-attempt

ROUTE = lambda **settings: game(**settings)[0]
KINDS = {"cards": lambda: SixthAttempt(GeneralPoints(attempts=2)), "default": ROUTE,
         "route": lambda: SixthAttempt(ROUTE()),
         "walk on": lambda: SixthAttempt(ROUTE(after_failure="walk-on"))}
UNJUDGED = {"verdict": "unjudged", "message": "", "correct": False, "recognized": False}


@cases("kind, said, rewards, end", """
    cards   | ??!       | -3 -3 -1                 | failed      # right, but nobody looks
    cards   | ?!        | -3 5                     | right
    route   | !??!      | 1 -2.5 -2.5 -1           | failed
    route   | !!!!!!??? | 1 1 1 1 1 1 -2.5 -2.5 -1 | both        # at the destination
    walk on | ???!!!!!! | -2.5 -2.5 -1 1 1 1 1 1 1 | right
    default | !!!!!!??  | 1 1 1 1 1 1 -2.5 -3.5    | failed""")
def test_the_answer_after_the_last_attempt_is_not_judged(here, kind, said, rewards, end):     # noqa: F811
    """said: a right answer (!) or none. The last judged one costs no more than another."""
    env = KINDS[kind]()
    env.reset(0)
    steps = [env.step(env.oracle() if answer == "!" else answer) for answer in said]
    assert [step[1] for step in steps] == numbers(rewards)
    assert not any(sum(step[2:4]) for step in steps[:-1])
    assert steps[-1][2:4] == (end != "failed", end != "right") and steps[-1][0].messages == []
    assert steps[-1][4]["success"] == (end == "right" and "-1" not in rewards.split())
    for observation, reward, *_, info in steps[:-1]:
        assert len(observation.messages) == 1 and observation.fresh == (reward in (1, -1))
    assert [UNJUDGED.items() <= step[4].items() for step in steps] == [step[1] == -1 for step in steps]
    with pytest.raises(RuntimeError, match="reset"):
        env.step("?")


def test_a_demonstration_has_no_sixth_attempt():
    env = SixthAttempt(GeneralPoints(attempts=2))
    assert env.attempts == 2 and env.demonstrate(0, 1) == GeneralPoints(attempts=2).demonstrate(0, 1)


# ------------------------------------------------------------------------------------ GeneralPoints' verdicts

def judged(compat, text, numbers=(1, 2, 3, 4), cards=("A", "2", "3", "4"), image=False, target=24):
    """Return the verdict on an answer to a given hand."""
    env = GeneralPoints(image=image, target=target)
    env.ranks, env.numbers = cards, numbers
    return wrap(env, compat).judge(text)


# By hand from the released code's step_rewards: -3 per token that cannot follow the one before, -2 if a
# number was not dealt or else is used too often, -2 if one is left out; without any of these -1 unless the
# value is right. The columns: formula, reward in the paper, added penalties, message.
@cases("formula, reward, added, message", """
    1*2*3*4=24     |  5 |   5 | Correct.
    1+2+3+4=24     | -1 |  -1 | The formula gives 10, not 24.
    4/(3-2-1)=24   | -3 |  -1 | The formula divides by zero.
    1*2*3*4=25     | -3 |  -3 | The formula must end in =24.
    2*2*3*4=24     | -3 |  -4 | 2 is used too often. 1 is left out.
    2*3*4=24       | -3 |  -2 | 1 is left out.
    (1+2+3)*9=24   | -2 |  -4 | 9 is not one of the numbers. 4 is left out.
    2*2*3*4*1=24   | -3 |  -2 | 2 is used too often.
    2=24           | -3 |  -2 | 1 is left out.  # three are: one kind
    7*8*9=24       | -2 |  -4 | 7 is not one of the numbers. 1 is left out.
    7*2*2*3=24     | -2 |  -4 | 7 is not one of the numbers. 1 is left out.  # the second 2 costs nothing
    1*2*3*4*7=24   | -2 |  -2 | 7 is not one of the numbers.
    (1*2*3*4=24    | -3 |  -1 | The formula cannot be read.  # an open parenthesis is no misplaced token
    1*2*3*4+=24    | -3 |  -1 | The formula cannot be read.
    (2*3*4=24      | -3 |  -2 | 1 is left out.
    7*2*3+=24      | -3 |  -4 | 7 is not one of the numbers. 1 is left out.
    1*2*3*4)=24    | -3 |  -3 | The formula cannot be read.
    1**2*3*4=24    | -3 |  -3 | The formula cannot be read.
    1*2*3 4=24     | -3 |  -3 | The formula cannot be read.
    ()*1*2*3*4=24  | -3 |  -3 | The formula cannot be read.
    2*2*3)=24      | -3 |  -7 | The formula cannot be read. 2 is used too often. 1 is left out.
    1(2)(3)(4)=24  | -3 | -18 | The formula cannot be read.  # each ( and each ) that it opens
    -1*2*3*-4=24   |  5 |  -6 | The formula cannot be read.  # no minus sign there
    A*2*3*4=24     | -3 |  -3 | The formula cannot be read.  # other signs: nothing else is looked at""")
def test_penalties_add_up(formula, reward, added, message):
    result = judged("added-penalties", answer(formula))
    assert (result.reward, result.message) == (float(added), message)
    assert judged("", answer(formula)).reward == float(reward)
    assert (result.code == "correct") == (added == "5")
    assert judged("added-penalties", answer(formula, ["K"]), image=True).reward == float(added) - 1.5


@cases("formula, reward", [("1*2*3*4=24", 5), ("1+2+3+4=24", -1), ("?", -3)])
def test_misread_cards_replace_the_verdict(formula, reward):
    misread = answer(formula, ["A", "2", "3", "5"])
    result = judged("misread-first", misread, image=True)
    assert (result.reward, result.code, result.recognized) == (-1.5, "misread", False)
    assert result.message == "The cards are misread."
    assert judged("", misread, image=True).reward == reward - 1.5
    # In words, or read right: as ever.
    for image, text in ((False, misread), (True, answer(formula, ["4", "3", "2", "A"]))):
        assert judged("misread-first", text, image=image) == judged("", text, image=image)


def test_a_misread_hand_is_not_solved():
    env = wrap(GeneralPoints(image=True, size=(56, 14), attempts=1), "misread-first")
    env.reset(0)
    env.numbers = [1, 2, 3, 4]
    *outcome, info = env.step(answer("1*2*3*4=24", []))[1:]
    assert outcome == [-1.5 - 1, False, True] and not info["correct"] and info["verdict"] == "misread"


@cases("hand, formula, exact, floats", """
    3 3 8 8   | 8/(3-8/3)   | correct     | float_miss    # 23.99999999999999
    3 8 10 10 | (8/10)*3*10 | correct     | float_miss    # 24.000000000000004
    3 8 10 10 | 3*8*(10/10) | correct     | correct
    3 8 10 10 | 3+8+10+10   | wrong_value | wrong_value""")
def test_fractions_that_floats_miss(hand, formula, exact, floats):
    """The released code gives 0 and says "." to what floats miss."""
    said = {"correct": (5, "Correct."), "float_miss": (0, "."),
            "wrong_value": (-1, "The formula gives 31, not 24.")}
    for compat, code in (("", exact), ("float-equality", floats), ("float-equality,added-penalties", floats)):
        result = judged(compat, answer(f"{formula}=24"), numbers(hand))
        assert (result.code, result.reward, result.message) == (code, *said[code])


def test_floats_decide_as_python_does():
    rng, disagree = random.Random(0), 0
    for _ in range(3000):
        a, b, c, d = hand = rng.choices(range(1, 14), k=4)
        x, y, z = rng.choices("+-*/", k=3)
        left = rng.choice([*SHAPES, "{0}{1}({2}{3}{4}/{6})"]).format(a, x, b, y, c, z, d)
        try:
            value = eval(left)                              # made two lines above
        except ZeroDivisionError:
            continue
        target = max(1, round(value))
        exact, floating = (judged(compat, answer(f"{left}={target}"), hand, target=target).code
                           for compat in ("", "float-equality"))
        assert (floating == "correct") == (value == target), left
        disagree += exact != floating
    assert disagree >= 3


# ------------------------------------------------------------------------------------------------------- deck

# Of 26 black cards 4 are dealt: the share of hands with two cards of one rank, and the mean count of faces.
@cases("deal, compat, pair, faces", [
    ("any", "", 1 - 24 * 22 * 20 / (25 * 24 * 23), 12 / 13),
    ("any", "iid-deck", 1 - 12 * 11 * 10 / 13**3, 12 / 13),
    ("face", "iid-deck", 1 - 12 * 11 * 10 / 13**3, 1 + 9 / 13)])
def test_independent_draws(deal, compat, pair, faces):
    env = wrap(GeneralPoints(deal=deal), compat)
    env.reset(0)
    hands = [env.draw() for _ in range(4000)]
    twice = sum(len(set(hand)) < 4 for hand in hands)
    assert twice > 300 if compat else twice == 0            # the same card twice
    are_faces = np.array([[rank in FACES for rank, _ in hand] for hand in hands])
    # Within four standard errors.
    assert np.mean([len(dict(hand)) < 4 for hand in hands]) == pytest.approx(pair, abs=0.03)
    assert are_faces.sum(1).mean() == pytest.approx(faces, abs=0.055)
    assert are_faces[:, 3].mean() == pytest.approx(faces / 4, abs=0.03)         # no place is special
    assert deal == "any" or are_faces.any(1).all()


def test_a_hand_of_four_equal_cards_can_be_shown_and_solved():
    env = wrap(GeneralPoints(image=True, size=(56, 14)), "iid-deck")
    env.deck = [("6", "spades")]
    env.reset(0)
    assert env.ranks == ["6"] * 4 and env.step(env.oracle())[1:4] == (5, True, False)


# ----------------------------------------------------------------------------------------------------- angles

@cases("old, new, wrapped, unwrapped", """
    350 | 10  | slightly right | left
    10  | 350 | slightly left  | right
    300 | 30  | right          | left
    30  | 300 | left           | right
    0   | 359 | slightly left  | right
    0   | 45  | slightly right | slightly right
    46  | 0   | left           | left
    10  | 10  | slightly left  | slightly left""")
def test_turns_past_north(old, new, wrapped, unwrapped):
    assert [turn(int(old), int(new)) for turn in (relative_turn, unwrapped_turn)] == [wrapped, unwrapped]


@cases("compat, words", [
    ("", ["slightly right", "slightly left"]), ("unwrapped-angles", ["left", "right"])])
def test_instructions_and_actions_agree(monkeypatch, compat, words):
    legs = Leg(10, "north", None, None, (), place("a")), Leg(340, "north", "Bar", "left", (), place("b"))
    monkeypatch.setattr(envs, "known_routes", lambda *_: [Route("here", place("start"), 350, legs)])
    env = wrap(Navigation(rule="relative"), compat)
    sentences = env.reset(0)[1]["instructions"]
    assert sentences[::2] == [f"First, turn {words[0]} to face north.", f"Turn {words[1]} to face north."]
    turns = [point.action for point in env.points[:-1]]
    assert turns == [f"turn_direction({word})" for word in words]
    absolute = wrap(Navigation(), compat)
    assert absolute.reset(0)[1]["instructions"] == sentences
    assert absolute.points[0].action == "turn_direction(north)"


# --------------------------------------------------------------------------------------- any text, any switch

NINES = ["9/(1-1/3-1/3-1/3)"] * 11


@cases("compat", [*OF_GAME["gp"], "official"])
@cases("image", [False, True])
def test_hostile_answers_to_cards(image, compat):
    env = wrap(GeneralPoints(image=image, size=(56, 14)), compat)
    env.reset(1)
    for text in HOSTILE_CARDS + ["*".join(NINES) + "=24", "1/" * 90 + "0=24"]:
        for wrapped in (text, answer(text)):
            observation, reward, terminated, truncated, info = env.step(wrapped)
            assert -620 <= reward < 0 and not terminated and not info["correct"]       # 3 per character
            assert truncated or 0 < len(observation.messages[0]["content"]) <= 160
            if truncated:
                env.reset(1)


@cases("left", [
    "9" * 180 + "/1", "9" * 90 + "*" + "9" * 90 + "/7", "*".join(NINES[1:]), "-" * 190 + "1", "1/0*0",
    f"24*{10**17 + 1}/({10**17 + 1}/1-{10**17}/1)",             # over 1; in floats over 0
    f"1+2/(3/({10**17 + 1}/1-{10**17}/1))"])
def test_floats_do_not_overflow_or_divide_by_zero(left):
    """Every number was dealt as often as it is used, so the value is computed and looked at."""
    numbers = [int(n) for n in re.findall("[0-9]+", left)]
    assert read_answer(answer(f"{left}=24"))[1] == f"{left}=24"
    found = judged("official", answer(f"{left}=24"), numbers).code
    assert found in ("wrong_value", "division_by_zero", "unparsable")


@cases("compat", [*OF_GAME["virl"], "official"])
def test_hostile_answers_on_a_route(here, compat):            # noqa: F811
    env = wrap(game()[0], compat)
    answers = env.attempts + (type(env) is SixthAttempt)
    for text, code in HOSTILE_STEPS:
        env.reset(0)
        outcomes = [env.step(text) for _ in range(answers)]
        assert all(outcome[1] in (-1, -2.5, -2, -3.5) and not outcome[4]["correct"] for outcome in outcomes)
        assert outcomes[-1][3] and outcomes[0][4]["verdict"] in (code, "wrong_action")
