"""Test navigation: rails and instructions worked by hand, the verifier against nonsense, and a solver that
reads the prompt. What an observation claims is in test_observations.py; test_hostile.py makes up answers and
names."""
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import envs
from envs import Navigation
from games.prompts import PROMPTS
from games.rails import Point, instructions, rail, relative_turn
from games.routes import Leg, Place, Route
from games.verifier import SPACES, TURNS, judge_step
from tables import cases, lines, raises, rows


def place(name):
    return Place((0.0, 0.0), f"/nowhere/street_views/{name}.jpg")


# North to a corner with a landmark, east to one without, and diagonally back to the destination.
ROUTE = Route("route 0 of here", place("start"), 0, (
    Leg(2, "north", "Red Star Diner", "right front", (place("a"), place("b")), place("corner")),
    Leg(92, "east", None, None, (), place("bend")),
    Leg(300, "northwest", "Blue Fish Hotel", "left", (place("c"),), place("door"))))
SENTENCES = """First, turn right to face north.
Move forward until you reach next intersection where Red Star Diner is on your right front.
Turn right to face east.
Move forward until you reach next intersection.
Turn left to face northwest.
Move forward until you reach destination where Blue Fish Hotel is on your left.""".splitlines()


def walks(monkeypatch, route):
    monkeypatch.setattr(envs, "known_routes", lambda *_: [route])


@pytest.fixture
def here(monkeypatch):
    """Let Navigation walk ROUTE, and make every street view a grey square."""
    walks(monkeypatch, ROUTE)
    monkeypatch.setattr(envs.views, "grid",
                        lambda panorama, heading, size: Image.new("RGB", (2 * size + 5,) * 2, "gray"))


def game(seed=0, **settings):
    env = Navigation(drop_rate=0.0, **settings)
    return env, env.reset(seed)


def answer(observation="No landmarks nearby", action="turn_direction(north)"):
    return json.dumps({"current observation": observation, "current instruction": SENTENCES[0],
                       "action": action})


# ------------------------------------------------------------------------------------ rails and instructions

@cases("old, new, word", """
    0   | 90  | right
    90  | 0   | left
    0   | 45  | slightly right
    0   | 46  | right
    45  | 0   | slightly left
    46  | 0   | left
    10  | 10  | slightly left
    350 | 10  | slightly right
    10  | 350 | slightly left
    300 | 30  | right
    30  | 300 | left
    0   | 180 | right
    180 | 0   | right
    359 | 0   | slightly right
    0   | 359 | slightly left""")
def test_turns_are_wrapped(old, new, word):
    assert relative_turn(int(old), int(new)) == word


# Panorama, heading, number of the sentence, where the absolute and the relative rule turn or what else they
# do, what is seen (nothing: no landmark; +: an intersection).
RAIL = rows("""
    start  | 270 | 0 | north     | right     |
    a      | 2   | 1 | forward() | forward() |
    b      | 2   | 1 | forward() | forward() |
    corner | 2   | 2 | east      | right     | Red Star Diner is on your right front+
    bend   | 92  | 4 | northwest | left      | +
    c      | 300 | 5 | forward() | forward() |
    door   | 300 | 5 | stop()    | stop()    | Blue Fish Hotel is on your left""")


def test_rail_by_hand(here):
    absolute, relative = (rail(ROUTE, 270, rule, random.Random(0), 0.0) for rule in ("absolute", "relative"))
    for point, other, (*row, seen) in zip(absolute, relative, RAIL, strict=True):
        does = [re.sub(r"turn_direction\((.*)\)", r"\1", action) for action in (point.action, other.action)]
        assert row == [Path(point.panorama).stem, str(point.heading), str(point.instruction), *does]
        seen = re.sub(r"^(?=\+|$)", "No landmarks nearby", seen).replace("+", "; You observe an intersection")
        assert point.observation == other.observation == seen
    assert instructions(ROUTE.legs, 270) == SENTENCES


def test_names_can_be_hidden(here):
    env, (observation, _) = game(hide_landmarks=True)
    text = observation.messages[0]["content"]
    assert "next intersection.\n" in text and "destination.\n" in text and "Red Star" not in text
    for _ in range(3):
        env.step(env.oracle())
    assert "Red Star Diner is on" in env.oracle()
    assert env.step(env.oracle())[1] == 1       # it must still be seen


def test_points_between_drop_by_the_seed(here):
    env = Navigation()
    infos = [env.reset(seed)[1] for seed in range(400)]
    kept = np.bincount([info["points"] - 4 for info in infos]) / 400         # of three candidates
    assert kept == pytest.approx([1 / 8, 3 / 8, 3 / 8, 1 / 8], abs=0.08)
    # the route gives no heading: the seed does
    firsts = {f"First, turn {word} to face north." for word in TURNS}
    assert {info["instructions"][0] for info in infos} == firsts
    assert env.reset(7) == env.reset(7) != env.reset(8)
    raises("seed", env.reset, -1)


def test_a_given_heading_is_kept(monkeypatch):
    walks(monkeypatch, replace(ROUTE, init_heading=271))
    assert {Navigation().reset(seed)[1]["instructions"][0] for seed in range(20)} == {SENTENCES[0]}


# ---------------------------------------------------------------------------------------------- conversations

def walked(env, steps):
    """Return the content of the message after some steps of the expert."""
    for _ in range(steps):
        observation = env.step(env.oracle())[0]
    assert observation.fresh and len(observation.messages) == 1
    return observation.messages[0]["content"]


def actions_of(text):
    return text.split("Actions:")[1].split("Observations")[0]


def test_the_prompt_in_words(here):
    env, (_, info) = game(seed=3)
    text = walked(env, 3)
    assert "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(info["instructions"], 1)) in text
    assert """O_1: No landmarks nearby
A_1: turn_direction(north)
O_2: No landmarks nearby
A_2: forward()
O_3: No landmarks nearby
A_3: forward()
O_4: Red Star Diner is on your right front; You observe an intersection
Answer""" in text
    relative = actions_of(Navigation(rule="relative").reset(3)[0].messages[0]["content"])
    for own, other, words in ((actions_of(text), relative, "northeast"),
                              (relative, actions_of(text), "slightly right")):
        assert words in own and words not in other


def test_the_prompt_with_a_picture_hides_what_is_seen_now(here):
    env, _ = game(image=True, size=20)
    picture, text = walked(env, 3)
    assert picture["image"].size == (45, 45) and text["type"] == "text"
    end = env.prompts["virl-vl"].split("{history}")[1].replace("{{", "{").replace("}}", "}")
    assert text["text"].endswith(end) and "right front;" not in text["text"]
    assert "O_4: You observe an image of 4 views; You observe an intersection" in text["text"]
    text = walked(env, 1)[1]["text"]
    assert "O_4: Red Star Diner is on your right front; You observe an intersection" in text
    assert "O_5: You observe an image of 4 views; You" in text


@cases("image", [False, True])
@cases("rule", SPACES)
def test_the_expert_is_always_right(here, rule, image):
    """Whatever a landmark is called: see test_hostile.py."""
    env, (_, info) = game(rule=rule, image=image)
    for k in range(7):
        observation, *outcome, step = env.step(env.oracle())
        assert outcome == [1, k == 6, False] and step["success"] == (k == 6)
        assert (step["point"], step["attempt"], step["verdict"]) == (k, 1, "right_action")
        assert step["correct"] and step["recognized"]
    assert observation.messages == [] and info["points"] == 7
    raises("reset", env.step, "again", error=RuntimeError)


SAID = {"?": "?", "forward": answer(action="forward()"), "stop": answer(action="stop()"),
        "ghost": answer("Blue Fish Hotel is on your left", action="forward()")}


# What is answered, and the rewards by hand: . ends the route at its destination, ! before it.
@cases("after_failure, said, rewards", """
    end     | forward right                                  | -1 1
    end     | right ? stop                                   | 1 -2.5 -2!
    end     | forward right ghost ? ?                        | -1 1 -0.5 -2.5 -3.5!
    walk-on | ? stop right right right right right right     | -2.5 -2 1 1 1 1 1 1.
    walk-on | right right right right right right ? ?        | 1 1 1 1 1 1 -2.5 -3.5!""")
def test_episodes_by_hand(here, after_failure, said, rewards):
    env, _ = game(after_failure=after_failure)
    found, attempt = [], 1
    for word in said.split():
        observation, reward, terminated, truncated, info = env.step(SAID.get(word) or env.oracle())
        found.append(f"{reward:g}{'.' * terminated}{'!' * truncated}")
        assert not info["success"] and info["attempt"] == attempt
        ended, again = terminated or truncated, reward < 0 and word != "ghost" and attempt == 1
        assert bool(observation.messages) != ended and (ended or observation.fresh != again)
        attempt = 1 + again
    assert found == rewards.split()


def test_what_a_wrong_answer_is_told(here):
    """Say so at the point; who walks on has taken the expert's action."""
    env, _ = game(after_failure="walk-on")
    assert env.step(SAID["forward"])[0].messages == [{"role": "user", "content": "The action is wrong."}]
    assert "A_1: turn_direction(north)" in env.step("?")[0].messages[0]["content"]


# --------------------------------------------------------------------------------------------------- verifier

CORNER = Point("x.jpg", 2, "Red Star Diner", "right front", True, 2, "turn_direction(east)")
STREET = Point("x.jpg", 2, None, None, False, 1, "forward()")
NAMES = {"Red Star Diner", "Red Star", "Blue Fish Hotel"}


def verdict(text, point=CORNER):
    return judge_step(text, point, NAMES, "absolute")


def test_the_page_says_what_the_verifier_says():
    page = (Path(envs.__file__).parent / "docs/virl/README.md").read_text(encoding="utf-8")
    said = r"(?:observation `(.*?)`, action `(.*?)`|`(\{.{,80}\})`)"
    found = re.findall(rf"^\| {said} \| (\S+) \| (.*) \|$", page, re.M)
    assert len(found) > 20
    for observation, action, text, reward, message in found:
        result = verdict(text or answer(observation, action))
        assert (result.reward, result.message) == (float(reward), message), (observation, action, text)


EAST = answer(action="turn_direction(east)")


@cases("text", [
    EAST, f"I think:\n```json\n{EAST}\n```\nDone.", EAST.replace('"', "'"), *lines(r"""
    {current observation: Joe's Diner, current instruction: go, action: turn_direction(east)}
    {"action": "Turn_Direction( East )"}
    {"action": "turn_direction(\"east\")"}
    {"action": "turn_direction('east')",}
    {↵  "current observation": "a, b; c",↵  "action": "turn_direction(east)"↵
    {"action": "stop()"} {"action": "turn_direction(east)"}""")])
def test_right_actions_are_found_in_any_dress(text):
    assert verdict(text).code == "right_action"


HOSTILE = rows(r"""
                                                            | no_action
    turn_direction(east)                                    | no_action
    {}                                                      | no_action
    {"current observation": "action: turn_direction(east)"} | no_action
    {"action": }                                            | unknown_action
    {"action": null}                                        | unknown_action
    {"action": ["turn_direction(east)"]}                    | unknown_action
    {"action": "turn_direction(east) or forward()"}         | unknown_action
    {"action": "turn_direction(right)"}                     | unknown_action
    {"action": "turn_direction(east); stop()"}              | unknown_action
    {"action": "turn_direction"}                            | unknown_action
    {"action": "__import__('os').system('true')"}           | unknown_action
    {"action": "turn_direction(еast)"}                      | unknown_action
    {"action": "forward()"}                                 | wrong_action
    {"action": "turn_direction(northeast)"}                 | wrong_action""") + [
    ('{"a": ' * 50_000, "no_action"), (",action:" * 20_000, "no_action"), ("\n{" * 50_000, "no_action"),
    *(('{"action": "%s"}' % action, "unknown_action") for action in (
        "x" * 100_000, "\udcff\0", "turn_direction(" * 20))]


@cases("text, code", HOSTILE, ids=range(len(HOSTILE)))
def test_nonsense_gets_a_verdict(text, code):
    result = verdict(text)
    assert result.code == code and result.reward == -2.5 and len(result.message) < 200


def test_no_message_gives_the_action_away():
    words = {*re.findall(r"[a-z]+", " ".join(sum(SPACES.values(), ()))), "star"}
    for observation in ("", "Red Star", "intersection", "Blue Fish Hotel is on your left"):
        for text in (*(answer(observation, action) for action in ("forward()", "nowhere()")), "?"):
            for point in (CORNER, replace(STREET, action="stop()")):
                message = verdict(text, point).message
                assert not words & set(re.findall(r"[a-z]+", message.lower())), message


# ------------------------------------------------------------------------------------------- expert dialogues

@cases("image", [False, True])
def test_demonstrations(here, image):
    env, points = Navigation(image=image), set()
    for seed in range(80):
        question, right = dialogue = env.demonstrate(seed)
        assert [m["role"] for m in dialogue] == ["user", "assistant"] and right["train"]
        assert dialogue == env.demonstrate(seed)
        points.add(env.index)
        first, wrong, told, last = env.demonstrate(seed, 1)
        assert (first, last) == (question, right) and not wrong["train"] and "wrong" in told["content"]
    assert points == set(range(7))
    raises("mistakes", env.demonstrate, 0, 2)


def test_descriptions_tell_what_is_in_the_picture(here):
    env, marks = Navigation(image=True, describe=True), Counter()
    for seed in range(200):
        question, told = env.demonstrate(seed)
        point = env.points[env.index]
        assert question["content"][1]["text"] == PROMPTS["describe"]
        assert told == {"role": "assistant", "content": point.observation, "train": True}
        marks[point.landmark] += 1
    assert set(marks) == {None, "Red Star Diner", "Blue Fish Hotel"}
    assert marks[None] < 60         # mostly at a landmark


# ------------------------------------------------------------------------------------------ the built-in city

def solve(text):
    """Return the action that follows from the prompt alone: instructions, history, action space."""
    sentences = re.findall(r"^\d+\. (.*)$", text, re.M)
    done = len(re.findall(r"^A_\d+: turn_direction", text, re.M))               # turns that were made
    now = re.findall(r"^O_\d+: (.*)$", text, re.M)[-1]
    landmark = re.search(r"where (.*) is on your", sentences[-1])[1]
    rule = "absolute" if "northeast" in actions_of(text) else "relative"
    if done == 0 or "intersection" in now:
        words = re.search("turn (?P<relative>.*) to face (?P<absolute>.*)\\.", sentences[2 * done], re.I)
        return f"turn_direction({words[rule]})"
    return "stop()" if 2 * done == len(sentences) and landmark in now else "forward()"


@cases("rule", SPACES)
@cases("look", ["new-york", "others"])
def test_the_action_follows_from_the_text(rule, look):
    env = Navigation(rule=rule, look=look, held_out=True)
    for seed in range(200):
        observation, terminated = env.reset(seed)[0], False
        while not terminated:
            action = solve(observation.messages[0]["content"])
            observation, _, terminated, truncated, info = env.step(json.dumps({"action": action}))
            assert info["correct"] and not truncated
        assert info["success"]
