"""The games: deal, show, judge, and an expert to learn from. No torch and no model in here.

GeneralPoints (paper, section 4.1 and appendix A): four playing cards, in words or as an image; use each
exactly once with + - * / ( ) to make 24. Navigation (section 4.2 and appendix B): follow instructions along a
route through a city; words tell what is seen on the way, or street views show it. A game has gymnasium's
shape: `reset(seed)` deals, `step(text)` judges an answer; what the model must be told next comes back as chat
messages. A third game is a class that has what `Env` lists, and an entry in GAMES. Try it:

    python -c "import envs; g = envs.GeneralPoints(); print(*g.reset(0)[0].messages, g.oracle())"
    python -c "import envs; g = envs.Navigation(); print(*g.reset(0)[0].messages, g.oracle())"
"""
import json
import random
from dataclasses import dataclass
from typing import Protocol

from games import foundation, views
from games.cards import FACES, LOOKS, RANKS, STYLES, card_values, draw_hand
from games.prompts import PROMPTS
from games.rails import LOOK, instructions, known_routes, rail, relative_turn
from games.seeds import derive
from games.solver import miss, solve
from games.verifier import SPACES, judge, judge_step
from harness.ranges import integer, one_of, pair, text

RIGHT = "correct", "right_action"       # verdicts of games/verifier.py
EXHAUSTED = -1.0    # added to the reward when the last attempt fails
COUNTS = {3: "three", 4: "four", 5: "five"}      # cards that can be dealt, and {count} in a prompt


@dataclass
class Observation:
    """Chat messages for the model to answer next. A content is a str, or Hugging Face's list of image and
    text parts."""
    messages: list[dict]    # [{"role": "user", "content": ...}]; empty when the episode is over
    fresh: bool             # True: they start a new conversation; False: they continue the current one


class Env(Protocol):
    """Contract of a game. Its constructor takes the keywords image, size and prompts, and each of the command
    line's game settings (rule, look, attempts, ...) that it knows. It may have `presets`, too: of its own
    tasks, in the words of harness/settings.PRESETS."""
    kinds: dict         # setting -> what it may be, a ranges.Kind; "rule" and "look" are among them
    answer_key: str     # the JSON key that holds the final answer: PPO weights the tokens before it by 0.5
    headline: str       # the metric to plot: success or per_step
    recognition: str    # the meaning of `recognized`, for the log
    sizes: dict         # preset -> size of an image
    looks: dict         # image: False, True, or both -> the look trained on by default
    apart: str          # regular expression: each match is a token of its own in the tiny tokenizer
    attempts: int       # answers judged per question: a hand, or a point of a route
    distinct: int       # most seeds that an evaluation plays: beyond it, routes would come again

    def reset(self, seed: int) -> tuple[Observation, dict]:
        """Start the episode of a seed >= 0, the same in any process; ValueError for a negative one."""

    def step(self, text: str) -> tuple[Observation, float, bool, bool, dict]:
        """Judge one answer, any string: (observation, reward, terminated, truncated, info). For the answer,
        info holds verdict (a word), message, correct, attempt (from 1) and recognized (does it tell rightly
        what is seen?); for the episode, success. RuntimeError if none is running. See `judged_step`."""

    def oracle(self) -> str:
        """Return the expert's answer."""

    def demonstrate(self, seed: int, mistakes: int = 0) -> list[dict]:
        """Return an expert's dialogue; see `dialogue`."""

    @staticmethod
    def shifts(rule: str, look: str, image: bool) -> dict[str, dict]:
        """Return {evaluation set: settings that differ from training}: "id", "rule-ood" and, with pictures,
        "visual-ood" at least."""

    @staticmethod
    def broad() -> list[tuple[float, dict]]:
        """Return [(weight, settings)], the mixture that the tiny model's foundation learns."""


def check_settings(game):
    """Refuse settings that are not of their kind: a ValueError that names one."""
    for name, kind in game.kinds.items():
        if not kind.holds(value := getattr(game, name)):
            raise ValueError(f"{name} {kind.refusal(value)}")


def _random(seed):
    if seed < 0:    # random.Random would take it for -seed
        raise ValueError(f"seed {seed!r}: expected an integer >= 0")
    return random.Random(int(seed))


def _content(game, text):
    """Return a message's content: a text, in image tasks behind the picture of what it is about."""
    if not game.image:
        return text
    return [{"type": "image", "image": game.picture()}, {"type": "text", "text": text}]


def _answer(game, *values):
    """Return an answer as an expert writes it: é and not \\u00e9."""
    return json.dumps(dict(zip(game.keys, values)), ensure_ascii=False)


def dialogue(game, messages, mistakes):
    """Return the prompt `messages`, then `mistakes` wrong answers ("train": False) with the verifier's
    replies, then the expert's ("train": True). With mistakes these are the sub-optimal dialogues of the
    paper's section 5. ValueError unless 0 <= mistakes < attempts. A game needs `_mistake()` for it, which
    returns a wrong answer."""
    if not 0 <= mistakes < game.attempts:
        raise ValueError(f"mistakes {mistakes!r}: expected 0 to {game.attempts - 1}, one less than attempts")
    for _ in range(mistakes):
        wrong = {"role": "assistant", "content": game._mistake(), "train": False}
        messages = [*messages, wrong, *game.step(wrong["content"])[0].messages]
    return [*messages, {"role": "assistant", "content": game.oracle(), "train": True}]


def _description(game, asked, told):
    """Return a dialogue that asks what is in the picture, and tells it."""
    return [{"role": "user", "content": _content(game, asked)},
            {"role": "assistant", "content": told, "train": True}]


def judged_step(game, text):
    """Judge an answer to the question at hand, any string. A right one terminates the episode, the last wrong
    one truncates it; after that RuntimeError until the next reset. See Env.step. A game needs `judge(text)`,
    which returns a verifier.Verdict, and `attempt`, which reset sets to 0."""
    if game.attempt is None:
        raise RuntimeError("no episode is running: call reset(seed) first")
    verdict = game.judge(text)
    game.attempt += 1
    correct = verdict.code in RIGHT
    truncated = not correct and game.attempt == game.attempts
    info = {"verdict": verdict.code, "message": verdict.message, "recognized": verdict.recognized,
            "correct": correct, "attempt": game.attempt, "success": correct}
    messages = [{"role": "user", "content": verdict.message}]
    if correct or truncated:
        messages, game.attempt = [], None
    reward = verdict.reward + EXHAUSTED * truncated
    return Observation(messages, fresh=False), reward, correct, truncated, info


# ---------------------------------------------------------------------------------------------- GeneralPoints

@dataclass(kw_only=True, eq=False)
class GeneralPoints:
    """The card game of the paper's section 4.1: gp-l, or gp-vl with `image=True`. Bad settings are
    ValueErrors."""
    image: bool = False
    rule: str = "10"            # what J, Q, K count as ("10", "11-12-13", ...)
    judged_rule: str = None     # what they count for the verifier and the expert, if that is something else
    look: str = "black"         # suits dealt: "black", "red", "all"
    style: str = "plain"        # how the cards are drawn (cards.STYLES), in image tasks
    target: int = 24
    deal: str = "any"           # any hand, or those with a "face" card (the paper's rule-OOD)
    held_out: bool = False      # hands whose numbers training never deals; None: those and all others
    cards: int = 4              # in a hand, one of COUNTS
    describe: bool = False      # image tasks: demonstrations tell the cards in the picture, and no formula
    attempts: int = 5           # answers judged per episode
    size: tuple = (1200, 1200)  # width and height of the image, pixels
    prompts: dict = None        # see prompts.load_prompts

    kinds = {
        "rule": text("one positive integer for J, Q and K, as 10, or three, as 11-12-13", card_values),
        "look": one_of(LOOKS), "style": one_of(STYLES), "deal": one_of(("any", "face")),
        "cards": integer(min(COUNTS), max(COUNTS)), "target": integer(1), "attempts": integer(1),
        "size": pair("two positive integers", integer(1))}
    keys = ("cards", "number", "formula")       # of an answer, a JSON object
    answer_key = keys[-1]
    headline, recognition = "success", "cards read"
    sizes = {"tiny": (224, 56), "paper": (1200, 1200)}
    looks = {False: "all", True: "black"}
    apart = r"\d+|[-+*/()=]|(?<![A-Za-z])[AJQK](?![A-Za-z])"    # numbers, operators and card letters
    distinct = 10**9
    broad = staticmethod(foundation.cards)

    @staticmethod
    def shifts(rule, look, image):
        """Return evaluation sets: name -> what differs from training. Rule-OOD hands hold a face card, so the
        rule matters in each (the paper); id-face is the same deal under the training rule, to tell a harder
        deal from a new rule.

        fake-rule says what rule-ood says and judges by the training rule: a model that fails rule-ood ignores
        the new rule where it succeeds here, and fails at its arithmetic where it fails here, too. Look at the
        first try, as the verifier's messages speak of the numbers by which it judges. The rest are shifts
        beyond the paper's, and but for varied pictures new to the tiny model. id deals what training deals;
        id-unseen and visual-ood-unseen deal the fifth of all sets of numbers that training never does."""
        other = {"rule": "10" if rule == "11-12-13" else "11-12-13", "deal": "face", "held_out": None}
        other_look = {"look": "black" if look == "red" else "red"}
        sets = {"id": {}, "id-unseen": {"held_out": True}, "id-face": {"deal": "face"}, "rule-ood": other,
                "visual-ood": other_look, "visual-ood-unseen": {**other_look, "held_out": True},
                "fake-rule": {**other, "judged_rule": rule}, "five-cards": {"cards": 5, "held_out": None},
                **{f"face-{value}": {"rule": value, "deal": "face"} for value in ("5", "7")},
                **{f"target-{target}": {"target": target} for target in (12, 20, 36)}}
        return sets | ({style: {"style": style} for style in STYLES[1:]} if image else {})

    def __post_init__(self):
        check_settings(self)
        self.prompts = self.prompts or PROMPTS
        # rank -> number, as the prompt states it, and as verifier and expert count
        self.stated, self.values = card_values(self.rule), card_values(self.judged_rule or self.rule)
        self.deck = [(rank, suit) for suit in LOOKS[self.look] for rank in RANKS]
        self.attempt = None     # judged so far; None: no episode is running

    def reset(self, seed):
        """Deal the hand that belongs to `seed` (an int >= 0): (observation, info about the hand). It can be
        solved by the rule that is judged and by the one that is stated, so that a model has an answer
        whichever it goes by. ValueError if hand after hand is unsolvable."""
        self.rng = _random(seed)
        for _ in range(10_000):
            self.hand = self.draw()
            self.ranks, suits = map(list, zip(*self.hand))
            if self.wanted() and all(solve([values[rank] for rank in self.ranks], self.target)
                              for values in (self.values, self.stated)):
                break
        else:
            raise ValueError(f"no solvable hand in 10000: rule {self.rule}, look {self.look}, "
                             f"target {self.target}")
        self.numbers = [self.values[rank] for rank in self.ranks]
        self.pick = self.rng.random()       # which of the solutions the expert gives, in [0, 1)
        self.attempt = 0
        info = {"cards": self.ranks, "suits": suits, "numbers": self.numbers}
        return Observation([{"role": "user", "content": self._prompt()}], fresh=True), info

    def wanted(self):
        """Tell whether the hand is one of those to deal. A fifth of all sets of numbers is held out."""
        unseen = derive("held out", *sorted(self.values[rank] for rank in self.ranks)) % 5 == 0
        return (self.held_out in (None, unseen)
                and (self.deal == "any" or set(FACES) & set(self.ranks)))

    def draw(self):
        """Return a hand from one deck, solvable or not."""
        return self.rng.sample(self.deck, self.cards)

    def judge(self, text):
        """Return the verifier.Verdict on an answer."""
        return judge(text, self.ranks, self.numbers, self.target, self.image, self.prompts)

    def _prompt(self):
        same = len({self.stated[face] for face in FACES}) == 1
        rule = self.prompts["rule_same" if same else "rule_each"].format(**self.stated, target=self.target)
        text = self.prompts["gp-vl" if self.image else "gp-l"].format(
            target=self.target, rule=rule, cards=self.ranks, count=COUNTS[self.cards])
        return _content(self, text)

    def picture(self):
        """Return the picture of the hand."""
        return draw_hand(self.hand, self.size, self.style)

    step = judged_step

    def oracle(self):
        """Return the expert's answer to the current hand; which of the solutions is the seed's choice."""
        formulas = solve(self.numbers, self.target)
        return _answer(self, self.ranks, self.numbers, formulas[int(self.pick * len(formulas))])

    def demonstrate(self, seed, mistakes=0):
        """Return an expert's dialogue, see `dialogue`; with `describe` it tells what is seen."""
        messages = self.reset(seed)[0].messages
        if self.describe:
            asked = self.prompts["describe_cards"].format(count=COUNTS[self.cards], target=self.target)
            return _description(self, asked, _answer(self, self.ranks))
        return dialogue(self, messages, mistakes)

    def _mistake(self):
        """Return a plausible wrong answer: mostly arithmetic that misses the target, at times other numbers
        than dealt, one left out, a card misread (image tasks), an answer cut short."""
        rng, cards = self.rng, list(self.ranks)
        if self.image and rng.random() < 0.25:
            cards[rng.randrange(self.cards)] = rng.choice(RANKS)
        numbers = [self.values[rank] for rank in cards]
        used = list(numbers)
        kind = rng.random()
        if kind < 0.12:         # another number, mostly one that was not dealt, at times one used twice
            used[rng.randrange(self.cards)] = rng.randint(1, 13)
        elif kind < 0.17:
            used.pop(rng.randrange(self.cards))
        answer = _answer(self, cards, numbers, miss(used, self.target, rng))
        return answer[:rng.randrange(1, len(answer))] if kind > 0.98 else answer


# ------------------------------------------------------------------------------------------------- Navigation

@dataclass(kw_only=True, eq=False)
class Navigation:
    """The navigation of the paper's section 4.2, on rails: virl-l, or virl-vl with `image=True`. Bad settings
    are ValueErrors."""
    image: bool = False
    rule: str = "absolute"          # what turn_direction takes: the compass, or "relative", left and right
    judged_rule: str = None         # what it takes for the verifier and the expert, if that is another
    wording: str = "both"           # how turns are told, "both" ways or "relative"; see rails.instructions
    look: str = "new-york"          # a built-in city or a folder of routes; see rails.known_routes
    held_out: bool = False          # routes that training never walks, where the city has them
    attempts: int = 2               # answers judged per point
    after_failure: str = "end"      # after a point stays wrong (paper); "walk-on": the released code
    drop_rate: float = 0.5          # share of the points between intersections that are left out
    hide_landmarks: bool = False    # leave them out of the instructions: only the pictures show them
    describe: bool = False          # image tasks: demonstrations tell what is seen rather than the way
    size: int = 53                  # pixels of one of the four views
    prompts: dict = None            # see prompts.load_prompts

    kinds = {
        "rule": one_of(SPACES), "judged_rule": one_of(SPACES), "look": LOOK,
        "wording": one_of(("both", "relative")), "after_failure": one_of(("end", "walk-on")),
        "attempts": integer(1), "size": integer(1)}
    keys = ("current observation", "current instruction", "action")
    answer_key = keys[-1]
    headline, recognition = "per_step", "observed right"
    sizes = {"tiny": 53, "paper": 640}      # 2 x 53 + 5 pixels fit into the tiny model's four tiles
    looks = {False: "new-york", True: "new-york"}
    # the words that differ from route to route: of names, directions and sides
    apart = (r"\d+| [A-Z][a-z]+(?= is on)| [A-Z][a-z]+(?= [A-Z][a-z]+ is on)|[A-Z][a-z]+(?= [A-Z])"
             r"|\b(?:north|south)?(?:east|west|north|south)\b|\b(?:slightly|left|right|front|behind)\b")
    broad = staticmethod(foundation.navigation)
    turn = staticmethod(relative_turn)      # from one heading to another, in words

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

    def __post_init__(self):
        self.judged_rule = self.judged_rule or self.rule
        check_settings(self)
        self.prompts = self.prompts or PROMPTS
        self.routes = known_routes(self.look, self.held_out, self.image, self.size)
        self.distinct = len(self.routes)
        # of the current point; attempts judged there, None while no episode is running
        self.index, self.attempt = 0, None

    def _start(self, seed):
        self.rng = _random(seed)
        route = self.routes[seed % len(self.routes)]
        heading = route.init_heading or self.rng.randrange(360)
        self.sentences = instructions(route.legs, heading, not self.hide_landmarks, self.wording,
                                      self.turn)
        self.points = rail(route, heading, self.judged_rule, self.rng, self.drop_rate, self.turn)
        self.landmarks = {leg.landmark for leg in route.legs if leg.landmark}
        self.index, self.attempt, self.failed = 0, 0, False
        return {"route": route.name, "points": len(self.points), "instructions": self.sentences}

    def reset(self, seed):
        """Start route number `seed` (an int >= 0, modulo their number), so that consecutive seeds walk every
        route equally often; rail and start heading are drawn from it: (observation, info about the route)."""
        info = self._start(seed)
        return self._observe(), info

    def _observe(self):
        """Return the Observation of the current point, which starts a conversation of its own: instructions,
        actions, history and what is seen. With pictures the last is in the picture, but an intersection is
        told in words, too (released code)."""
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
        return Observation([{"role": "user", "content": _content(self, text)}], fresh=True)

    def picture(self):
        """Return the four street views here."""
        point = self.points[self.index]
        return views.grid(point.panorama, point.heading, self.size)

    def judge(self, text):
        """Return the verifier.Verdict on an answer at the current point."""
        point = self.points[self.index]
        return judge_step(text, point, self.landmarks, self.judged_rule, self.prompts)

    def step(self, text):
        """Judge one answer: (observation, reward, terminated, truncated, info). Any string is taken. The
        right action leads to the next point; after a wrong one the walker stays, and is told the verifier's
        message. The destination terminates the episode, a point that stays wrong truncates it (see
        after_failure); after that RuntimeError."""
        observation, reward, correct, exhausted, info = judged_step(self, text)
        last = self.index == len(self.points) - 1
        self.failed |= exhausted
        terminated = last and correct
        truncated = exhausted and (last or self.after_failure == "end")
        info |= {"point": self.index, "landmark": self.points[self.index].landmark,
                 "success": terminated and not self.failed}
        if (correct or exhausted) and not (terminated or truncated):
            self.index += 1
            self.attempt = 0
            observation = self._observe()
        return observation, reward, terminated, truncated, info

    def oracle(self):
        """Return the expert's answer at the current point."""
        point = self.points[self.index]
        return _answer(self, point.observation, self.sentences[point.instruction], point.action)

    def demonstrate(self, seed, mistakes=0):
        """Return an expert's dialogue at one point of a route, both the seed's choice; with `describe` it
        tells what is seen there, mostly at a landmark."""
        self._start(seed)
        choices = range(len(self.points))
        marked = [i for i in choices if self.points[i].landmark] if self.describe else []
        if marked and self.rng.random() < 0.8:
            choices = marked
        self.index = self.rng.choice(choices)
        if self.describe:
            asked = self.prompts["describe"].format(target="")
            return _description(self, asked, self.points[self.index].observation)
        return dialogue(self, self._observe().messages, mistakes)

    def _mistake(self):
        """Return a plausible wrong answer: another action, mostly with the observation and the instruction of
        another point."""
        point, other = self.points[self.index], self.rng.choice(self.points)
        seen = self.rng.choice([point, other])
        action = self.rng.choice([action for action in SPACES[self.judged_rule] if action != point.action])
        return _answer(self, seen.observation, self.sentences[other.instruction], action)


GAMES = {"gp": GeneralPoints, "virl": Navigation}


def tasks(games):
    """Return {task: game}: a task is a game and "-l" (in words) or "-vl" (with pictures)."""
    return {f"{name}-{'vl' if image else 'l'}": game for name, game in games.items() for image in game.looks}


TASKS = tasks(GAMES)
