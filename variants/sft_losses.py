"""Losses for SFT: what an expert's token should weigh.

    torchrun train.py --task gp-l --algo sft --sft-loss dft

How to add one: write a function (logprobs, rows, examples, args) that returns the loss of each token, and
enter it in SFT_LOSSES. `logprobs`, `rows` and the losses have shape (tokens,). logprobs: the model's
log-probs of the expert's tokens, with a gradient; rows: which example a token lies in. A loss that compares
with an earlier model names it in the entry's field `before`, and gets the log-probs of that model from the
function `earlier` below.
"""

from dataclasses import dataclass
from typing import Callable

import torch

from ppo import ratio, surrogate
from rollout import of_sampled
from sft import nll


@dataclass(frozen=True)
class SFTLoss:
    """An entry of the table."""
    f: Callable
    before: str = ""           # "step": the model as the batch found it; "initial": as the run began; or none


def earlier(examples, logprobs):
    """Return the log-probs of the same tokens by the earlier model, (tokens,)."""
    return of_sampled(examples, "reference", logprobs.device)


def dft(logprobs, rows, examples, args):
    """Weigh a token by its probability (dynamic fine-tuning, arXiv 2508.05629): -sg(p) log p. The gradient of
    log p is that of p over p; times p, an unlikely token no longer pulls the harder the less likely it is.
    Where p = 1 it is plain SFT."""
    return -ratio(logprobs.detach()) * logprobs


def psft(logprobs, rows, examples, args):
    """Clip the ratio of a token, an action of advantage 1, as PPO does (proximal SFT, arXiv 2508.17784). Only
    from the second minibatch of a batch on (--minibatches, --epochs) can a ratio differ from 1; in the first
    the gradient is that of plain SFT."""
    ones = torch.ones_like(logprobs)
    return surrogate(logprobs, earlier(examples, logprobs), ones, args.clip, args.clip)[0]


def iw(logprobs, rows, examples, args):
    """Weigh a dialogue by how much likelier it became (importance-weighted SFT, arXiv 2507.12856): -w log p,
    w = p / p_initial of its tokens, without gradient. Good data are a sample of the initial policy's
    successes; what the policy has come to do more often counts more, as it would in RL. A product of thirty
    ratios can be anything, so each token's is clipped."""
    ratios = ratio((logprobs - earlier(examples, logprobs)).detach()).clamp(1 - args.clip, 1 + args.clip)
    products = ratios.new_zeros(len(examples)).index_add(0, rows, ratios.log())
    return -ratio(products)[rows] * logprobs


SFT_LOSSES = {"nll": SFTLoss(nll), "dft": SFTLoss(dft), "psft": SFTLoss(psft, "step"),
              "iw-sft": SFTLoss(iw, "initial")}
