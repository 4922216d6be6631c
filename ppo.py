"""Multi-turn PPO against a verifier: generalized advantage estimation over turns, clipped losses.

    torchrun train.py --task gp-l --algo ppo

An *action* is one whole turn (the paper's choice): gamma and lambda apply per turn. The model does not write
the verifier's words: their tokens have no ratio, no entropy and no advantage, and no discount applies to
them.

The file reads downwards: advantages, losses, the critic, the update. rollout.py plays the episodes. Other
estimators and losses (over tokens, against groups of samples, with a KL penalty) are in variants/.
"""

import copy
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Callable

import torch
from torch import nn

from kernels import without_autocast
from llama.batches import OneProcess, parts, passes
from llama.metrics import averages
from rollout import Episode, conversations_of, of_sampled, trees_of_hands, turns_of


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator: f(episodes, args) fills in `turn.advantage` and, with a critic,
    `turn.target`."""
    f: Callable
    per: str = "turn"          # what has an advantage (and a value): a "turn" or a "token"
    values: bool = True        # does it read values? If not, no critic is asked or trained
    normalize: bool = True     # are its advantages brought to mean 0 and deviation 1, over the rollout?
    groups: bool = False       # does it compare episodes of one hand? Then --samples must be 2 or more
    # Fills in `turn.value` before f is called: (actor_critic, processor, conversations, args, ranks). None:
    # read_values.
    read: Callable | None = None


@dataclass(frozen=True)
class Loss:
    """A policy loss: f(logprobs, old_logprobs, advantages, args) -> (loss, metrics), all tensors (units,).

    A unit is what a ratio is taken of: a "turn" (the weighted sum of its log-probs), a "token", or a
    "sequence" (the mean over all that was sampled in a conversation).
    """
    f: Callable
    unit: str | None = None                    # None: --unit
    # How units are averaged. "units": all of the minibatch alike. "sequences": within each conversation, then
    # over conversations, so that a long one weighs no more than a short one.
    mean: str = "units"
    # Added to the loss: (conversations, log-probs of their sampled tokens, Units.pool) -> (units,)
    penalty: Callable | None = None

    @property
    def mean_over(self):
        """Name what the mean divides by: a key of `count`."""
        return "sequence" if self.mean == "sequences" else self.unit


# ------------------------------------------------------------------------------------------------------------
# Advantages

def earned(turn, args):
    """Return r_k, what a turn earned by itself: the scaled reward less the penalties of its tokens."""
    return args.reward_scale * turn.reward - sum(turn.penalties)


def chain(rewards, values, gamma, lam):
    """Return generalized advantage estimates over a chain of steps (arXiv 1506.02438, eq. 16):

        delta_k = r_k + gamma V_{k+1} - V_k,   A_k = delta_k + gamma lambda A_{k+1}

    with V = A = 0 after the last step. Running out of attempts is a real end: nothing is bootstrapped.
    """
    advantages, next_value, advantage = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        advantage = reward + gamma * next_value - value + gamma * lam * advantage
        advantages.append(advantage)
        next_value = value
    return advantages[::-1]


def gae(episodes, args):
    """Estimate advantages over turns, with --gamma and --lam (0.9 and 0.95 in the paper)."""
    for episode in episodes:
        rewards = [earned(turn, args) for turn in episode.turns]
        values = [turn.value for turn in episode.turns]
        for turn, advantage in zip(episode.turns, chain(rewards, values, args.gamma, args.lam)):
            turn.advantage = advantage
            turn.target = advantage + turn.value


def flat(turns, name):
    """List the values, advantages or targets of all turns, whether there is one per turn or per token."""
    numbers = [getattr(turn, name) for turn in turns]
    return sum(numbers, []) if numbers and isinstance(numbers[0], list) else numbers


def fill_in(turns, name, numbers):
    """Do the inverse of `flat`: where there was a list, there is one again."""
    rest = iter(numbers)
    for turn in turns:
        old = getattr(turn, name)
        setattr(turn, name, [next(rest) for _ in old] if isinstance(old, list) else next(rest))


# Log-probs and values are float32. Advantages that differ by a few of its steps count as equal: normalising
# would blow that noise up to a deviation of 1.
ROUNDING = 2**-21


def magnitude(turn, args):
    """Return how large the terms of an advantage are, to judge its rounding; a penalty counts as a nat."""
    value = max(map(abs, flat([turn], "value")))
    return abs(args.reward_scale * turn.reward) + value + args.kl_coef * len(turn.penalties)


def mean_and_std(x, sizes, ranks=OneProcess()):
    """Return mean and standard deviation of x over all ranks. The deviation is 0 where it is no larger than
    the rounding error of numbers as large as `sizes` are on average."""
    x, sizes = (torch.tensor(numbers, dtype=torch.float64) for numbers in (x, sizes))
    n, total, terms, summed = ranks.total([len(x), x.sum(), len(sizes), sizes.abs().sum()])
    std = math.sqrt(ranks.total([((x - total / n) ** 2).sum()])[0] / n)
    rounding = ROUNDING * summed / terms
    return total / n, 0.0 if std <= rounding else std          # NaN stays NaN, for `step` to find


def normalize_advantages(turns, args, ranks=OneProcess()):
    """Shift and scale all advantages of the rollout, over all ranks, to mean 0 and deviation 1, in place.

    Where the rewards tie, all are 0: the rounding that is left is no reason to learn.
    """
    a = flat(turns, "advantage")
    mean, std = mean_and_std(a, a + [magnitude(turn, args) for turn in turns], ranks)
    fill_in(turns, "advantage", [(x - mean) / std if std else 0.0 for x in a])


def explained_variance(turns, ranks=OneProcess()):
    """Return 1 - Var(target - value) / Var(target) over all turns and ranks: 0 for a constant critic, 1 for a
    perfect one, NaN without a critic or where all targets are equal."""
    targets = flat(turns, "target")
    errors = [target - value for target, value in zip(targets, flat(turns, "value"))]
    _, spread = mean_and_std(targets, targets, ranks)
    _, rest = mean_and_std(errors, [0.0], ranks)               # no rounding is forgiven
    return 1 - (rest / spread) ** 2 if spread else math.nan


# ------------------------------------------------------------------------------------------------------------
# Losses

def ratio(log_ratio):
    """Return exp(log_ratio), with value and gradient at most e^20 = 4.9e8: exp(100) would be infinite.

    The value is clamped, and the gradient passes the clamp (straight through): where a loss wants the ratio
    back, it still pulls. Where its clipped branch wins, 0 times a finite ratio is 0; times infinity it would
    be NaN.
    """
    return (log_ratio.clamp(max=20).detach() + (log_ratio - log_ratio.detach())).exp()


def divergence(log_ratio):
    """Return r - 1 - log r, never negative: the k3 estimate of KL(old || new), r = new / old (Schulman
    2020)."""
    return ratio(log_ratio) - 1 - log_ratio


def surrogate(logprobs, old_logprobs, advantages, low, high):
    """Return PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with a range of its own in each direction:

        -min(r A, clip(r, 1 - low, 1 + high) A),   r = exp(logprobs - old_logprobs).
    """
    log_ratio = logprobs - old_logprobs
    r = ratio(log_ratio)
    loss = -torch.minimum(r * advantages, r.clamp(1 - low, 1 + high) * advantages)
    outside = (r < 1 - low) | (r > 1 + high)
    return loss, {"approx_kl": divergence(log_ratio).detach(), "clipfrac": outside.float()}


def clip(logprobs, old_logprobs, advantages, args):
    """Clip the ratio to 1 - clip ... 1 + clip, with --clip (0.1 in the paper)."""
    return surrogate(logprobs, old_logprobs, advantages, args.clip, args.clip)


def value_loss(values, old_values, targets, clip):
    """Return half the squared error; with clip > 0 the larger of two: of the value, and of the value clamped
    to old - clip ... old + clip."""
    loss = (values - targets) ** 2
    if clip > 0:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped - targets) ** 2)
    return 0.5 * loss


# ------------------------------------------------------------------------------------------------------------
# The critic

class ActorCritic(nn.Module):
    """The policy and its critic: an MLP hidden-1024-512-1 on the hidden state at a turn's last prompt token.

    critic = "shared":   the head reads the policy's hidden state and its gradient flows into the policy (the
                         paper)
             "detached": it reads the same state, but its gradient stops there (the tiny preset)
             "separate": it reads the hidden state of a second network that starts as a copy of the policy; a
                         random head then cannot disturb the policy, and the critic can learn features of its
                         own. Costs a second model.
    """

    def __init__(self, policy, critic="shared"):
        super().__init__()
        self.policy, self.critic = policy, critic
        width = policy.config.hidden_size
        self.value_head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 1))
        for parameter in self.value_head[-1].parameters():     # values start at 0, not at noise
            nn.init.zeros_(parameter)
        self.trunk = copy.deepcopy(policy) if critic == "separate" else None

    def head(self, hidden):
        """Return float32 values (turns,) of states at last prompt tokens (turns, D)."""
        with without_autocast(hidden):
            return self.value_head(hidden.float()).squeeze(-1)

    def values(self, batch, turns, hidden=None):
        """Return the values (turns,). hidden: states (B, T, D) that the policy has computed; None: make a
        forward pass for them, of the trunk if the critic is separate."""
        if hidden is None:
            hidden = (self.trunk or self.policy)(**batch.inputs()).hidden
        return self.head(hidden.flatten(0, 1)[turns.value_places])

    def forward(self, batch, turns, temperature, with_values=True):
        """Score all turns of all conversations in one pass -> log-probs and entropies (tokens,) of what was
        sampled, values (turns,) or None."""
        out = self.policy(**batch.inputs(), targets=batch.targets, temperature=temperature)
        # what the critic reads; a separate one makes a pass of its own
        states = {"shared": out.hidden, "detached": out.hidden.detach(), "separate": None}[self.critic]
        values = self.values(batch, turns, states) if with_values else None
        sampled = batch.targets >= 0
        return out.logprobs[sampled], out.entropy[sampled], values


@dataclass
class Turns:
    """The turns of a batch of conversations as tensors. With an estimator over tokens read (tokens,) for
    (turns,): an entry per sampled token, whose value is read one place before it."""
    value_places: torch.Tensor                 # (turns,) last prompt token, where the value is read, of B * T
    conversation_of_turn: torch.Tensor         # (turns,) an index into the batch
    turn_of_token: torch.Tensor                # (tokens,) of each sampled token
    conversation_of_token: torch.Tensor        # (tokens,)
    weights: torch.Tensor                      # (tokens,) its weight in the turn's log-prob
    old_logprobs: torch.Tensor                 # (tokens,)
    advantages: torch.Tensor                   # (turns,)
    old_values: torch.Tensor                   # (turns,)
    targets: torch.Tensor                      # (turns,)


def stack_turns(conversations, batch, per="turn"):
    """Return the Turns of the conversations in a batch. per: what has an advantage, a "turn" or a "token"."""
    turns, device = turns_of(conversations), batch.targets.device
    places = (batch.targets.flatten() >= 0).nonzero()[:, 0]    # (tokens,) where each is predicted

    def owners(counts):
        """Return to which owner each token belongs, (tokens,). counts: how many tokens each owns."""
        counts = torch.tensor(counts, dtype=torch.int64, device=device)
        return torch.arange(len(counts), device=device).repeat_interleave(counts)

    turn = owners([turn.length for turn in turns])             # (tokens,), and so is the next
    conversation = owners([sum(c.sampled) for c in conversations])
    first = turn.diff(prepend=turn.new_tensor([-1])) > 0       # is a token the first of its turn?
    kept = slice(None) if per == "token" else first
    return Turns(places[kept], conversation[kept], turn, conversation,
                 of_sampled(conversations, "weights", device), of_sampled(conversations, "logprobs", device),
                 *(torch.tensor(flat(turns, name), dtype=torch.float32, device=device)
                   for name in ("advantage", "value", "target")))         # advantages, old_values, targets


@torch.no_grad()
def read_values(actor_critic, processor, conversations, args, ranks):
    """Fill in `turn.value` from the hidden states that the rollout kept, without a pass."""
    assert actor_critic.trunk is None, "a separate critic needs Estimator.read: variants.algorithm"
    turns = turns_of(conversations)
    fill_in(turns, "value", actor_critic.head(torch.stack([turn.hidden for turn in turns])).tolist())


# ------------------------------------------------------------------------------------------------------------
# The update

class Units:
    """A map of sampled tokens to units (see Loss), and the weight of each unit in the mean."""

    def __init__(self, turns, batch, loss):
        turn, conversation = turns.turn_of_token, turns.conversation_of_token
        tokens, conversations = (torch.arange(n, device=turn.device) for n in (len(turn), batch.count))
        # (tokens,) the unit of each sampled token; (units,) the conversation of each unit
        self.unit, owner = {"turn": (turn, turns.conversation_of_turn),
                            "token": (tokens, conversation),
                            "sequence": (conversation, conversations)}[loss.unit]
        length = torch.bincount(self.unit, minlength=len(owner))       # (units,); 0 in a filler's pass
        self.divisor = length.clamp(min=1) if loss.unit == "sequence" else torch.ones_like(length)
        # (units,) 1 / how many units the conversation has
        self.weight = 1 / torch.bincount(owner)[owner] if loss.mean == "sequences" else 1.0

    def pool(self, x):
        """Sum numbers of tokens over turns, average them over sequences, or keep them: (tokens,) ->
        (units,)."""
        return x.new_zeros(len(self.divisor)).index_add(0, self.unit, x) / self.divisor


def count(conversations):
    """Count turns, sampled tokens and conversations -> {"turn", "token", "sequence": number}."""
    turns = turns_of(conversations)
    return {"turn": len(turns), "token": sum(turn.length for turn in turns),
            "sequence": len(conversations)}


def batch_loss(actor_critic, conversations, batch, args, estimator, loss, n):
    """Return the loss of a batch and its metrics. Each term is divided by its count over the whole minibatch
    and all ranks (n, see `count`), so that losses and gradients of batches just add up."""
    turns = stack_turns(conversations, batch, estimator.per)
    logprobs, entropy, values = actor_critic(batch, turns, args.temperature, with_values=estimator.values)
    units = Units(turns, batch, loss)
    advantages = turns.advantages
    weights = turns.weights
    if loss.unit != "turn":
        weights = 1.0                          # a token's weight is one in the log-prob of its turn
        if estimator.per == "turn":
            advantages = advantages[turns.turn_of_token]
        advantages = units.pool(advantages)                    # (tokens,) -> (units,)
    policy_loss, metrics = loss.f(units.pool(weights * logprobs), units.pool(weights * turns.old_logprobs),
                                  advantages, args)
    if loss.penalty:
        policy_loss = policy_loss + loss.penalty(conversations, logprobs, units.pool)
    metrics |= {"policy_loss": policy_loss}                    # (units,) each
    metrics = {name: (units.weight * x).sum() / n[loss.mean_over] for name, x in metrics.items()}
    metrics |= {"entropy": entropy.sum() / n["token"], "value_loss": logprobs.new_zeros(()),
                "drawn_vs_scored": (logprobs - turns.old_logprobs).abs().sum() / n["token"]}
    if estimator.values:
        errors = value_loss(values, turns.old_values, turns.targets, args.value_clip)
        metrics["value_loss"] = errors.sum() / n[estimator.per]
    total = (args.value_coef * metrics["value_loss"] + metrics["policy_loss"]
             - args.entropy_coef * metrics["entropy"])
    return total, {name: x.detach() for name, x in metrics.items()}


def update(actor_critic: ActorCritic, processor, episodes: list[Episode], args, *,
           estimator=Estimator(gae), loss=Loss(clip, "turn"), step, seed, ranks=OneProcess()):
    """Learn from a rollout: values, advantages, then `args.epochs` passes of `args.minibatches` steps each.
    Return the metrics of the update as a dict of floats.

    step(loss): reduces the gradients over ranks, clips them, steps the optimizer and returns the gradient
    norm; no step is made where loss or gradients are not finite. ranks: see llama.batches.OneProcess.
    """
    conversations = conversations_of(episodes)
    turns = turns_of(conversations)
    if estimator.values:
        (estimator.read or read_values)(actor_critic, processor, conversations, args, ranks)
    estimator.f(episodes, args)
    explained = explained_variance(turns, ranks)
    if estimator.normalize:
        normalize_advantages(turns, args, ranks)
    hands = trees_of_hands(episodes)
    trees = sum(hands, [])                     # of all hands: what minibatches are made of
    places = ranks.positions(map(len, hands))  # of this rank's trees, among those of all ranks
    n_trees, tokens, sampled = ranks.total(
        [len(trees), sum(len(c.ids) for c in conversations), count(conversations)["token"]])
    generator = torch.Generator().manual_seed(seed)            # the same on all ranks
    steps = []                                 # metrics of each
    for _ in range(args.epochs):
        order = torch.randperm(int(n_trees), generator=generator).tolist()
        for part in parts(places, order, args.minibatches):
            steps.append(one_step(actor_critic, processor, [trees[i] for i in part], args, estimator, loss,
                                  step, ranks, conversations[0]))
    first = next(metrics["drawn_vs_scored"][0] for metrics in steps if metrics)
    return averages(steps) | {
        "drawn_vs_scored": first,              # of the first step: afterwards the policy has moved
        "explained_variance": explained, "rollout_tokens": tokens, "drawn_tokens": sampled,
        "trained_tokens": args.epochs * tokens}


def one_step(actor_critic, processor, trees, args, estimator, loss, step, ranks, filler):
    """Make one optimizer step on this rank's part of a minibatch.

    Return {metric: (mean, how many it is a mean over)}; nothing where no rank has a conversation, and then no
    step is made. filler: see llama.batches.passes.
    """
    own = count(sum(trees, []))
    n = dict(zip(own, ranks.total(list(own.values()))))
    if not n["token"]:
        return {}
    sums = defaultdict(float)
    for group, batch, weight in passes(actor_critic.policy, processor, trees, args.token_budget, ranks,
                                       filler):
        total, numbers = batch_loss(actor_critic, group, batch, args, estimator, loss, n)
        (weight * total).backward()
        for name, value in numbers.items():
            sums[name] += weight * value.item()
    means = dict(zip(sums, ranks.total(list(sums.values()))))
    grad_norm = step(means["policy_loss"] + means["value_loss"])
    over = {"value_loss": estimator.per, "entropy": "token", "drawn_vs_scored": "token"}
    return {name: (mean, n[over.get(name, loss.mean_over)]) for name, mean in means.items()} | {
        "grad_norm": (grad_norm, 1)}
