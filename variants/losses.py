"""Policy losses and KL penalties, per turn, token or sequence.

    torchrun train.py --task gp-l --algo ppo --advantage grpo --loss dapo --clip 0.2

How to add one: write a function (logprobs, old_logprobs, advantages, args) -> (loss, metrics), where all
tensors have shape (units,), and enter it in LOSSES with what a unit is and how units are averaged. `metrics`
holds one number per unit under "approx_kl" and "clipfrac". `clip` itself, the paper's loss, is in ppo.py.
"""

from dataclasses import dataclass

import torch

from harness.ranges import above, arg
from ppo import Loss, clip, divergence, surrogate


@dataclass
class LossSettings:
    """Settings of single losses."""
    clip_high: float = arg(0.28, above(0), "clip range upwards", "--loss clip-higher or dapo")
    dual_clip: float = arg(3.0, above(1), "largest ratio that counts against an answer worse than expected",
                           "--loss dual-clip")


def clip_higher(logprobs, old_logprobs, advantages, args):
    """Leave more room upwards, --clip-high, so that what is unlikely can become likely. Over tokens, all of
    the minibatch alike, it is the loss of DAPO (arXiv 2503.14476, eq. 8)."""
    return surrogate(logprobs, old_logprobs, advantages, args.clip, args.clip_high)


def dual_clip(logprobs, old_logprobs, advantages, args):
    """Bound, where A < 0, also how bad a large ratio can be (arXiv 1912.09729): -max(min(r A, clip(r) A),
    c A), c = --dual-clip."""
    loss, metrics = clip(logprobs, old_logprobs, advantages, args)
    return torch.where(advantages < 0, torch.minimum(loss, -args.dual_clip * advantages), loss), metrics


def reinforce(logprobs, old_logprobs, advantages, args):
    """Follow the policy gradient itself (Williams 1992): -log pi A, without a ratio. Exact on the first step
    of a rollout only: --minibatches 1."""
    log_ratio = (logprobs - old_logprobs).detach()
    metrics = {"approx_kl": divergence(log_ratio), "clipfrac": torch.zeros_like(log_ratio)}
    return -logprobs * advantages, metrics


LOSSES = {
    "ppo": Loss(clip),
    # A mean over each sequence first: GRPO (arXiv 2402.03300, eq. 3).
    "grpo": Loss(clip, unit="token", mean="sequences"),
    # One ratio per sequence, (pi / pi_old)^(1/length): GSPO (arXiv 2507.18071, eq. 5). It moves so little
    # that its --clip is some 3e-4.
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
    """Return log(p / q). Its gradient, that of log p, is zero in expectation: in the loss it only adds
    noise."""
    return logprobs - reference


def k2(logprobs, reference):
    """Return log(p / q)^2 / 2. Its gradient, log(p / q) that of log p, is in expectation that of KL(p ||
    q)."""
    return (logprobs - reference) ** 2 / 2


def k3(logprobs, reference):
    """Return q / p - 1 - log(q / p), never negative; GRPO's. Its gradient, (1 - q / p) that of log p, is in
    expectation that of KL(q || p)."""
    return divergence(reference - logprobs)


KL = {"k1": k1, "k2": k2, "k3": k3}
