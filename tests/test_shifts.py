"""Evaluation sets beyond the paper's, and rules mixed in training: solved by the expert, verdicts by hand,
pictures compared pixel by pixel, and a walker that knows its heading from the prompt alone."""
import ast
import json
import re
from dataclasses import replace
from itertools import combinations_with_replacement
from unittest import mock

import numpy as np

import train
from distributed.processes import Processes
from envs import GAMES, TASKS, GeneralPoints, Navigation
from games import cards, compass
from games.mixed import Mixed
from games.rails import instructions
from games.solver import solve
from games.verifier import SPACES
from harness.environments import evaluation_sets, make_env, training_env
from harness.settings import Args, apply_preset
from tables import cases, rows
from test_envs import HAND, SMALL, answer, differs, replayed, values_of
from test_hostile import value_of
from test_navigation import game, here    # noqa: F401 (here is a fixture)
from variants.official import wrap

GP = GeneralPoints.shifts("10", "black", True)
VIRL = Navigation.shifts("absolute", "new-york", False)
BEYOND = list(GP)[list(GP).index("fake-rule"):]


# ------------------------------------------------------------------------------------ every set can be solved

@cases("name, rule", [("fake-rule", "11-12-13"), *((name, "10") for name in BEYOND)])
def test_the_expert_solves_every_hand_of_every_set(name, rule):
    """By Python's own parser, too, its formula makes the target of the numbers that count."""
    env = GeneralPoints(**SMALL, **{"rule": rule, **GeneralPoints.shifts(rule, "black", True)[name]})
    for seed in range(300):
        _, info = env.reset(seed)
        assert len(set(zip(info["cards"], info["suits"]))) == len(info["numbers"])
        said = json.loads(env.oracle())
        left = said["formula"].removesuffix(f"={env.target}")
        assert value_of(ast.parse(left, mode="eval").body) == env.target
        assert sorted(map(int, re.findall("[0-9]+", left))) == sorted(said["number"])
        _, reward, terminated, _, info = env.step(json.dumps(said))
        assert reward == 5 and terminated and info["success"] and info["recognized"]


@cases("rule", SPACES)
@cases("name", ["fake-rule", "relative-wording"])
def test_the_expert_walks_every_route_of_every_set(name, rule):
    env = Navigation(**{"rule": rule, **Navigation.shifts(rule, "new-york", False)[name]})
    for seed in range(300):
        env.reset(seed)
        terminated = False
        while not terminated:
            _, reward, terminated, truncated, info = env.step(env.oracle())
            assert reward == 1 and info["recognized"] and not truncated
        assert info["success"]


@cases("name", GP)
def test_demonstrations_of_every_set_replay(name):
    assert replayed(range(20), **SMALL, **GP[name])


# -------------------------------------------------------------------------------------------------- fake rule

def dealt(hand, **settings):
    """Return GeneralPoints with this hand before it, and the prompt."""
    env = GeneralPoints(look="all", **settings)
    env.draw = lambda: [(rank, "clubs") for rank in hand.split()]
    return env, env.reset(0)[0].messages[0]["content"]


@cases("formula, reward, message", """
    6*9-10*3=24 |  5 |  # the queen counts 10, whatever the prompt says
    9+12+6-3=24 | -2 | 12 is not one of the numbers.  # right by what it says
    10+9+6-3=24 | -1 | The formula gives 22, not 24.
    6*9-3=24    | -3 | 10 is left out.
    6*9-10*3=23 | -3 | The formula must end in =24.""")
def test_fake_rule_by_hand(formula, reward, message):
    env, prompt = dealt("Q 6 9 3", **GP["fake-rule"])
    assert "J counts as 11, Q as 12 and K as 13." in prompt and "10" not in prompt.split("Cards:")[0]
    observation, got, *_, info = env.step(answer(formula, "Q693", (10, 6, 9, 3)))
    assert got == float(reward) and info["correct"] == (not message)
    assert [said["content"] for said in observation.messages] == [message] * bool(message)


@cases("formula, reward", [("9+12+6-3=24", 5), ("6*9-10*3=24", -2)])
def test_fake_rule_the_other_way_round(formula, reward):
    env, prompt = dealt("Q 6 9 3", **GeneralPoints.shifts("11-12-13", "all", False)["fake-rule"])
    assert "J, Q and K all count as 10." in prompt and env.step(answer(formula))[1] == reward


def test_fake_rule_hands_have_an_answer_by_either_rule_and_never_the_same():
    """They are rule-ood's hands where those can be solved by both rules."""
    env, stated = (GeneralPoints(look="all", **GP[name]) for name in ("fake-rule", "rule-ood"))
    same = 0
    for seed in range(300):
        (prompt, info), (other, its) = env.reset(seed), stated.reset(seed)
        new, old = (values_of(info["cards"], rule) for rule in ("11-12-13", "10"))
        assert info["numbers"] == old and solve(old) and solve(new) and set("JQK") & set(info["cards"])
        text = answer(solve(new)[0], info["cards"], new)
        _, reward, *_, said = env.step(text)
        assert reward == -2 and said["verdict"] == "foreign_number"
        assert (prompt == other) == bool(solve(values_of(its["cards"], "10")))
        assert prompt != other or stated.step(text)[1] == 5
        same += prompt == other
    assert same > 200


def test_fake_actions_by_hand(here):    # noqa: F811
    """On ROUTE from a heading of 270 degrees one turns right to face north."""
    env, _ = game(**VIRL["fake-rule"])
    env.routes = [replace(env.routes[0], init_heading=270)]
    text = env.reset(0)[0].messages[0]["content"]
    assert "First, turn right to face north." in text
    assert "x is left, right, slightly left or slightly right." in text
    for action, reward, said in (("right", -1, "There is no such action."),
                                 ("north", 1, "A_1: turn_direction(north)")):
        action = f"turn_direction({action})"
        observation, got, *_ = env.step(json.dumps({"current observation": "", "action": action}))
        assert got == reward and said in observation.messages[0]["content"]


# ------------------------------------------------------------------------ five cards, other faces and targets

@cases("image", [False, True])
def test_the_prompt_counts_the_cards(image):
    for count, word in ((3, "three"), (4, "four"), (5, "five")):
        text = str(GeneralPoints(image=image, size=(56, 14), cards=count).reset(2)[0].messages)
        assert re.findall("three|four|five", text) == [word] * 2


@cases("formula, reward", """
    1*2*3*4+9-9=24 | -3
    (2+4-1)*3+9=24 | 5
    1*2*3*4=24     | -3
    9+4*3+2+1=24   | 5
    9+4+3+2+1=24   | -1
    9+5*3=24       | -2""")
def test_five_cards_by_hand(formula, reward):
    env, _ = dealt("A 2 3 4 9", cards=5)
    assert env.step(answer(formula))[1] == float(reward)


def test_five_cards_of_the_released_deck():
    env = wrap(GeneralPoints(look="all", **{**GP["five-cards"], "deal": "face"}), "iid-deck")
    hands = [env.reset(seed)[1]["cards"] for seed in range(200)]
    faces = np.array([[rank in "JQK" for rank in hand] for hand in hands])
    assert faces.shape == (200, 5) and faces.any(1).all() and faces.any(0).all()


@cases("name, said", """
    face-5    | J, Q and K all count as 5.
    face-7    | J, Q and K all count as 7.
    target-12 | to make 12.
    target-20 | to make 20.
    target-36 | to make 36.""")
def test_other_faces_and_targets(name, said):
    env, (kind, value) = GeneralPoints(look="all", **GP[name]), name.split("-")
    for seed in range(60):
        observation, info = env.reset(seed)
        text = observation.messages[0]["content"]
        assert said in text and f"={env.target}" in text
        faces = {n for rank, n in zip(info["cards"], info["numbers"]) if rank in "JQK"}
        assert faces == {int(value)} if kind == "face" else env.target == int(value)


# --------------------------------------------------------------------------------------------------- pictures

def slots(size, style="plain"):
    """Return the picture of four cards in pieces of one, (height, width / 4, 3) integers each."""
    return np.split(np.asarray(cards.draw_hand(HAND[:4], size, style), int), 4, axis=1)


@cases("size", [(224, 56), (1200, 1200)])
def test_each_card_is_mirrored_where_it_lies(size):
    for plain, mirrored in zip(slots(size), slots(size, "mirrored")):
        assert (mirrored == plain[:, ::-1]).all() and differs(mirrored, plain).mean() > 0.01


@cases("style", cards.STYLES[1:])
def test_only_the_picture_differs_from_id(style):
    plain, env = (GeneralPoints(image=True, size=(224, 56), **GP[name]) for name in ("id", style))
    for seed in range(8):
        (one, info), (other, its) = plain.reset(seed), env.reset(seed)
        (image, text), (another, same) = (found.messages[0]["content"] for found in (one, other))
        assert its == info == GeneralPoints().reset(seed)[1] and same == text
        assert another["image"].tobytes() != image["image"].tobytes()


# ----------------------------------------------------------------------------------------- what training sees

def numbers(**settings):
    env = GeneralPoints(**settings)
    return {tuple(sorted(env.reset(seed)[1]["numbers"])) for seed in range(900)}


def test_training_never_deals_the_numbers_held_out():
    """Nor does id; id-unseen deals nothing else, and the foundation any."""
    learnt, unseen, both = numbers(**GP["id"]), numbers(**GP["id-unseen"]), numbers(held_out=None)
    assert learnt == numbers() and not learnt & unseen and not learnt & numbers(**GP["visual-ood-unseen"])
    every = [h for h in combinations_with_replacement(range(1, 11), 4) if solve(list(h), 24)]
    assert len(every) == 566 and 0.15 < len(unseen) / 566 < 0.25 and both & unseen and both & learnt


def test_the_foundation_knows_no_shift_but_the_two_rules():
    shifted = {(s.get("rule"), s.get("target")) for s in GP.values() if "rule" in s or "target" in s}
    known = [settings for _, settings in GeneralPoints.broad()]
    assert shifted & {(s.get("rule"), s.get("target")) for s in known} == {("11-12-13", None)}
    assert {(s["look"], s.get("style")) for s in known if s["image"]} == {("all", "varied")}


def test_a_hand_described():
    *_, told = GeneralPoints(image=True, describe=True).demonstrate(3)
    assert json.loads(told["content"]) == {"cards": GeneralPoints().reset(3)[1]["cards"]}


# ------------------------------------------------------------------------------------------- relative wording

@cases("heading, first", """
    270 | You face west. First, turn right by 90 degrees.
    23  | You face northeast. First, turn slightly left by 45 degrees.
    182 | You face south. First, turn right by 180 degrees.""")
def test_relative_wording_by_hand(here, heading, first):    # noqa: F811
    """ROUTE: north, east, northwest."""
    env, _ = game(**VIRL["relative-wording"])
    assert instructions(env.routes[0].legs, int(heading), wording="relative")[::2] == [
        first, "Turn right by 90 degrees.", "Turn left by 135 degrees."]


def where_to(text):
    """Return the compass word that a turn leads to, from a prompt with relative wording under the absolute
    rule."""
    turned = re.findall(r"^A_\d+: turn_direction\((.*)\)$", text, re.M)
    facing = turned[-1] if turned else re.search(r"^1\. You face (\w+)\. First, turn", text, re.M)[1]
    turns = re.findall(r"turn (?:slightly )?(left|right) by (\d+) degrees\.$", text, re.M | re.I)
    way, angle = turns[len(turned)]
    compass = "north northeast east southeast south southwest west northwest".split()
    return compass[(compass.index(facing) + {"left": -1, "right": 1}[way] * int(angle) // 45) % 8]


@cases("look", ["new-york", "others"])
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


# ------------------------------------------------------------------------------------------------ mixed rules

RULES = {"gp-l": "10,11-12-13,5", "virl-l": "relative,absolute"}


def settings(task, algo, **changes):
    args = Args(task=task, algo=algo, preset="tiny", batch_size=12, rules=RULES[task], **changes)
    return apply_preset(args, 32)


@cases("task", RULES)
def test_a_seed_is_an_episode_of_one_of_the_rules(task):
    args = settings(task, "sft")
    mixed, rules = training_env(args)(), RULES[task].split(",")
    alone = {rule: make_env(args, rule=rule)() for rule in rules}
    count = dict.fromkeys(rules, 0)
    for seed in range(300):
        dialogue = mixed.demonstrate(seed, mistakes=1)
        one = alone[mixed.rule]
        assert dialogue == one.demonstrate(seed, mistakes=1) and mixed.reset(seed) == one.reset(seed)
        assert mixed.oracle() == one.oracle() and mixed.step("?") == one.step("?")
        assert mixed.attempts == one.attempts
        count[mixed.rule] += 1
    # Within four standard errors.
    assert all(abs(n - 300 / len(rules)) < 4 * 300**0.5 / 2 for n in count.values()), count


def test_the_rule_tells_nothing_of_the_deal():
    """Both start from the seed: chosen by the same first draw, one rule would deal spades first and the other
    diamonds."""
    mixed = Mixed([GeneralPoints(look="all", rule=rule) for rule in ("10", "9")])
    first = {"10": [], "9": []}
    for seed in range(4000):
        _, info = mixed.reset(seed)
        first[mixed.rule].append(info["suits"][0] in ("spades", "clubs"))
    assert abs(np.mean(first["10"]) - np.mean(first["9"])) < 4 * 4000**-0.5       # errors of it


STATED = dict(rows("""
    10       | all count as 10
    11-12-13 | Q as 12
    5        | all count as 5
    absolute | x is north
    relative | x is left"""))


@cases("task", RULES)
def test_sft_and_ppo_learn_from_all_rules(model, processor, task):
    """SFT's batches hold prompts of each rule; PPO's samples of a hand agree. Evaluation keeps to --rule."""
    def of_one_rule_each(texts):
        found = [[rule for rule, words in STATED.items() if words in text] for text in texts]
        assert all(len(rules) == 1 for rules in found)
        assert {rule for rule, in found} == set(RULES[task].split(","))
        return found
    trainer = train.Trainer(settings(task, "sft"), model, processor, Processes("cpu"))
    trainer.ledger = mock.Mock()
    assert np.isfinite(trainer.update(0)["nll"])
    _, examples, _ = trainer.ledger.add_sft.call_args.args
    of_one_rule_each(processor.decode(example.ids) for example in examples)

    args = settings(task, "ppo", hands=6, samples=2, max_new_tokens=4, attempts=1)
    trainer = train.Trainer(args, model, processor, Processes("cpu"))
    trainer.ledger = mock.Mock()
    trainer.update(0)
    _, episodes, *_ = trainer.ledger.add_ppo.call_args.args
    found = of_one_rule_each(episode.transcript[0][1] for episode in episodes)
    assert found[::2] == found[1::2]
    alone = evaluation_sets(Args(**{**vars(args), "rules": None}))
    for name, factory in evaluation_sets(args).items():
        assert factory().reset(3) == alone[name]().reset(3)


@cases("task", TASKS)
def test_every_set_can_be_asked_for(task):
    args = apply_preset(Args(task=task, algo="eval", preset="tiny"), 128)
    known = GAMES[args.game].shifts(args.rule, args.look, args.image)
    args.eval_sets = ",".join(known)
    assert list(evaluation_sets(args)) == list(known)
    for factory in evaluation_sets(args).values():
        factory().reset(0)
    assert args.eval_sets.count("mirrored") == (task == "gp-vl") and args.eval_sets.count("fake-rule") == 1
