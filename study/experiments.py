"""The paper's questions as lists of runs: from one init checkpoint each way to learn (an *arm*), several seeds, and the figure and table that answer.

    python -m study main                     # figures 5 to 7: SFT and PPO on all four tasks
    python -m study attempts                 # figure 10: how many attempts in training
"""

from dataclasses import dataclass

from games.prompts import TASKS
from study import figures
from study.figures import Group
from study.runner import Run


@dataclass(frozen=True)
class Arm:
    """One way to learn. Its runs are TASK-NAME-SEED. start: the name of an arm of the same task and seed whose weights it begins with ("": the task's
    init checkpoint), or with a '/' in it a folder."""
    task: str
    name: str
    flags: str
    start: str = ""

    def run(self, seed):
        return f"{self.task}-{self.name}-{seed}"

    def model(self, seed):
        if not self.start:
            return ()
        return "--model", self.start if "/" in self.start else f"{{root}}/{self.task}-{self.start}-{seed}/final"


SFT, PPO = "--algo sft", "--algo ppo"
FROM_INIT = "--skip-first-eval"        # where all seeds begin with the init checkpoint, its own evaluation is the first
MAIN = [Arm(task, algo, f"--algo {algo}") for task in TASKS for algo in ("sft", "ppo")]
main_of = {(arm.task, arm.name): arm for arm in MAIN}
ARMS = {                   # experiment: (its question, its arms)
    "main": ("Figures 5 to 8: SFT and PPO from one init checkpoint, tested on the rule and look of training and on others.", MAIN),
    "no-sft": ("Figure 9: RL without SFT before it. The tiny foundation knows the game's format already; beside it one that has hardly begun to learn.",
               [main_of["gp-l", "ppo"], Arm("gp-l", "ppo-from-foundation", PPO, "docs/tiny/gp"), Arm("gp-l", "ppo-from-young", PPO, "young")]),
    # As many updates as take the compute of 40 with five attempts (80, 119, 146 and 198 tokens an episode).
    "attempts": ("Figure 10: how many attempts, in training and in the evaluation, at equal compute.",
                 [Arm("gp-l", "ppo-1-attempt", f"{PPO} --attempts 1 --steps 73 --eval-every 37"),
                  Arm("gp-l", "ppo-3-attempts", f"{PPO} --attempts 3 --steps 49 --eval-every 25"), main_of["gp-l", "ppo"],
                  Arm("gp-l", "ppo-10-attempts", f"{PPO} --attempts 10 --steps 30 --eval-every 15")]),
    # 185 tokens instead of 79 (gp-l), 134 instead of 112 (virl-l), and so fewer steps.
    "suboptimal": ("Figure 15: SFT on dialogues in which wrong answers and the verifier's replies come before the right one.",
                   [main_of["gp-l", "sft"], Arm("gp-l", "sft-suboptimal", f"{SFT} --mistakes 1 --steps 193 --eval-every 97 {FROM_INIT}"),
                    main_of["virl-l", "sft"], Arm("virl-l", "sft-suboptimal", f"{SFT} --mistakes 1 --steps 186 --eval-every 93 {FROM_INIT}")]),
    "freeze": ("Figure 16: SFT's learning rate, and what is frozen.",
               [Arm("gp-vl", f"sft-{lr}-{tune}", f"{SFT} --lr {lr} --tune {tune} --steps 150 {FROM_INIT}")
                for tune in ("all", "no-vision", "no-vision-no-adapter") for lr in ("1e-4", "3e-4", "1e-3")]),
    "overfitted": ("Figure 19: RL from where SFT ended.",
                   [arm for task in ("gp-l", "virl-l") for arm in (main_of[task, "sft"], Arm(task, "ppo-after-sft", PPO, "sft"))]),
    "best-sft": ("SFT given its best chance: several rules, a small learning rate, weights for tokens, an early end, embedding and head left alone.",
                 [main_of["gp-l", "sft"], Arm("gp-l", "sft-rules", f"{SFT} --rules 10,5,7 {FROM_INIT}"),
                  Arm("gp-l", "sft-small-lr", f"{SFT} --lr 3e-5 {FROM_INIT}"), Arm("gp-l", "sft-dft-weights", f"{SFT} --sft-loss dft {FROM_INIT}"),
                  Arm("gp-l", "sft-early", f"{SFT} --steps 90 --eval-every 15 {FROM_INIT}"),
                  Arm("gp-l", "sft-no-embeddings", f"{SFT} --tune no-embeddings {FROM_INIT}"), main_of["gp-l", "ppo"],
                  main_of["virl-l", "sft"], Arm("virl-l", "sft-small-lr", f"{SFT} --lr 3e-5 {FROM_INIT}"), main_of["virl-l", "ppo"]]),
}
STARTS = [Arm("gp-l", "young", "--algo pretrain --steps 60 --eval-hands 0")]           # begun with, but no arm of an experiment


@dataclass(frozen=True)
class Experiment:
    """A list of arms with its runs, table and figure."""
    question: str
    arms: list

    def runs(self, seeds):
        """The init checkpoints first (their evaluation makes them), then seed by seed, what is begun with before what begins with it."""
        tasks = list(dict.fromkeys(arm.task for arm in self.arms))
        found = [Run(f"{task}-init-0", ("--task", task, "--algo", "eval")) for task in tasks]
        known = {(arm.task, arm.name): arm for arms in [*(arms for _, arms in ARMS.values()), STARTS] for arm in arms}
        for seed in seeds:
            for arm in self.arms:
                chain = [arm]
                while chain[0].start and "/" not in chain[0].start:
                    chain.insert(0, known[arm.task, chain[0].start])
                for one in chain:
                    needs = chain[chain.index(one) - 1].run(seed) if one.start and "/" not in one.start else f"{arm.task}-init-0"
                    run = Run(one.run(seed), ("--task", one.task, "--seed", str(seed), *one.flags.split(), *one.model(seed)), after=(needs,))
                    if run not in found:
                        found.append(run)
        return found

    def groups(self, found):
        """A group an arm that has any records, each with an evaluation before the first step."""
        groups = []
        for arm in self.arms:
            mine = [found[arm.run(seed)] for seed in range(100) if arm.run(seed) in found]
            if FROM_INIT in arm.flags:
                before = [point | {"counted_tflops": 0.0} for point in found[f"{arm.task}-init-0"]["curve"]]
                mine = [record | {"curve": before + record["curve"]} for record in mine]
            groups += [Group(arm.task, arm.name, mine)] if mine else []
        return groups

    def table(self, found):
        groups = self.groups(found)
        if self.arms is not MAIN:
            return figures.table(groups)
        return "\n\n".join(show(groups) for show in (figures.headline, figures.verdict, figures.explained))

    def plot(self, found, file):
        groups = self.groups(found)
        figures.draw(groups, file)
        figures.tradeoff(groups, file.with_stem(f"{file.stem}-tradeoff"))
        if self.arms is MAIN:
            figures.finals(groups, file.with_stem(f"{file.stem}-final"))
            figures.scatter(groups, file.with_stem(f"{file.stem}-recognition"), "cards or observations read right (%)",
                            lambda point, name: 100 * point["eval"][name]["recognized"])
            figures.scatter(groups, file.with_stem(f"{file.stem}-kl"), "KL(init || policy) on the training game (nats an answer)",
                            lambda point, name: figures.measured(point, 1, "forward_kl_answer"))
