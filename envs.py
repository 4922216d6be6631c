"""The games: deal, show, judge, and an expert to learn from. No torch and no model in here.

GeneralPoints (paper, section 4.1 and appendix A): four playing cards, in words or as an image; use each
exactly once with + - * / ( ) to make 24. Navigation (section 4.2 and appendix B): walk a route through a city
by instructions, with what is seen on the way told in words or shown as street views. A game has gymnasium's
shape: `reset(seed)` deals, `step(text)` judges an answer; what the model must be told next comes back as chat
messages. Try it:

    python -c "import envs; g = envs.GeneralPoints(); print(*g.reset(0)[0].messages, g.oracle())"
    python -c "import envs; g = envs.Navigation(); print(*g.reset(0)[0].messages, g.oracle())"
"""
import json
import random
from dataclasses import dataclass

import numpy as np

from games import views
from games.cards import FACES, LOOKS, RANKS, STYLES, card_values, draw_hand
from games.prompts import check_prompts
from games.rails import instructions, known_routes, rail, relative_turn
from games.seeds import derive
from games.solver import miss, solvable, solve
from games.verifier import SPACES, judge, judge_step

EXHAUSTED = -1.0    # on top, when the last attempt fails

COUNTS = {3: "three", 4: "four", 5: "five"}      # {count} of cards, in words


@dataclass
class Observation:
    """What the model must be told next. A content is a str, or Hugging Face's list of image and text
    parts."""
    messages: list[dict]    # [{"role": "user", "content": ...}]; empty when the episode is over
    fresh: bool             # True: they start a new conversation; False: they continue the current one


# ---------------------------------------------------------------------------------------------- GeneralPoints

def _one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} {value!r}: expected one of {', '.join(map(repr, allowed))}")


def _positive(name, value):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} {value!r}: expected a positive integer")


def _dialogue(game, messages, mistakes):
    """Return the prompt `messages`, then `mistakes` wrong answers with the verifier's replies, then the
    expert's."""
    if not 0 <= mistakes < game.attempts:
        raise ValueError(f"mistakes {mistakes!r}: expected 0 to {game.attempts - 1}, one less than attempts")
    for _ in range(mistakes):
        wrong = {"role": "assistant", "content": game._mistake(), "train": False}
        messages = [*messages, wrong, *game.step(wrong["content"])[0].messages]
    return [*messages, {"role": "assistant", "content": game.oracle(), "train": True}]


def _answer(cards, numbers, formula):
    return json.dumps({"cards": list(cards), "number": list(numbers), "formula": formula}, ensure_ascii=False)


class GeneralPoints:
    """The card game of the paper's section 4.1: gp-l, or gp-vl with `image=True`.

    rule: what J, Q, K count as ("10", "11-12-13", ...); judged_rule: what they count for the verifier and the
    expert, if that is not what the prompt says; look: the suits dealt ("black", "red", "all"); style: how the
    cards are drawn (cards.STYLES); deal: "any" hand or those with a "face" card (the paper's rule-OOD);
    cards: how many, of COUNTS; target: a positive integer; attempts: answers judged an episode; size: (width,
    height) of the image in pixels; prompts: see load_prompts. Bad values are ValueErrors."""
    # the JSON key that holds the final answer: PPO weights the tokens before it by 0.5
    answer_key = "formula"
    headline, recognition = "success", "cards read"             # what is plotted; what `recognized` means
    sizes = {"tiny": (224, 56), "paper": (1200, 1200)}
    # trained on by default, without and with images
    looks = {False: "all", True: "black"}
    distinct = 10**9                                            # how many seeds start something new

    @staticmethod
    def shifts(rule, look, image):
        """Return evaluation sets: name -> what differs from training. Rule-OOD hands hold a face card, so the
        rule matters in each (the paper); id-face is the same deal under the training rule, to tell a harder
        deal from a new rule.

        fake-rule says what rule-ood says and judges by the training rule: a model that fails rule-ood ignores
        the new rule where it succeeds here, and fails at its arithmetic where it fails here, too. Look at the
        first try, as the verifier's messages speak of the numbers by which it judges. The rest are shifts
        beyond the paper's; the tiny model's pre-training knows face-5, face-7, target-12 and target-20 (see
        `broad`), the others are new to it."""
        other = {"rule": "10" if rule == "11-12-13" else "11-12-13", "deal": "face"}
        sets = {"id": {}, "id-face": {"deal": "face"}, "rule-ood": other,
                "visual-ood": {"look": "black" if look == "red" else "red"},
                "fake-rule": {**other, "judged_rule": rule}, "five-cards": {"cards": 5},
                **{f"face-{value}": {"rule": value, "deal": "face"} for value in ("5", "7")},
                **{f"target-{target}": {"target": target} for target in (12, 20, 36)}}
        return sets | ({style: {"style": style} for style in STYLES[1:]} if image else {})

    @staticmethod
    def broad():
        """Return what a foundation model brings along, as (weight, settings): both rules and others, many
        targets, all suits."""
        games = [(0.4, dict(rule="10")), (0.4, dict(rule="11-12-13", deal="face"))]
        games += [(0.02, dict(rule=rule, target=target))
                  for target in (12, 20, 30) for rule in ("10", "11-12-13")]
        games += [(0.04, dict(rule=rule, deal="face")) for rule in ("5", "7")]
        return [(weight, dict(game, image=image, look="all"))
                for weight, game in games for image in (False, True)]

    def __init__(self, *, image=False, rule="10", judged_rule=None, look="black", style="plain", target=24,
                 deal="any", cards=4, attempts=5, size=(1200, 1200), prompts=None):
        _one_of("look", look, tuple(LOOKS))
        _one_of("style", style, STYLES)
        _one_of("deal", deal, ("any", "face"))
        _one_of("cards", cards, tuple(COUNTS))
        for name, value in (("target", target), ("attempts", attempts), ("size", size[0]), ("size", size[1])):
            _positive(name, value)
        if style != "plain" and not image:
            raise ValueError(f"style {style!r}: no card is drawn for a text task; expected image=True")
        self.image, self.rule, self.look, self.style = image, str(rule), look, style
        self.deal, self.count = deal, cards
        self.target, self.attempts, self.size = int(target), int(attempts), tuple(size)
        self.prompts = check_prompts(prompts or {})
        self.stated, self.values = card_values(rule), card_values(judged_rule or rule)
        self.deck = [(rank, suit) for suit in LOOKS[look] for rank in RANKS]
        self.attempt = None     # judged so far; None: no episode is running

    def reset(self, seed):
        """Deal the hand that belongs to `seed` (an int >= 0): (observation, info about the hand). It can be
        solved by the rule that is judged and by the one that is stated, so that a model has an answer
        whichever it goes by. RuntimeError if hand after hand is unsolvable."""
        if seed < 0:    # random.Random would take it for -seed
            raise ValueError(f"seed {seed!r}: expected an integer >= 0")
        self.rng = random.Random(int(seed))
        for self.drawn in range(1, 10_001):
            self.hand = self.draw()
            self.cards = [rank for rank, _ in self.hand]
            wanted = self.deal == "any" or set(FACES) & set(self.cards)
            if wanted and all(solvable([values[rank] for rank in self.cards], self.target)
                              for values in (self.values, self.stated)):
                break
        else:
            raise RuntimeError(f"no solvable hand in 10000: rule {self.rule}, look {self.look}, "
                               f"target {self.target}")
        self.numbers = [self.values[rank] for rank in self.cards]
        self.pick, self.attempt = self.rng.random(), 0
        info = {"cards": self.cards, "suits": [suit for _, suit in self.hand], "numbers": self.numbers}
        return Observation([{"role": "user", "content": self._prompt()}], fresh=True), info

    def draw(self):
        """Return a hand from one deck, solvable or not."""
        return self.rng.sample(self.deck, self.count)

    def judge(self, text):
        return judge(text, self.cards, self.numbers, self.target, self.image, self.prompts)

    def _prompt(self):
        faces, target = {face: self.stated[face] for face in FACES}, self.target
        rule = "rule_same" if len(set(faces.values())) == 1 else "rule_each"
        rule = self.prompts[rule].format(**faces, target=target)
        template = self.prompts["gp-vl" if self.image else "gp-l"]
        text = template.format(target=target, rule=rule, cards=self.cards, count=COUNTS[self.count])
        if not self.image:
            return text
        picture = draw_hand(self.hand, self.size, self.style)
        return [{"type": "image", "image": picture}, {"type": "text", "text": text}]

    def step(self, text):
        """Judge one answer: (observation, reward, terminated, truncated, info). Any string is taken. A right
        answer terminates the episode, the last wrong one truncates it; after that RuntimeError until the next
        reset."""
        if self.attempt is None:
            raise RuntimeError("no episode is running: call reset(seed) first")
        self.attempt += 1
        verdict = self.judge(text)
        correct = verdict.code == "correct"
        truncated = not correct and self.attempt == self.attempts
        info = {"verdict": verdict.code, "message": verdict.message, "correct": correct,
                "attempt": self.attempt, "recognized": verdict.recognized,
                "translated": verdict.translated, "success": correct}
        messages = [{"role": "user", "content": verdict.message}]
        if correct or truncated:
            messages, self.attempt = [], None
        reward = verdict.reward + EXHAUSTED * truncated
        return Observation(messages, fresh=False), reward, correct, truncated, info

    def oracle(self):
        """Return the expert's answer to the current hand; which of the solutions is the seed's choice."""
        formulas = solve(self.numbers, self.target)
        return _answer(self.cards, self.numbers, formulas[int(self.pick * len(formulas))])

    def demonstrate(self, seed, mistakes=0):
        """Return an expert's dialogue as chat messages: the prompt, `mistakes` wrong answers ("train": False)
        each with the verifier's message, and the right answer ("train": True). With mistakes these are the
        sub-optimal dialogues of the paper's section 5. ValueError unless 0 <= mistakes < attempts."""
        return _dialogue(self, self.reset(seed)[0].messages, mistakes)

    def _mistake(self):
        """Return a plausible wrong answer: mostly arithmetic that misses the target, at times other numbers
        than dealt, a card misread (image tasks), an answer cut short."""
        rng, cards = self.rng, list(self.cards)
        if self.image and rng.random() < 0.25:
            cards[rng.randrange(self.count)] = rng.choice(RANKS)
        numbers = [self.values[rank] for rank in cards]
        used, kind = list(numbers), rng.random()
        # one number gives way to another: mostly one that was not dealt, at times a second use
        if kind < 0.12:
            used[rng.randrange(self.count)] = rng.randint(1, 13)
        elif kind < 0.17:
            used.pop(rng.randrange(self.count))
        answer = _answer(cards, numbers, miss(used, self.target, rng))
        return answer[:rng.randrange(1, len(answer))] if kind > 0.98 else answer


# ------------------------------------------------------------------------------------------------- Navigation

class Navigation:
    """The navigation of the paper's section 4.2, on rails: virl-l, or virl-vl with `image=True`.

    rule: what turn_direction takes, "absolute" (compass) or "relative" (left, right, slightly ...);
    judged_rule: what it takes for the verifier and the expert, if that is not what the prompt says; wording:
    of the turns, "both" or "relative" (see instructions); look: a folder of routes in the released format or
    a built-in city (see known_routes); held_out: routes that training never walks, where the city has them;
    attempts: answers judged a point; after_failure: when a point stays wrong, "end" the episode (the paper)
    or "walk-on" to the next point, the route failed (the released code); drop_rate: of points between
    intersections; hide_landmarks: the instructions do not name them, so that with pictures only one's eyes
    can tell; describe: demonstrations tell what is in the picture rather than the way; size: pixels of one of
    the four views; prompts: see load_prompts. Bad values are ValueErrors."""
    answer_key = "action"
    headline, recognition = "per_step", "observed right"
    sizes = {"tiny": 53, "paper": 640}      # 2 x 53 + 5 pixels fit into the tiny model's four tiles
    looks = {False: "new-york", True: "new-york"}
    turn = staticmethod(relative_turn)      # names a turn from one heading to another

    @staticmethod
    def shifts(rule, look, image):
        """Return evaluation sets: name -> what differs from training. fake-rule offers the actions that
        rule-ood offers and judges by the training rule, to tell who ignores the offer; after the first turn
        the history shows the actions that were right. relative-wording: the turns are worded relatively
        alone, so that the absolute rule has to be worked out."""
        other = {"rule": "absolute" if rule == "relative" else "relative", "held_out": True}
        return {"id": {"held_out": True}, "id-train": {}, "rule-ood": other, "visual-ood": {"look": "others"},
                "fake-rule": {**other, "judged_rule": rule},
                "relative-wording": {"wording": "relative", "held_out": True}}

    @staticmethod
    def broad():
        """Return what a foundation model brings along, as (weight, settings): both action spaces, several
        cities, eyes."""
        ways = [(1.0, dict(image=False)), (0.5, dict(image=True)),
                (0.5, dict(image=True, hide_landmarks=True))]
        looks = [(1.5, dict(image=True, describe=True, look=look)) for look in ("new-york", "broad")]
        return looks + [(weight, dict(way, rule=rule, look=look)) for weight, way in ways for rule in SPACES
                        for look in ("new-york", "broad")]

    def __init__(self, *, image=False, rule="absolute", judged_rule=None, wording="both", look="new-york",
                 held_out=False, attempts=2, after_failure="end", drop_rate=0.5, hide_landmarks=False,
                 describe=False, size=53, prompts=None, skip_bad_routes=False):
        for name, value in (("rule", rule), ("judged_rule", judged_rule or rule)):
            _one_of(name, value, tuple(SPACES))
        _one_of("wording", wording, ("both", "relative"))
        _one_of("after_failure", after_failure, ("end", "walk-on"))
        _positive("attempts", attempts)
        _positive("size", size)
        if describe and not image:
            raise ValueError("describe=True: there is no picture to describe; expected image=True")
        self.image, self.rule, self.judged_rule, self.wording = image, rule, judged_rule or rule, wording
        self.describe, self.attempts, self.after_failure = describe, attempts, after_failure
        self.drop_rate, self.named, self.size = drop_rate, not hide_landmarks, size
        self.prompts = check_prompts(prompts or {})
        self.routes = known_routes(str(look), held_out, image, size, skip_bad_routes)
        self.distinct = len(self.routes)
        self.index = None       # of the point where one stands; None: no episode is running

    def _start(self, seed):
        if seed < 0:
            raise ValueError(f"seed {seed!r}: expected an integer >= 0")
        self.rng = random.Random(int(seed))
        route = self.routes[seed % len(self.routes)]
        heading = route.init_heading or self.rng.randrange(360)
        self.sentences = instructions(route.legs, heading, self.named, self.wording, self.turn)
        self.points = rail(route, heading, self.judged_rule, self.rng, self.drop_rate, self.turn)
        self.landmarks = {leg.landmark for leg in route.legs if leg.landmark}
        self.index, self.attempt, self.failed = 0, 0, False
        return {"route": route.name, "points": len(self.points), "instructions": self.sentences}

    def reset(self, seed):
        """Start route number `seed` (an int >= 0, modulo their number), so that consecutive seeds walk every
        route equally often; rail and start heading are drawn from it: (observation, info about the route)."""
        info = self._start(seed)
        return self._look(), info

    def _look(self):
        """Return the prompt of a point, which starts a conversation of its own: instructions, actions,
        history and what is seen. With pictures, what is seen now is in the picture, but for the intersection
        (released code)."""
        history = [f"O_{i}: {passed.observation}\nA_{i}: {passed.action}"
                   for i, passed in enumerate(self.points[:self.index], 1)]
        point = self.points[self.index]
        now = point.observation
        if self.image:
            now = "You observe an image of 4 views" + "; You observe an intersection" * point.intersection
        text = self.prompts["virl-vl" if self.image else "virl-l"].format(
            instructions="\n".join(f"{i}. {sentence}" for i, sentence in enumerate(self.sentences, 1)),
            history="\n".join([*history, f"O_{self.index + 1}: {now}"]),
            actions=self.prompts[self.rule], target="")
        content = self._show(text) if self.image else text
        return Observation([{"role": "user", "content": content}], fresh=True)

    def _show(self, text):
        """Return the four street views here, and a text."""
        point = self.points[self.index]
        picture = views.grid(point.panorama, point.heading, self.size)
        return [{"type": "image", "image": picture}, {"type": "text", "text": text}]

    def step(self, text):
        """Judge one answer: (observation, reward, terminated, truncated, info). Any string is taken. The
        right action leads to the next point, a wrong one leaves one where one is, with the verifier's
        message. The destination terminates the episode, a point that stays wrong truncates it (see
        after_failure); after that RuntimeError."""
        if self.index is None:
            raise RuntimeError("no episode is running: call reset(seed) first")
        point, self.attempt = self.points[self.index], self.attempt + 1
        sentence = self.sentences[point.instruction]
        verdict = judge_step(text, point, sentence, self.landmarks, self.judged_rule, self.prompts)
        correct, last = verdict.code == "right_action", self.index == len(self.points) - 1
        exhausted = not correct and self.attempt == self.attempts
        self.failed |= exhausted
        terminated = last and correct
        truncated = exhausted and (last or self.after_failure == "end")
        info = {"verdict": verdict.code, "message": verdict.message, "correct": correct,
                "attempt": self.attempt, "point": self.index, "landmark": point.landmark,
                "recognized": verdict.recognized, "translated": verdict.translated,
                "success": terminated and not self.failed}
        if terminated or truncated:
            self.index, observation = None, Observation([], fresh=False)
        elif correct or exhausted:
            self.index, self.attempt = self.index + 1, 0
            observation = self._look()
        else:
            observation = Observation([{"role": "user", "content": verdict.message}], fresh=False)
        return observation, verdict.reward + EXHAUSTED * exhausted, terminated, truncated, info

    def oracle(self):
        """Return the expert's answer at the current point."""
        point = self.points[self.index]
        return _step_answer(point.observation, self.sentences[point.instruction], point.action)

    def demonstrate(self, seed, mistakes=0):
        """Return an expert's dialogue at one point of a route, both the seed's choice, as chat messages: the
        prompt, `mistakes` wrong answers ("train": False) each with the verifier's message, and the right one
        ("train": True). With `describe` instead what is seen there, mostly at a landmark."""
        self._start(seed)
        anywhere = range(len(self.points))
        marked = [i for i in anywhere if self.points[i].landmark] if self.describe else []
        self.index = self.rng.choice(marked if marked and self.rng.random() < 0.8 else anywhere)
        if self.describe:
            return [{"role": "user", "content": self._show(self.prompts["describe"])},
                    {"role": "assistant", "content": self.points[self.index].observation, "train": True}]
        return _dialogue(self, self._look().messages, mistakes)

    def _mistake(self):
        """Return a plausible wrong answer: another action, mostly with the observation and the instruction of
        another point."""
        point, other = self.points[self.index], self.rng.choice(self.points)
        seen = self.rng.choice([point, other])
        action = self.rng.choice([action for action in SPACES[self.judged_rule] if action != point.action])
        return _step_answer(seen.observation, self.sentences[other.instruction], action)


def _step_answer(observation, instruction, action):
    said = {"current observation": observation, "current instruction": instruction, "action": action}
    return json.dumps(said, ensure_ascii=False)     # as people write: a model is to learn é and not \u00e9


class Mixed:
    """Several instances of a game as one: the seed chooses which of them is played, so that all samples of a
    hand agree. A rule each mixes the rules of training evenly."""

    def __init__(self, games):
        self.games, self.game = games, games[0]

    def _choose(self, seed):
        # Not by the generator of the game, which starts from the seed itself: the first card would tell.
        self.game = self.games[derive("game", seed) % len(self.games)]
        return self.game

    def reset(self, seed):
        return self._choose(seed).reset(seed)

    def demonstrate(self, seed, mistakes=0):
        return self._choose(seed).demonstrate(seed, mistakes)

    def __getattr__(self, name):
        """Pass on all else, from step() to answer_key: it is that of the game being played."""
        return getattr(self.game, name)


# a task is a game and "-l" (in words) or "-vl" (with pictures)
GAMES = {"gp": GeneralPoints, "virl": Navigation}
