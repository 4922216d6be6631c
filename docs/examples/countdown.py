"""A third game: Countdown. Make the target from some of the numbers, each at most once.

    python train.py --custom docs/examples/countdown.py --task countdown-l --algo sft --model docs/tiny/gp

`envs.Env` says what each name is for. A game with pictures has looks for `True`, too, and shows them.
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass

from envs import Observation
from games.answers import read_answer
from games.verifier import evaluate, fault
from harness.ranges import integer, one_of

PROMPT = ('Make {} from some of the numbers {}, each at most once, with + - * / and parentheses. Answer with '
          'one JSON object: {{"formula": "an equation that ends in ={}"}}')


@dataclass
class Countdown:
    """A hand of three to `rule` numbers up to 25; the rule out of distribution is a longer hand."""
    image: bool = False
    rule: str = "5"
    look: str = "plain"
    attempts: int = 3
    size: int = 1
    prompts: dict = None

    kinds = {"rule": one_of(("4", "5", "7")), "look": one_of(("plain",)), "attempts": integer(1)}
    answer_key, headline, recognition, apart = "formula", "success", "own numbers", r"\d+|[-+*/()=]"
    sizes, looks, distinct = {"tiny": 1, "paper": 1}, {False: "plain"}, 10**9
    presets = {"tiny countdown": "--max-new-tokens 48 --eval-hands 100 --eval-every 20 --probe-hands 0 "
                                 "--steps 40",
               "tiny ppo countdown": "--hands 32 --samples 8 --reward-scale 0.2 --save-every 20"}

    @staticmethod
    def shifts(rule, look, image):
        return {"id": {}, "rule-ood": {"rule": "7"}}

    def reset(self, seed):
        rng, self.attempt, self.target = random.Random(seed), 0, 0
        while self.target < 1:                 # the expert knows how the target came about
            self.numbers = [rng.randint(1, 25) for _ in range(rng.randint(3, int(self.rule)))]
            a, b, c = rng.sample(self.numbers, 3)
            self.formula = f"({a}{rng.choice('+-*')}{b}){rng.choice('+-*')}{c}"
            self.target = evaluate(re.findall(r"\d+|\S", self.formula))[0]
        text = PROMPT.format(self.target, ", ".join(map(str, self.numbers)), self.target)
        return Observation([{"role": "user", "content": text}], fresh=True), {"numbers": self.numbers}

    def step(self, text):
        self.attempt += 1
        formula = read_answer(text)[2]
        used = [int(number) for number in re.findall(r"[0-9]+", (formula or "").rpartition("=")[0][:200])]
        foreign = Counter(used) - Counter(self.numbers)
        code = "foreign_number" if foreign else fault(formula, used, self.target)[0]
        correct, last = code == "correct", self.attempt == self.attempts
        messages = [] if correct or last else [{"role": "user", "content": f"Wrong: {code}."}]
        info = {"verdict": code, "message": code, "correct": correct, "attempt": self.attempt,
                "recognized": not foreign, "translated": correct, "success": correct}
        return Observation(messages, False), 5.0 if correct else -1.0, correct, last and not correct, info

    def oracle(self):
        return json.dumps({"formula": f"{self.formula}={self.target}"})

    def demonstrate(self, seed, mistakes=0):
        messages = self.reset(seed)[0].messages
        for _ in range(mistakes):
            wrong = json.dumps({"formula": f"{self.numbers[0]}={self.target}"})
            messages = [*messages, {"role": "assistant", "content": wrong, "train": False},
                        *self.step(wrong)[0].messages]
        return [*messages, {"role": "assistant", "content": self.oracle(), "train": True}]


GAMES = {"countdown": Countdown}
