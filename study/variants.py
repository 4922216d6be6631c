"""Every variant on both games, at equal compute: what it does to success in and out of distribution, and what it costs.

    python -m study variants
"""

from study import figures, records
from study.runner import Run

question = "Every variant on both games: what it does to success, and what it costs. Presets and variants at equal compute, half of main's."
GAMES = {"gp-l": "success", "virl-l": "per_step"}      # task: its headline metric
TITLES = {"id": "ID", "rule-ood": "rule-OOD"}
STEPS = {("gp-l", "ppo"): 20, ("gp-l", "sft"): 225, ("virl-l", "ppo"): 15, ("virl-l", "sft"): 110}       # half of the presets'

# (what differs, name, flags beside the preset, training FLOPs of a step against the preset's as train.py counts them, a number or one a game).
# Steps are fewer or more by as much. Learning rates of LoRA and the weight of the KL penalty were not tuned.
SCORED = 10 / 8                # a rollout takes 2 a weight and token, an update 6, and a pass that scores 2 more
VALUED = {"gp-l": 1.54, "virl-l": 1.32}                # with a critic at every token as well
PPO = [
    ("advantage", "gae-loo (preset)", "", 1),
    ("advantage", "gae", "--advantage gae", 1),
    ("advantage", "gae-token", "--advantage gae-token --unit token", VALUED),
    ("advantage", "gae-two-level", "--advantage gae-two-level --unit token", VALUED),
    ("advantage", "monte-carlo", "--advantage monte-carlo", 1),
    ("advantage", "rloo", "--advantage rloo", 1),
    ("advantage", "grpo", "--advantage grpo", 1),
    ("advantage", "grpo-no-std", "--advantage grpo-no-std", 1),
    ("advantage", "reinforce++", "--advantage reinforce++ --unit token", 1),
    ("loss", "ppo, of tokens", "--unit token", 1),
    ("loss", "clip-higher", "--loss clip-higher", 1),
    ("loss", "dual-clip", "--loss dual-clip", 1),
    ("loss", "reinforce", "--loss reinforce --minibatches 1", 1),
    ("both, as published", "GRPO", "--advantage grpo --loss grpo --clip 0.2", 1),
    ("both, as published", "Dr. GRPO", "--advantage grpo-no-std --unit token --clip 0.2", 1),
    ("both, as published", "GSPO", "--advantage grpo --loss gspo --clip 3e-4", 1),
    ("both, as published", "DAPO", "--advantage grpo --loss dapo --clip 0.2", 1),
    *(("KL to init", f"{estimator} in the {where}", f"--kl-coef 0.1 --kl-in {where} --kl-estimator {estimator}", SCORED)
      for where in ("loss", "reward") for estimator in ("k1", "k2", "k3")),
    ("what learns", "attention", "--tune attention", 0.84),
    ("what learns", "mlp", "--tune mlp", 0.9),
    ("what learns", "LoRA", "--lora-rank 16 --lr 1e-3", 0.94),
]
SFT = [
    ("SFT", "nll (preset)", "", 1),
    ("SFT", "dft", "--sft-loss dft", 1),
    ("SFT", "psft", "--sft-loss psft --minibatches 4", 8 / 6),
    ("SFT", "iw-sft", "--sft-loss iw-sft", 8 / 6),
    ("SFT", "own right answers", "--sft-data own", {"gp-l": 1.43, "virl-l": 7.1}),            # it plays a batch to keep what came out right
    ("SFT", "attention", "--tune attention", 0.75),
    ("SFT", "mlp", "--tune mlp", 0.86),
    ("SFT", "LoRA", "--lora-rank 16 --lr 3e-3", 0.85),
]
VARIANTS = [("ppo", *row) for row in PPO] + [("sft", *row) for row in SFT]


def name_of(task, algo, variant):
    return f"{task}-{algo}-" + "".join(c if c.isalnum() or c in "-+" else "" for c in variant.replace(" ", "-"))


def steps(task, algo, cost):
    """As many as take the compute of the preset's."""
    return round(STEPS[task, algo] / (cost[task] if isinstance(cost, dict) else cost))


def runs(seeds):
    """Seed by seed, so that the table grows evenly; both games' init checkpoints first."""
    both = [Run(f"{task}-init-0", ("--task", task, "--algo", "eval")) for task in GAMES]
    return both + [Run(f"{name_of(task, algo, variant)}-{seed}",
                       ("--task", task, "--algo", algo, "--seed", str(seed), "--steps", str(steps(task, algo, cost)), "--eval-every", "0",
                        "--skip-first-eval", "--probe-hands", "0", "--keep", "1", *flags.split()), after=(f"{task}-init-0",))
                   for seed in seeds for task in GAMES for algo, _, variant, flags, cost in VARIANTS]


def rows(found):
    """What the table and the figure show: (algo, family, variant, {task: list of records, a seed each}), where there are any."""
    for algo, family, variant, flags, _ in VARIANTS:
        of = {task: [found[name] for seed in range(100) if (name := f"{name_of(task, algo, variant)}-{seed}") in found] for task in GAMES}
        if any(of.values()):
            yield algo, family, variant, of


def last(group, name):
    """The final evaluations of some runs on one set."""
    return [record["curve"][-1]["eval"][name] for record in group]


def table(found):
    """Markdown: the rate at the end, the change against the preset of the same algorithm on the same hands, and what a run took."""
    head = ["", "variant"] + [f"{task} {TITLES[name]}" for task in GAMES for name in TITLES] + ["TFLOPs", "minutes", "GB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    cells = [f"{rate:.1f} ± {error:.1f}" for task, metric in GAMES.items() for name in TITLES
             for rate, error in [records.rate(last([found[f"{task}-init-0"]], name), metric)]]
    lines.append("| | init | " + " | ".join(cells) + " | | | |")
    preset = {}
    for algo, family, variant, of in rows(found):
        preset.setdefault(algo, of)
        cells, cost = [], []
        for task, metric in GAMES.items():
            for name in TITLES:
                if not of[task]:
                    cells.append("")
                    continue
                cell = "{:.1f} ± {:.1f}".format(*records.rate(last(of[task], name), metric))
                if of is not preset[algo] and len(of[task]) == len(preset[algo][task]):
                    cell += " ({:+.1f} ± {:.1f})".format(*records.change(last(of[task], name), last(preset[algo][task], name), metric))
                cells.append(cell)
        mean = lambda key, task: sum(record[key] for record in of[task]) / len(of[task]) if of[task] else float("nan")
        for key, scale, digits in (("counted_tflops", 1, 1), ("seconds", 60, 1), ("memory_gb", 1, 2)):
            cost.append(" / ".join(f"{mean(key, task) / scale:.{digits}f}" for task in GAMES if of[task]))
        lines.append(f"| {family if family != 'SFT' else ''} | {'SFT ' if algo == 'sft' else ''}{variant} | " + " | ".join(cells + cost) + " |")
    return "\n".join(lines)


def plot(found, file):
    """A row a variant, a column a game and set."""
    plt, entries = figures.pyplot(), list(rows(found))
    columns = [(task, metric, name) for task, metric in GAMES.items() for name in TITLES]
    figure, axes = plt.subplots(1, len(columns), figsize=(3 * len(columns), 0.24 * len(entries) + 1), sharey=True, squeeze=False)
    colors = {"ppo": "#0072B2", "sft": "#D55E00"}
    for axis, (task, metric, name) in zip(axes[0], columns):
        axis.axvline(records.rate(last([found[f"{task}-init-0"]], name), metric)[0], color="#666666", ls=":", lw=1)
        for k, (algo, _, _, of) in enumerate(entries):
            if of[task]:
                seeds = [records.rate([one], metric)[0] for one in last(of[task], name)]
                axis.plot(seeds, [k + 0.3] * len(seeds), "o", color=colors[algo], ms=3.5, alpha=0.6, mew=0)
                mean, error = records.rate(last(of[task], name), metric)
                axis.errorbar(mean, k, xerr=error, color=colors[algo], marker="D", ms=4, capsize=2, lw=1.2)
        axis.set(title=f"{task}: {TITLES[name]}", xlabel=f"{metric.replace('_', '-')} (%)")
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(entries)), [f"{variant}  {algo.upper()}" for algo, _, variant, _ in entries], fontsize=7)
    axes[0][0].set_ylim(len(entries) - 0.5, -0.5)
    figure.supxlabel("mean and standard error, below it a point a seed; dotted: init", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
