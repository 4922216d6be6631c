"""Check that the settings make a valid run, before weights are read or anything is written.

    train.py: error: --hands 3: works only with --algo ppo

`settle` completes the settings of a command line, a program or a resumed run. It refuses a setting that is
out of its range (declared in settings.py), has no effect (names in --compat may: variants/official.py), or is
at odds with the rest. What files hold shows when they are read.
"""

import inspect
import re
from pathlib import Path

import envs
from harness.ranges import SettingError, met, one_of, several, shown, text
from harness.settings import GAME_SETTINGS, Args, apply_preset, flag_of, load_custom, spelled
from variants import ESTIMATORS, LOSSES, official


def settle(args, config, typed=frozenset(), world=1):
    """Complete the settings, in place, or raise a SettingError.

    config: of the model; typed: names of the settings that the user gave; world: ranks.
    """
    if args.custom:
        load_custom(args.custom)
    check_ranges(args)
    apply_preset(args, config.hidden_size)
    check_needs(args, typed)
    check_words(args)
    for name, expected in conflicts(args, config, world):
        raise SettingError(f"{spelled(args, name)}: expected {expected}")


def check_ranges(args, kinds=None):
    """Refuse a setting that is neither the default nor of its kind. kinds: in place of the declared ones."""
    fields = Args.__dataclass_fields__
    for name, kind in (kinds or {name: field.metadata["kind"] for name, field in fields.items()}).items():
        value = getattr(args, name)
        if repr(value) != repr(fields[name].default):          # True is no 1 here
            if kind.fit(value) is None:
                raise SettingError(f"{flag_of(name)} {kind.refusal(value)}")
            setattr(args, name, kind.fit(value))


def check_words(args):
    """Do the same for settings of which the game or the disk says what they may be."""
    game = envs.GAMES[args.game]
    rule = game.kinds["rule"]
    check_ranges(args, {"routes": ROUTE_FOLDER, "ood_routes": ROUTE_FOLDER, "look": game.kinds["look"],
                        "rule": rule, "rules": several(rule)})
    sets = game.shifts(args.rule, args.look, args.image)
    check_ranges(args, {"eval_sets": several(one_of(tuple(sets)))})


ROUTE_FOLDER = text("a folder of routes in the released format", lambda name: Path(name).is_dir())


# ------------------------------------------------------------------------------------------------------------
# Settings without effect

def check_needs(args, typed):
    """Refuse what was typed and would do nothing, as it needs other settings: who types it expects something.

    What the estimators, losses and games of --custom read is not known here.
    """
    for name in sorted(typed):
        for clause in filter(None, Args.__dataclass_fields__[name].metadata["needs"].split("; ")):
            own = args.custom and re.search("--(loss|advantage|sft-loss|task) ", clause)
            if not own and not met(args, clause):
                raise SettingError(f"{spelled(args, name)}: works only with {clause}")
    known = inspect.signature(envs.GAMES[args.game]).parameters
    for name in GAME_SETTINGS:
        if getattr(args, name) is not None and name not in known:
            raise SettingError(f"{spelled(args, name)}: works only with another --task than {args.task}")


# ------------------------------------------------------------------------------------------------------------
# Settings at odds with each other

def conflicts(args, config, world):
    """Yield (a setting, what is expected of it) wherever two contradict each other."""
    ppo = args.algo == "ppo"
    if args.image and config.vision is None:
        yield "task", f"{args.game}-l, as {shown(args.model)} is a text-only model"
    useful = [*official.OF_GAME.get(args.game, []), *(official.PPO if ppo else [])]
    if args.compat not in ("", "official") and set(args.compat.split(",")) - set(useful):
        own = f"what --task {args.task} --algo {args.algo} has: {', '.join(useful)}"
        yield "compat", f"official alone, or {own}"
    if args.shard == "on" and (world == 1 or args.algo == "pretrain" or args.lora_rank):
        # Muon steps in whole matrices; beside adapters there are whole copies of weights that do not change
        yield "shard", (
            "several ranks (torchrun --nproc-per-node 2), another --algo than pretrain and no --lora-rank")
    if args.tune == "vision" and (not args.image or args.algo == "pretrain"):
        yield "tune", "with pictures to learn from: --task gp-vl or virl-vl, --algo sft or ppo"
    if args.algo == "eval":
        if args.eval_hands == 0:
            yield "eval_hands", "at least 1 with --algo eval"
        return
    shared = "hands" if ppo else "batch_size"
    if getattr(args, shared) < world:
        yield shared, f"at least {world}, one for each rank"
    if ppo:
        estimator, unit = ESTIMATORS[args.advantage], LOSSES[args.loss].unit or args.unit
        if estimator.groups and args.samples < 2:
            yield "advantage", "--samples of at least 2: it compares the episodes of a hand"
        if estimator.per == "token" and unit == "turn":
            yield "advantage", "--unit token, or a --loss over tokens or sequences: each token has its own"


def attempt(args, name, expected, function, *arguments):
    """Return what a function makes of a setting; refuse the setting if it fails, with the reason."""
    try:
        return function(*arguments)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SettingError(f"{spelled(args, name)}: expected {expected}; {reason}") from None
