"""The settings of a run: names, defaults, presets, the command line, and changes on resume.

    python train.py --help          # what most runs need; --help-all shows the rest, too
"""

import dataclasses
import inspect
import re
import runpy
import sys
from argparse import SUPPRESS
from dataclasses import dataclass

from envs import GAMES, TASKS, tasks
from harness.ranges import (
    SettingError, above, arg, at_least, between, command_line, flag, inside, integer, one_of, optional,
    pair, real, several, shown, text)
from variants import ESTIMATORS, LOSSES, SFT_LOSSES
from variants.advantages import AdvantageSettings
from variants.lora import LoraSettings
from variants.losses import LossSettings
from variants.official import OfficialSettings
from variants.reference import ReferenceSettings
from variants.tune import TUNE

BETA = real("a number from 0 to below 1", lambda x: 0 <= x < 1)
# Below 0.01, logits over it leave the range of float32.
TEMPERATURE = real("a number from 0.01 to 100; greedy answers (0) leave no ratio to learn from",
                   lambda x: 0.01 <= x <= 100)
EVAL_TEMPERATURE = real("0 (greedy) or a number from 0.01 to 100", lambda x: x == 0 or 0.01 <= x <= 100)

# Needs of settings, without which they have no effect; see ranges.arg.
LEARNING, SFT, PPO = "--algo sft, ppo or pretrain", "--algo sft or pretrain", "--algo ppo"
POST_TRAINING = "--algo sft or ppo"
CARDS, ROUTES = "--task gp-l or gp-vl", "--task virl-l or virl-vl"
EXPERT = f"{SFT}; --sft-data expert"
CRITIC = f"{PPO}; --advantage gae, gae-loo, gae-token or gae-two-level"
CLIPS = "--loss ppo, grpo, gspo, clip-higher, dapo or dual-clip"


@dataclass
class Args(LossSettings, AdvantageSettings, ReferenceSettings, LoraSettings, OfficialSettings):
    """Every setting of a run. None means: from the preset, or the game's own default."""
    task: str = arg("gp-l", one_of(TASKS), "cards (gp) or navigation (virl), in text or in pictures (-vl)")
    algo: str = arg("ppo", one_of(("ppo", "sft", "eval", "pretrain")),
                    "how to learn; eval: only evaluate; pretrain: make the tiny model's foundation")
    model: str = arg("tiny", text("a folder, or tiny"),
                     "tiny (built in), a Hugging Face folder of a Llama or Llama-3.2-Vision, or a checkpoint")
    out: str = optional(text("a folder"), "folder of the run (default: runs/TASK-ALGO)")
    seed: int = arg(0, integer(0, 2**63 - 1), "of hands, draws and shuffles in training",
                    LEARNING)
    preset: str = arg("auto", one_of(("auto", "tiny", "paper")),
                      "settings for the built-in model or the paper's; auto: by the model's size")
    device: str = arg("auto", one_of(("auto", "cuda", "mps", "cpu")), "what to compute on")
    resume: bool = flag(False, "go on with the run in --out, from its newest checkpoint", LEARNING)

    rule: str = optional(text("a rule"),
                         "in training. gp: what J, Q, K count, 10, 11-12-13 or others; virl: directions, "
                         "absolute or relative")
    look: str = optional(text("a look"),
                         "in training. gp: suits, black, red or all; virl: a city, others (nine cities), "
                         "broad (those of pre-training) or a folder of routes")
    attempts: int = optional(integer(1, 1000),
                             "judged answers (default: 5 per hand, 2 per point of a route)")
    target: int = optional(integer(1), "gp: the number to make (default: 24)", CARDS)
    routes: str = optional(text("a folder of routes"),
                           "virl: folder of routes in the released format to train on", ROUTES)

    steps: int = optional(integer(1), "PPO updates, or batches of SFT", LEARNING)
    lr: float = optional(above(0), "learning rate", LEARNING)
    lr_schedule: str = optional(one_of(("constant", "cosine")),
                                "cosine: falling to 0 from the first step on, not only after the warm-up",
                                LEARNING)
    warmup: float = optional(between(0, 1), "share of the steps in which the rate rises from 0", LEARNING)
    epochs: int = optional(integer(1), "passes over each rollout, or batch of SFT", LEARNING)
    minibatches: int = optional(integer(1), "optimizer steps per pass; samples with one prompt share a step",
                                LEARNING)
    tune: str = arg("all", one_of(tuple(TUNE)), "weights that learn; text: the language model", LEARNING)

    batch_size: int = optional(integer(1, 10**6), "dialogues per step, over all ranks", SFT)
    sft_loss: str = arg("nll", one_of(SFT_LOSSES), "see sft.py and variants/sft_losses.py", "--algo sft")
    sft_data: str = arg("expert", one_of(("expert", "own")),
                        "an expert's dialogues, or the model's own right answers (rejection sampling)",
                        "--algo sft")
    mistakes: float = optional(between(0, 1), "share of dialogues with wrong answers before the right one",
                               f"{EXPERT}; --attempts above 1")

    hands: int = optional(integer(1, 10**6), "hands (or routes) per update, over all ranks", PPO)
    samples: int = optional(integer(1, 10**6), "episodes played of each", PPO)
    temperature: float = optional(TEMPERATURE, "of the rollout", f"{PPO} or --sft-data own")
    max_new_tokens: int = optional(integer(1, 131072), "longest answer, in tokens")
    advantage: str = optional(one_of(ESTIMATORS), "see ppo.py and variants/advantages.py", PPO)
    loss: str = arg("ppo", one_of(LOSSES), "see ppo.py and variants/losses.py", PPO)
    unit: str = optional(one_of(("turn", "token")), "unit of a ratio, where --loss leaves it open",
                         f"{PPO}; --loss ppo, clip-higher, dual-clip or reinforce")
    clip: float = optional(inside(0, 1), "clip range of the ratio",
                           f"{PPO} or --sft-loss psft or iw-sft; {CLIPS}")
    gamma: float = arg(0.9, between(0, 1), "discount from turn to turn",
                       f"{PPO}; --advantage gae, gae-loo, gae-two-level, monte-carlo, rloo, grpo or "
                       "grpo-no-std")
    lam: float = arg(0.95, between(0, 1), "lambda of GAE, from turn to turn",
                     f"{PPO}; --advantage gae, gae-loo or gae-two-level")
    value_coef: float = optional(at_least(0), "weight of the value loss", CRITIC)
    entropy_coef: float = optional(at_least(0), "weight of an entropy bonus", PPO)
    critic: str = optional(one_of(("shared", "detached", "separate")),
                           "what the value head reads (see ppo.ActorCritic)", CRITIC)

    eval_every: int = optional(integer(0), "steps between evaluations; 0: only before and after", LEARNING)
    eval_hands: int = optional(integer(0), "hands (or routes) per evaluation set")
    eval_sets: str = optional(several(text("a set")),
                              "id, rule-ood, visual-ood, or other `shifts` of the game in envs.py, by commas")
    save_every: int = optional(integer(1), "steps between checkpoints; there is one at the end", LEARNING)

    # From here on --help-all alone shows them.
    rules: str = optional(several(text("a rule")),
                          "rules that training mixes, one per seed, in place of --rule, by commas: "
                          "10,11-12-13,5; --rule still says what the init checkpoint, id and rule-ood are "
                          "about", POST_TRAINING)
    ood_routes: str = optional(text("a folder of routes"),
                               "virl: routes of the visual-ood set, instead of the nine built-in cities",
                               f"{ROUTES}; --eval-sets visual-ood")
    hide_landmarks: bool = flag(None,
                                "virl: leave the landmarks' names out of the instructions, so that only what "
                                "is seen tells them", ROUTES)
    prompts: str = optional(text("a JSON file"),
                            "JSON file of templates that replace the built-in prompts and verifier messages")
    custom: str = optional(text("a Python file"),
                           "Python file with ESTIMATORS, LOSSES, SFT_LOSSES or GAMES of your own, for "
                           "--advantage, --loss, --sft-loss and --task (see README.md)")
    override: bool = flag(False, "take settings from the command line that differ from the run's", "--resume")

    weight_decay: float = optional(at_least(0), "AdamW's", LEARNING)
    betas: tuple = optional(pair("two numbers from 0 to below 1, joined by a comma", BETA),
                            "AdamW's, as two numbers joined by a comma", LEARNING)
    adam_eps: float = optional(above(0), "AdamW's", LEARNING)
    max_grad_norm: float = optional(above(0), "gradient norm to clip to", LEARNING)
    max_skipped: int = arg(5, integer(1),
                           "stop after so many steps in a row whose loss or gradient was not finite; such a "
                           "step changes nothing", LEARNING)
    value_clip: float = optional(at_least(0), "clip range of the value's change, 0 for none", CRITIC)
    critic_lr: float = optional(above(0), "learning rate of the value head (and of its own trunk)", CRITIC)
    reward_scale: float = optional(above(0), "factor on rewards before advantages and value targets", PPO)

    token_budget: int = optional(integer(1),
                                 "padded tokens of one forward and backward pass, an image as many as "
                                 "take its memory; gradients are accumulated over several", LEARNING)
    rollout_batch: int = optional(integer(1), "episodes played at once by each rank")
    checkpoint_activations: bool = flag(
        False, "compute a block's activations again in the backward pass instead of keeping them", LEARNING)
    shard: str = arg("auto", one_of(("auto", "on", "off")),
                     "every rank keeps a slice of the weights instead of a copy (auto: on GPUs, or from 100 "
                     "million weights on)")

    skip_first_eval: bool = flag(
        False, "leave out the evaluation before training, which is the same for all runs from one model",
        LEARNING)
    eval_temperature: float = arg(0.2, EVAL_TEMPERATURE, "sampling temperature of evaluations")
    keep: int = arg(2, integer(1), "checkpoints to keep", LEARNING)
    transcript_every: int = arg(10, integer(1), "steps between sample transcripts", PPO)

    describe: bool = flag(None, "virl-vl: learn to tell what is in the pictures rather than the way",
                          f"{EXPERT}; --task virl-vl")
    learn_prompts: bool = flag(None, "also learn to predict the prompts", EXPERT)

    @property
    def game(self):
        """'gp' or 'virl', a key of GAMES."""
        return self.task.split("-")[0]

    @property
    def image(self):
        return self.task.endswith("vl")


def entries(text):
    """Read lines `name: text`, of which the text may go on over several."""
    return dict(re.findall(r"(\w[\w -]+): ([^:]+)\n", text))


# Titles in --help, by the first setting below each; those of RARE are in --help-all only.
GROUPS = entries("""
    task: the run
    rule: the game
    steps: learning
    batch_size: SFT
    hands: PPO
    eval_every: evaluation
""")
RARE = entries("""
    rules: the game and files
    weight_decay: optimizer and critic
    token_budget: memory
    skip_first_eval: evaluation and logs
    describe: pre-training and SFT
    clip_high: variants/losses.py
    token_gamma: variants/advantages.py
    rescore: variants/reference.py
    lora_rank: variants/lora.py
    compat: variants/official.py (the released code)
""")
# A resumed run may set these anew: they do not change what is computed, but for rounding.
FREE = "out resume override custom device shard checkpoint_activations save_every keep max_skipped".split()
# Handed to the game, which knows some of them.
GAME_SETTINGS = "rule look attempts target hide_landmarks after_failure describe".split()


# ------------------------------------------------------------------------------------------------------------
# Presets are command lines. A line holds for the runs that all words before it name: preset, algorithm,
# game, task. Of two the later wins. "paper" holds those of the paper and its released code.

PRESETS = entries("""
    tiny: --weight-decay 0 --betas 0.9,0.95 --adam-eps 1e-8 --max-grad-norm 1 --token-budget 2048
        --lr-schedule constant --rollout-batch 256 --max-new-tokens 64 --eval-hands 100
    tiny gp: --max-new-tokens 48 --eval-hands 200 --eval-sets id,id-unseen,rule-ood
    tiny gp-vl: --eval-sets id,id-unseen,rule-ood,visual-ood,visual-ood-unseen
    tiny virl: --max-new-tokens 64

    tiny sft: --lr 3e-4 --warmup 0.03 --batch-size 64 --mistakes 0 --epochs 1 --minibatches 1 --clip 0.1
        --temperature 1 --save-every 150 --steps 200 --eval-every 100
    tiny sft gp: --steps 525 --eval-every 175
    tiny sft gp-vl: --steps 420 --eval-every 210
    tiny sft virl: --steps 153 --eval-every 51
    tiny sft virl-l: --steps 210 --eval-every 105

    tiny ppo: --lr 1e-4 --lr-schedule cosine --warmup 0.1 --temperature 0.5 --advantage gae-loo
        --unit turn --clip 0.1 --value-clip 0 --value-coef 0.5 --entropy-coef 0 --epochs 1 --minibatches 4
        --critic detached --critic-lr 3e-4 --steps 40 --hands 64 --samples 4
        --reward-scale 0.2 --eval-every 20 --save-every 20
    tiny ppo virl: --steps 60 --hands 16 --reward-scale 0.5

    tiny pretrain: --lr-schedule constant --warmup 0.065 --weight-decay 0.01 --betas 0.9,0.98 --epochs 1
        --minibatches 1 --save-every 150 --steps 300 --lr 3e-3 --batch-size 64
        --mistakes 0.3 --eval-every 150
    tiny pretrain gp-vl: --steps 225 --warmup 0.08889 --save-every 75
    tiny pretrain virl: --steps 245 --batch-size 40 --mistakes 0.2 --learn-prompts

    paper: --weight-decay 0 --adam-eps 1e-7 --token-budget 6144 --lr-schedule cosine --max-new-tokens 512
        --rollout-batch 40 --eval-hands 100
    paper gp: --rollout-batch 64 --eval-hands 234
    paper gp-vl: --rollout-batch 32
    paper virl: --rollout-batch 40 --eval-hands 48

    paper sft: --steps 400 --lr 1e-6 --warmup 0.03 --betas 0.9,0.98 --max-grad-norm 1 --batch-size 128
        --mistakes 0 --epochs 1 --minibatches 1 --clip 0.1 --temperature 1 --eval-every 50
        --save-every 100
    paper sft gp-vl: --lr 5e-7
    paper sft virl-vl: --lr 5e-7

    paper ppo: --lr 1e-6 --warmup 0 --betas 0.9,0.999 --max-grad-norm 0.01 --samples 1 --temperature 0.2
        --advantage gae --unit turn --clip 0.1 --value-clip 0.1 --value-coef 0.5 --entropy-coef 0
        --epochs 4 --minibatches 2 --critic shared --critic-lr 1e-6 --reward-scale 1
        --eval-every 5 --save-every 5 --steps 20 --hands 512
    paper ppo virl: --steps 15 --hands 320 --minibatches 4
    paper ppo virl-vl: --lr 1e-7
""")


def apply_preset(args, hidden_size):
    """Fill what the user left open from the preset and from the game's own defaults."""
    if args.preset == "auto":
        args.preset = "tiny" if hidden_size <= 512 else "paper"
    if args.algo == "pretrain" and args.preset != "tiny":
        raise SettingError(f"--preset {args.preset}: expected tiny with --algo pretrain")
    run = {args.preset, args.algo, args.game, args.task}
    game = GAMES[args.game]
    presets = PRESETS | getattr(game, "presets", {})
    line = " ".join(line for words, line in presets.items() if run.issuperset(words.split()))
    defaults = {name: parameter.default for name, parameter in inspect.signature(game).parameters.items()}
    if args.routes and args.look not in (None, args.routes):
        raise SettingError(f"{spelled(args, 'look')}: works only without --routes")
    args.look = args.look or args.routes or game.looks[args.image]
    for name, value in (defaults | vars(options().parse_args(line.split()))).items():
        if getattr(args, name, "") is None:
            setattr(args, name, value)
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


def options(description=None, everything=True):
    """Return the parser of train.py, made from the fields of Args. everything: show those of RARE, too."""
    parser = command_line("train.py", description, fail, usage="%(prog)s [options]",
                          argument_default=SUPPRESS)
    parser.add_argument("--help-all", action="help", help="show all settings")
    for name in [name for section in (Args, *Args.__bases__) for name in section.__annotations__]:
        if title := (GROUPS | RARE).get(name):
            group, hidden = parser.add_argument_group(title), name in RARE and not everything
        field = Args.__dataclass_fields__[name]
        kind, help = field.metadata["kind"], field.metadata["help"]
        if field.default:
            help += f" (default: {field.default})"
        how = dict(action="store_true")
        if field.type is not bool:
            late = isinstance(kind.names, dict)                # --custom can add to it, see `load_custom`
            how = dict(type=str if late else kind,
                       metavar=f"{{{','.join(kind.names)}}}" if kind.names else field.type.__name__.upper())
        group.add_argument(flag_of(name), help=SUPPRESS if hidden else help, **how)
    return parser


def parse(argv=None, description=__doc__):
    """Read a command line -> (Args, names of the settings that were typed).

    SettingError for a word that is none of its kind. Nothing is read or written, so that all ranks come to
    the same verdict.
    """
    argv = sys.argv[1:] if argv is None else argv
    typed = vars(options(description, "--help-all" in argv).parse_args(argv))
    return Args(**typed), frozenset(typed)


def fail(message):
    raise SettingError(message)


def load_custom(file):
    """Run a user's file; its ESTIMATORS, LOSSES, SFT_LOSSES and GAMES join the tables. SettingError that
    names the file and what is wrong with it."""
    try:
        names = runpy.run_path(file)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise SettingError(f"--custom {shown(file)}: expected a Python file that runs; {reason}") from error
    tables = {"ESTIMATORS": ESTIMATORS, "LOSSES": LOSSES, "SFT_LOSSES": SFT_LOSSES, "GAMES": GAMES}
    if not tables.keys() & names.keys():
        raise SettingError(f"--custom {file}: expected a dict {', '.join(tables)} in it")
    for title, table in tables.items():
        kind = type(next(iter(table.values())))
        for name, entry in names.get(title, {}).items():
            if not isinstance(entry, kind):
                form = "a class" if kind is type else f"{kind.__name__}(function, ...)"
                raise SettingError(f"--custom {file}: expected {form} as '{name}', not {entry!r}")
            table[name] = entry
    TASKS.update(tasks(GAMES))


def resumed(args, typed, config, source):
    """Return the settings of a run that goes on: those it had (`config`), and of the `typed` ones those that
    it may set anew. SettingError for one that contradicts, without --override."""
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
        if getattr(args, name) not in (config[name], "auto") and not args.override:
            raise SettingError(f"{source}: this run has {flag_of(name)} {config[name]}, not "
                               f"{getattr(args, name)}; leave it out, or add --override to go on with "
                               "another value")
    fresh = typed | {"out", "resume", "override", "device", "shard"}         # these follow from the machine
    return Args(**config | {name: getattr(args, name) for name in fresh})
