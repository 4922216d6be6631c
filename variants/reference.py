"""The frozen policy with which a KL penalty, an SFT loss or a probe compares, without a second copy on the
device.

    torchrun train.py --task gp-l --algo ppo --kl-coef 0.05
    torchrun train.py --task gp-l --algo sft --sft-loss iw-sft

A reference is a function without arguments that returns a context; inside of it the policy computes as the
reference does. `initial` makes one that puts the initial values of the trained weights back for a while. With
adapters, `lora.disabled` is one that costs nothing at all.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from harness.ranges import arg, at_least, one_of
from llama.batches import OneProcess, passes
from rollout import trees_of_hands
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
    return Snapshot(policy, list(trained.values()), dict(zip(trained, on_host(trained.values()))))


@dataclass(frozen=True)
class Snapshot:
    """A reference from weights as they once were."""
    policy: nn.Module
    parameters: list
    remembered: dict           # name: what a parameter held, on the host

    @contextmanager
    def __call__(self):
        trained = on_host(self.parameters)
        write(self.policy, self.parameters, self.remembered.values())
        try:
            yield
        finally:
            write(self.policy, self.parameters, trained)


def local(parameter):
    """Return what this rank holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def on_host(parameters):
    return [local(parameter.detach()).to("cpu", copy=True) for parameter in parameters]


@torch.no_grad()
def write(policy, parameters, tensors):
    """Fill the parameters in place, and forget what was computed from their old content: gathered weights,
    autocast's copies."""
    for parameter, tensor in zip(parameters, tensors):
        local(parameter).copy_(tensor)
    reshard(policy)
    torch.clear_autocast_cache()


def reshard(policy):
    """Forget gathered weights, which a forward pass may have left in place of this rank's slices."""
    for unit in policy.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


# ------------------------------------------------------------------------------------------------------------
# What it is for

@torch.no_grad()
def scores(model, processor, trees, token_budget, temperature=1.0, ranks=OneProcess(), filler=None):
    """Yield (conversation, (2, n) on the host: log-probs and entropies that its n sampled tokens have by the
    model as it is now), in no order."""
    for group, batch, weight in passes(model, processor, trees, token_budget, ranks, filler):
        out = model(**batch.inputs(), targets=batch.targets, temperature=temperature)
        both = torch.stack([out.logprobs, out.entropy])[:, batch.targets >= 0].cpu()
        if weight:
            yield from zip(group, both.split([sum(c.sampled) for c in group], 1), strict=True)


def score(*given, **how):
    """Note in each conversation, as `reference`, the log-probs among `scores`; 0 for tokens that were not
    sampled."""
    for conversation, (logprobs, _) in scores(*given, **how):
        found = iter(logprobs.tolist())
        conversation.reference = [next(found) if drawn else 0.0 for drawn in conversation.sampled]


def rescore(model, processor, episodes, args, ranks):
    """Give every sampled token the log-prob that training computes for it, in place of the one it was drawn
    with -> {"drawn_vs_scored": mean over tokens of how far they were apart}.

    Decoding and training round differently, in bfloat16 so much that ratios of turns, which sum dozens of
    tokens, leave the clip range before any step (docs/scale.md). TRL and verl score again, too.
    """
    conversations = [c for episode in episodes for c in episode.conversations]
    score(model, processor, sum(trees_of_hands(episodes), []), args.token_budget, args.temperature, ranks,
          conversations[0])
    off = sum(abs(x - y) for c in conversations for x, y in zip(c.logprobs, c.reference))
    for c in conversations:
        c.logprobs = c.reference
    off, drawn = ranks.total([off, sum(sum(c.sampled) for c in conversations)])
    return {"drawn_vs_scored": off / drawn}


def penalize(conversations, args):
    """Return the sum of the KL estimates over all sampled tokens, from `score`; with --kl-in reward, take
    them from the rewards of the turns."""
    total = 0.0
    for conversation in conversations:
        for turn in conversation.turns:
            drawn = slice(turn.start, turn.end)
            both = (torch.tensor(x[drawn]) for x in (conversation.logprobs, conversation.reference))
            kl = KL[args.kl_estimator](*both)
            total += kl.sum().item()
            if args.kl_in == "reward":
                turn.penalties = (args.kl_coef * kl).tolist()
    return total


def score_reference(model, processor, episodes, args, reference, ranks):
    """Score all conversations by the reference and penalize them -> {"kl_reference": mean over what was
    sampled, of all ranks}."""
    conversations = [c for episode in episodes for c in episode.conversations]
    with reference():
        score(model, processor, sum(trees_of_hands(episodes), []), args.token_budget, args.temperature, ranks)
    drawn = sum(sum(c.sampled) for c in conversations)
    kl, drawn = ranks.total([penalize(conversations, args), drawn])
    return {"kl_reference": kl / drawn}


def with_penalty(loss, args):
    """Return the ppo.Loss with --kl-coef times the divergence from the reference added. Of a turn it is the
    sum, as its log-prob is a sum, too."""
    def penalty(conversations, logprobs, gather):
        theirs = [x for c in conversations for x, sampled in zip(c.reference, c.sampled) if sampled]
        theirs = torch.tensor(theirs, dtype=torch.float32, device=logprobs.device)
        return args.kl_coef * gather(KL[args.kl_estimator](logprobs, theirs))

    return replace(loss, penalty=penalty)
