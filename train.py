"""Post-train a (vision-)language model on one rule of a game by SFT or by multi-turn PPO, and test it on another.

    torchrun train.py --task gp-vl --algo ppo                          # the built-in tiny model, two CPU cores, minutes
    torchrun train.py --task gp-l --algo sft --steps 200               # the other way to learn
    torchrun train.py --task virl-vl --algo ppo                        # the other game: find the way through a city
    torchrun train.py --task gp-l --algo eval --model runs/gp-l-ppo/final
    torchrun train.py --plot runs/gp-l-sft runs/gp-l-ppo               # ID and OOD success against training compute

This file holds what is around the learning: arguments and presets, processes and devices, the tiny model, evaluation,
logs, checkpoints and the loop. What is learnt from is in envs.py, what learns in model.py, how in sft.py and ppo.py.
"""

import argparse
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import ppo
import sft
from distributed import checkpoint, plan, shard
from distributed.processes import Interrupt, Processes, gather, leave, lost
from envs import GAMES, TASKS, Mixed, load_prompts
from model import Config, Llama, Processor, read_json
from study import figures
from study.explain import Probe
from study.flops import Ledger
from variants import lora, losses, official, reference

HERE = Path(__file__).resolve().parent
FOUNDATIONS = HERE / "docs" / "tiny"           # the tiny model's pre-trained weights, a folder a game; remade by --algo pretrain


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and presets

class UserError(Exception):
    """Something the user can mend; shown as one line."""


def arg(default, help, choices=None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Args:
    """Every setting of a run. None means: from the preset."""
    task: str = arg("gp-l", "gp-l: GeneralPoints with the cards in text; gp-vl: with the cards in an image; "
                            "virl-l: navigation with what is seen in text; virl-vl: with street views", TASKS)
    algo: str = arg("ppo", "ppo, sft, eval, or pretrain (makes the tiny model's foundation, from random weights or from --model)", ("ppo", "sft", "eval", "pretrain"))
    model: str = arg("tiny", "'tiny' (built in), a Hugging Face folder of a Llama or Llama-3.2-Vision model, or a checkpoint of another run")
    out: str = arg(None, "folder for logs, checkpoints and transcripts (default runs/TASK-ALGO)")
    seed: int = arg(0, "seed of training hands, draws and shuffles; evaluation hands are the same for every seed")
    preset: str = arg("auto", "tiny: settings for the built-in model; paper: the paper's settings; auto: by the model's size", ("auto", "tiny", "paper"))
    device: str = arg("auto", "cuda, mps, cpu, or auto", ("auto", "cuda", "mps", "cpu"))
    resume: bool = arg(False, "continue the run in --out from its newest checkpoint, with its settings")
    override: bool = arg(False, "with --resume: take settings from the command line that differ from the run's")
    compat: str = arg("", "behaviours of the released code, by name, joined by commas, or official: all (python -m variants.official lists them)")
    custom: str = arg(None, "Python file with ESTIMATORS, LOSSES or SFT_LOSSES of your own, for --advantage, --loss and --sft-loss (see README.md)")
    prompts: str = arg(None, "JSON file of templates that replace the built-in prompts and verifier messages")
    # the game; None means the game's own default
    rule: str = arg(None, "rule in training. gp: what J, Q, K count, 10 (default), 11-12-13, or any number or three joined by '-'; "
                          "virl: what turn_direction takes, absolute (default) or relative")
    rules: str = arg(None, "rules that training mixes, one a seed, in place of --rule, by commas: 10,11-12-13,5; --rule still says what the init "
                           "checkpoint, id and rule-ood are about")
    look: str = arg(None, "look in training. gp: suits dealt, black (default for gp-vl), red or all (default for gp-l); "
                          "virl: a built-in city (default new-york), 'others' (nine cities) or 'broad' (those of pre-training)")
    attempts: int = arg(None, "judged attempts (default: 5 a hand, 2 a point of a route)")
    target: int = arg(None, "gp: the number to make (default 24)")
    routes: str = arg(None, "virl: train on this folder of routes in the released format (route_infos.json, ...) instead of a built-in city")
    ood_routes: str = arg(None, "virl: folder of the visual-ood set, in the same format, instead of the nine built-in cities")
    skip_bad_routes: bool = arg(None, "virl: leave out routes that cannot be read, and say how many")
    hide_landmarks: bool = arg(None, "virl: leave the landmarks' names out of the instructions, so that only what is seen tells them")
    after_failure: str = arg(None, "virl: what follows a point that stays wrong, 'end' of the episode (default, the paper) or "
                                   "'walk-on' (the released code)", ("end", "walk-on"))
    # learning
    steps: int = arg(None, "PPO updates or SFT optimizer steps")
    lr: float = arg(None, "learning rate")
    lr_schedule: str = arg(None, "constant or cosine (to 0), after the warm-up", ("constant", "cosine"))
    warmup: float = arg(None, "share of the steps over which the learning rate rises from 0")
    weight_decay: float = arg(None, "AdamW weight decay")
    betas: tuple = arg(None, "Adam betas, as two numbers joined by a comma")
    adam_eps: float = arg(None, "Adam epsilon")
    max_grad_norm: float = arg(None, "gradient norm to clip to")
    max_skipped: int = arg(5, "stop after so many steps in a row whose loss or gradient was not finite; such a step changes nothing")
    token_budget: int = arg(None, "padded tokens of one forward and backward pass, an image as many as take its memory; "
                                  "gradients are accumulated over several")
    tune: str = arg("all", "what SFT and PPO train; text, attention and mlp are the language model's (with its cross-attention layers), vision is "
                           "the tower and its projector, no-embeddings all but the embedding and the head", tuple(sft.TUNE))
    lora_rank: int = arg(0, "train low-rank adapters of this rank beside frozen weights (see variants/lora.py); 0: the weights themselves")
    lora_alpha: float = arg(16.0, "an adapter's update counts alpha / rank times")
    lora_modules: str = arg("all", "which of the linear layers that --tune leaves get adapters: attention, mlp, all, or names as q_proj, by commas")
    # several ranks
    shard: str = arg("auto", "every rank keeps a slice of the weights instead of a copy (auto: on GPUs, or from 100 million weights on)",
                     ("auto", "on", "off"))
    checkpoint_activations: bool = arg(False, "compute a block's activations again in the backward pass instead of keeping them")
    dry_run: int = arg(0, "print the memory that this run takes on so many GPUs, and end")
    rollout_sharded: bool = arg(False, "where a gathered copy does not fit: keep the weights sharded in rollouts, all ranks in lockstep")
    # SFT
    batch_size: int = arg(None, "SFT dialogues a step, over all ranks")
    mistakes: float = arg(None, "share of SFT dialogues with wrong answers and verifier messages before the right answer")
    describe: bool = arg(None, "virl-vl, for SFT and pre-training: learn to tell what is in the pictures rather than the way")
    learn_prompts: bool = arg(None, "also learn to predict the prompts, as pre-training does")
    sft_loss: str = arg("nll", "SFT loss (see sft.py and variants/sft_losses.py)", sft.LOSSES)
    sft_data: str = arg("expert", "what SFT learns from: dialogues of an expert, or the model's own right answers of --batch-size episodes a step "
                                  "(rejection sampling)", ("expert", "own"))
    # PPO
    hands: int = arg(None, "hands dealt (or routes begun) an update, over all ranks")
    samples: int = arg(None, "episodes played of each of them")
    temperature: float = arg(None, "sampling temperature of the rollout")
    max_new_tokens: int = arg(None, "longest answer, in tokens")
    advantage: str = arg(None, "advantage estimator (see ppo.py and variants/advantages.py)", ppo.ESTIMATORS)
    loss: str = arg("ppo", "policy loss (see ppo.py and variants/losses.py)", ppo.LOSSES)
    unit: str = arg(None, "what a ratio is taken of, where --loss leaves it open: a whole turn (the paper) or a token", ("turn", "token"))
    clip: float = arg(None, "clip range of the ratio")
    clip_high: float = arg(0.28, "clip range upwards, of --loss clip-higher and dapo")
    dual_clip: float = arg(3.0, "of --loss dual-clip: largest ratio that counts against an answer worse than expected")
    value_clip: float = arg(None, "clip range of the value's change, 0 for none")
    value_coef: float = arg(None, "weight of the value loss")
    entropy_coef: float = arg(None, "weight of an entropy bonus")
    gamma: float = arg(0.9, "discount from turn to turn")
    lam: float = arg(0.95, "lambda of GAE, from turn to turn")
    token_gamma: float = arg(1.0, "discount from token to token, of estimators over tokens")
    token_lam: float = arg(0.95, "lambda of GAE from token to token")
    kl_coef: float = arg(0.0, "weight of a penalty on the KL divergence from the policy that the run began with; 0 for none")
    kl_in: str = arg("loss", "where that penalty goes", ("loss", "reward"))
    kl_estimator: str = arg("k3", "how the divergence is estimated from a token; in the loss the gradient of k1 is zero in expectation",
                            tuple(losses.KL))
    epochs: int = arg(None, "passes over each rollout (or batch of SFT)")
    minibatches: int = arg(None, "optimizer steps a pass")
    critic: str = arg(None, "what the value head reads: shared, detached or separate (see ppo.ActorCritic)", ("shared", "detached", "separate"))
    critic_lr: float = arg(None, "learning rate of the value head (and of its own trunk)")
    critic_warmup: int = arg(None, "first updates that train the critic alone")
    reward_scale: float = arg(None, "factor on rewards before advantages and value targets")
    # evaluation and logs
    eval_every: int = arg(None, "steps between evaluations (also before and after training); 0: only before and after")
    eval_hands: int = arg(None, "hands (or routes) an evaluation set")
    skip_first_eval: bool = arg(False, "leave out the evaluation before training, which is the same for all runs from one model")
    eval_sets: str = arg(None, "comma-separated: id, rule-ood, visual-ood (default: those of the task); also fake-rule; gp: id-face, five-cards, "
                               "face-5, face-7, target-12, target-20, target-36; gp-vl: mirrored, recoloured; virl: id-train, relative-wording "
                               "(see `shifts` in envs.py)")
    eval_temperature: float = arg(0.2, "sampling temperature of evaluations")
    probe_hands: int = arg(None, "with every evaluation, fixed hands (or routes) to measure KL to the run's start, pass@k, entropy and changed weights on "
                                 "(see study/explain.py); 0: do not")
    probe_samples: int = arg(8, "episodes of each of them, at temperature 1")
    save_every: int = arg(None, "steps between checkpoints; there is always one at the end")
    keep: int = arg(2, "checkpoints to keep")
    transcript_every: int = arg(10, "steps between sample transcripts (PPO)")
    rollout_batch: int = arg(None, "episodes played at once, a rank")

    @property
    def game(self):
        """'gp' or 'virl', a key of GAMES."""
        return self.task.split("-")[0]

    @property
    def image(self):
        return self.task.endswith("vl")


# The first setting of each group in --help.
GROUPS = {"task": "the run", "rule": "the game", "steps": "learning", "shard": "several ranks", "batch_size": "SFT", "hands": "PPO",
          "eval_every": "evaluation and logs"}
# What a resumed run may set anew, for it does not change what is computed (but for the order of sums).
FREE = ("out", "resume", "override", "device", "shard", "checkpoint_activations", "rollout_sharded", "save_every", "keep", "max_skipped")
# Handed to the game, which knows some of them.
GAME_SETTINGS = ("rule", "look", "attempts", "target", "skip_bad_routes", "hide_landmarks", "after_failure", "describe")


# Presets are data: algorithm-independent first, then what the algorithm adds. The paper's numbers are PAPER: section 4.
PRESETS = {
    "tiny": dict(
        all=dict(weight_decay=0.0, betas=(0.9, 0.95), adam_eps=1e-8, max_grad_norm=1.0, token_budget=4096, max_new_tokens={"gp": 48, "virl": 64},
                 rollout_batch=256, lr_schedule="constant", eval_hands={"gp": 500, "virl": 200}, probe_hands={"gp": 16, "virl": 8}),
        sft=dict(steps={"gp": 450, "virl-l": 221, "virl-vl": 230}, lr=3e-4, batch_size=64, mistakes=0.0, learn_prompts=False,
                 epochs=1, minibatches=1, clip=0.1, temperature=1.0,
                 eval_every={"gp": 150, "virl": 115}, save_every=150, warmup=0.03),
        ppo=dict(steps={"gp": 40, "virl": 30}, lr=1e-4, lr_schedule="cosine", warmup=0.1, hands={"gp": 32, "virl": 16}, samples={"gp": 8, "virl": 4},
                 temperature=0.5, advantage="gae-loo", unit="turn", clip=0.1, value_clip=0.0, value_coef=0.5, entropy_coef=0.0,
                 epochs=1, minibatches=4, critic="detached", critic_lr=3e-4, critic_warmup=0, reward_scale={"gp": 0.2, "virl": 0.5}, eval_every={"gp": 20, "virl": 15},
                 save_every={"gp": 20, "virl": 15}),
        pretrain=dict(steps={"gp": 450, "virl": 560}, lr={"gp": 4e-3, "virl": 3e-3}, batch_size={"gp": 64, "virl": 40}, epochs=1, minibatches=1,
                      mistakes={"gp": 0.3, "virl": 0.2}, learn_prompts={"gp": False, "virl": True}, warmup=0.05, lr_schedule="cosine",
                      eval_every={"gp": 150, "virl": 280}, save_every=150, weight_decay=0.01, betas=(0.9, 0.98), probe_hands=0),
        eval={}),
    "paper": dict(
        all=dict(weight_decay=0.0, adam_eps=1e-7, token_budget=6144, max_new_tokens=512, lr_schedule="cosine",
                 rollout_batch={"gp-l": 64, "gp-vl": 32, "virl": 40}, eval_hands={"gp": 234, "virl": 48}, probe_hands=0),
        sft=dict(steps=400, lr={"gp-l": 1e-6, "gp-vl": 5e-7, "virl-l": 1e-6, "virl-vl": 5e-7}, batch_size=128, mistakes=0.0,
                 epochs=1, minibatches=1, clip=0.1, temperature=1.0,
                 learn_prompts=False, betas=(0.9, 0.98), warmup=0.03, max_grad_norm=1.0, eval_every=50, save_every=100),
        ppo=dict(steps={"gp": 20, "virl": 15}, lr={"gp": 1e-6, "virl-l": 1e-6, "virl-vl": 1e-7}, betas=(0.9, 0.999), warmup=0.0,
                 hands={"gp": 512, "virl": 320}, samples=1, temperature=0.2, advantage="gae", unit="turn", clip=0.1,
                 value_clip=0.1, value_coef=0.5, entropy_coef=0.0, epochs=4, minibatches=2, critic="shared", critic_lr=1e-6,
                 critic_warmup=0, reward_scale=1.0, max_grad_norm=0.01, eval_every=5, save_every=5),
        eval={}),
}


def parse(argv=None):
    """Command line -> (Args, names of the settings that were typed, run folders to plot). Options come from the dataclass, so `--help`
    cannot drift from what is used."""
    parser = argparse.ArgumentParser(prog="train.py", usage="%(prog)s [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--custom")
    args, _ = first.parse_known_args(argv)
    if args.custom:                                            # before the choices are read
        try:
            load_custom(args.custom)
        except UserError as error:
            parser.error(str(error))
    parser.add_argument("--plot", nargs="+", metavar="RUN", help="print the table and draw success against compute (success.png) of these run folders")
    for f in dataclasses.fields(Args):
        group = parser.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
        flag, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.default not in (None, False):
            help += f" (default: {f.default})"
        if f.type is bool:
            group.add_argument(flag, action="store_true", help=help)
        elif f.type is tuple:
            group.add_argument(flag, type=lambda text: tuple(float(x) for x in text.split(",")), metavar="A,B", help=help)
        else:
            group.add_argument(flag, type=f.type, choices=f.metadata["choices"] and tuple(f.metadata["choices"]), help=help)
    typed = vars(parser.parse_args(argv))
    runs = typed.pop("plot", None)
    return Args(**typed), frozenset(typed), runs


def load_custom(file):
    """Run a user's file; its ESTIMATORS, LOSSES and SFT_LOSSES join the tables. UserError that names the file and what is wrong with it."""
    try:
        names = runpy.run_path(file)
    except Exception as error:
        raise UserError(f"--custom {file}: {type(error).__name__}: {error}") from error
    found = [(table, names[name]) for name, table in (("ESTIMATORS", ppo.ESTIMATORS), ("LOSSES", ppo.LOSSES), ("SFT_LOSSES", sft.LOSSES)) if name in names]
    if not found:
        raise UserError(f"--custom {file}: expected a dict ESTIMATORS, LOSSES or SFT_LOSSES in it")
    for table, own in found:
        for name, entry in own.items():
            if not isinstance(entry, type(next(iter(table.values())))):
                raise UserError(f"--custom {file}: '{name}' is {entry!r}; expected {type(next(iter(table.values()))).__name__}(function, ...)")
            table[name] = entry


def resumed(args, typed, config, source):
    """The settings of a run that goes on: those it had (`config`), and of the `typed` ones those that it may set anew. UserError for one
    that contradicts, without --override."""
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    if config.get("custom"):
        load_custom(config["custom"])
    unknown = set(config) ^ {f.name for f in dataclasses.fields(Args)}
    if unknown:
        raise UserError(f"{source}: written by another version of this program, which differs in the setting {min(unknown)}")
    for name in sorted(typed - set(FREE)):
        if getattr(args, name) != config[name] and not args.override:
            raise UserError(f"{source}: this run has --{name.replace('_', '-')} {config[name]}, not {getattr(args, name)}; leave it out, "
                            "or add --override to go on with another value")
    fresh = typed | {"out", "resume", "override", "shard"}     # how to shard follows from the number of ranks
    return Args(**config | {name: getattr(args, name) for name in fresh})


def apply_preset(args, hidden_size):
    """Fill what the user left open from the preset and from the game's own defaults."""
    if args.preset == "auto":
        args.preset = "tiny" if hidden_size <= 512 else "paper"
    preset = PRESETS[args.preset]
    if args.algo not in preset:
        raise UserError(f"--algo {args.algo} has no preset '{args.preset}': it is for the tiny model only")
    for name, value in (preset["all"] | preset[args.algo]).items():      # the algorithm's own come last and win
        if getattr(args, name) is None:
            setattr(args, name, value.get(args.task, value.get(args.game)) if isinstance(value, dict) else value)
    defaults = {name: parameter.default for name, parameter in inspect.signature(GAMES[args.game]).parameters.items()}
    defaults |= {"look": GAMES[args.game].looks[args.image]} | ({"routes": None, "ood_routes": None} if args.game == "virl" else {})
    for name in ("routes", "ood_routes", *GAME_SETTINGS):
        if getattr(args, name) is None:
            setattr(args, name, defaults.get(name))
        elif name not in defaults:
            raise UserError(f"--{name.replace('_', '-')} means nothing to --task {args.task}")
    args.look = args.routes or args.look
    seen = args.image and (args.ood_routes or not args.routes)     # one's own routes are tested on one's own other look, or none
    args.eval_sets = args.eval_sets or ("id,rule-ood,visual-ood" if seen else "id,rule-ood")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The run's surroundings

def autocast(args, device):
    """bfloat16 compute over float32 weights on CUDA; nothing elsewhere. A sharded model gathers its weights in bfloat16 by itself."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda" and args.shard != "on")


def git_commit():
    """The commit this run's code comes from, with a + where its Python differs; None outside a git checkout."""
    run = lambda *command: subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True).stdout.strip()
    commit = shutil.which("git") and run("rev-parse", "--short", "HEAD")
    return commit + ("+" if run("status", "--porcelain", "--untracked-files=no", "--", "*.py") else "") if commit else None


# ---------------------------------------------------------------------------------------------------------------------
# The game: training and evaluation sets are instances of one class

def make_env(args, **changes):
    """A factory of environments with the run's settings and `changes` to them."""
    game = GAMES[args.game]
    settings = {name: getattr(args, name) for name in GAME_SETTINGS if getattr(args, name) is not None}
    settings |= dict(image=args.image, size=game.sizes[args.preset], prompts=load_prompts(args.prompts) if args.prompts else None,
                     compat=official.of_game(args.compat, args.game)) | changes
    return lambda: game(**settings)


def training_env(args):
    """The factory of the game that is learnt from: with --rules one rule a seed, else make_env's."""
    if not args.rules:
        return make_env(args)
    factories = [make_env(args, rule=rule) for rule in args.rules.split(",")]
    return lambda: Mixed([make() for make in factories])


def evaluation_sets(args):
    """Name -> factory of the sets in --eval-sets; they are the game's own `shifts` of the training environment."""
    known = GAMES[args.game].shifts(args.rule, args.look, args.image)
    if args.ood_routes:
        known["visual-ood"] = {"look": args.ood_routes}
    names = args.eval_sets.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"--eval-sets: no set '{name}' for --task {args.task}; known are {', '.join(known)}")
    return {name: make_env(args, **known[name]) for name in names}


def evaluate(model, processor, args, processes, progress=""):
    """Play the fixed hands (or routes) of every evaluation set. Returns {set: {success, first, per_step, recognized, reward, n, ..., and of each
    hand: solved (0 or 1), right and answers (how many)}}.

    success: solved, a route with every point right, within the attempts; first: without one wrong answer; both with the binomial
    standard error sqrt(P(1-P)/N). per_step: share of all answers that are right; its error counts episodes, not answers, as
    independent. recognized: share of answers whose cards or observation are right (landmarks: of those given at a landmark);
    reward: mean sum of rewards of an episode.
    """
    results = {}
    for name, factory in evaluation_sets(args).items():
        seeds = processes.share(range(min(args.eval_hands, factory().distinct)))       # no route is walked twice
        with autocast(args, processes.device), shard.for_rollout(model, processes.largest, args.rollout_sharded) as player:
            episodes = ppo.rollout(player, processor, factory, seeds, draws=seeds, temperature=args.eval_temperature,
                                   batch=args.rollout_batch, max_new_tokens=args.max_new_tokens, device=processes.device)
        r = summarize(episodes, processes)
        of_each = sorted(gather([(episode.seed, int(episode.success), *right_answers(episode)) for episode in episodes]))
        results[name] = r | dict(zip(("solved", "right", "answers"), list(zip(*of_each))[1:]))
        rates = "   ".join(f"{what} {100 * r[key]:5.1f} ± {100 * r[key + '_se']:.1f} %" for what, key in (
            ("success", "success"), ("first try", "first"), ("per step", "per_step")))
        at_landmarks = f" (at landmarks {100 * r['landmarks']:.1f} %)" if "landmarks" in r else ""
        processes.print(f"{progress}  {name:<10}  {rates}   {GAMES[args.game].recognition} {100 * r['recognized']:5.1f} %{at_landmarks}   "
                        f"reward {r['reward']:+6.2f}   N {r['n']}")
    return results


def judged(episode):
    """Its turns but for those that --compat leaves without a verdict."""
    return [turn for turn in episode.turns if turn.info["verdict"] != "unjudged"]


def right_answers(episode):
    """(right answers, all answers) of an episode."""
    return sum(turn.info["correct"] for turn in judged(episode)), len(judged(episode))


def summarize(episodes, processes):
    """Rates over all episodes of all ranks."""
    turns = [turn for episode in episodes for turn in judged(episode)]
    right = [right_answers(episode) for episode in episodes]
    sums = lambda width, rows: [sum(column) for column in zip([0.0] * width, *rows)]          # a rank may have no episode
    counts = sums(3, [(1, e.success, e.success and k == m) for e, (k, m) in zip(episodes, right)])
    counts += sums(3, [(1, turn.info["recognized"], turn.reward) for turn in turns])
    counts += sums(2, [(1, turn.info["recognized"]) for turn in turns if turn.info.get("landmark")])
    counts += sums(4, [(k, k * k, k * m, m * m) for k, m in right])
    n, success, first, n_turns, recognized, reward, landmarks, read, k, kk, km, mm = processes.all_reduce(
        torch.tensor(counts, dtype=torch.float64)).tolist()
    rate = lambda name, p: {name: p, f"{name}_se": math.sqrt(p * (1 - p) / n)}
    p = k / n_turns                                                        # a ratio of two sums over episodes: its error by linearisation
    return rate("success", success / n) | rate("first", first / n) | {
        "per_step": p, "per_step_se": math.sqrt(max(0.0, kk - 2 * p * km + p * p * mm)) / n_turns,
        "recognized": recognized / n_turns, "reward": reward / n, "turns": n_turns / n, "n": int(n)} | (
        {"landmarks": read / landmarks} if landmarks else {})


# ---------------------------------------------------------------------------------------------------------------------
# The tiny model: a from-scratch Llama-Vision in an ordinary Hugging Face folder

TINY = {
    "model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"], "torch_dtype": "float32",
    "image_token_index": 1024,
    "text_config": {
        "model_type": "mllama_text_model", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 6, "cross_attention_layers": [2], "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 5},
    "vision_config": {
        "model_type": "mllama_vision_model", "image_size": 56, "patch_size": 14, "num_channels": 3, "hidden_size": 96,
        "attention_heads": 4, "intermediate_size": 192, "num_hidden_layers": 2, "num_global_layers": 1,
        "intermediate_layers_indices": [1, 2], "max_num_tiles": 4, "vision_output_dim": 288, "norm_eps": 1e-5,
        "hidden_act": "gelu",
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]},
}
TINY_IMAGES = {"size": {"height": 56, "width": 56}, "max_image_tiles": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>"]
INIT_STEPS = 60                                # SFT steps from the foundation to the paper's init


def foundation_mixture(args):
    """What the tiny model is 'pre-trained' on, half in text, half in images: the game under all rules and many looks (its `broad`).

    The paper's Llama comes to the game with arithmetic, with words and with eyes; this stands for that. Returns the
    mixture of sft.make_batch: (environment, weight) pairs; with --describe of pictures to describe alone.
    """
    return [(make_env(args, **settings)(), weight) for weight, settings in GAMES[args.game].broad()
            if settings.get("describe") or not args.describe]


# What the tiny tokenizer keeps apart: numbers, operators and card letters; words that differ from route to route.
APART = {"gp": r"\d+|[-+*/()=]|(?<![A-Za-z])[AJQK](?![A-Za-z])",
         "virl": r"\d+| [A-Z][a-z]+(?= is on)| [A-Z][a-z]+(?= [A-Z][a-z]+ is on)|[A-Z][a-z]+(?= [A-Z])"      # the words of a name
                 r"|\b(?:north|south)?(?:east|west|north|south)\b|\b(?:slightly|left|right|front|behind)\b"}


def train_tokenizer(mixture, vocab_size, apart):
    """Byte-level BPE on the environments' own text. What matches `apart` stays in tokens of its own; all else, spaces
    included, may merge, so that a prompt costs the tiny model some dozen tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(apart), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [ppo.readable(message["content"]).replace("<image>", "") for seed in range(40) for env, _ in mixture
             for message in env.demonstrate(seed, mistakes=seed % env.attempts)] + ["user", "assistant", "\n\n"] * 500
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    fillers = [f"<|reserved_{i}|>" for i in range(vocab_size - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in fillers + ["<|image|>"]])   # its id: vocab_size
    return tokenizer


def prepare_tiny(args, processes):
    """Folder of the tiny model's init checkpoint for this game: the foundation after the paper's brief SFT on it.

    Made on first use and kept in runs/, by a name that follows from the foundation's weights and the game.
    """
    foundation = FOUNDATIONS / args.game
    if not (foundation / "model.safetensors").exists():
        raise UserError(f"{foundation}: no tiny model there; take it from git, or make it anew as the README.md there says")
    game = {name: getattr(args, name) for name in ("task", "rule", "look", "target", "routes", "skip_bad_routes", "hide_landmarks", "describe")}
    digest = hashlib.sha256((foundation / "model.safetensors").read_bytes() + repr(game).encode()).hexdigest()[:8]
    run_folder = Path("runs") / f"init-{args.task}-{digest}"
    ready = (run_folder / "final").exists()
    processes.barrier()
    if not ready:
        processes.print(f"first use of tiny on {args.task}: making its init checkpoint, {INIT_STEPS} SFT steps, in {run_folder}")
        if processes.rank == 0:
            shutil.rmtree(run_folder, ignore_errors=True)
        processes.barrier()
        train(Args(algo="sft", model=str(foundation), out=str(run_folder), steps=INIT_STEPS, eval_every=0, eval_hands=0,
                   device=args.device, **game), processes)
        processes.barrier()
        if not (run_folder / "final").exists():
            raise UserError("interrupted before the init checkpoint was ready; the next run makes it anew")
    return run_folder / "final"


def load(args, processes, resumed=None):
    """Model, processor, folder of the weights, and complete settings of a run. A model that is to be sharded comes without its weights;
    so does that of a run that is resumed from the checkpoint `resumed`."""
    if args.algo == "pretrain" and args.model == "tiny" and not resumed:
        apply_preset(args, 0)
        args.shard = sharding(args, 0, processes)
        config, everything = Config.from_dict(TINY), foundation_mixture(dataclasses.replace(args, describe=None))
        processor = Processor(train_tokenizer(everything, config.vocab_size, APART[args.game]), image_config=TINY_IMAGES)
        model = Llama(config)
        model.init_weights(seed=args.seed)
        for name, parameter in model.named_parameters():
            if "gate" in name.split(".")[-1] and parameter.numel() == 1:
                torch.nn.init.constant_(parameter, 0.5)        # Llama grafted its eyes on with closed gates; these grow together
        return model.to(processes.device), processor, None
    if resumed and (compares_with_start(args) or args.probe_hands) and not args.lora_rank:           # load that; Trainer.restore does the rest
        folder, resumed = Path(checkpoint.read_record(resumed)["began"]), None
    else:
        folder = resumed or (prepare_tiny(args, processes) if args.model == "tiny" else Path(args.model))
    with torch.device("meta"):
        model = Llama(Config.from_dict(read_json(folder, "config.json")))
    args.shard = sharding(args, sum(p.numel() for p in model.parameters()), processes)
    trained = checkpoint.read_record(folder)["config"] if checkpoint.is_checkpoint(folder) and not resumed else {}
    if trained.get("lora_rank"):
        if args.shard == "on":
            raise UserError(f"{folder} holds adapters beside the weights; with --shard on take the run's final/, in which they are merged")
        choose_what_learns(model, argparse.Namespace(**trained))
    if args.shard == "off" and checkpoint.is_checkpoint(folder):
        shard.fill(model, None if resumed else folder, processes.device)
        lora.merge(model)
    elif args.shard == "off":
        model = Llama.from_pretrained(folder, device=processes.device, dtype=torch.float32)
    if args.image and model.config.vision is None:
        raise UserError(f"--task {args.task} shows images, but {folder} is a text-only model; use --task {args.game}-l")
    apply_preset(args, model.config.hidden_size)
    return model, Processor.from_pretrained(folder), None if resumed else folder


def compares_with_start(args):
    """Does the run need the policy that it began with, for a KL penalty or an SFT loss?"""
    return bool(args.kl_coef) if args.algo == "ppo" else sft.LOSSES[args.sft_loss].before == "initial"


def choose_what_learns(model, args):
    """Leave to learn what --tune and --lora-* say. What LoRA adds comes from args.seed, or from a checkpoint afterwards."""
    sft.freeze(model, args.tune)
    if args.lora_rank:
        lora.adapt(model, args.lora_modules, args.lora_rank, args.lora_alpha, args.seed)


def sharding(args, size, processes):
    """What --shard comes to, on or off, for a model of `size` parameters."""
    if args.lora_rank:
        if args.shard == "on":
            raise UserError("--lora-rank keeps whole copies of the weights, which do not change; leave out --shard on")
        return "off"
    possible = processes.world > 1 and args.algo != "pretrain"           # Muon steps in whole matrices
    if args.shard == "on" and not possible:
        raise UserError("--shard on needs several ranks (torchrun --nproc-per-node 2) and an --algo other than pretrain")
    auto = "on" if possible and (processes.device.type == "cuda" or size > 10**8) else "off"
    return auto if args.shard == "auto" else args.shard


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and logs

def choose_out(args, processes):
    """Fill in --out: runs/TASK-ALGO, with a number behind it when a run is there already, or the newest run there for --resume. Workers
    that torchrun starts again resume the run that they began."""
    base = Path(f"runs/{args.task}-{args.algo}")
    names = [Path(args.out)] if args.out else [base] + [base.with_name(f"{base.name}-{k}") for k in range(2, 1000)]
    taken = [name for name in names if (name / "log.jsonl").exists()]
    own = [name for name in taken if processes.restarted and launch_of(name) == processes.launch]
    if own:
        args.resume = True
        args.out = str(own[-1])
    elif args.resume:
        args.out = str((taken or names)[-1 if taken else 0])
    else:
        args.out = str(args.out or next(name for name in names if name not in taken))


def launch_of(run):
    """Which launch of torchrun began or resumed a run last."""
    starts = [json.loads(line) for line in open(run / "log.jsonl") if '"event": "start"' in line and line.endswith("}\n")]
    return starts[-1].get("launch") if starts else None


class RunFolder:
    """runs/NAME: config.json, log.jsonl, transcripts/, checkpoints/step_N/ and at the end final/, an ordinary Hugging Face folder."""

    def __init__(self, args, processes):
        self.path, self.processes = Path(args.out), processes
        self.log_file = self.path / "log.jsonl"
        self.checkpoints = checkpoint.Checkpoints(self.path / "checkpoints", processes.rank, processes.world, args.keep)
        if self.log_file.exists() and not args.resume:
            raise UserError(f"{self.path} holds a run already; continue it with --resume or choose another --out")
        if args.resume and not self.log_file.exists():
            raise UserError(f"--resume: no run in {self.path}")

    def settings(self, args, typed):
        """What a resumed run goes on with (see `resumed`)."""
        newest = self.checkpoints.newest()
        if newest:
            return resumed(args, typed, checkpoint.read_record(newest)["config"], newest)
        return resumed(args, typed, read_json(self.path, "config.json"), self.path / "config.json")     # stopped before its first checkpoint

    def start(self, args, step):
        """Open the log; on resuming, drop what was logged after the checkpoint."""
        if self.processes.rank == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            lines = self.log_file.read_text().splitlines() if step else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]      # the last one may be cut off
            write_atomically(self.path / "config.json", json.dumps(dataclasses.asdict(args), indent=2))
            write_atomically(self.log_file, "".join(line + "\n" for line in kept))
        self.log(event="start", step=step, config=dataclasses.asdict(args), commit=git_commit(), launch=self.processes.launch,
                 hardware=self.processes.hardware, time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def log(self, **record):
        """Append one JSON line."""
        if self.processes.rank == 0:
            with open(self.log_file, "a") as f:
                f.write(json.dumps(record) + "\n")

    def save(self, trainer, step):
        """Begin to write a checkpoint, while training goes on."""
        def model_and_tokenizer(folder):
            (folder / "config.json").write_text(json.dumps(trainer.model.config.to_dict(), indent=2))
            trainer.processor.save_pretrained(folder)

        self.checkpoints.save(step, checkpoint.tensors_of(trainer.module, trainer.optimizers), trainer.record(step), model_and_tokenizer)

    def save_final(self, model, processor, sharded):
        """Write final/ under a temporary name, then rename it. Adapters are merged into the weights, here and in `model`."""
        aside, final, first = self.path / ".final", self.path / "final", self.processes.rank == 0
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            processor.save_pretrained(aside)
        self.processes.barrier()
        if sharded:
            checkpoint.export(model, aside, self.processes.rank, self.processes.world)
        elif first:
            lora.merge(model)
            model.save_pretrained(aside)
        self.processes.barrier()
        if first:
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)

    def dump(self, step, batch):
        """Write down what a rank was learning from when it broke down: lists and numbers as JSON, pictures beside it. Returns the folder."""
        folder, pictures = self.path / f"broken_step_{step:06d}", []
        folder.mkdir(exist_ok=True)

        def plain(x):
            if dataclasses.is_dataclass(x):
                return vars(x)
            if isinstance(x, torch.Tensor):
                return f"tensor of shape {list(x.shape)}"
            pictures.append(f"rank_{self.processes.rank}_{len(pictures)}.png")
            x.save(folder / pictures[-1])
            return pictures[-1]

        (folder / f"rank_{self.processes.rank}.json").write_text(json.dumps(batch, default=plain))
        return folder

    def transcript(self, step, episode):
        """Write one episode as a person would like to read it, and the pictures it was about."""
        if self.processes.rank:
            return
        folder = self.path / "transcripts"
        folder.mkdir(exist_ok=True)
        text = "\n\n".join(f"[{who}]\n{said}" for who, said in episode.transcript)
        (folder / f"step_{step:06d}.txt").write_text(text + "\n")
        for k, conversation in enumerate(episode.conversations):
            if conversation.image is not None:
                conversation.image.save(folder / f"step_{step:06d}{f'_{k + 1}' if k else ''}.png")


def write_atomically(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Training

class Trainer:
    """The model with its optimizer and the state that a checkpoint holds. `update(i)` makes the i-th step.

    All randomness of step i derives from (seed, i), so there is no generator state to save.
    """

    def __init__(self, args, model, processor, processes, folder=None):
        self.args, self.model, self.processor, self.processes = args, model, processor, processes
        if (args.hands if args.algo == "ppo" else args.batch_size) < processes.world:
            raise UserError(f"{processes.world} ranks need at least as many --hands (PPO) or a --batch-size (SFT) as large")
        if args.tune == "vision" and (not args.image or args.algo == "pretrain"):
            raise UserError("--tune vision learns from pictures alone: it needs --task gp-vl or virl-vl, and --algo sft or ppo")
        if args.algo == "pretrain" and args.rules:
            raise UserError("--algo pretrain mixes rules as it is; --rules is for --algo sft and ppo")
        if args.algo == "pretrain" and args.lora_rank:
            raise UserError("--algo pretrain makes all weights anew; --lora-rank is for --algo sft and ppo")
        if args.algo == "pretrain" and args.probe_hands:
            raise UserError("--algo pretrain makes all weights anew; --probe-hands compares with those that --algo sft and ppo begin with")
        if args.algo == "ppo":
            ppo.check(args)
        choose_what_learns(model, args)
        torch.manual_seed(args.seed)           # of the value head's first weights
        self.module = ppo.ActorCritic(model, args.critic) if args.algo == "ppo" else model
        if args.shard == "on":
            shard.shard(self.module, folder, processes.device, processes.world)
        else:
            self.module.to(processes.device)
        if args.checkpoint_activations:
            shard.checkpoint_activations(self.module)
        self.ledger = Ledger()                 # FLOPs counted, beside self.compute
        self.pace = self.ledger.paced(functools.partial(shard.pace, agree=processes.largest))
        self.began = folder and str(folder)    # the weights of step 0, for a resumed run's reference
        self.reference = self.probe = None
        if compares_with_start(args) or args.probe_hands:      # a context in which the model is the one that the run began with
            start = functools.partial(lora.disabled, model) if args.lora_rank else reference.initial(model)
            self.reference = start if compares_with_start(args) else None
            sets = evaluation_sets(dataclasses.replace(args, eval_sets="id,rule-ood"))
            self.probe = Probe(args, model, processor, processes, sets, start, args.probe_hands, args.probe_samples) if args.probe_hands else None
        policy = [p for p in model.parameters() if p.requires_grad]
        known = {id(p) for p in model.parameters()}
        critic = [p for p in self.module.parameters() if id(p) not in known and p.requires_grad]
        groups = [dict(params=policy, peak=args.lr)] + ([dict(params=critic, peak=args.critic_lr)] if critic else [])
        muon = matrices(model) if args.algo == "pretrain" else []
        groups[0]["params"] = [p for p in policy if all(p is not matrix for matrix in muon)]
        self.optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), eps=args.adam_eps, weight_decay=args.weight_decay)]
        if muon:
            group = dict(params=muon, peak=args.lr)
            self.optimizers.append(torch.optim.Muon([group], lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"))
        self.env = training_env(args)
        self.mixture = foundation_mixture(args) if args.algo == "pretrain" else [(self.env(), 1.0)]
        self.policy_size = count_parameters(model, args.task)
        self.critic_size = self.policy_size if args.algo == "ppo" and args.critic == "separate" else 0
        self.compute = 0.0                     # training compute in FLOPs: 6 N D_trained + 2 N D_rollout (paper, section 5)
        self.skipped = self.skipped_in_a_row = 0               # optimizer steps without a finite loss and gradient
        self.batch = None                      # the episodes or examples of this step

    @property
    def groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def update(self, i):
        """Learn once. Returns the metrics."""
        progress = i / self.args.steps
        scale = min(1.0, (i + 1) / max(1.0, self.args.warmup * self.args.steps))
        if self.args.lr_schedule == "cosine":
            scale *= 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.groups:
            group["lr"] = group["peak"] * scale
        metrics = self.ppo_update(i) if self.args.algo == "ppo" else self.sft_update(i)
        self.ledger.settle(self.processes.all_reduce)
        return metrics

    def seeds(self, i, n):
        """n seeds of step i: this run's own, disjoint from the evaluation's (which start at 0)."""
        first = (self.args.seed + 1) * 10**9 + i * n
        return range(first, first + n)

    def sft_update(self, i):
        args, scored = self.args, 0
        seeds = self.processes.share(self.seeds(i, args.batch_size))
        examples = sft.make_batch(self.processor, self.mixture, seeds, args.mistakes, args.learn_prompts)
        if args.sft_data == "own":
            episodes = self.play(seeds, seeds)
            scored += sum(len(conversation.ids) for episode in episodes for conversation in episode.conversations)
            nothing = dataclasses.replace(examples[0], sampled=[False] * len(examples[0].sampled))      # for a rank without a right answer
            examples = sft.own_answers(episodes) or [nothing]
        self.batch = examples
        if sft.LOSSES[args.sft_loss].before:
            scored += sum(len(example.ids) for example in examples)
        if self.reference:
            with autocast(args, self.processes.device), self.reference(), self.ledger.phase("update", self.model):
                sft.score(self.model, self.processor, examples, args, pace=self.pace, device=self.processes.device)
        with autocast(args, self.processes.device), self.ledger.phase("update", self.model):
            metrics = sft.update(self.model, self.processor, examples, args, step=self.step, all_reduce=self.processes.all_reduce,
                                 pace=self.pace, device=self.processes.device)
        scored = self.processes.all_reduce(torch.tensor(float(scored), dtype=torch.float64)).item()
        self.compute += self.policy_size * (6 * metrics["trained_tokens"] + 2 * scored)
        return metrics

    def play(self, seeds, draws):
        """A rollout of the training game."""
        args = self.args
        with (autocast(args, self.processes.device), shard.for_rollout(self.model, self.processes.largest, args.rollout_sharded) as player,
              self.ledger.phase("rollout", player)):
            return ppo.rollout(player, self.processor, self.env, seeds, draws=draws, temperature=args.temperature, batch=args.rollout_batch,
                               max_new_tokens=args.max_new_tokens, keep_features=args.algo == "ppo" and self.model.vision_frozen,
                               device=self.processes.device)

    def ppo_update(self, i):
        args, start = self.args, time.time()
        hands = self.processes.share(self.seeds(i, args.hands))                       # all samples of a hand on one rank
        seeds, draws = zip(*[(hand, hand * args.samples + k) for hand in hands for k in range(args.samples)])
        episodes = self.play(seeds, draws)
        rolled, self.batch = time.time(), episodes
        # autocast anew: what the rollout cast to bfloat16 can have no gradients
        with autocast(args, self.processes.device), self.ledger.phase("update", self.module):
            metrics = ppo.update(self.module, self.processor, episodes, args, step=self.step, seed=args.seed * 1_000_003 + i,
                                 train_policy=i >= args.critic_warmup, reference=self.reference, all_reduce=self.processes.all_reduce,
                                 pace=self.pace, device=self.processes.device)
        self.sample = next((episode for episode in episodes if len(episode.turns) > 1), episodes[0])     # one with a revision
        scored = metrics["rollout_tokens"] * ((self.reference is not None) + (ppo.ESTIMATORS[args.advantage].per == "token" and
                                                                              ppo.ESTIMATORS[args.advantage].values))
        self.compute += (self.policy_size + self.critic_size) * (2 * (metrics["rollout_tokens"] + scored) + 6 * metrics["trained_tokens"])
        summary = summarize(episodes, self.processes)
        return metrics | {name: summary[name] for name in ("success", "first", "per_step", "recognized", "landmarks", "reward", "turns")
                          if name in summary} | {
            "rollout_seconds": rolled - start, "update_seconds": time.time() - rolled,
            "rollout_tokens_per_second": metrics["drawn_tokens"] / (rolled - start)}

    def evaluate(self, folder, i):
        """Evaluate after i steps, print and log."""
        if self.args.eval_hands:
            results = evaluate(self.model, self.processor, self.args, self.processes, f"step {i:>4}")
            with autocast(self.args, self.processes.device):
                probe = {"probe": self.probe(f"step {i:>4}")} if self.probe else {}
            folder.log(event="eval", step=i, tflops=self.compute / 1e12, counted_tflops=self.ledger.tflops, eval=results, **probe)

    def step(self, loss):
        """Sum gradients over ranks, clip, step; policy and critic are clipped apart. Returns the policy's gradient norm.

        loss: over all ranks. A loss or a gradient that is not finite on one rank is not on any (they are sums), so that all skip the
        step. FloatingPointError after --max-skipped of them in a row.
        """
        norms = []
        for group in self.groups:                  # a sharded model's gradients are sums already
            learning = group["params"] if self.args.shard == "on" else self.processes.sum_gradients(group["params"])
            norms.append(float(shard.clip(learning, self.args.max_grad_norm)))
        finite = all(math.isfinite(x) for x in [loss, *norms])
        for optimizer in self.optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()               # of weights in bfloat16, which have just changed
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == self.args.max_skipped:
            raise FloatingPointError(f"{self.skipped_in_a_row} steps in a row without a finite loss and gradient (loss {loss}, norms {norms})")
        return norms[0]

    def record(self, i):
        """What a checkpoint holds beside tensors. i: steps done. Of random numbers there is no state: those of a step derive from (seed, i)."""
        return {"step": i, "compute": self.compute, "flops": self.ledger.total, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row,
                "began": self.began, "config": dataclasses.asdict(self.args)}

    def restore(self, checkpoints, path):
        """Go on from a checkpoint. Returns the number of steps done."""
        record = checkpoints.load(path, self.module, self.optimizers)
        self.compute, self.ledger.total, self.skipped, self.skipped_in_a_row, self.began = (
            record[name] for name in ("compute", "flops", "skipped", "skipped_in_a_row", "began"))
        return record["step"]


def matrices(model):
    """The weight matrices of the layers: what Muon (Jordan et al. 2024) steps in pre-training; AdamW steps the rest."""
    return [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]


def count_parameters(model, task):
    """Parameters that work on a token: N of the paper's 6ND. Text tasks use neither the vision tower nor cross-attention."""
    blind = ("vision_model.", "multi_modal_projector.", *(f"layers.{i}." for i in model.config.cross_attention_layers))
    return sum(p.numel() for name, p in model.named_parameters() if task.endswith("vl") or not name.startswith(blind))


def describe(i, args, metrics, seconds_left):
    """The line a person reads."""
    if args.algo == "ppo":
        m = metrics
        ev = "" if math.isnan(m["explained_variance"]) else f"ev {m['explained_variance']:+.2f}  "          # an estimator may ask no critic
        body = (f"reward {m['reward']:+6.2f}  success {100 * m['success']:5.1f} %  per step {100 * m['per_step']:5.1f} %  kl {m['approx_kl']:.1e}  "
                f"clip {100 * m['clipfrac']:4.1f} %  {ev}entropy {m['entropy']:.2f}  "
                f"grad {m['grad_norm']:.2f}  {m['rollout_tokens_per_second']:,.0f} tok/s")
    else:
        body = f"nll {metrics['nll']:.4f}  entropy {metrics['entropy']:.3f}  grad {metrics['grad_norm']:.2f}  {metrics['tokens_per_second']:,.0f} tok/s"
    if metrics["skipped"]:
        body += f"  skipped {metrics['skipped']}"
    return f"step {i:>4}/{args.steps}  {body}  left {int(seconds_left) // 60}:{int(seconds_left) % 60:02d}"


def train(args, processes, typed=frozenset()):
    """One run, from loading to the final folder. typed: names of the settings that the user gave."""
    folder = RunFolder(args, processes)
    newest = folder.checkpoints.newest() if args.resume else None
    if args.resume:
        args = folder.settings(args, typed)
    processes.barrier()                        # nobody writes before all have looked
    model, processor, weights = load(args, processes, newest)
    trainer = Trainer(args, model, processor, processes, weights)
    start = trainer.restore(folder.checkpoints, newest) if newest else 0
    folder.start(args, start)
    processes.print(f"{args.task} {args.algo}: {sum(p.numel() for p in model.parameters()):,} parameters on {processes.hardware}; "
                    f"steps {start} to {args.steps}; log in {folder.path}")
    if start == 0 and not args.skip_first_eval:
        trainer.evaluate(folder, 0)
    with Interrupt(processes) as interrupt:
        done = loop(trainer, folder, start, interrupt)
        folder.checkpoints.finish()
    if done < args.steps:
        processes.print(f"stopped after step {done}; continue with --resume --out {folder.path}")
    else:
        half = args.algo == "pretrain"                         # the size in git
        folder.save_final(model.to(torch.bfloat16) if half else model, processor, args.shard == "on")
        processes.print(f"weights in {folder.path / 'final'}")


def loop(trainer, folder, start, interrupt):
    """Steps `start` to the last, with what is printed, logged and saved on the way. Returns the number of steps done."""
    args, processes, begun = trainer.args, trainer.processes, time.time()
    for i in range(start + 1, args.steps + 1):
        before = time.time()
        try:
            metrics = trainer.update(i - 1)
        except FloatingPointError as error:
            folder.checkpoints.finish()
            raise UserError(f"step {i}: {error}; what it was learning from is in {folder.dump(i, trainer.batch)}") from error
        metrics |= {"seconds": time.time() - before, "skipped": trainer.skipped, "memory_gb": processes.memory() / 1e9}
        metrics["tokens_per_second"] = metrics["trained_tokens"] / metrics["seconds"]
        processes.print(describe(i, args, metrics, (time.time() - begun) / (i - start) * (args.steps - i)))
        folder.log(event="step", step=i, tflops=trainer.compute / 1e12, **trainer.ledger.summary(), lr=trainer.groups[0]["lr"], **metrics)
        if args.algo == "ppo" and i % args.transcript_every == 0:
            folder.transcript(i, trainer.sample)
        last, stop = i == args.steps, interrupt.agreed()
        if last or (args.eval_every and i % args.eval_every == 0 and not stop):
            trainer.evaluate(folder, i)
        folder.checkpoints.poll()
        if last or stop or i % args.save_every == 0:
            folder.save(trainer, i)
        if stop:
            return i
    return args.steps


def evaluate_only(args, processes):
    """--algo eval: print and save the evaluation of a checkpoint."""
    model, processor, weights = load(args, processes)
    if args.shard == "on":
        shard.shard(model, weights, processes.device, processes.world)
    results = evaluate(model, processor, args, processes)
    if processes.rank == 0:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        record = {"config": dataclasses.asdict(args), "commit": git_commit(), "hardware": processes.hardware, "eval": results}
        write_atomically(Path(args.out) / "eval.json", json.dumps(record, indent=2))


def main(argv=None):
    args, typed, runs = parse(argv)
    try:
        if runs:
            return figures.plot(runs)
        if args.dry_run and args.lora_rank:
            raise UserError("--dry-run does not plan --lora-rank; python -m variants.lora says what it saves")
        if args.dry_run:
            return plan.show(args, apply_preset, args.dry_run)
        processes = Processes(args.device)
        choose_out(args, processes)
        if args.algo == "eval":
            evaluate_only(args, processes)
        else:
            train(args, processes, typed)
    except Exception as error:
        message = explain(error, args)
        if message is None or os.environ.get("DEBUG"):
            traceback.print_exc()
        leave(message or f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; checkpoints that were written before can be resumed")
    if dist.is_initialized():
        dist.destroy_process_group()


def explain(error, args):
    """What happened and what to do, in one line; None for an error that this program did not expect."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"{str(error).splitlines()[0]} A smaller --rollout-batch or --token-budget, or --checkpoint-activations, takes less; --dry-run shows what takes it"
    if isinstance(error, RuntimeError) and lost(error):
        return (f"lost another rank, which may have said why ({str(error).splitlines()[0][:160]}); torchrun --max-restarts N goes on by itself from the last "
                f"checkpoint, else add --resume --out {args.out}")
    return str(error) if isinstance(error, (UserError, OSError, ValueError)) else None


if __name__ == "__main__":
    main()
