"""Measure, at every evaluation of a run, what might explain why one way to learn forgets and another does
not.

    torchrun train.py --task gp-l --algo ppo --probe-hands 32 --probe-samples 8    # log.jsonl: "probe"

The further a model has moved from the one it began as (by KL divergence on the new task), the more it is said
to forget (Shenfeld et al. 2025, arXiv 2509.04259). RL is said to change few of the weights (Mukherjee et al.
2025, arXiv 2505.11711), and to sharpen what the model can do already: pass@1 rises, pass@k, where one of k
samples must be right, does not (Yue et al. 2025, arXiv 2504.13837). A probe plays some fixed hands several
times at temperature 1. Its random numbers come from hand, sample and turn alone: they are the same at every
evaluation, and those of training stay what they would be without it.
"""

import dataclasses
import math
from collections import defaultdict
from functools import partial

import torch

from distributed.processes import gather
from harness.environments import evaluation_sets
from harness.evaluation import fixed_hands, play, rate
from harness.load import compares_with_start
from rollout import trees_of_hands
from sft import make_example
from variants import lora
from variants.reference import initial, local, reshard, scores
from variants.tune import VISION

# Per hand: sums over its samples.
COLUMNS = "solved", "answers", "tokens", "entropy", "log_ratio"


def pass_at(k, n, c):
    """Return the probability that of k samples one is right, if c of n were: 1 - C(n - c, k) / C(n, k),
    unbiased (Chen et al. 2021, arXiv 2107.03374)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def started(args, model):
    """Return the reference (see variants/reference.py) of a KL penalty or an SFT loss, or None, and that of a
    probe, or None: contexts in which the model is the one that the run began with."""
    if not (compares_with_start(args) or args.probe_hands):
        return None, None
    start = partial(lora.disabled, model) if args.lora_rank else initial(model)
    return start if compares_with_start(args) else None, start


class Probe:
    """Called on all ranks at the same time: what the policy does now, and how far it is from the one that the
    run began with, of which `start` is the reference."""

    def __init__(self, args, model, processor, processes, start):
        self.args, self.model, self.processor, self.processes = args, model, processor, processes
        self.start, self.player = start, partial(play, model, processor, args, processes)
        self.sets = evaluation_sets(dataclasses.replace(args, eval_sets="id,rule-ood"))
        self.ks = [k for k in (1, 2, 4, 8) if k <= args.probe_samples]
        self.begun = None      # episodes of "id" that the initial policy played, and how it scored them

    def __call__(self, progress=""):
        """Print the gist and return {"id" and "rule-ood": see `behaviour`, "reverse_kl" and "forward_kl" (see
        `divergence`) on "id", "weights": see `changed`}.

        reverse: KL(policy || init), from what the policy plays; forward: KL(init || policy), from what the
        initial policy plays on the same hands.
        """
        played = {name: self.play(name) for name in self.sets}
        scored = {name: self.score(episodes) for name, episodes in played.items()}
        with self.start():
            initially = self.score(played["id"])
            if self.begun is None:
                episodes = self.play("id")
                self.begun = episodes, self.score(episodes)
        result = {name: self.behaviour(played[name], scored[name]) for name in self.sets}
        result |= self.divergence("reverse_kl", played["id"], scored["id"], initially)
        result |= self.divergence("forward_kl", *self.begun, self.score(self.begun[0]))
        result["weights"] = changed(self.model, self.start, self.processes.all_reduce)
        self.processes.print(
            f"{progress}  probe       KL per token: reverse {result['reverse_kl']:.4f}, forward "
            f"{result['forward_kl']:.4f}   weights changed {100 * result['weights']['changed']['all']:.1f} %")
        return result

    def play(self, name):
        """Play this rank's hands of a set, --probe-samples episodes of each, by the model as it is now."""
        hands = fixed_hands(self.args.probe_hands, self.sets[name], self.processes)
        return self.player(self.sets[name], hands, 1.0, self.args.probe_samples)

    def score(self, episodes):
        """Return each episode's `scores` (variants/reference.py), a list of (2, tokens) in float64."""
        filler = make_example(self.processor, self.sets["id"](), seed=0)       # a rank may have no hand
        trees = sum(trees_of_hands(episodes), [])
        found = {id(c): both.double() for c, both in scores(
            self.model, self.processor, trees, self.args.token_budget, ranks=self.processes, filler=filler)}
        return [torch.cat([found[id(c)] for c in episode.conversations], 1) for episode in episodes]

    def of_hands(self, episodes, scored, others=None):
        """Return COLUMNS of every hand of all ranks, in order: {name: (hands,) float64}. scored: as from
        `score`; others: by the policy compared with."""
        sums = defaultdict(lambda: 0)
        for episode, (logprobs, entropy), (other, _) in zip(episodes, scored, others or scored):
            row = [episode.success, len(episode.turns), len(logprobs), entropy.sum(),
                   (logprobs - other).sum()]
            sums[episode.seed] += torch.tensor(row, dtype=torch.float64)
        rows = sorted(gather([(seed, row.tolist()) for seed, row in sums.items()]))
        return dict(zip(COLUMNS, torch.tensor([row for _, row in rows], dtype=torch.float64).T))

    def behaviour(self, episodes, scored):
        """Return rates, each with its error as NAME_se: pass@k, where a sample is an episode with its
        revisions; length, tokens per answer; entropy, nats per token."""
        hands = self.of_hands(episodes, scored)
        result = {"n": len(hands["solved"])}
        for k in self.ks:
            found = torch.tensor([pass_at(k, self.args.probe_samples, int(c)) for c in hands["solved"]],
                                 dtype=torch.float64)
            result |= rate(f"pass@{k}", found, torch.ones_like(found))
        result |= rate("length", hands["tokens"], hands["answers"])
        return result | rate("entropy", hands["entropy"], hands["tokens"])

    def divergence(self, name, episodes, scored, others):
        """Return KL(who played || other), the mean of log p - log q over sampled tokens, in nats, as NAME;
        summed over an answer as NAME_answer."""
        hands = self.of_hands(episodes, scored, others)
        return rate(name, hands["log_ratio"], hands["tokens"]) | rate(
            f"{name}_answer", hands["log_ratio"], hands["answers"])


# ------------------------------------------------------------------------------------------------------------
# Weights

def pairs(model, start):
    """Yield (name, now, at the start) of every weight, of a sharded one this rank's slices. An adapted one is
    W + (alpha / r) B A now and was W."""
    reshard(model)
    remembered = getattr(start, "remembered", {})
    for name, parameter in model.named_parameters():
        now = local(parameter.detach())
        if name.endswith(".base.weight"):                      # of a lora.Adapted; all else is frozen then
            part = model.get_submodule(name.removesuffix(".base.weight"))
            yield name, now + part.scale * part.lora_B.detach() @ part.lora_A.detach(), now
        elif not name.endswith((".lora_A", ".lora_B")):
            yield name, now, remembered.get(name, now)


def kind(name, config):
    """Return what a weight is: all of the layers that look at pictures are cross-attention, the tower and its
    projector are vision."""
    kinds = {"norm.": "norm", ".self_attn.": "attention", ".mlp.": "mlp", "embed_tokens.": "embedding",
             "lm_head.": "head"}
    if name.startswith(VISION):
        return "vision"
    if name.startswith(tuple(f"layers.{i}." for i in config.cross_attention_layers)):
        return "cross-attention"
    return next(what for part, what in kinds.items() if part in name)


def changed(model, start, all_reduce=lambda x: x):
    """Return {"changed": share of the weights that are another number in bfloat16 than at the start,
    "distance": ||w - w0|| / ||w0||}, each {"all": of the whole policy, frozen and unused weights included,
    and by kind}."""
    sums = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
    for name, now, then in pairs(model, start):
        then = then.to(now.device)
        norms = torch.stack([(now - then).norm(), then.norm()]).cpu().double() ** 2
        other = (now.bfloat16() != then.bfloat16()).sum().item()
        sums[kind(name, model.config)] += torch.tensor([other, now.numel(), *norms], dtype=torch.float64)
    # whole copies count alike above and below
    other, of, moved, was = all_reduce(torch.stack([sum(sums.values()), *sums.values()])).T
    shares = {"changed": other / of, "distance": (moved / was).sqrt()}
    return {name: dict(zip(["all", *sums], share.tolist())) for name, share in shares.items()}
