"""More shifts than the paper's: what SFT and PPO made of the model in `main`, tested on other targets, other values, another look, another wording.

    python -m study shifts

The weights are those that main's runs end with. fake-rule states the new rule and judges by the old one: who succeeds there ignores the rule, who
fails there and on rule-ood fails at its arithmetic (first tries tell it best, as the verifier's replies speak of the old values). envs.py describes
each set; the model's pre-training knew face-5, face-7, target-12 and target-20.
"""

from games.prompts import TASKS
from study import figures
from study.experiments import ARMS, Experiment
from study.figures import Group
from study.runner import Run

SETS = {"gp": ["id-face", "fake-rule", "face-5", "face-7", "five-cards", "target-12", "target-20", "target-36"], "virl": ["fake-rule", "relative-wording"]}
SEEN = {"gp-vl": ["mirrored", "recoloured"]}           # of pictures alone
question = "More shifts than the paper's: does what holds there hold on others, and does a model that fails a rule ignore it?"


def runs(seeds):
    """Main's, and an evaluation of each init checkpoint and of what each run ends with."""
    found = Experiment(*ARMS["main"]).runs(seeds)
    for task in TASKS:
        evaluate = ("--task", task, "--algo", "eval", "--eval-sets", ",".join(SETS[task.split("-")[0]] + SEEN.get(task, [])))
        found.append(Run(f"{task}-shifts-init-0", evaluate, after=(f"{task}-init-0",)))
        found += [Run(f"{task}-shifts-{algo}-{seed}", (*evaluate, "--model", f"{{root}}/{task}-{algo}-{seed}/final"), after=(f"{task}-{algo}-{seed}",))
                  for seed in seeds for algo in ("sft", "ppo")]
    return found


def groups(found):
    """As if each run had been evaluated before and after."""
    for task in TASKS:
        for algo in ("sft", "ppo"):
            after = [found[name] for seed in range(100) if (name := f"{task}-shifts-{algo}-{seed}") in found]
            if after and (before := found.get(f"{task}-shifts-init-0")):
                yield Group(task, algo, [{"curve": before["curve"] + record["curve"]} for record in after])


def table(found):
    return figures.headline(groups(found))


def plot(found, file):
    figures.finals(groups(found), file)
