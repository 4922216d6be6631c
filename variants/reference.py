"""Provide a frozen policy that KL penalties and SFT losses compare with; no second copy is on the device.

    torchrun train.py --task gp-l --algo ppo --kl-coef 0.05
    torchrun train.py --task gp-l --algo sft --sft-loss iw-sft

A reference is a function without arguments that returns a context; inside of it the policy computes as the
reference does. `initial` makes one that puts the initial values of the trained weights back for a while. With
adapters, `lora.disabled` is one that costs nothing at all.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.distributed.fsdp import FSDPModule

from harness.ranges import arg, at_least, one_of
from llama.batches import OneProcess, passes
from llama.folders import local
from rollout import conversations_of, of_sampled, trees_of_hands, turns_of
from variants.losses import KL


@dataclass
class ReferenceSettings:
    """Settings of a KL penalty."""
    rescore: str = arg("auto", one_of(("auto", "on", "off")),
                       "before the update, replace the log-probs that were drawn by those of a pass as in "
                       "training: in bfloat16 the two differ, and clipping would see it (auto: on GPUs)",
                       "--algo ppo")
    kl_coef: float = arg(0.0, at_least(0),
                         "weight of a penalty on the KL divergence from the policy that the run began with; "
                         "0 for none", "--algo ppo")
    kl_in: str = arg("loss", one_of(("loss", "reward")), "where that penalty goes", "--kl-coef above 0")
    kl_estimator: str = arg("k3", one_of(tuple(KL)),
                            "how the divergence is estimated from a token; in the loss the gradient of k1 is "
                            "zero in expectation", "--kl-coef above 0")


def initial(policy):
    """Return a reference to the policy as it is now. The weights that are trained (of sharded ones: this
    rank's slices) are kept in host memory, and while they are swapped in, the trained ones are there, too."""
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    remembered = local_copies(trained)

    @contextmanager
    def reference():
        now = local_copies(trained)
        write(policy, trained, remembered)
        try:
            yield
        finally:
            write(policy, trained, now)

    return reference


def local_copies(parameters):
    """Copy {name: parameter} to host memory."""
    return {name: local(p.detach()).to("cpu", copy=True) for name, p in parameters.items()}


@torch.no_grad()
def write(policy, parameters, contents):
    """Fill the parameters in place, and forget what was computed from their old content: gathered weights,
    autocast's copies."""
    for name, parameter in parameters.items():
        local(parameter).copy_(contents[name])
    for unit in policy.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()      # gathered weights may be left in place of this rank's slices
    torch.clear_autocast_cache()


# ------------------------------------------------------------------------------------------------------------
# What it is for

@torch.no_grad()
def score(model, processor, trees, token_budget, temperature=1.0, ranks=OneProcess(), filler=None):
    """Note in each conversation, as `reference`, the log-probs that sampled tokens have by the model as it is
    now, and 0 for the others."""
    for group, batch, weight in passes(model, processor, trees, token_budget, ranks, filler):
        out = model(**batch.inputs(), targets=batch.targets, temperature=temperature)
        if weight:
            found = iter(out.logprobs[batch.targets >= 0].tolist())
            for conversation in group:
                conversation.reference = [next(found) if sampled else 0.0 for sampled in conversation.sampled]


def rescore(model, processor, episodes, args, ranks):
    """Give every sampled token the log-prob that training computes for it, in place of the one it was drawn
    with -> {"drawn_vs_scored": mean over tokens of how far they were apart}.

    Decoding and training round differently, in bfloat16 so much that ratios of turns, which sum dozens of
    tokens, leave the clip range before any step (docs/scale.md). TRL and verl score again, too.
    """
    before, now = score_episodes(model, processor, episodes, args, ranks)
    for conversation in conversations_of(episodes):
        conversation.logprobs = conversation.reference
    return {"drawn_vs_scored": mean((before - now).abs(), ranks)}


def score_episodes(model, processor, episodes, args, ranks):
    """Score all conversations as `score` does. Return the log-probs with which tokens were drawn, and those
    that they have now, (tokens,) each."""
    trees, conversations = sum(trees_of_hands(episodes), []), conversations_of(episodes)
    score(model, processor, trees, args.token_budget, args.temperature, ranks, conversations[0])
    return of_sampled(conversations, "logprobs"), of_sampled(conversations, "reference")


def mean(x, ranks):
    """Return the mean of numbers (n,) over all ranks."""
    total, n = ranks.total([x.double().sum(), len(x)])
    return total / n


def score_reference(model, processor, episodes, args, reference, ranks):
    """Score all conversations by the reference and estimate the KL divergence of each sampled token; with
    --kl-in reward, its penalty is taken from the reward -> {"kl_reference": mean over tokens of all ranks}"""
    with reference():
        both = score_episodes(model, processor, episodes, args, ranks)
    kl, turns = KL[args.kl_estimator](*both), turns_of(conversations_of(episodes))
    for turn, own in zip(turns, kl.split([turn.length for turn in turns])):
        if args.kl_in == "reward":
            turn.penalties = (args.kl_coef * own).tolist()
    return {"kl_reference": mean(kl, ranks)}


def with_penalty(loss, args):
    """Return the ppo.Loss with --kl-coef times the divergence from the reference added. Of a turn it is the
    sum, as its log-prob is a sum, too."""
    def penalty(conversations, logprobs, pool):
        theirs = of_sampled(conversations, "reference", logprobs.device)
        return args.kl_coef * pool(KL[args.kl_estimator](logprobs, theirs))

    return replace(loss, penalty=penalty)
