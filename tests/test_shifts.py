"""The evaluation sets beyond the paper's, and rules mixed in training: solvability by brute force, verdicts worked by hand, pictures compared
pixel by pixel, and a walker that knows its heading from the prompt alone."""
import itertools
import json
import random
import re
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
from test_envs import HOSTILE as HOSTILE_CARDS
from test_envs import AnyNumber, answer, evaluate, values_of
from test_navigation import HOSTILE as HOSTILE_STEPS
from test_navigation import game, here    # noqa: F401 (here is a fixture)

import train
from harness.settings import apply_preset
from envs import GAMES, TASKS, GeneralPoints, Navigation
from games import cards, compass, solver
from games.mixed import Mixed
from games.rails import instructions
from games.solver import solve
from games.verifier import SPACES
from variants.official import wrap
from distributed.processes import Processes
from harness.environments import evaluation_sets, make_env, training_env
from harness.settings import Args

SMALL = dict(image=True, size=(56, 14))
GP = GeneralPoints.shifts("10", "black", True)
VIRL = Navigation.shifts("absolute", "new-york", False)


# -------------------------------------------------------------------------------------------------- every set can be solved

@lru_cache(maxsize=None)
def reachable(numbers, target):
    """Can a sorted tuple of Fractions be brought to one number, the target? Any two at a time, by all four operations."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        if any(reachable(tuple(sorted([*rest, c])), target) for c in [a + b, a - b, a * b] + ([a / b] if b else [])):
            return True
    return False


def solvable(numbers, target=24):
    return reachable(tuple(sorted(map(Fraction, numbers))), target)


def test_five_card_hands_are_solvable_by_brute_force():
    env = GeneralPoints(look="all", cards=5)
    for seed in range(300):
        _, info = env.reset(seed)
        assert len(set(zip(info["cards"], info["suits"]))) == len(info["numbers"]) == 5 and solvable(info["numbers"]), info
    rng, found = random.Random(0), []
    for numbers in [(1, 1, 1, 1, 1), (10, 10, 10, 10, 9), *(tuple(rng.choices((1, 2, 9, 10), k=5)) for _ in range(30))]:
        found.append(solvable(numbers))
        assert solver.solvable(numbers, 24) == found[-1], numbers
    assert {True, False} == set(found)


@pytest.mark.parametrize("name, rule", [("fake-rule", "11-12-13")] + [(name, "10") for name in list(GP)[list(GP).index("fake-rule"):]])
def test_the_expert_solves_every_hand_of_every_set(name, rule):
    """And by Python's own parser its formula makes the target of the numbers that count."""
    env = GeneralPoints(**SMALL, **{"rule": rule, **GeneralPoints.shifts(rule, "black", True)[name]})
    for seed in range(300):
        env.reset(seed)
        said = json.loads(env.oracle())
        left = said["formula"].removesuffix(f"={env.target}")
        assert evaluate(left, AnyNumber())[0] == env.target and sorted(map(int, re.findall("[0-9]+", left))) == sorted(said["number"])
        _, reward, terminated, _, info = env.step(json.dumps(said))
        assert reward == 5 and terminated and info["success"] and info["recognized"] and info["translated"]


@pytest.mark.parametrize("rule", SPACES)
@pytest.mark.parametrize("name", ["fake-rule", "relative-wording"])
def test_the_expert_walks_every_route_of_every_set(name, rule):
    env = Navigation(**{"rule": rule, **Navigation.shifts(rule, "new-york", False)[name]})
    for seed in range(300):
        env.reset(seed)
        terminated = False
        while not terminated:
            _, reward, terminated, truncated, info = env.step(env.oracle())
            assert reward == 1 and info["recognized"] and info["translated"] and not truncated
        assert info["success"]


@pytest.mark.parametrize("settings", [GP["fake-rule"], GP["five-cards"], {**SMALL, **GP["five-cards"]}, {**SMALL, **GP["mirrored"]}])
def test_hostile_answers_get_a_verdict(settings):
    env = GeneralPoints(**settings)
    for text in HOSTILE_CARDS:
        env.reset(1)
        observation, reward, *_, info = env.step(text)
        assert reward in ({-4.5, -3.5} if env.image else {-3, -2}) and not info["correct"] and 0 < len(observation.messages[0]["content"]) <= 80


@pytest.mark.parametrize("settings", [VIRL["fake-rule"], VIRL["relative-wording"]])
def test_hostile_steps_get_a_verdict(here, settings):    # noqa: F811
    env, _ = game(**settings)
    for text, _ in HOSTILE_STEPS:
        env.reset(0)
        observation, reward, *_, info = env.step(text)
        assert reward in (-1, -2.5) and not info["correct"] and 0 < len(observation.messages[0]["content"]) < 200


def test_demonstrations_of_every_set_replay():
    for settings in GP.values():
        env, replay = GeneralPoints(**SMALL, **settings), GeneralPoints(**SMALL, **settings)
        for seed in range(20):
            dialogue = env.demonstrate(seed, 3)
            assert replay.reset(seed)[0].messages == dialogue[:1]
            for said, reply in zip(dialogue[1:-1:2], dialogue[2::2]):
                assert replay.step(said["content"])[0].messages == [reply]
            assert replay.step(dialogue[-1]["content"])[1] == 5


# --------------------------------------------------------------------------------------------------------------- fake rule

def dealt(hand, **settings):
    """GeneralPoints with this hand before it, and the prompt."""
    env = GeneralPoints(look="all", **settings)
    env.draw = lambda: [(rank, "clubs") for rank in hand]
    return env, env.reset(0)[0].messages[0]["content"]


@pytest.mark.parametrize("formula, reward, message", [
    ("6*9-10*3=24", 5, None),                                       # the queen counts 10, whatever the prompt says
    ("9+12+6-3=24", -2, "12 is not one of the numbers."),           # right by what it says
    ("10+9+6-3=24", -1, "The formula gives 22, not 24."),
    ("6*9-3=24", -3, "10 is left out."),
    ("6*9-10*3=23", -3, "The formula must end in =24.")])
def test_fake_rule_by_hand(formula, reward, message):
    env, prompt = dealt(["Q", "6", "9", "3"], **GP["fake-rule"])
    assert "J counts as 11, Q as 12 and K as 13." in prompt and "10" not in prompt.split("Cards:")[0]
    observation, got, *_, info = env.step(answer(formula, ["Q", "6", "9", "3"], (10, 6, 9, 3)))
    assert got == reward and info["translated"] and (message is None) == info["correct"]
    assert [m["content"] for m in observation.messages] == [message] * (message is not None)


def test_fake_rule_the_other_way_round():
    settings = GeneralPoints.shifts("11-12-13", "all", False)["fake-rule"]
    for formula, reward in (("9+12+6-3=24", 5), ("6*9-10*3=24", -2)):
        env, prompt = dealt(["Q", "6", "9", "3"], **settings)
        assert "J, Q and K all count as 10." in prompt
        assert env.step(answer(formula))[1] == reward


def test_fake_rule_hands_have_an_answer_by_either_rule_and_never_the_same():
    """They are rule-ood's hands where those can be solved by both rules."""
    env, stated = GeneralPoints(look="all", **GP["fake-rule"]), GeneralPoints(look="all", **GP["rule-ood"])
    same = 0
    for seed in range(300):
        prompt, info = env.reset(seed)
        prompt_of_stated, info_of_stated = stated.reset(seed)
        new, old = (values_of(info["cards"], rule) for rule in ("11-12-13", "10"))
        assert info["numbers"] == old and solvable(old) and solvable(new) and set("JQK") & set(info["cards"])
        text = answer(solve(new)[0], info["cards"], new)
        _, reward, *_, said = env.step(text)
        assert reward == -2 and said["verdict"] == "foreign_number"
        same += prompt == prompt_of_stated
        assert (prompt == prompt_of_stated) == solvable(values_of(info_of_stated["cards"], "10"))
        assert prompt != prompt_of_stated or stated.step(text)[1] == 5
    assert same > 200


def test_fake_actions_by_hand(here):    # noqa: F811
    """On ROUTE from a heading of 270 degrees one turns right to face north."""
    env, _ = game(**VIRL["fake-rule"])
    env.routes = [env.routes[0].__class__(**{**vars(env.routes[0]), "init_heading": 270})]
    text = env.reset(0)[0].messages[0]["content"]
    assert "First, turn right to face north." in text and "x is left, right, slightly left or slightly right." in text
    step = lambda action: env.step(json.dumps({"current observation": "No landmarks nearby", "action": f"turn_direction({action})"}))
    observation, reward, *_ = step("right")
    assert reward == -1 and observation.messages[0]["content"] == "There is no such action."
    observation, reward, *_ = step("north")
    assert reward == 1 and "A_1: turn_direction(north)" in observation.messages[0]["content"]


# -------------------------------------------------------------------------------------- five cards, other faces and targets

def test_the_prompt_counts_the_cards():
    for image in (False, True):
        text = lambda cards: str(GeneralPoints(image=image, size=(56, 14), cards=cards).reset(2)[0].messages)
        assert [(text(n).count("four"), text(n).count("five"), text(n).count("three")) for n in (3, 4, 5)] == [(0, 0, 2), (2, 0, 0), (0, 2, 0)]


def test_a_template_may_leave_the_number_of_cards_out():
    """As those written before there was one to say."""
    env = GeneralPoints(prompts={"gp-l": "{rule} {target} {cards}"}, cards=5)
    assert env.reset(0)[0].messages[0]["content"].endswith(str(env.ranks))


@pytest.mark.parametrize("formula, reward", [
    ("1*2*3*4+9-9=24", -3), ("(2+4-1)*3+9=24", 5), ("1*2*3*4=24", -3), ("9+4*3+2+1=24", 5), ("9+4+3+2+1=24", -1), ("9+5*3=24", -2)])
def test_five_cards_by_hand(formula, reward):
    hand = ["A", "2", "3", "4", "9"]
    env, _ = dealt(hand, cards=5)
    assert env.step(answer(formula, hand, (1, 2, 3, 4, 9)))[1] == reward


def test_five_cards_of_the_released_deck():
    env = wrap(GeneralPoints(look="all", **{**GP["five-cards"], "deal": "face"}), "iid-deck")
    hands = [env.reset(seed)[1]["cards"] for seed in range(200)]
    assert all(len(hand) == 5 and set("JQK") & set(hand) for hand in hands)
    assert {i for hand in hands for i, rank in enumerate(hand) if rank in "JQK"} == set(range(5))


@pytest.mark.parametrize("value", [5, 7])
def test_faces_of_another_value(value):
    env = GeneralPoints(look="all", **GP[f"face-{value}"])
    for seed in range(60):
        observation, info = env.reset(seed)
        assert f"J, Q and K all count as {value}." in observation.messages[0]["content"]
        faces = [number for rank, number in zip(info["cards"], info["numbers"]) if rank in "JQK"]
        assert faces and set(faces) == {value}


def test_targets():
    for target in (12, 20, 36):
        observation, info = GeneralPoints(**GP[f"target-{target}"]).reset(0)
        assert f"to make {target}." in observation.messages[0]["content"] and f"={target}" in observation.messages[0]["content"]
        assert solvable(info["numbers"], target)


@pytest.mark.parametrize("argument", [{"cards": 2}, {"cards": 6}, {"cards": "5"}, {"style": "upside-down"}, {"style": "mirrored"},
                                      {"judged_rule": "ten"}])
def test_bad_settings_are_named(argument):
    (name, value), = argument.items()
    with pytest.raises(ValueError, match=f"{value}.*expected"):
        GeneralPoints(**argument)
    with pytest.raises(ValueError, match="expected"):
        Navigation(**{"judged_rule": "10"} if name == "judged_rule" else {"wording": value})


# ---------------------------------------------------------------------------------------------------------------- pictures

HAND = [("Q", "spades"), ("4", "clubs"), ("J", "hearts"), ("7", "diamonds")]


def slots(size, style="plain", hand=HAND):
    """The picture cut into a piece a card, (width / cards, height, 3) integers each."""
    image = np.asarray(cards.draw_hand(hand, size, style), int)
    return [image[:, round(i * size[0] / len(hand)):round((i + 1) * size[0] / len(hand))] for i in range(len(hand))]


@pytest.mark.parametrize("size", [(224, 56), (1200, 1200)])
def test_each_card_is_mirrored_where_it_lies(size):
    for plain, mirrored in zip(slots(size), slots(size, "mirrored"), strict=True):
        assert (mirrored == plain[:, ::-1]).all()
        assert (np.abs(mirrored - plain).max(axis=2) > 60).mean() > 0.01


def test_suits_in_colours_that_no_deck_has():
    """Ink, and nothing but ink, has another colour: a pixel changes by its share of ink, up to rounding."""
    for (_, suit), plain, recoloured in zip(HAND, slots((1200, 1200)), slots((1200, 1200), "recoloured"), strict=True):
        old, new = (cards.RED if suit in cards.LOOKS["red"] else cards.BLACK)["ink"], cards.RECOLOURED[suit]
        step = np.subtract(new, old)
        share = (recoloured - plain) @ step / (step @ step)
        assert np.abs(recoloured - plain - share[:, :, None] * step).max() <= 2 and -0.02 < share.min() and share.max() < 1.02
        ink = (plain == old).all(axis=2)
        assert ink.mean() > 0.005 and (recoloured[ink] == new).all()
    for suit, other in itertools.combinations(cards.RECOLOURED, 2):
        assert np.abs(np.subtract(cards.RECOLOURED[suit], cards.RECOLOURED[other])).max() > 60
    used = {tuple(colors["ink"]) for colors in (cards.RED, cards.BLACK)}
    assert all(np.abs(np.subtract(new, old)).max() > 60 for new in cards.RECOLOURED.values() for old in used)


@pytest.mark.parametrize("size, height, smaller", [((224, 56), 53, 1), ((1200, 1200), 302, 0.8)])
def test_five_cards_lie_in_order_and_whole(size, height, smaller):
    hand, edge = [*HAND, ("K", "clubs")], cards.COLORS["table"]
    image = np.asarray(cards.draw_hand(hand, size), int)
    assert image.shape == (size[1], size[0], 3) and not (image[:, [0, -1]] - edge).any() and not (image[[0, -1]] - edge).any()
    table = (image == edge).all(axis=(0, 2))                       # columns without a card, between each two and at both ends
    starts = np.flatnonzero(np.diff(table.astype(int)) == -1)
    assert len(starts) == 5 and np.diff(starts) == pytest.approx(size[0] / 5, abs=1)
    tall = lambda image: (~(image == edge).all(axis=(1, 2))).sum()
    assert tall(image) == height and tall(image) / tall(np.asarray(cards.draw_hand(HAND, size))) == pytest.approx(smaller, abs=0.005)
    changed = hand[:2] + [("9", "clubs")] + hand[3:]
    columns = np.flatnonzero((np.asarray(cards.draw_hand(changed, size)) != image).any(axis=(0, 2)))
    assert size[0] * 2 / 5 <= columns.min() and columns.max() < size[0] * 3 / 5


def test_only_the_picture_differs_from_id():
    for style in ("mirrored", "recoloured"):
        for seed in range(8):
            (message,), info = GeneralPoints(image=True, size=(224, 56)).reset(seed)[0].messages, GeneralPoints().reset(seed)[1]
            env = GeneralPoints(image=True, size=(224, 56), **GP[style])
            (other,), its = env.reset(seed)[0].messages, env.reset(seed)[1]
            assert its == info and other["content"][1] == message["content"][1]
            assert other["content"][0]["image"].tobytes() != message["content"][0]["image"].tobytes()


# -------------------------------------------------------------------------------------------------------- relative wording

def test_relative_wording_by_hand(here):    # noqa: F811
    """ROUTE: north, east, northwest, from a start to the west."""
    env, _ = game(**VIRL["relative-wording"])
    assert instructions(env.routes[0].legs, 270, wording="relative")[::2] == [
        "You face west. First, turn right by 90 degrees.", "Turn right by 90 degrees.", "Turn left by 135 degrees."]
    assert instructions(env.routes[0].legs, 23, wording="relative")[0] == "You face northeast. First, turn slightly left by 45 degrees."
    assert instructions(env.routes[0].legs, 182, wording="relative")[0] == "You face south. First, turn right by 180 degrees."


def where_to(text):
    """The compass word that a turn leads to, from a prompt with relative wording under the absolute rule."""
    turned = re.findall(r"^A_\d+: turn_direction\((.*)\)$", text, re.M)
    facing = turned[-1] if turned else re.search(r"^1\. You face (\w+)\. First, turn", text, re.M)[1]
    way, angle = re.findall(r"turn (?:slightly )?(left|right) by (\d+) degrees\.$", text, re.M | re.I)[len(turned)]
    compass = ["north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest"]
    return compass[(compass.index(facing) + {"left": -1, "right": 1}[way] * int(angle) // 45) % 8]


@pytest.mark.parametrize("look", ["new-york", "others"])
def test_the_heading_is_in_the_prompt(look):
    env, turns = Navigation(look=look, **VIRL["relative-wording"]), 0
    for seed in range(200):
        observation, terminated = env.reset(seed)[0], False
        assert not re.search("|".join(compass.COMPASS), " ".join(env.sentences[2:]))
        while not terminated:
            point, text = env.points[env.index], observation.messages[0]["content"]
            if point.action.startswith("turn"):
                assert point.action == f"turn_direction({where_to(text)})"
                turns += 1
            observation, _, terminated, *_ = env.step(env.oracle())
    assert turns > 400


# -------------------------------------------------------------------------------------------------------------- mixed rules

RULES = {"gp-l": "10,11-12-13,5", "virl-l": "relative,absolute"}


def settings(task, algo, **changes):
    return apply_preset(Args(task=task, algo=algo, preset="tiny", batch_size=12, rules=RULES[task], **changes), 32)


@pytest.mark.parametrize("task", RULES)
def test_a_seed_is_an_episode_of_one_of_the_rules(task):
    args = settings(task, "sft")
    mixed, rules = training_env(args)(), RULES[task].split(",")
    alone = {rule: make_env(args, rule=rule)() for rule in rules}
    count = dict.fromkeys(rules, 0)
    for seed in range(300):
        dialogue = mixed.demonstrate(seed, mistakes=1)
        rule = mixed.rule
        assert dialogue == alone[rule].demonstrate(seed, mistakes=1)
        assert mixed.reset(seed) == alone[rule].reset(seed) and mixed.oracle() == alone[rule].oracle()
        assert mixed.step("?") == alone[rule].step("?") and mixed.attempts == alone[rule].attempts
        count[rule] += 1
    assert all(abs(n - 300 / len(rules)) < 4 * 300**0.5 / 2 for n in count.values()), count     # four standard errors at most


def test_the_rule_tells_nothing_of_the_deal():
    """Both start from the seed: chosen by the same first draw, one rule would deal spades first and the other diamonds."""
    mixed = Mixed([GeneralPoints(look="all", rule=rule) for rule in ("10", "9")])
    first = {"10": [], "9": []}
    for seed in range(4000):
        _, info = mixed.reset(seed)
        first[mixed.rule].append(info["suits"][0] in ("spades", "clubs"))
    assert abs(np.mean(first["10"]) - np.mean(first["9"])) < 4 * 4000**-0.5           # four standard errors of the difference


@pytest.mark.parametrize("task", RULES)
def test_sft_and_ppo_learn_from_all_rules(model, processor, task):
    """SFT's batches hold prompts of each rule; PPO's samples of a hand agree. The evaluation keeps to --rule."""
    stated = {"10": "all count as 10", "11-12-13": "Q as 12", "5": "all count as 5", "absolute": "x is north", "relative": "x is left"}
    wanted = {stated[rule] for rule in RULES[task].split(",")}
    said = lambda text: {part for part in stated.values() if part in text}
    trainer = train.Trainer(settings(task, "sft"), model, processor, Processes("cpu"))
    assert np.isfinite(trainer.update(0)["nll"])
    seen = [said(processor.decode(example.ids)) for example in trainer.batch]
    assert all(len(found) == 1 for found in seen) and set.union(*seen) == wanted

    args = settings(task, "ppo", hands=6, samples=2, max_new_tokens=4, attempts=1)
    trainer = train.Trainer(args, model, processor, Processes("cpu"))
    trainer.update(0)
    rules = [said(episode.transcript[0][1]) for episode in trainer.batch]
    assert all(len(found) == 1 for found in rules) and rules[::2] == rules[1::2] and set.union(*rules) == wanted
    for name, factory in evaluation_sets(args).items():
        of_one = evaluation_sets(Args(**{**vars(args), "rules": None}))[name]
        assert factory().reset(3) == of_one().reset(3)


@pytest.mark.parametrize("task", TASKS)
def test_every_set_can_be_asked_for(task):
    args = apply_preset(Args(task=task, algo="eval", preset="tiny"), 128)
    known = GAMES[args.game].shifts(args.rule, args.look, args.image)
    args.eval_sets = ",".join(known)
    assert list(evaluation_sets(args)) == list(known)
    for factory in evaluation_sets(args).values():
        factory().reset(0)
    assert args.eval_sets.count("mirrored") == (task == "gp-vl") and args.eval_sets.count("fake-rule") == 1
