"""Losses for SFT: what an expert's token should weigh.

    torchrun train.py --task gp-l --algo sft --sft-loss dft

How to add one: write a function (logprobs, before, rows, args) -> loss of each token, all (tokens,), and
enter it in LOSSES. logprobs are the model's of the expert's tokens, with a gradient; `before` those of an
earlier model if the entry asks for one, else None: "step", the model as this optimizer step's batch found it,
or "initial", the model as the run began. rows: which example of the micro-batch a token lies in.
"""

from dataclasses import dataclass
from typing import Callable

import torch

from variants.losses import ratio, surrogate


@dataclass(frozen=True)
class Loss:
    """An entry of the table."""
    f: Callable
    before: str = ""           # "step", "initial", or none


def dft(logprobs, before, rows, args):
    """Dynamic fine-tuning (arXiv 2508.05629): -sg(p) log p. The gradient of log p is that of p over p; times
    p, an unlikely token no longer pulls the harder the less likely it is. Where p = 1 it is plain SFT."""
    return -ratio(logprobs.detach()) * logprobs


def psft(logprobs, before, rows, args):
    """Proximal SFT (arXiv 2508.17784): PPO's clipped surrogate, every token an action of advantage 1. Only
    from the second minibatch of a batch on (--minibatches, --epochs) can a ratio differ from 1; in the first
    the gradient is that of plain SFT."""
    return surrogate(logprobs, before, torch.ones_like(logprobs), args.clip, args.clip)[0]


def iw(logprobs, before, rows, args):
    """Importance-weighted SFT (arXiv 2507.12856): -w log p of a dialogue, w = p / p_initial of its tokens,
    without gradient. Good data are a sample of the initial policy's successes; what the policy has come to do
    more often counts more, as it would in RL. A product of thirty ratios can be anything, so each token's is
    clipped."""
    ratios = ratio((logprobs - before).detach()).clamp(1 - args.clip, 1 + args.clip)
    products = ratios.new_zeros(int(rows.max()) + 1 if len(rows) else 0).index_add(0, rows, ratios.log())
    return -ratio(products)[rows] * logprobs


LOSSES = {"dft": Loss(dft), "psft": Loss(psft, before="step"), "iw-sft": Loss(iw, before="initial")}
