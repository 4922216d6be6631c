"""Make the environments of a run: training and evaluation sets are instances of one class."""

from envs import GAMES
from games.mixed import Mixed
from games.prompts import load_prompts
from harness.settings import GAME_SETTINGS
from variants import official


def make_env(args, **changes):
    """Return a factory of environments with the run's settings and `changes` to them."""
    game = GAMES[args.game]
    settings = {name: getattr(args, name) for name in GAME_SETTINGS if getattr(args, name) is not None}
    settings |= {"image": args.image, "size": game.sizes[args.preset],
                 "prompts": load_prompts(args.prompts) if args.prompts else None} | changes
    return lambda: official.wrap(game(**settings), args.compat)


def training_env(args):
    """Return the factory of the game that is learnt from: with --rules one rule per seed."""
    if not args.rules:
        return make_env(args)
    factories = [make_env(args, rule=rule) for rule in args.rules.split(",")]
    return lambda: Mixed([make() for make in factories])


def evaluation_sets(args):
    """Return {name: factory} of the sets in --eval-sets: the game's own `shifts` of training."""
    known = GAMES[args.game].shifts(args.rule, args.look, args.image)
    if args.ood_routes:
        known["visual-ood"] = {"look": args.ood_routes}
    return {name: make_env(args, **known[name]) for name in args.eval_sets.split(",")}


def training_mixture(args):
    """Return what SFT learns from, as (environment, weight) pairs; see sft.make_batch.

    Pre-training takes the game's `broad`, of which a text task leaves out the pictures; with --describe, only
    the pictures to describe.
    """
    if args.algo != "pretrain":
        return [(training_env(args)(), 1.0)]
    return [(make_env(args, **settings)(), weight) for weight, settings in GAMES[args.game].broad()
            if (settings.get("describe") or not args.describe) and (args.image or not settings.get("image"))]
