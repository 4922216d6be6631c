"""Policy losses and KL penalties: numbers in, one loss a unit out.

    torchrun train.py --task gp-l --algo ppo --advantage grpo --loss dapo --clip 0.2

How to add one: write a function (logprobs, old_logprobs, advantages, args) -> (loss, metrics), where all
tensors have shape (units,), and enter it in LOSSES with what a unit is and how units are averaged. `metrics`
holds one number a unit under "approx_kl" and "clipfrac". `ppo`, the paper's, is in ppo.py.
"""

from dataclasses import dataclass
from typing import Callable

import torch

from harness.ranges import above, arg


@dataclass
class LossSettings:
    """Settings of single losses."""
    clip_high: float = arg(0.28, above(0), "clip range upwards", "--loss clip-higher or dapo")
    dual_clip: float = arg(3.0, above(1), "largest ratio that counts against an answer worse than expected",
                           "--loss dual-clip")


@dataclass(frozen=True)
class Loss:
    """An entry of the table. A sequence is all that was sampled in one conversation."""
    f: Callable
    # What a ratio is taken of: a "turn", a "token", a "sequence" (the mean of its log-probs); None: --unit.
    unit: str | None = None
    # Over all "units" of the minibatch, or over the units of each of its "sequences" and then over these.
    mean: str = "units"


def ratio(log_ratio):
    """exp(log_ratio), finite: from 20 on it counts as 20 (e^20 = 4.9e8), with the gradient of that. So a gate
    that is open still pulls back what is beyond, and one that is shut gives 0; times an infinity it would be
    NaN."""
    return (log_ratio.clamp(max=20).detach() + (log_ratio - log_ratio.detach())).exp()


def divergence(log_ratio):
    """r - 1 - log r, never negative: the k3 estimate of KL(old || new), r = new / old (Schulman 2020)."""
    return ratio(log_ratio) - 1 - log_ratio


def surrogate(logprobs, old_logprobs, advantages, low, high):
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with a range of its own in each direction:

        -min(r A, clip(r, 1 - low, 1 + high) A),   r = exp(logprobs - old_logprobs).
    """
    log_ratio = logprobs - old_logprobs
    r = ratio(log_ratio)
    loss = -torch.minimum(r * advantages, r.clamp(1 - low, 1 + high) * advantages)
    outside = (r < 1 - low) | (r > 1 + high)
    return loss, {"approx_kl": divergence(log_ratio).detach(), "clipfrac": outside.float()}


def clip(logprobs, old_logprobs, advantages, args):
    """The same range both ways. As "grpo" with a mean over each sequence first (GRPO, arXiv 2402.03300,
    eq. 3). As "gspo" with one ratio per sequence, (pi / pi_old)^(1/length) (GSPO, arXiv 2507.18071, eq. 5):
    it moves so little that its --clip is some 3e-4."""
    return surrogate(logprobs, old_logprobs, advantages, args.clip, args.clip)


def clip_higher(logprobs, old_logprobs, advantages, args):
    """More room upwards, --clip-high, so that what is unlikely can become likely. Over tokens, all of the
    minibatch alike, it is the loss of DAPO (arXiv 2503.14476, eq. 8)."""
    return surrogate(logprobs, old_logprobs, advantages, args.clip, args.clip_high)


def dual_clip(logprobs, old_logprobs, advantages, args):
    """Where A < 0, a bound also on how bad a large ratio can be (arXiv 1912.09729): -max(min(r A, clip(r) A),
    c A), c = --dual-clip."""
    loss, metrics = clip(logprobs, old_logprobs, advantages, args)
    return torch.where(advantages < 0, torch.minimum(loss, -args.dual_clip * advantages), loss), metrics


def reinforce(logprobs, old_logprobs, advantages, args):
    """The policy gradient itself (Williams 1992): -log pi A, without a ratio. Exact on the first step of a
    rollout only: --minibatches 1."""
    log_ratio = (logprobs - old_logprobs).detach()
    metrics = {"approx_kl": divergence(log_ratio), "clipfrac": torch.zeros_like(log_ratio)}
    return -logprobs * advantages, metrics


LOSSES = {
    "grpo": Loss(clip, unit="token", mean="sequences"),
    "gspo": Loss(clip, unit="sequence"),
    "clip-higher": Loss(clip_higher),
    "dapo": Loss(clip_higher, unit="token"),
    "dual-clip": Loss(dual_clip),
    "reinforce": Loss(reinforce),
}


# ------------------------------------------------------------------------------------------------------------
# Estimates of KL(policy || reference) from tokens that the policy sampled (Schulman 2020,
# joschu.net/blog/kl-approx.html), token by token. As numbers, in the reward, k1 and k3 have the right mean,
# k2 is biased and small in variance. As a loss it is their gradient that counts:

def k1(logprobs, reference):
    """log(p / q). Its gradient, that of log p, is zero in expectation: in the loss it only adds noise."""
    return logprobs - reference


def k2(logprobs, reference):
    """log(p / q)^2 / 2. Its gradient, log(p / q) that of log p, is in expectation that of KL(p || q)."""
    return (logprobs - reference) ** 2 / 2


def k3(logprobs, reference):
    """q / p - 1 - log(q / p), never negative; GRPO's. Its gradient, (1 - q / p) that of log p, is in
    expectation that of KL(q || p)."""
    return divergence(reference - logprobs)


KL = {"k1": k1, "k2": k2, "k3": k3}
