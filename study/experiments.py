"""The paper's questions and some of our own as lists of runs. Each way to learn (an *arm*) starts from one
init checkpoint and has several seeds; tables and figures give the answers.

    python -m study main                     # figures 5 to 7: SFT and PPO on all four tasks
    python -m study attempts                 # figure 10: how many attempts in training
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction

from envs import TASKS
from study import figures, tables
from study.runner import Run
from study.tables import Group

SEEDS = range(100)             # tables look for runs of these


@dataclass(frozen=True)
class Arm:
    """One way to learn, or to test what was learnt.

    name: of its runs' folders but for -SEED; it holds the task
    flags: of train.py; {NAME} in them stands for the weights that NAME's run of the same seed ends with
    label: in tables and figures; "": they leave it out
    """
    name: str
    flags: str
    label: str

    @property
    def task(self):
        return next(task for task in TASKS if f"{task}-" in self.name)

    @property
    def before(self):
        """The run whose evaluation stands before the arm's own; None: the arm begins with one itself."""
        if tested := re.search("-(shifts|hands)-", self.name):
            return f"{self.task}{tested[0]}init-0"
        return f"{self.task}-init-0" if "--skip-first-eval" in self.flags else None

    def run(self, seed):
        begun = re.search("{(.+)}", self.flags)
        after = f"{begun[1]}-{seed}" if begun else f"{self.task}-init-0"
        flags = self.flags.replace(begun[0], f"{{root}}/{after}/final") if begun else self.flags
        drawn = () if "--algo eval" in flags else ("--seed", str(seed))
        name = f"{self.name}-{0 if self.name.endswith('-init') else seed}"
        return Run(name, ("--task", self.task, *flags.split(), *drawn), (after,))


@dataclass(frozen=True)
class Experiment:
    """arms: what others begin with comes first; table: groups -> Markdown; figures: {what their names end
    with: function of groups and file}."""
    question: str
    arms: list
    table_of: Callable = tables.changes
    figures: dict = field(default_factory=lambda: {"": figures.draw, "-tradeoff": figures.tradeoff})

    def runs(self, seeds):
        """Return the runs: first the init checkpoints (evaluating one makes it), then seed by seed."""
        tasks = dict.fromkeys(arm.task for arm in self.arms)
        inits = [Run(f"{task}-init-0", ("--task", task, "--algo", "eval")) for task in tasks]
        return list(dict.fromkeys(inits + [arm.run(seed) for seed in seeds for arm in self.arms]))

    def groups(self, found):
        """Return a group for each arm that has any records, each with an evaluation before the first step."""
        groups = []
        for arm in self.arms:
            mine = [found[name] for seed in SEEDS if (name := f"{arm.name}-{seed}") in found]
            if arm.label and mine and (not arm.before or arm.before in found):
                curve = found[arm.before]["curve"] if arm.before else []
                before = [point | {"counted_tflops": 0.0} for point in curve]
                mine = [record | {"curve": before + record["curve"]} for record in mine]
                groups.append(Group(arm.task, arm.label, mine))
        return groups

    def table(self, found):
        return self.table_of(self.groups(found))

    def plot(self, found, file):
        groups = self.groups(found)
        for suffix, draw in self.figures.items() if groups else ():
            draw(groups, file.with_stem(file.stem + suffix))


def arms(text):
    """Read arms, TASK NAME FLAGS in a line each."""
    return [Arm(f"{task}-{name}", " ".join(flags), name)
            for task, name, *flags in map(str.split, text.strip().splitlines())]


def hidden(found):
    """Return the arms without a label."""
    return [replace(arm, label="") for arm in found]


# ------------------------------------------------------------------------------------------------------------
# The paper's figures

MAIN = arms("\n".join(f"{task} {algo} --algo {algo}" for task in TASKS for algo in ("sft", "ppo")))

NO_SFT = hidden(arms("gp-l young --algo pretrain --steps 60 --eval-hands 0")) + arms("""
    gp-l ppo                  --algo ppo
    gp-l ppo-from-foundation  --algo ppo --model docs/tiny/gp-l
    gp-l ppo-from-young       --algo ppo --model {gp-l-young}
""")
# As many updates as take the compute of 40 with five attempts (one takes 0.10, 0.30, 0.49 and 0.92 TFLOPs).
ATTEMPTS = arms("""
    gp-l ppo-1-attempt    --algo ppo --attempts 1 --steps 177 --eval-every 59
    gp-l ppo-3-attempts   --algo ppo --attempts 3 --steps 62 --eval-every 21
    gp-l ppo              --algo ppo
    gp-l ppo-10-attempts  --algo ppo --attempts 10 --steps 20 --eval-every 7
""")
# 0.082 TFLOPs a step instead of 0.033 (gp-l), 0.059 instead of 0.049 (virl-l), and so fewer steps.
SUBOPTIMAL = arms("""
    gp-l   sft             --algo sft
    gp-l   sft-suboptimal  --algo sft --mistakes 1 --steps 209 --eval-every 105 --skip-first-eval
    virl-l sft             --algo sft
    virl-l sft-suboptimal  --algo sft --mistakes 1 --steps 174 --eval-every 87 --skip-first-eval
""")
FREEZE = arms("\n".join(
    f"gp-vl sft-{lr}-{tune} --algo sft --lr {lr} --tune {tune} --steps 150 --skip-first-eval"
    for tune in ("all", "no-vision", "no-vision-no-adapter") for lr in ("1e-4", "3e-4", "1e-3")))
OVERFITTED = arms("""
    gp-l   sft            --algo sft
    gp-l   ppo-after-sft  --algo ppo --model {gp-l-sft}
    virl-l sft            --algo sft
    virl-l ppo-after-sft  --algo ppo --model {virl-l-sft}
""")
BEST_SFT = arms("""
    gp-l   sft                --algo sft
    gp-l   sft-rules          --algo sft --rules 10,5,7 --skip-first-eval
    gp-l   sft-small-lr       --algo sft --lr 3e-5 --skip-first-eval
    gp-l   sft-dft-weights    --algo sft --sft-loss dft --skip-first-eval
    gp-l   sft-early          --algo sft --steps 90 --eval-every 15 --skip-first-eval
    gp-l   sft-no-embeddings  --algo sft --tune no-embeddings --skip-first-eval
    gp-l   ppo                --algo ppo
    virl-l sft                --algo sft
    virl-l sft-small-lr       --algo sft --lr 3e-5 --skip-first-eval
    virl-l ppo                --algo ppo
""")

# ------------------------------------------------------------------------------------------------------------
# More shifts: the weights that main's runs end with, tested on other targets, values, looks and wordings.
# fake-rule states the new rule and judges by the old one: who succeeds there ignores the rule, who fails
# there and on rule-ood fails at its arithmetic (first tries tell it best, as the verifier's replies speak of
# the old values). envs.py describes each set.

SETS = {"gp": "id-face,fake-rule,face-5,face-7,five-cards,target-12,target-20,target-36",
        "virl": "fake-rule,relative-wording"}
SEEN = {"gp-vl": ",mirrored,varied"}                   # of pictures alone
SHIFTS = hidden(MAIN)
HANDS = hidden(arm for arm in MAIN if arm.task in ("gp-l", "gp-vl"))


def tests(task, name, test):
    """Return arms that test init and what main's runs end with."""
    return [Arm(f"{task}-{name}-init", test, label="")] + [
        Arm(f"{task}-{name}-{algo}", f"{test} --model {{{task}-{algo}}}", algo) for algo in ("sft", "ppo")]


for task in TASKS:
    test = f"--algo eval --eval-sets {SETS[task.split('-')[0]]}{SEEN.get(task, '')}"
    SHIFTS += tests(task, "shifts", test)
for task in ("gp-l", "gp-vl"):
    HANDS += tests(task, "hands", "--algo eval --eval-sets id-unseen,rule-ood --eval-hands 2000")

# ------------------------------------------------------------------------------------------------------------
# Variants at equal compute, half of main's. Each line: what differs, its name, flags beside the preset's, and
# the training FLOPs of a step against the preset's as train.py counts them (gp-l, virl-l, or both). Steps are
# fewer or more by as much. A rollout takes 2 a weight and token, an update 6, a pass that scores 2 more;
# own right answers cost the batch that is played to find them. Learning rates of LoRA and the weight of the
# KL penalty were not tuned.

ONCE = "--eval-every 0 --skip-first-eval --keep 1"
HALF = {"ppo": {"gp-l": 20, "virl-l": 30}, "sft": {"gp-l": 262, "virl-l": 105}}        # of the presets' steps
VARIANTS = """
    advantage: gae-loo (preset)  | | 1
    advantage: gae               | --advantage gae | 1
    advantage: gae-token         | --advantage gae-token --unit token | 1.54 1.32
    advantage: gae-two-level     | --advantage gae-two-level --unit token | 1.54 1.32
    advantage: monte-carlo       | --advantage monte-carlo | 1
    advantage: rloo              | --advantage rloo | 1
    advantage: grpo              | --advantage grpo | 1
    advantage: grpo-no-std       | --advantage grpo-no-std | 1
    advantage: reinforce++       | --advantage reinforce++ --unit token | 1
    loss: ppo, of tokens         | --unit token | 1
    loss: clip-higher            | --loss clip-higher | 1
    loss: dual-clip              | --loss dual-clip | 1
    loss: reinforce              | --loss reinforce --minibatches 1 | 1
    both, as published: GRPO     | --advantage grpo --loss grpo --clip 0.2 | 1
    both, as published: Dr. GRPO | --advantage grpo-no-std --unit token --clip 0.2 | 1
    both, as published: GSPO     | --advantage grpo --loss gspo --clip 3e-4 | 1
    both, as published: DAPO     | --advantage grpo --loss dapo --clip 0.2 | 1
    KL to init: k1 in the loss   | --kl-coef 0.1 --kl-in loss --kl-estimator k1 | 10/8
    KL to init: k2 in the loss   | --kl-coef 0.1 --kl-in loss --kl-estimator k2 | 10/8
    KL to init: k3 in the loss   | --kl-coef 0.1 --kl-in loss --kl-estimator k3 | 10/8
    KL to init: k1 in the reward | --kl-coef 0.1 --kl-in reward --kl-estimator k1 | 10/8
    KL to init: k2 in the reward | --kl-coef 0.1 --kl-in reward --kl-estimator k2 | 10/8
    KL to init: k3 in the reward | --kl-coef 0.1 --kl-in reward --kl-estimator k3 | 10/8
    what learns: attention       | --tune attention | 0.84
    what learns: mlp             | --tune mlp | 0.9
    what learns: LoRA            | --lora-rank 16 --lr 1e-3 | 0.94
    SFT: nll (preset)            | | 1
    SFT: dft                     | --sft-loss dft | 1
    SFT: psft                    | --sft-loss psft --minibatches 4 | 8/6
    SFT: iw-sft                  | --sft-loss iw-sft | 8/6
    SFT: own right answers       | --sft-data own | 1.43 7.1
    SFT: attention               | --tune attention | 0.75
    SFT: mlp                     | --tune mlp | 0.86
    SFT: LoRA                    | --lora-rank 16 --lr 3e-3 | 0.85
"""


def variant(line, task):
    """Read a line of VARIANTS as the arm of a task."""
    label, flags, costs = map(str.strip, line.split("|"))
    algo = "sft" if label.startswith("SFT") else "ppo"
    name = re.sub(r"[^\w+-]", "", label.partition(": ")[2].replace(" ", "-"))
    cost = Fraction(costs.split()[-1 if task == "virl-l" else 0])
    steps = round(HALF[algo][task] / cost)
    return Arm(f"{task}-{algo}-{name}", f"--algo {algo} --steps {steps} {ONCE} {flags}", label)


# ------------------------------------------------------------------------------------------------------------

EXPERIMENTS = {
    "main": Experiment(
        "Figures 5 to 8: SFT and PPO from one init checkpoint, tested on the rule and look of training and "
        "on others.", MAIN, tables.headline,
        {"": figures.draw, "-glance": figures.glance, "-recognition": figures.recognition,
         "-tradeoff": figures.tradeoff}),
    "no-sft": Experiment(
        "Figure 9: RL without SFT before it. The tiny foundation knows the game's format already; beside it "
        "one that has hardly begun to learn.", NO_SFT),
    "attempts": Experiment(
        "Figure 10: how many attempts, in training and in the evaluation, at equal compute.", ATTEMPTS),
    "suboptimal": Experiment(
        "Figure 15: SFT on dialogues in which wrong answers and the verifier's replies come before the right "
        "one.", SUBOPTIMAL),
    "freeze": Experiment("Figure 16: SFT's learning rate, and what is frozen.", FREEZE),
    "overfitted": Experiment("Figure 19: RL from where SFT ended.", OVERFITTED),
    "best-sft": Experiment(
        "SFT given its best chance: several rules, a small learning rate, weights for tokens, an early end, "
        "embedding and head left alone.", BEST_SFT),
    "shifts": Experiment(
        "More shifts than the paper's: does what holds there hold on others, and does a model that fails a "
        "rule ignore it?", SHIFTS, tables.headline, {}),
    "hands": Experiment(
        "Where main's changes are small, the same weights on four times as many hands.", HANDS,
        tables.headline, {}),
    "variants": Experiment(
        "Every variant on both games: what it does to success, and what it costs. Presets and variants at "
        "equal compute, half of main's.",
        [variant(line, task) for task in ("gp-l", "virl-l") for line in VARIANTS.strip().splitlines()],
        tables.variants, {}),
}
