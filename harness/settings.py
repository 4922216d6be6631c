"""The settings of a run: names, defaults, presets, the command line, and what a resumed run may set anew.

    python train.py --help
"""

import argparse
import dataclasses
import inspect
import runpy
from dataclasses import dataclass

import ppo
import sft
from envs import GAMES
from games.prompts import TASKS
from harness.ranges import (
    Kind, SettingError, above, at_least, between, command_line, inside, integer, numbers, one_of, real,
    several, shown, text)
from variants import lora, losses, official


def arg(default, kind, help):
    """Declare a setting. kind: what it may be, beside its default; see ranges.py."""
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help})


def flag(default, help):
    """Declare a setting that is on if its flag is there."""
    return arg(default, Kind("true or false", str, lambda value: isinstance(value, bool)), help)


BETA = real("a number from 0 to below 1", lambda x: 0 <= x < 1)
# Below 0.01, logits over it leave the range of float32.
TEMPERATURE = real("a number from 0.01 to 100; greedy answers (0) leave no ratio to learn from",
                   lambda x: 0.01 <= x <= 100)
EVAL_TEMPERATURE = real("0 (greedy) or a number from 0.01 to 100", lambda x: x == 0 or 0.01 <= x <= 100)


@dataclass
class Args:
    """Every setting of a run. None means: from the preset."""
    task: str = arg("gp-l", one_of(TASKS),
                    "gp-l: GeneralPoints with the cards in text; gp-vl: with the cards in an image; virl-l: "
                    "navigation with what is seen in text; virl-vl: with street views")
    algo: str = arg("ppo", one_of(("ppo", "sft", "eval", "pretrain")),
                    "ppo, sft, eval, or pretrain (makes the tiny model's foundation, from random weights or "
                    "from --model)")
    model: str = arg("tiny", text("a folder, or tiny"),
                     "'tiny' (built in), a Hugging Face folder of a Llama or Llama-3.2-Vision model, or a "
                     "checkpoint of another run")
    out: str = arg(None, text("a folder"),
                   "folder for logs, checkpoints and transcripts (default runs/TASK-ALGO)")
    seed: int = arg(0, integer(0, 2**63 - 1),
                    "seed of training hands, draws and shuffles; evaluation hands are the same for every "
                    "seed")
    preset: str = arg("auto", one_of(("auto", "tiny", "paper")),
                      "tiny: settings for the built-in model; paper: the paper's settings; auto: by the "
                      "model's size")
    device: str = arg("auto", one_of(("auto", "cuda", "mps", "cpu")), "cuda, mps, cpu, or auto")
    resume: bool = flag(False, "continue the run in --out from its newest checkpoint, with its settings")
    override: bool = flag(False,
                          "with --resume: take settings from the command line that differ from the run's")
    compat: str = arg("", several(one_of(("official", *sorted(official.NAMES)))),
                      "behaviours of the released code, by name, joined by commas, or official: all (python "
                      "-m variants.official lists them)")
    custom: str = arg(None, text("a Python file"),
                      "Python file with ESTIMATORS, LOSSES or SFT_LOSSES of your own, for --advantage, "
                      "--loss and --sft-loss (see README.md)")
    prompts: str = arg(None, text("a JSON file"),
                       "JSON file of templates that replace the built-in prompts and verifier messages")

    # the game; None means the game's own default
    rule: str = arg(None, text("a rule"),
                    "rule in training. gp: what J, Q, K count, 10 (default), 11-12-13, or any number or "
                    "three joined by '-'; virl: what turn_direction takes, absolute (default) or relative")
    rules: str = arg(None, several(text("a rule")),
                     "rules that training mixes, one per seed, in place of --rule, joined by commas: "
                     "10,11-12-13,5; --rule still says what the init checkpoint, id and rule-ood are about")
    look: str = arg(None, text("a look"),
                    "look in training. gp: suits dealt, black (default for gp-vl), red or all (default for "
                    "gp-l); virl: a built-in city (default new-york), 'others' (nine cities) or 'broad' "
                    "(those of pre-training)")
    attempts: int = arg(None, integer(1, 1000),
                        "judged attempts (default: 5 per hand, 2 per point of a route)")
    target: int = arg(None, integer(1), "gp: the number to make (default 24)")
    routes: str = arg(None, text("a folder of routes"),
                      "virl: train on this folder of routes in the released format (route_infos.json, ...) "
                      "instead of a built-in city")
    ood_routes: str = arg(None, text("a folder of routes"),
                          "virl: folder of the visual-ood set, in the same format, instead of the nine "
                          "built-in cities")
    skip_bad_routes: bool = flag(None, "virl: leave out routes that cannot be read, and say how many")
    hide_landmarks: bool = flag(None,
                                "virl: leave the landmarks' names out of the instructions, so that only what "
                                "is seen tells them")
    after_failure: str = arg(None, one_of(("end", "walk-on")),
                             "virl: what follows a point that stays wrong, 'end' of the episode (default, "
                             "the paper) or 'walk-on' (the released code)")

    # learning
    steps: int = arg(None, integer(1), "PPO updates or SFT optimizer steps")
    lr: float = arg(None, above(0), "learning rate")
    lr_schedule: str = arg(None, one_of(("constant", "cosine")),
                           "constant or cosine (to 0), after the warm-up")
    warmup: float = arg(None, between(0, 1), "share of the steps over which the learning rate rises from 0")
    weight_decay: float = arg(None, at_least(0), "AdamW weight decay")
    betas: tuple = arg(None, numbers("two numbers from 0 to below 1, joined by a comma", BETA, BETA),
                       "Adam betas, as two numbers joined by a comma")
    adam_eps: float = arg(None, above(0), "Adam epsilon")
    max_grad_norm: float = arg(None, above(0), "gradient norm to clip to")
    max_skipped: int = arg(5, integer(1),
                           "stop after so many steps in a row whose loss or gradient was not finite; such a "
                           "step changes nothing")
    token_budget: int = arg(None, integer(1),
                            "padded tokens of one forward and backward pass, an image as many as take its "
                            "memory; gradients are accumulated over several")
    tune: str = arg("all", one_of(tuple(sft.TUNE)),
                    "what SFT and PPO train; text, attention and mlp are the language model's (with its "
                    "cross-attention layers), vision is the tower and its projector, no-embeddings all but "
                    "the embedding and the head")
    lora_rank: int = arg(0, integer(0, 10**5),
                         "train low-rank adapters of this rank beside frozen weights (see variants/lora.py); "
                         "0: the weights themselves")
    lora_alpha: float = arg(16.0, above(0), "an adapter's update counts alpha / rank times")
    lora_modules: str = arg("all", several(one_of((*lora.GROUPS, *lora.GROUPS["all"]))),
                            "which of the linear layers that --tune leaves get adapters: attention, mlp, "
                            "all, or names as q_proj, by commas")

    # several ranks
    shard: str = arg("auto", one_of(("auto", "on", "off")),
                     "every rank keeps a slice of the weights instead of a copy (auto: on GPUs, or from 100 "
                     "million weights on)")
    checkpoint_activations: bool = flag(False,
                                        "compute a block's activations again in the backward pass instead of "
                                        "keeping them")
    dry_run: int = arg(0, integer(1, 10**5), "print the memory that this run takes on so many GPUs, and end")
    rollout_sharded: bool = flag(False,
                                 "where a gathered copy does not fit: keep the weights sharded in rollouts, "
                                 "all ranks in lockstep")

    # SFT
    batch_size: int = arg(None, integer(1, 10**6), "SFT dialogues per step, over all ranks")
    mistakes: float = arg(None, between(0, 1),
                          "share of SFT dialogues with wrong answers and verifier messages before the right "
                          "answer")
    describe: bool = flag(None,
                          "virl-vl, for SFT and pre-training: learn to tell what is in the pictures rather "
                          "than the way")
    learn_prompts: bool = flag(None, "also learn to predict the prompts, as pre-training does")
    sft_loss: str = arg("nll", one_of(sft.LOSSES), "SFT loss (see sft.py and variants/sft_losses.py)")
    sft_data: str = arg("expert", one_of(("expert", "own")),
                        "what SFT learns from: dialogues of an expert, or the model's own right answers of "
                        "--batch-size episodes per step (rejection sampling)")

    # PPO
    hands: int = arg(None, integer(1, 10**6), "hands dealt (or routes begun) per update, over all ranks")
    samples: int = arg(None, integer(1, 10**6), "episodes played of each of them")
    temperature: float = arg(None, TEMPERATURE, "sampling temperature of the rollout")
    max_new_tokens: int = arg(None, integer(1, 131072), "longest answer, in tokens")
    advantage: str = arg(None, one_of(ppo.ESTIMATORS),
                         "advantage estimator (see ppo.py and variants/advantages.py)")
    loss: str = arg("ppo", one_of(ppo.LOSSES), "policy loss (see ppo.py and variants/losses.py)")
    unit: str = arg(None, one_of(("turn", "token")),
                    "what a ratio is taken of, where --loss leaves it open: a whole turn (the paper) or a "
                    "token")
    clip: float = arg(None, inside(0, 1), "clip range of the ratio")
    clip_high: float = arg(0.28, above(0), "clip range upwards, of --loss clip-higher and dapo")
    dual_clip: float = arg(3.0, above(1),
                           "of --loss dual-clip: largest ratio that counts against an answer worse than "
                           "expected")
    value_clip: float = arg(None, at_least(0), "clip range of the value's change, 0 for none")
    value_coef: float = arg(None, at_least(0), "weight of the value loss")
    entropy_coef: float = arg(None, at_least(0), "weight of an entropy bonus")
    gamma: float = arg(0.9, between(0, 1), "discount from turn to turn")
    lam: float = arg(0.95, between(0, 1), "lambda of GAE, from turn to turn")
    token_gamma: float = arg(1.0, between(0, 1), "discount from token to token, of estimators over tokens")
    token_lam: float = arg(0.95, between(0, 1), "lambda of GAE from token to token")
    kl_coef: float = arg(0.0, at_least(0),
                         "weight of a penalty on the KL divergence from the policy that the run began with; "
                         "0 for none")
    kl_in: str = arg("loss", one_of(("loss", "reward")), "where that penalty goes")
    kl_estimator: str = arg("k3", one_of(tuple(losses.KL)),
                            "how the divergence is estimated from a token; in the loss the gradient of k1 is "
                            "zero in expectation")
    epochs: int = arg(None, integer(1), "passes over each rollout (or batch of SFT)")
    minibatches: int = arg(None, integer(1), "optimizer steps per pass")
    critic: str = arg(None, one_of(("shared", "detached", "separate")),
                      "what the value head reads: shared, detached or separate (see ppo.ActorCritic)")
    critic_lr: float = arg(None, above(0), "learning rate of the value head (and of its own trunk)")
    critic_warmup: int = arg(None, integer(0), "first updates that train the critic alone")
    reward_scale: float = arg(None, above(0), "factor on rewards before advantages and value targets")

    # evaluation and logs
    eval_every: int = arg(None, integer(0),
                          "steps between evaluations (also before and after training); 0: only before and "
                          "after")
    eval_hands: int = arg(None, integer(0), "hands (or routes) per evaluation set")
    skip_first_eval: bool = flag(False,
                                 "leave out the evaluation before training, which is the same for all runs "
                                 "from one model")
    eval_sets: str = arg(None, several(text("a set")),
                         "comma-separated: id, rule-ood, visual-ood (default: those of the task); also "
                         "fake-rule; gp: id-face, five-cards, face-5, face-7, target-12, target-20, "
                         "target-36; gp-vl: mirrored, recoloured; virl: id-train, relative-wording (see "
                         "`shifts` in envs.py)")
    eval_temperature: float = arg(0.2, EVAL_TEMPERATURE, "sampling temperature of evaluations")
    probe_hands: int = arg(None, integer(0),
                           "with every evaluation, fixed hands (or routes) to measure KL to the run's start, "
                           "pass@k, entropy and changed weights on (see study/explain.py); 0: do not")
    probe_samples: int = arg(8, integer(1, 10**6), "episodes of each of them, at temperature 1")
    save_every: int = arg(None, integer(1), "steps between checkpoints; there is always one at the end")
    keep: int = arg(2, integer(1), "checkpoints to keep")
    transcript_every: int = arg(10, integer(1), "steps between sample transcripts (PPO)")
    rollout_batch: int = arg(None, integer(1), "episodes played at once by each rank")

    @property
    def game(self):
        """'gp' or 'virl', a key of GAMES."""
        return self.task.split("-")[0]

    @property
    def image(self):
        return self.task.endswith("vl")


# The first setting of each group in --help.
GROUPS = {"task": "the run", "rule": "the game", "steps": "learning", "shard": "several ranks",
          "batch_size": "SFT", "hands": "PPO", "eval_every": "evaluation and logs"}
# What a resumed run may set anew, for it does not change what is computed (but for the order of sums).
FREE = ("out", "resume", "override", "custom", "device", "shard", "checkpoint_activations", "rollout_sharded",
        "save_every", "keep", "max_skipped")
# Handed to the game, which knows some of them.
GAME_SETTINGS = ("rule", "look", "attempts", "target", "skip_bad_routes", "hide_landmarks", "after_failure",
                 "describe")


# ------------------------------------------------------------------------------------------------------------
# Presets are data: what holds for every algorithm first, then what one adds. Where a number is a dict, the
# task or the game chooses. The paper's numbers are PAPER: section 4.

PRESETS = {
    "tiny": dict(
        all=dict(
            weight_decay=0.0, betas=(0.9, 0.95), adam_eps=1e-8, max_grad_norm=1.0, token_budget=4096,
            lr_schedule="constant", max_new_tokens={"gp": 48, "virl": 64}, rollout_batch=256,
            eval_hands={"gp": 500, "virl": 200}, probe_hands={"gp": 16, "virl": 8}),
        sft=dict(
            steps={"gp": 450, "virl-l": 221, "virl-vl": 230}, lr=3e-4, batch_size=64, mistakes=0.0,
            learn_prompts=False, epochs=1, minibatches=1, clip=0.1, temperature=1.0, warmup=0.03,
            eval_every={"gp": 150, "virl": 115}, save_every=150),
        ppo=dict(
            steps={"gp": 40, "virl": 30}, lr=1e-4, lr_schedule="cosine", warmup=0.1,
            hands={"gp": 32, "virl": 16}, samples={"gp": 8, "virl": 4}, temperature=0.5,
            advantage="gae-loo", unit="turn", clip=0.1, value_clip=0.0, value_coef=0.5, entropy_coef=0.0,
            epochs=1, minibatches=4, critic="detached", critic_lr=3e-4, critic_warmup=0,
            reward_scale={"gp": 0.2, "virl": 0.5}, eval_every={"gp": 20, "virl": 15},
            save_every={"gp": 20, "virl": 15}),
        pretrain=dict(
            steps={"gp": 450, "virl": 560}, lr={"gp": 4e-3, "virl": 3e-3}, lr_schedule="cosine", warmup=0.05,
            weight_decay=0.01, betas=(0.9, 0.98), batch_size={"gp": 64, "virl": 40}, epochs=1, minibatches=1,
            mistakes={"gp": 0.3, "virl": 0.2}, learn_prompts={"gp": False, "virl": True},
            eval_every={"gp": 150, "virl": 280}, save_every=150, probe_hands=0),
        eval={}),
    "paper": dict(
        all=dict(
            weight_decay=0.0, adam_eps=1e-7, token_budget=6144, lr_schedule="cosine", max_new_tokens=512,
            rollout_batch={"gp-l": 64, "gp-vl": 32, "virl": 40}, eval_hands={"gp": 234, "virl": 48},
            probe_hands=0),
        sft=dict(
            steps=400, lr={"gp-l": 1e-6, "gp-vl": 5e-7, "virl-l": 1e-6, "virl-vl": 5e-7}, batch_size=128,
            mistakes=0.0, learn_prompts=False, epochs=1, minibatches=1, clip=0.1, temperature=1.0,
            betas=(0.9, 0.98), warmup=0.03, max_grad_norm=1.0, eval_every=50, save_every=100),
        ppo=dict(
            steps={"gp": 20, "virl": 15}, lr={"gp": 1e-6, "virl-l": 1e-6, "virl-vl": 1e-7}, warmup=0.0,
            betas=(0.9, 0.999), max_grad_norm=0.01,
            hands={"gp": 512, "virl": 320}, samples=1, temperature=0.2,
            advantage="gae", unit="turn", clip=0.1, value_clip=0.1, value_coef=0.5, entropy_coef=0.0,
            epochs=4, minibatches=2, critic="shared", critic_lr=1e-6, critic_warmup=0, reward_scale=1.0,
            eval_every=5, save_every=5),
        eval={}),
}


def apply_preset(args, hidden_size):
    """Fill what the user left open from the preset and from the game's own defaults."""
    if args.preset == "auto":
        args.preset = "tiny" if hidden_size <= 512 else "paper"
    preset = PRESETS[args.preset]
    if args.algo not in preset:
        raise SettingError(f"--preset {args.preset}: expected tiny with --algo {args.algo}")
    for name, value in (preset["all"] | preset[args.algo]).items():      # the later one wins
        if getattr(args, name) is None:
            chosen = value.get(args.task, value.get(args.game)) if isinstance(value, dict) else value
            setattr(args, name, chosen)
    game = GAMES[args.game]
    defaults = {name: parameter.default for name, parameter in inspect.signature(game).parameters.items()}
    defaults |= {"look": game.looks[args.image]}
    defaults |= {"routes": None, "ood_routes": None} if args.game == "virl" else {}
    for name in ("routes", "ood_routes", *GAME_SETTINGS):
        if getattr(args, name) is None:
            setattr(args, name, defaults.get(name))
        elif name not in defaults:
            raise SettingError(f"{spelled(args, name)}: expected with another --task than {args.task}")
    args.look = args.routes or args.look
    # One's own routes are tested on one's own other look, or on none.
    seen = args.image and (args.ood_routes or not args.routes)
    args.eval_sets = args.eval_sets or ("id,rule-ood,visual-ood" if seen else "id,rule-ood")
    return args


# ------------------------------------------------------------------------------------------------------------
# The command line

def flag_of(name):
    return "--" + name.replace("_", "-")


def spelled(args, name):
    """Return a setting as one types it: `--lr 0.1`, `--resume`."""
    value = getattr(args, name)
    return flag_of(name) if value is True else f"{flag_of(name)} {shown(value)}"


def parse(argv=None, description=__doc__):
    """Command line -> (Args, names of the settings that were typed).

    Options come from the dataclass, so `--help` cannot drift from what is used. SettingError for a word that
    is none of its kind. Nothing is read or written, so that all ranks come to the same verdict.
    """
    parser = command_line("train.py", description, fail, usage="%(prog)s [options]",
                          argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Args):
        group = parser.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
        kind, help = f.metadata["kind"], f.metadata["help"]
        if f.default not in (None, False):
            help += f" (default: {f.default})"
        if f.type is bool:
            group.add_argument(flag_of(f.name), action="store_true", help=help)
        else:
            names = "{" + ",".join(kind.names) + "}" if kind.names else None
            late = isinstance(kind.names, dict)                # --custom can add to it, see `load_custom`
            group.add_argument(flag_of(f.name), type=str if late else kind, metavar=names, help=help)
    typed = vars(parser.parse_args(argv))
    return Args(**typed), frozenset(typed)


def fail(message):
    raise SettingError(message)


def load_custom(file):
    """Run a user's file; its ESTIMATORS, LOSSES and SFT_LOSSES join the tables. SettingError that names the
    file and what is wrong with it."""
    try:
        names = runpy.run_path(file)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise SettingError(f"--custom {shown(file)}: expected a Python file that runs; {reason}") from error
    tables = {"ESTIMATORS": ppo.ESTIMATORS, "LOSSES": ppo.LOSSES, "SFT_LOSSES": sft.LOSSES}
    found = [(table, names[name]) for name, table in tables.items() if name in names]
    if not found:
        raise SettingError(f"--custom {file}: expected a dict ESTIMATORS, LOSSES or SFT_LOSSES in it")
    for table, own in found:
        kind = type(next(iter(table.values())))
        for name, entry in own.items():
            if not isinstance(entry, kind):
                raise SettingError(f"--custom {file}: expected {kind.__name__}(function, ...) as '{name}', "
                                   f"not {entry!r}")
            table[name] = entry


def resumed(args, typed, config, source):
    """The settings of a run that goes on: those it had (`config`), and of the `typed` ones those that it may
    set anew. SettingError for one that contradicts, without --override."""
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    unknown = set(config) ^ {f.name for f in dataclasses.fields(Args)}
    if unknown:
        raise SettingError(f"{source}: written by another version of this program, which differs in the "
                           f"setting {min(unknown)}")
    if config["custom"] and "custom" not in typed:             # a folder from elsewhere runs nothing here
        raise SettingError(f"{source}: this run was begun with --custom {config['custom']}; to run that file "
                           "again, give --custom FILE with --resume, too")
    if "algo" in typed and args.algo != config["algo"]:
        raise SettingError(f"{source}: --algo {args.algo} cannot go on with a run of --algo "
                           f"{config['algo']}; begin one from its weights, with --model {source} and another "
                           "--out")
    for name in sorted(typed - set(FREE)):
        if getattr(args, name) != config[name] and not args.override:
            raise SettingError(f"{source}: this run has {flag_of(name)} {config[name]}, not "
                               f"{getattr(args, name)}; leave it out, or add --override to go on with "
                               "another value")
    fresh = typed | {"out", "resume", "override", "shard"}     # how to shard follows from the number of ranks
    return Args(**config | {name: getattr(args, name) for name in fresh})
