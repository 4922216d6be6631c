"""Navigation: rails and instructions worked by hand, the verifier against nonsense, and a solver that reads the prompt."""
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
from test_observations import ODD_NAMES


def place(name):
    return Place((0.0, 0.0), f"/nowhere/street_views/{name}.jpg")


# North to a corner with a landmark, east to one without, and diagonally back to the destination.
ROUTE = Route("route 0 of here", place("start"), 0, (
    Leg(2, "north", "Red Star Diner", "right front", (place("a"), place("b")), place("corner")),
    Leg(92, "east", None, None, (), place("bend")),
    Leg(300, "northwest", "Blue Fish Hotel", "left", (place("c"),), place("door"))))
SENTENCES = ["First, turn right to face north.", "Move forward until you reach next intersection where Red Star Diner is on your right front.",
             "Turn right to face east.", "Move forward until you reach next intersection.",
             "Turn left to face northwest.", "Move forward until you reach destination where Blue Fish Hotel is on your left."]


@pytest.fixture
def here(monkeypatch):
    """Navigation walks ROUTE, and every street view is a grey square."""
    monkeypatch.setattr(envs, "known_routes", lambda *_: [ROUTE])
    monkeypatch.setattr(envs.views, "grid", lambda panorama, heading, size: Image.new("RGB", (2 * size + 5,) * 2, "gray"))


def game(seed=0, **settings):
    env = Navigation(drop_rate=0.0, **settings)
    return env, env.reset(seed)


def answer(observation="No landmarks nearby", instruction=SENTENCES[0], action="turn_direction(north)"):
    return json.dumps({"current observation": observation, "current instruction": instruction, "action": action})


# ----------------------------------------------------------------------------------------------- rails and instructions

@pytest.mark.parametrize("old, new, word", [
    (0, 90, "right"), (90, 0, "left"), (0, 45, "slightly right"), (0, 46, "right"), (45, 0, "slightly left"), (46, 0, "left"),
    (10, 10, "slightly left"), (350, 10, "slightly right"), (10, 350, "slightly left"), (300, 30, "right"), (30, 300, "left"),
    (0, 180, "right"), (180, 0, "right"), (359, 0, "slightly right"), (0, 359, "slightly left")])
def test_turns_are_wrapped(old, new, word):
    assert relative_turn(old, new) == word


def test_rail_by_hand(here):
    points = rail(ROUTE, 270, "absolute", random.Random(0), 0.0)
    name = lambda point: point.panorama.split("/")[-1][:-4]
    assert [name(p) for p in points] == ["start", "a", "b", "corner", "bend", "c", "door"]
    assert [p.heading for p in points] == [270, 2, 2, 2, 92, 300, 300]
    assert [p.action for p in points] == ["turn_direction(north)", "forward()", "forward()", "turn_direction(east)",
                                          "turn_direction(northwest)", "forward()", "stop()"]
    assert [p.instruction for p in points] == [0, 1, 1, 2, 4, 5, 5]
    assert [p.observation for p in points] == [
        "No landmarks nearby", "No landmarks nearby", "No landmarks nearby",
        "Red Star Diner is on your right front; You observe an intersection", "No landmarks nearby; You observe an intersection",
        "No landmarks nearby", "Blue Fish Hotel is on your left"]
    relative = rail(ROUTE, 270, "relative", random.Random(0), 0.0)
    assert [p.action for p in relative] == ["turn_direction(right)", "forward()", "forward()", "turn_direction(right)",
                                            "turn_direction(left)", "forward()", "stop()"]
    assert instructions(ROUTE.legs, 270) == SENTENCES


def test_names_can_be_hidden(here):
    env, (observation, _) = game(hide_landmarks=True)
    text = observation.messages[0]["content"]
    assert "next intersection.\n" in text and "destination.\n" in text and "Red Star" not in text
    for _ in range(3):
        env.step(env.oracle())
    assert "Red Star Diner is on" in env.oracle() and env.step(env.oracle())[1] == 1           # it must still be seen


def test_points_between_drop_by_the_seed(here):
    env = Navigation()
    kept = [env.reset(seed)[1]["points"] - 4 for seed in range(400)]         # of three candidates
    assert np.bincount(kept) / 400 == pytest.approx([1 / 8, 3 / 8, 3 / 8, 1 / 8], abs=0.08)
    assert {env.reset(seed)[1]["instructions"][0].split(" to face")[0] for seed in range(60)} == {
        f"First, turn {word}" for word in TURNS}                       # the route gives no heading: the seed does
    assert env.reset(7) == env.reset(7) != env.reset(8)
    with pytest.raises(ValueError, match="seed"):
        env.reset(-1)


def test_a_given_heading_is_kept(monkeypatch):
    monkeypatch.setattr(envs, "known_routes", lambda *_: [replace(ROUTE, init_heading=271)])
    assert all(Navigation().reset(seed)[1]["instructions"][0] == SENTENCES[0] for seed in range(20))


# --------------------------------------------------------------------------------------------------------- conversations

def test_the_prompt_in_words(here):
    env, (observation, info) = game(seed=3)
    assert observation.fresh and len(observation.messages) == 1
    for _ in range(3):
        observation = env.step(env.oracle())[0]
    assert observation.fresh
    text = observation.messages[0]["content"]
    assert "\n".join(f"{i + 1}. {sentence}" for i, sentence in enumerate(info["instructions"])) in text
    assert ("O_1: No landmarks nearby\nA_1: turn_direction(north)\nO_2: No landmarks nearby\nA_2: forward()\nO_3: No landmarks nearby\n"
            "A_3: forward()\nO_4: Red Star Diner is on your right front; You observe an intersection\nAnswer") in text
    assert "northeast" in text and "slightly right" not in text.split("Actions:")[1].split("Observations")[0]
    assert "slightly right" in Navigation(rule="relative").reset(3)[0].messages[0]["content"].split("Actions:")[1].split("Observations")[0]


def test_the_prompt_with_a_picture_hides_what_is_seen_now(here):
    env, _ = game(image=True, size=20)
    for _ in range(3):
        observation = env.step(env.oracle())[0]
    picture, text = observation.messages[0]["content"]
    assert picture["image"].size == (45, 45) and text["type"] == "text"
    assert text["text"].endswith(Navigation(image=True).prompts["virl-vl"].split("{history}")[1].replace("{{", "{").replace("}}", "}"))
    assert "O_4: You observe an image of 4 views; You observe an intersection" in text["text"] and "right front;" not in text["text"]
    observation = env.step(env.oracle())[0]
    assert "O_4: Red Star Diner is on your right front; You observe an intersection" in observation.messages[0]["content"][1]["text"]
    assert "O_5: You observe an image of 4 views; You" in observation.messages[0]["content"][1]["text"]


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("rule", SPACES)
def test_the_expert_is_always_right(here, rule, image):
    env, (_, info) = game(rule=rule, image=image)
    for k in range(info["points"]):
        observation, reward, terminated, truncated, step = env.step(env.oracle())
        assert reward == 1 and step["correct"] and step["recognized"] and step["translated"] and step["verdict"] == "right_action"
        assert (terminated, truncated, step["success"]) == ((True, False, True) if k == 6 else (False, False, False))
        assert (step["point"], step["attempt"]) == (k, 1)
    assert observation.messages == []
    with pytest.raises(RuntimeError, match="reset"):
        env.step("again")


@pytest.mark.parametrize("rule", SPACES)
@pytest.mark.parametrize("image", [False, True])
def test_the_expert_is_right_whatever_landmarks_are_called(here, monkeypatch, rule, image):
    for first, second in zip(ODD_NAMES, ODD_NAMES[1:] + ODD_NAMES[:1]):
        names = (first, None, second)
        legs = [replace(leg, landmark=name) for leg, name in zip(ROUTE.legs, names)]
        monkeypatch.setattr(envs, "known_routes", lambda *_: [replace(ROUTE, legs=tuple(legs))])
        env, (_, info) = game(rule=rule, image=image)
        for _ in range(info["points"]):
            _, reward, terminated, _, step = env.step(env.oracle())
            assert reward == 1 and step["recognized"] and step["translated"], (first, second)
        assert terminated and step["success"]


def test_demonstrations_are_written_as_people_write(here, monkeypatch):
    legs = (replace(ROUTE.legs[0], landmark="Café Zürich"), *ROUTE.legs[1:])
    monkeypatch.setattr(envs, "known_routes", lambda *_: [replace(ROUTE, legs=legs)])
    answers = {Navigation(drop_rate=0.0).demonstrate(seed)[-1]["content"] for seed in range(40)}
    assert any('"Café Zürich is on your right front; You' in text for text in answers)
    assert not any("\\u" in text for text in answers)


def test_a_wrong_answer_is_retried_where_one_stands(here):
    env, _ = game()
    observation, reward, terminated, truncated, info = env.step(answer(action="forward()"))
    assert (reward, terminated, truncated, info["success"]) == (-1, False, False, False)
    assert not observation.fresh and observation.messages == [{"role": "user", "content": "The action is wrong."}]
    observation, reward, *_, info = env.step(env.oracle())
    assert reward == 1 and observation.fresh and (info["point"], info["attempt"]) == (0, 2)


def test_a_point_that_stays_wrong_ends_the_route(here):
    env, _ = game()
    env.step(env.oracle())
    env.step("?")
    observation, reward, terminated, truncated, info = env.step(answer(action="stop()"))
    assert (reward, terminated, truncated, info["success"], observation.messages) == (-2, False, True, False, [])


def test_or_walks_on_as_the_released_code_does(here):
    env, _ = game(after_failure="walk-on")
    env.step("?")
    observation, reward, terminated, truncated, info = env.step(answer(action="stop()"))
    assert (reward, terminated, truncated) == (-2, False, False) and observation.fresh
    assert "A_1: turn_direction(north)" in observation.messages[0]["content"]             # the expert's action was taken
    for k in range(6):
        *_, terminated, truncated, info = env.step(env.oracle())
    assert terminated and not info["success"]                                              # one point was wrong
    env.reset(0)
    for k in range(6):
        env.step(env.oracle())
    env.step("?")
    *_, truncated, info = env.step("?")
    assert truncated and not info["success"]                                               # the destination itself


def test_rewards_of_an_episode_by_hand(here):
    """Point 1: wrong, then right. Point 2: right, with a landmark that is not there. Then point 3 twice wrong."""
    env, _ = game()
    rewards = [env.step(text)[1] for text in (answer(action="turn_direction(south)"), answer(),
                                              answer("Blue Fish Hotel is on your left", action="forward()"), "?", "forward()")]
    assert rewards == [-1, 1, 1 - 1.5, -1 - 1.5, -1 - 1.5 - 1]


# -------------------------------------------------------------------------------------------------------------- verifier

CORNER = Point("x.jpg", 2, "Red Star Diner", "right front", True, 2, "turn_direction(east)")
STREET = Point("x.jpg", 2, None, None, False, 1, "forward()")
NAMES = {"Red Star Diner", "Red Star", "Blue Fish Hotel"}


def verdict(text, point=CORNER, rule="absolute"):
    return judge_step(text, point, SENTENCES[point.instruction], NAMES, rule)


@pytest.mark.parametrize("observation, wrong", [
    ("Red Star Diner is on your right front; You observe an intersection", []),
    ("intersection; the RED  star diner is to the left", []),                # neither wording nor side is judged
    ("Red Star Diner", ["missed_intersection"]),
    ("You observe an intersection", ["missed_landmark"]),
    ("No landmarks nearby; no intersection", ["missed_landmark", "missed_intersection"]),
    ("Red Star is on your left; You observe an intersection", ["missed_landmark"]),
    ("Blue Fish Hotel is on your left; You observe an intersection", ["missed_landmark"]),
    ("Red Star Diner and Blue Fish Hotel; You observe an intersection", ["false_landmark"]),
    ("", ["missed_landmark", "missed_intersection"])])
def test_the_observation_at_a_corner(observation, wrong):
    result = verdict(answer(observation, action="forward()"))
    assert result.message == " ".join([*(PROMPTS[key] for key in wrong), "The action is wrong."])
    assert result.recognized == (not wrong) and result.reward == (-2.5 if wrong else -1)
    right = verdict(answer(observation, action="turn_direction(east)"))
    assert right.code == "right_action" and right.reward == (-0.5 if wrong else 1)


@pytest.mark.parametrize("observation, wrong", [
    ("No landmarks nearby", []), ("", []), ("There is not any intersection", []),
    ("Joe's Bar is on your left", ["false_landmark"]), ("Red Star", ["false_landmark"]),
    ("No landmarks nearby; You observe an intersection", ["false_intersection"])])
def test_the_observation_on_a_street(observation, wrong):
    assert verdict(answer(observation, action="forward()"), STREET).recognized == (not wrong)


def test_the_page_says_what_the_verifier_says():
    page = (Path(envs.__file__).parent / "docs/virl/README.md").read_text()
    said = r"(?:observation `(.*?)`, action `(.*?)`|`(\{.{,80}\})`)"
    rows = re.findall(rf"^\| {said} \| (\S+) \| (.*) \|$", page, re.M)
    assert len(rows) > 20
    for observation, action, text, reward, message in rows:
        result = verdict(text or answer(observation, action=action))
        assert (result.reward, result.message) == (float(reward), message), (observation, action, text)


@pytest.mark.parametrize("text", [
    answer(action="turn_direction(east)"),
    "I think:\n```json\n" + answer(action="turn_direction(east)") + "\n```\nDone.",
    answer(action="turn_direction(east)").replace('"', "'"),
    "{current observation: Joe's Diner, current instruction: go, action: turn_direction(east)}",
    '{"action": "Turn_Direction( East )"}', '{"action": "turn_direction(\\"east\\")"}', '{"action": "turn_direction(\'east\')",}',
    '{\n  "current observation": "a, b; c",\n  "action": "turn_direction(east)"\n', '{"action": "stop()"} {"action": "turn_direction(east)"}'])
def test_right_actions_are_found_in_any_dress(text):
    assert verdict(text).code == "right_action"


HOSTILE = [
    ("", "no_action"), ("turn_direction(east)", "no_action"), ("{}", "no_action"), ('{"action": }', "unknown_action"),
    ('{"action": null}', "unknown_action"), ('{"action": ["turn_direction(east)"]}', "unknown_action"),
    ('{"action": "turn_direction(east) or forward()"}', "unknown_action"), ('{"action": "turn_direction(right)"}', "unknown_action"),
    ('{"action": "turn_direction(east); stop()"}', "unknown_action"), ('{"action": "turn_direction"}', "unknown_action"),
    ('{"action": "__import__(\'os\').system(\'true\')"}', "unknown_action"), ('{"action": "forward()"}', "wrong_action"),
    ('{"action": "turn_direction(northeast)"}', "wrong_action"), ('{"current observation": "action: turn_direction(east)"}', "no_action"),
    ('{"a": ' * 50_000, "no_action"), ('{"action": "' + "x" * 100_000 + '"}', "unknown_action"), (',action:' * 20_000, "no_action"),
    ("\n{" * 50_000, "no_action"), ('{"action": "\udcff\x00"}', "unknown_action"), ('{"action": "turn_direction(еast)"}', "unknown_action"),
    ('{"action": "' + "turn_direction(" * 20 + '"}', "unknown_action")]


@pytest.mark.parametrize("text, code", HOSTILE)
def test_nonsense_gets_a_verdict(text, code):
    result = verdict(text)
    assert result.code == code and result.reward in (-1, -2.5) and len(result.message) < 200


def test_any_bytes_get_a_verdict():
    rng = random.Random(0)
    base = answer("Red Star Diner is on your left", action="turn_direction(east)")
    for _ in range(3000):
        text = list(base)
        for _ in range(rng.randrange(1, 9)):
            text[rng.randrange(len(text))] = rng.choice(['"', "{", "}", "\\", "(", ")", ",", ":", "\n", "é", "\x00", ""])
        assert verdict("".join(text)).reward in (1, -0.5, -1, -2.5)


def test_no_message_gives_the_action_away():
    words = {word for space in SPACES.values() for action in space for word in re.findall(r"[a-z]+", action)}
    for observation in ("", "Red Star", "intersection", "Blue Fish Hotel is on your left"):
        for text in (answer(observation, action="forward()"), answer(observation, action="nowhere()"), "?"):
            for point in (CORNER, replace(STREET, action="stop()")):
                message = verdict(text, point).message
                assert not words & set(re.findall(r"[a-z]+", message.lower())) and "Star" not in message, message


# ------------------------------------------------------------------------------------------------------- expert dialogues

@pytest.mark.parametrize("image", [False, True])
def test_demonstrations(here, image):
    env, points = Navigation(image=image), set()
    for seed in range(80):
        dialogue = env.demonstrate(seed)
        assert [m["role"] for m in dialogue] == ["user", "assistant"] and dialogue[-1]["train"] and dialogue == env.demonstrate(seed)
        points.add(env.index)
        wrong = env.demonstrate(seed, 1)
        assert wrong[0] == dialogue[0] and wrong[-1] == dialogue[-1] and len(wrong) == 4 and not wrong[1]["train"]
        assert "wrong" in wrong[2]["content"]
    assert points == set(range(7))
    with pytest.raises(ValueError, match="mistakes"):
        env.demonstrate(0, 2)


def test_descriptions_tell_what_is_in_the_picture(here):
    env, points = Navigation(image=True, describe=True), Counter()
    for seed in range(200):
        question, answer = env.demonstrate(seed)
        point = env.points[env.index]
        assert question["content"][1]["text"] == PROMPTS["describe"]
        assert answer == {"role": "assistant", "content": point.observation, "train": True}
        points[point.landmark] += 1
    assert set(points) == {None, "Red Star Diner", "Blue Fish Hotel"} and points[None] < 60        # mostly at a landmark


@pytest.mark.parametrize("settings, word", [
    ({"rule": "10"}, "rule"), ({"describe": True}, "image=True"), ({"attempts": 0}, "attempts"), ({"size": 0}, "size"), ({"after_failure": "cry"}, "after_failure"),
    ({"prompts": {"virl-l": "{history}"}}, "virl-l")])
def test_bad_settings_are_named(here, settings, word):
    with pytest.raises(ValueError, match=word):
        Navigation(**settings)


# ------------------------------------------------------------------------------------------------------ the built-in city

def solve(text):
    """The action that follows from the prompt alone: instructions, action space, history."""
    sentences = re.findall(r"^\d+\. (.*)$", text, re.M)
    turns, moves = sentences[::2], sentences[1::2]
    done = len(re.findall(r"^A_\d+: turn_direction", text, re.M))               # turns that were made
    now = re.findall(r"^O_\d+: (.*)$", text, re.M)[-1]
    landmark = re.search(r"where (.*) is on your", moves[-1])[1]
    if done == 0 or "intersection" in now:
        relative, absolute = re.search("turn (.*) to face (.*)\\.", turns[done], re.I).groups()
        return f"turn_direction({absolute if 'northeast' in text.split('Actions:')[1].split('Observations')[0] else relative})"
    return "stop()" if done == len(turns) and landmark in now else "forward()"


@pytest.mark.parametrize("rule", SPACES)
@pytest.mark.parametrize("look", ["new-york", "others"])
def test_the_action_follows_from_the_text(rule, look):
    env = Navigation(rule=rule, look=look, held_out=True)
    for seed in range(200):
        observation, terminated = env.reset(seed)[0], False
        while not terminated:
            action = solve(observation.messages[0]["content"])
            observation, _, terminated, truncated, info = env.step(json.dumps({"action": action}))
            assert info["correct"] and not truncated
        assert info["success"]
