"""Variants of the algorithms, one file per kind. Their tables, which hold the paper's own choices as well,
are collected here.

How to change the loss: write a function as in losses.py and enter it in that file's table, or give your own
file to --custom. Nothing else changes.
"""

from dataclasses import replace
from functools import partial

from variants import official, reference
from variants.advantages import ESTIMATORS, score_values
from variants.losses import LOSSES
from variants.sft_losses import SFT_LOSSES    # noqa: F401 (the registry)


def algorithm(args):
    """Return the ppo.Estimator and the ppo.Loss of a run: --advantage, --loss, --unit, --kl-in, --compat."""
    loss = LOSSES[args.loss]
    loss = replace(loss, unit=loss.unit or args.unit)
    if args.kl_coef and args.kl_in == "loss":
        loss = reference.with_penalty(loss, args)
    names = official.switches(args.compat)
    if args.loss == "ppo" and "ratio-10" in names:
        loss = replace(loss, f=official.ratio_10)
    estimator = ESTIMATORS[args.advantage]
    # The rollout kept a state per turn, and of the policy.
    if estimator.values and (args.critic == "separate" or estimator.per == "token"):
        estimator = replace(estimator, read=partial(score_values, estimator.per))
    return official.change_estimator(estimator, names), loss
