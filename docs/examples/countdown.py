"""A third game: Countdown, with any count of numbers and any target. This file, FILE, is all it takes:

    python train.py --custom FILE --task countdown-l --algo pretrain --out runs/foundation
    python train.py --custom FILE --task countdown-l --algo ppo --model runs/foundation/final
"""

import json
import random
from dataclasses import dataclass

from envs import Observation, judged_step, check_settings, dialogue
from games.prompts import PROMPTS
from games.solver import miss, solve
from games.verifier import judge
from harness.ranges import integer, one_of

LOOKS = {"small": range(1, 11), "large": range(11, 31)}
PROMPT = """Make {target} of {numbers}, each exactly once, with + - * / and parentheses.
Answer with one JSON object: {{"formula": "an equation that ends in ={target}"}}"""


@dataclass(kw_only=True, eq=False)
class Countdown:
    """A hand of `rule` numbers; see envs.Env for what each name is for."""
    rule: str = "3"             # how many numbers
    look: str = "small"         # which numbers
    target: int = 24
    attempts: int = 3
    image: bool = False
    size: int = 0
    prompts: dict = None

    kinds = {"rule": one_of(("2", "3", "4", "5", "6")), "look": one_of(LOOKS), "target": integer(1)}
    answer_key, headline, recognition = "formula", "success", "always true"
    sizes, looks, distinct, apart = {"tiny": 0, "paper": 0}, {False: "small"}, 10**9, r"\d+|[-+*/()=]"
    presets = {"tiny countdown": "--max-new-tokens 32"}

    @staticmethod
    def shifts(rule, look, image):
        return {"id": {}, "rule-ood": {"rule": "4" if rule == "3" else "3"}, "large": {"look": "large"}}

    @staticmethod
    def broad():
        return [(1.0, {"rule": rule}) for rule in ("2", "3", "4")]

    def __post_init__(self):
        check_settings(self)
        self.prompts, self.attempt = self.prompts or PROMPTS, None

    def reset(self, seed):
        self.rng, self.numbers, self.attempt = random.Random(seed), [], 0
        while not self.numbers or not solve(self.numbers, self.target):
            self.numbers = self.rng.choices(LOOKS[self.look], k=int(self.rule))
        text = PROMPT.format(target=self.target, numbers=", ".join(map(str, self.numbers)))
        return Observation([{"role": "user", "content": text}], fresh=True), {"numbers": self.numbers}

    def judge(self, text):
        return judge(text, (), self.numbers, self.target, prompts=self.prompts)

    step = judged_step

    def oracle(self):
        return json.dumps({"formula": solve(self.numbers, self.target)[0]})

    def _mistake(self):
        return json.dumps({"formula": miss(self.numbers, self.target, self.rng)})

    def demonstrate(self, seed, mistakes=0):
        return dialogue(self, self.reset(seed)[0].messages, mistakes)


GAMES = {"countdown": Countdown}
