"""The paper's questions as lists of runs: from one init checkpoint each way to learn (an *arm*), several seeds, and the figure and table that answer.

    python -m study main                     # figures 5 to 7: SFT and PPO on all four tasks
    python -m study attempts                 # figure 10: how many attempts in training
"""

from dataclasses import dataclass

import numpy as np

from envs import GAMES, TASKS
from study import records
from study.runner import Run

# The paper's own results, %: (task, set) -> init, RL, SFT at equal compute (PAPER: figures 5 to 7).
PAPER = {
    ("gp-l", "rule-ood"): (11.5, 15.0, 3.4), ("gp-vl", "rule-ood"): (11.2, 14.2, 5.6), ("gp-vl", "visual-ood"): (23.6, 41.2, 13.7),
    ("virl-l", "rule-ood"): (80.8, 91.8, 1.3), ("virl-vl", "rule-ood"): (35.7, 45.0, 2.5), ("virl-vl", "visual-ood"): (16.7, 77.8, 11.1)}
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")      # told apart by the colour-blind, too (Okabe and Ito)


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


def metric(arm_or_task):
    """The game's headline: success of cards, per-step accuracy of navigation, as in the paper's figures."""
    return GAMES[getattr(arm_or_task, "task", arm_or_task).split("-")[0]].headline


SFT, PPO = "--algo sft", "--algo ppo"
MAIN = [Arm(task, algo, f"--algo {algo}") for task in TASKS for algo in ("sft", "ppo")]
main_of = {(arm.task, arm.name): arm for arm in MAIN}
ARMS = {
    # Figures 5 to 7. Figure 8, recognition against success, is drawn from the same runs.
    "main": MAIN,
    # Figure 9: RL without SFT before it. The tiny foundation knows the game's format already, so beside it one that has hardly begun to learn.
    "no-sft": [main_of["gp-l", "ppo"], Arm("gp-l", "ppo-from-foundation", PPO, "docs/tiny/gp"), Arm("gp-l", "ppo-from-young", PPO, "young")],
    # Figure 10: attempts in training and in its evaluation; as many updates as take the compute of 40 with five attempts.
    "attempts": [Arm("gp-l", f"ppo-{attempts}-attempts", f"{PPO} --attempts {attempts} --steps {steps} --eval-every {-(-steps // 2)}")
                 for attempts, steps in ((1, 66), (3, 47))] + [main_of["gp-l", "ppo"],
                 Arm("gp-l", "ppo-10-attempts", f"{PPO} --attempts 10 --steps 31 --eval-every 16")],
    # Figure 15: expert dialogues in which wrong answers and the verifier's replies come before the right one.
    "suboptimal": [arm for task in ("gp-l", "virl-l") for arm in (main_of[task, "sft"], Arm(task, "sft-suboptimal", f"{SFT} --mistakes 1"))],
    # Figure 16: learning rates, and what is frozen.
    "freeze": [Arm("gp-vl", f"sft-{lr}-{tune}", f"{SFT} --lr {lr} --tune {tune}") for tune in ("all", "no-vision", "no-vision-no-adapter")
               for lr in ("1e-4", "3e-4", "1e-3")],
    # Figure 19: RL from where SFT ended.
    "overfitted": [arm for task in ("gp-l", "virl-l") for arm in (main_of[task, "sft"], Arm(task, "ppo-after-sft", PPO, "sft"))],
    # SFT given its best chance: several rules, a small learning rate, weights for tokens, an early end.
    "best-sft": [main_of["gp-l", "sft"], Arm("gp-l", "sft-rules", f"{SFT} --rules 10,5,7"), Arm("gp-l", "sft-small-lr", f"{SFT} --lr 3e-5"),
                 Arm("gp-l", "sft-dft", f"{SFT} --sft-loss dft"), Arm("gp-l", "sft-early", f"{SFT} --steps 90 --eval-every 15"),
                 main_of["gp-l", "ppo"]],
}
STARTS = [Arm("gp-l", "young", "--algo pretrain --steps 60 --eval-hands 0")]           # begun with, but no arm of an experiment


@dataclass(frozen=True)
class Experiment:
    """A list of arms with its runs, table and figure."""
    arms: list

    def runs(self, seeds):
        """The init checkpoints first (their evaluation makes them), then seed by seed, what is begun with before what begins with it."""
        tasks = list(dict.fromkeys(arm.task for arm in self.arms))
        found = [Run(f"{task}-init-0", ("--task", task, "--algo", "eval")) for task in tasks]
        known = {(arm.task, arm.name): arm for arms in [*ARMS.values(), STARTS] for arm in arms}
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
        """(arm, its records, a seed each) of all arms that have any."""
        groups = [(arm, [found[arm.run(seed)] for seed in range(100) if arm.run(seed) in found]) for arm in self.arms]
        return [(arm, group) for arm, group in groups if group]

    def table(self, found):
        """Markdown: a row an arm and set; before, after, the change hand by hand, and the paper's numbers where it has them."""
        lines = ["| task | tested on | arm | seeds | before | after | change | TFLOPs | paper: before, after |", "|---|---|---|---|---|---|---|---|---|"]
        for arm, group in self.groups(found):
            for name in group[0]["curve"][0]["eval"]:
                before, after = ([record["curve"][k]["eval"][name] for record in group] for k in (0, -1))
                init, rl, sft = PAPER.get((arm.task, name), (None,) * 3)
                theirs = f"{init}, {rl if arm.name == 'ppo' else sft}" if init and arm in MAIN else ""
                lines.append(f"| {arm.task} | {name} | {arm.name} | {len(group)} | " + " | ".join([
                    "{:.1f} ± {:.1f}".format(*records.rate(before, metric(arm))), "{:.1f} ± {:.1f}".format(*records.rate(after, metric(arm))),
                    "{:+.1f} ± {:.1f}".format(*records.change(after, before, metric(arm))),
                    f"{np.mean([record['counted_tflops'] for record in group]):.1f}", theirs]) + " |")
        return "\n".join(lines)

    def plot(self, found, file):
        """The headline metric against training compute: a row a task, a column a set; seeds thin, their mean thick with its standard error."""
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        groups = self.groups(found)
        tasks = list(dict.fromkeys(arm.task for arm, _ in groups))
        names = list(dict.fromkeys(name for _, group in groups for name in group[0]["curve"][0]["eval"]))
        color = dict(zip(dict.fromkeys(arm.name for arm, _ in groups), COLORS * 3))
        figure, axes = plt.subplots(len(tasks), len(names), figsize=(3.6 * len(names), 2.3 * len(tasks)), squeeze=False, sharey="row")
        for axis in axes.flat:
            axis.set_visible(False)
        for arm, group in groups:
            for axis, name in zip(axes[tasks.index(arm.task)], names):
                if name in group[0]["curve"][0]["eval"]:
                    axis.set_visible(True)
                    self.curve(axis, group, name, metric(arm), color[arm.name], f"{arm.name} ({len(group)} seeds)")
                    axis.set(title=f"{arm.task}: {name}", xlabel="training compute (TFLOPs, counted)")
        for task, row in zip(tasks, axes):
            row[0].set_ylabel(f"{metric(task).replace('_', '-')} (%)")
            row[0].legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(file, dpi=150)

    def curve(self, axis, group, name, metric, color, label):
        for record in group:
            points = [(point["counted_tflops"], records.rate([point["eval"][name]], metric)[0]) for point in record["curve"]]
            axis.plot(*zip(*points), color=color, lw=0.7, alpha=0.45, marker=".", ms=3)
        length = min(len(record["curve"]) for record in group)
        x = [np.mean([record["curve"][k]["counted_tflops"] for record in group]) for k in range(length)]
        y, error = zip(*[records.rate([record["curve"][k]["eval"][name] for record in group], metric) for k in range(length)])
        axis.errorbar(x, y, yerr=error, color=color, lw=2, marker="o", ms=3.5, capsize=2, label=label)
        axis.grid(alpha=0.3)
