"""Multi-turn PPO against a verifier: rollout, generalized advantage estimation over turns, clipped losses.

    torchrun train.py --task gp-l --algo ppo

One episode is a dialogue. The model answers, the verifier replies, the model revises, until the answer is
right or the attempts are used up. On a route each point is a dialogue of its own, and the route is one
episode. An *action* is one whole turn (the paper's choice; `--unit token` makes it one token), and the
advantage flows from turn to turn: a verifier message is something the model was told, not something it did,
so it takes no part in ratios, entropies, normalisation or the decay of an advantage.

The file reads downwards: the record of an episode, the rollout that fills it, the advantages, the losses, the
update. Other estimators and losses (over tokens, against groups of samples, with a KL penalty) and how to add
one: variants/.
"""

import copy
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from llama.batches import alone, bucket, collate, parts
from llama.metrics import averages
from variants import advantages, losses, official
from variants.advantages import Estimator, earned
from variants.losses import Loss


# ------------------------------------------------------------------------------------------------------------
# Advantages: episodes with values in, advantages and value targets out. A variant is a function and a table
# entry.

def gae(episodes, args):
    """Generalized advantage estimation over turns (Schulman et al. 2016; gamma 0.9, lambda 0.95 in the
    paper).

        delta_k = r_k + gamma V_{k+1} - V_k,   A_k = delta_k + gamma lambda A_{k+1}

    with V = A = 0 after the last turn.
    An episode that ran out of attempts is as terminal as a solved one: nothing leaks in from the next hand.
    """
    next_value = next_advantage = 0.0
    for episode in reversed(episodes):
        if episode.terminated or "leaking-gae" not in official.switches(args.compat):
            next_value = next_advantage = 0.0
        for turn in reversed(episode.turns):
            delta = earned(turn, args) + args.gamma * next_value - turn.value
            turn.advantage = delta + args.gamma * args.lam * next_advantage
            turn.target = turn.advantage + turn.value
            next_value, next_advantage = turn.value, turn.advantage


def gae_loo(episodes, args):
    """GAE less what the other samples of the same hand got on average at the same turn (leave one out, as in
    RLOO): the same attempt and, on a route, the same point.

    How hard a hand is explains most of the variance of the returns, and a small critic cannot see it. The
    other samples can; they know nothing of this sample's action, so subtracting their mean adds no bias.
    Needs --samples of at least 2.
    """
    gae(episodes, args)
    groups = defaultdict(list)
    for episode in episodes:
        for turn in episode.turns:
            groups[episode.seed, turn.info.get("point"), turn.info["attempt"]].append(turn)
    for group in groups.values():
        for turn, advantage in zip(group, advantages.leave_one_out([turn.advantage for turn in group])):
            turn.advantage = advantage


ESTIMATORS = {"gae": Estimator(gae), "gae-loo": Estimator(gae_loo)} | advantages.ESTIMATORS


def flat(turns, name):
    """The values, advantages or targets of all turns as one list, whether they are one a turn or one a
    token."""
    numbers = [getattr(turn, name) for turn in turns]
    return [x for one in numbers for x in one] if numbers and isinstance(numbers[0], list) else numbers


def fill_in(turns, name, numbers, per_token):
    """The inverse of `flat`."""
    rest = iter(numbers)
    for turn in turns:
        setattr(turn, name, [next(rest) for _ in range(turn.end - turn.start)] if per_token else next(rest))


def deviation(x, sizes, all_reduce=lambda x: x):
    """Mean and standard deviation of x over all ranks. The deviation is 0 where it is but the rounding of
    what x was added up from, numbers of these `sizes`."""
    x, sizes = (torch.tensor(numbers, dtype=torch.float64) for numbers in (x, sizes))
    sums = [len(x), x.sum(), len(sizes), sizes.abs().sum()]
    n, total, count, size = all_reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
    std = math.sqrt(all_reduce(((x - total / n) ** 2).sum()).item() / n)
    rounding = advantages.ROUNDING * size / count
    return total / n, 0.0 if std <= rounding else std          # NaN stays NaN, for `step` to find


def normalize_advantages(turns, args, all_reduce=lambda x: x):
    """Shift and scale all advantages of the rollout, over all ranks, to mean 0 and deviation 1, in place.

    Where the rewards tie, all are 0: the rounding that is left is no reason to learn.
    """
    a = flat(turns, "advantage")
    mean, std = deviation(a, a + [advantages.size(turn, args) for turn in turns], all_reduce)
    scaled = [(x - mean) / std if std else 0.0 for x in a]
    fill_in(turns, "advantage", scaled, per_token=isinstance(turns[0].advantage, list))


# ------------------------------------------------------------------------------------------------------------
# Losses: numbers in, one loss a unit out. A unit is a turn or a token; a variant is a function and a table
# entry.

def ppo_clip(logprobs, old_logprobs, advantages, args):
    """The clipped surrogate (Schulman et al. 2017, eq. 7), see losses.surrogate:

        -min(r A, clip(r, 1 - clip, 1 + clip) A),   r = exp(logprobs - old_logprobs).

    All tensors and the returned loss have shape (units,).
    """
    loss, metrics = losses.surrogate(logprobs, old_logprobs, advantages, args.clip, args.clip)
    if "ratio-10" in official.switches(args.compat):
        loss = torch.where(logprobs - old_logprobs > math.log(10), -(1 + args.clip) * advantages, loss)
    return loss, metrics


LOSSES = {"ppo": Loss(ppo_clip)} | losses.LOSSES


def value_loss(values, old_values, targets, clip):
    """Half the squared error; with `clip` > 0 the worse of it and of the error of a value kept within `clip`
    of the old."""
    loss = (values - targets) ** 2
    if clip > 0:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped - targets) ** 2)
    return 0.5 * loss


# ------------------------------------------------------------------------------------------------------------
# The update

class ActorCritic(nn.Module):
    """The policy and its critic: an MLP hidden-1024-512-1 on the hidden state at the last prompt token of a
    turn.

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
        nn.init.zeros_(self.value_head[-1].weight)                     # values start at 0, not at noise
        nn.init.zeros_(self.value_head[-1].bias)
        self.trunk = copy.deepcopy(policy) if critic == "separate" else None

    def values(self, batch, turns):
        """Values of the turns, (turns,), in a pass of their own. `turns`: the row and the position of each
        turn's last prompt token."""
        network = self.policy if self.trunk is None else self.trunk
        hidden = network(batch.input_ids, lengths=batch.lengths, images=batch.images).hidden
        return self.head(hidden[turns.rows, turns.positions])

    def head(self, hidden):
        """States at last prompt tokens (turns, D) -> values (turns,)."""
        return self.value_head(hidden.float()).squeeze(-1)

    def forward(self, batch, turns, temperature, with_values=True):
        """One forward pass for all turns of all conversations: log-probs (B, T), entropies (B, T), values
        (turns,) or None."""
        out = self.policy(batch.input_ids, lengths=batch.lengths, images=batch.images, targets=batch.targets,
                          temperature=temperature)
        if not with_values:
            return out.logprobs, out.entropy, None
        if self.trunk is not None:
            return out.logprobs, out.entropy, self.values(batch, turns)
        hidden = out.hidden.detach() if self.critic == "detached" else out.hidden
        return out.logprobs, out.entropy, self.head(hidden[turns.rows, turns.positions])


@dataclass
class TurnTensors:
    """The turns of one batch of conversations as tensors; (B, T) entries speak of the token *after* position
    t. For an estimator over tokens, what is (turns,) here is (tokens,), all the sampled ones in order, and
    values are read before each of them."""
    rows: torch.Tensor             # (turns,) batch row
    positions: torch.Tensor        # (turns,) last prompt token, where the value is read
    turn_of: torch.Tensor          # (B, T) index into `turns` of the sampled token that follows; -1: forced
    weights: torch.Tensor          # (B, T)
    old_logprobs: torch.Tensor     # (B, T)
    advantages: torch.Tensor       # (turns,)
    old_values: torch.Tensor       # (turns,)
    targets: torch.Tensor          # (turns,)
    reference: torch.Tensor = None # (B, T) log-probs by the reference policy, 0 without one


def kept_features(conversations):
    """The features of each conversation's image if the rollout kept them, else None."""
    return [c.features for c in conversations] if any(c.features is not None for c in conversations) else None


def make_batch(processor, items, device, per="turn"):
    """items: list of (Conversation, [its Turns]). per: what has an advantage, a "turn" or a "token". Returns
    (Batch for the model, TurnTensors, the turns in order)."""
    conversations = [conversation for conversation, _ in items]
    batch = collate(processor, [c.ids for c in conversations], [c.sampled for c in conversations],
                    [c.image for c in conversations], kept_features(conversations)).to(device)
    shape = batch.input_ids.shape
    turn_of, weights = torch.full(shape, -1), torch.zeros(shape)
    old_logprobs, reference, rows, positions, turns = torch.zeros(shape), torch.zeros(shape), [], [], []
    for row, (conversation, own) in enumerate(items):
        n = len(conversation.ids) - 1
        weights[row, :n] = torch.tensor(conversation.weights[1:])
        old_logprobs[row, :n] = torch.tensor(conversation.logprobs[1:])
        if conversation.reference:
            reference[row, :n] = torch.tensor(conversation.reference[1:])
        for turn in own:
            turn_of[row, turn.start - 1:turn.end - 1] = len(turns)
            before = range(turn.start - 1, turn.end - 1 if per == "token" else turn.start)
            rows += [row] * len(before)
            positions += before
            turns.append(turn)
    column = lambda name: torch.tensor(flat(turns, name), dtype=torch.float32, device=device)
    tensors = TurnTensors(
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(positions, dtype=torch.int64, device=device),
        turn_of.to(device), weights.to(device), old_logprobs.to(device),
        column("advantage"), column("value"), column("target"), reference.to(device))
    return batch, tensors, turns


def conversations_of(episodes):
    """All conversations with the turns in them: list of (Conversation, [Turn])."""
    items = []
    for episode in episodes:
        turns = defaultdict(list)
        for turn in episode.turns:
            turns[turn.conversation].append(turn)
        items += [(episode.conversations[k], turns[k]) for k in sorted(turns)]
    return items


def buckets_of(items, config, token_budget):
    """Split items into batches of conversations alike in length, each of at most `token_budget` padded
    tokens, images included."""
    conversations = [conversation for conversation, _ in items]
    extra = [0 if c.image is None else config.image_tokens(c.features is not None) for c in conversations]
    groups = bucket([len(c.ids) for c in conversations], token_budget, extra)
    return [[items[i] for i in group] for group in groups]


@torch.no_grad()
def read_values(actor_critic, episodes):
    """Fill in `turn.value` for all turns from the states that the rollout met, with a critic that reads the
    policy's."""
    turns = [turn for episode in episodes for turn in episode.turns]
    for turn, value in zip(turns, actor_critic.head(torch.stack([turn.hidden for turn in turns])).tolist()):
        turn.value = value


@torch.no_grad()
def score_values(actor_critic, processor, episodes, token_budget, device, pace=alone, per="turn"):
    """Fill in `turn.value` for all turns, or all their tokens, with the critic as it is before the update: a
    pass over all conversations."""
    items = conversations_of(episodes)
    for micro, _ in pace(buckets_of(items, actor_critic.policy.config, token_budget), [(items[0][0], [])]):
        batch, tensors, turns = make_batch(processor, micro, device, per)
        fill_in(turns, "value", actor_critic.values(batch, tensors).tolist(), per_token=per == "token")


@torch.no_grad()
def score_reference(actor_critic, processor, episodes, args, reference, device, pace=alone):
    """Fill in the log-probs of all conversations by the reference policy and, with --kl-in reward, the
    penalties of all turns. Returns the sum of the KL estimates over all sampled tokens."""
    items, total = conversations_of(episodes), 0.0
    buckets = buckets_of(items, actor_critic.policy.config, args.token_budget)
    with reference():
        for micro, weight in pace(buckets, [(items[0][0], [])]):
            batch, tensors, _ = make_batch(processor, micro, device)
            logprobs = actor_critic(batch, tensors, args.temperature, with_values=False)[0].tolist()
            for (conversation, _), row in zip(micro if weight else [], logprobs):
                conversation.reference = [0.0] + row[:len(conversation.ids) - 1]
    for conversation, turns in items:
        for turn in turns:
            drawn = slice(turn.start, turn.end)
            both = (torch.tensor(x[drawn]) for x in (conversation.logprobs, conversation.reference))
            kl = losses.KL[args.kl_estimator](*both)
            total += kl.sum().item()
            if args.kl_in == "reward":
                turn.penalties = (args.kl_coef * kl).tolist()
    return total


def units(logprobs, tensors, unit, per="turn"):
    """What a ratio is taken of: (new log-probs, old log-probs, advantages), each (units,). per: what has an
    advantage.

    turn:  the weighted sum over the tokens of a turn        token: each sampled token on its own
    sequence: the mean over the sampled tokens of a conversation
    """
    drawn = tensors.turn_of >= 0
    new, old, weights, turn_of = (
        x[drawn] for x in (logprobs, tensors.old_logprobs, tensors.weights, tensors.turn_of))
    if unit == "turn":
        return gather(weights * new, tensors, unit), gather(weights * old, tensors, unit), tensors.advantages
    each = tensors.advantages if per == "token" else tensors.advantages[turn_of]
    return tuple(gather(x, tensors, unit) for x in (new, old, each))


def gather(x, tensors, unit):
    """Numbers of all sampled tokens (tokens,) -> of the units (units,): a token's own, the sum over a turn,
    the mean over a conversation (0 where nothing was sampled)."""
    drawn = tensors.turn_of >= 0
    if unit == "token":
        return x
    if unit == "turn":
        return torch.zeros_like(tensors.advantages).index_add(0, tensors.turn_of[drawn], x)
    return x.new_zeros(len(drawn)).index_add(0, drawn.nonzero()[:, 0], x) / drawn.sum(1).clamp(min=1)


def count_units(items):
    """How many turns, sampled tokens and conversations ("sequence") there are in a list of items, as a
    dict."""
    turns = [turn for _, turns in items for turn in turns]
    return {"turn": len(turns), "token": sum(turn.end - turn.start for turn in turns), "sequence": len(items)}


def counts(tensors, unit, mean):
    """What each unit counts in the mean: 1, or for a mean over sequences one over the units of its own,
    (units,)."""
    if mean == "units" or unit == "sequence":
        return 1.0
    row = (tensors.turn_of >= 0).nonzero()[:, 0] if unit == "token" else tensors.rows
    return 1 / torch.bincount(row)[row]


def unit_of(args):
    """What a ratio is taken of, and what the mean is over (and divided by the number of)."""
    loss = LOSSES[args.loss]
    unit = loss.unit or args.unit
    return unit, "sequence" if loss.mean == "sequences" else unit


def minibatch_loss(actor_critic, processor, items, args, n, device, train_policy=True):
    """The loss of one micro-batch, scaled so that the micro-batches of a minibatch, over all ranks, add up to
    the mean.

    n: how many turns, tokens and sequences the minibatch has on all ranks. Every mean is one sum over one
    such count, so that it does not matter what shares a micro-batch. Returns (loss, metrics), these sums over
    counts, too.
    """
    estimator, (unit, over) = ESTIMATORS[args.advantage], unit_of(args)
    batch, tensors, _ = make_batch(processor, items, device, estimator.per)
    logprobs, entropy, values = actor_critic(batch, tensors, args.temperature, estimator.values)
    if "bf16-logprobs" in official.switches(args.compat):
        logprobs, tensors.old_logprobs = logprobs.bfloat16().float(), tensors.old_logprobs.bfloat16().float()
    new, old, advantages = units(logprobs, tensors, unit, estimator.per)
    policy, metrics = LOSSES[args.loss].f(new, old, advantages, args)
    value, drawn = torch.zeros((), device=device), tensors.turn_of >= 0
    if estimator.values:
        value = value_loss(values, tensors.old_values, tensors.targets, args.value_clip)
        value = value.sum() / n[estimator.per]
    if args.kl_coef and args.kl_in == "loss":
        kl = losses.KL[args.kl_estimator](logprobs[drawn], tensors.reference[drawn])
        # Of a turn it is the sum, as its log-prob is a sum, too.
        policy = policy + args.kl_coef * gather(kl, tensors, unit)
    count = counts(tensors, unit, LOSSES[args.loss].mean)
    policy, entropy = (count * policy).sum() / n[over], entropy[drawn].sum() / n["token"]
    loss = args.value_coef * value
    if train_policy:
        loss = loss + policy - args.entropy_coef * entropy
    metrics = {name: (count * x).sum() / n[over] for name, x in metrics.items()}
    metrics |= {"policy_loss": policy, "value_loss": value, "entropy": entropy,
                "drawn_vs_scored": (logprobs - tensors.old_logprobs)[drawn].abs().sum() / n["token"]}
    return loss, {name: x.detach() for name, x in metrics.items()}


def update(actor_critic, processor, episodes, args, *, step, seed, train_policy=True, reference=None,
           places=None, all_reduce=lambda x: x, pace=alone, device="cpu"):
    """One PPO update on one rollout: values, advantages, then `args.epochs` passes of `args.minibatches`
    steps each.

    `step(loss)` reduces the gradients over ranks, clips them, steps the optimizer and returns the gradient
    norm. With `train_policy` False only the critic learns (warm-up). `reference`: what --kl-coef measures
    from, see variants/reference.py. `places`: where this rank's conversations stand among those of all ranks
    (see `parts`); None: there are no others. `pace`: see `alone`. Returns the metrics of the update as a dict
    of floats.
    """
    estimator, switches = ESTIMATORS[args.advantage], official.switches(args.compat)
    items, turns = conversations_of(episodes), [turn for episode in episodes for turn in episode.turns]
    if "first-token-unscored" in switches:
        for conversation, own in items:
            for turn in own:
                conversation.weights[turn.start] = 0.0
    kl = 0.0
    if args.kl_coef:
        kl = score_reference(actor_critic, processor, episodes, args, reference, device, pace)
    if estimator.values and (estimator.per == "token" or actor_critic.trunk is not None):
        score_values(actor_critic, processor, episodes, args.token_budget, device, pace, estimator.per)
    elif estimator.values:
        read_values(actor_critic, episodes)
    estimator.f(episodes, args)
    explained = explained_variance(turns, all_reduce)
    if estimator.normalize:
        normalize_advantages(turns, args, (lambda x: x) if "rank-advantages" in switches else all_reduce)
    own = len(items), sum(len(conversation.ids) for conversation, _ in items), count_units(items)["token"]
    total, tokens, drawn, kl = all_reduce(torch.tensor([*own, kl], dtype=torch.float64)).tolist()
    places = range(len(items)) if places is None else places
    generator, steps = torch.Generator().manual_seed(seed), []
    for _ in range(args.epochs):
        order = torch.randperm(int(total), generator=generator).tolist()
        for part in parts(places, order, args.minibatches):
            chunk = [items[i] for i in part]
            steps.append(one_step(actor_critic, processor, chunk, items[0][0], args, step, train_policy,
                                  all_reduce, pace, device))
    first = next(metrics["drawn_vs_scored"][0] for metrics in steps if metrics)
    return averages(steps) | {
        "drawn_vs_scored": first,              # of the first step: afterwards the policy has moved
        "explained_variance": explained, "rollout_tokens": tokens, "drawn_tokens": drawn,
        "trained_tokens": args.epochs * tokens} | ({"kl_reference": kl / drawn} if args.kl_coef else {})


def one_step(actor_critic, processor, chunk, spare, args, step, train_policy, all_reduce, pace, device):
    """One optimizer step on this rank's part of a minibatch. `spare` is a conversation to pass for other
    ranks' sake.

    Returns {metric: (mean, how many it is a mean over)}; nothing where no rank has a conversation, and then
    no step is made.
    """
    own = count_units(chunk)
    n = dict(zip(own, all_reduce(torch.tensor(list(own.values()), dtype=torch.float64)).tolist()))
    if not n["token"]:
        return {}
    sums, buckets = defaultdict(float), buckets_of(chunk, actor_critic.policy.config, args.token_budget)
    for micro, weight in pace(buckets, [(spare, [])]):
        loss, numbers = minibatch_loss(actor_critic, processor, micro, args, n, device, train_policy)
        (weight * loss).backward()
        for name, value in numbers.items():
            sums[name] += weight * value.double().cpu()
    means = dict(zip(sums, all_reduce(torch.stack(list(sums.values()))).tolist()))
    over = {"value_loss": ESTIMATORS[args.advantage].per, "entropy": "token", "drawn_vs_scored": "token"}
    return {name: (mean, n[over.get(name, unit_of(args)[1])]) for name, mean in means.items()} | {
        "grad_norm": (step(means["policy_loss"] + means["value_loss"]), 1)}


def explained_variance(turns, all_reduce=lambda x: x):
    """1 - Var(target - value) / Var(target) over all turns and ranks: 0 for a constant critic, 1 for a
    perfect one, NaN where there is none or nothing to explain."""
    targets, values = flat(turns, "target"), flat(turns, "value")
    _, spread = deviation(targets, targets, all_reduce)
    _, rest = deviation([t - v for t, v in zip(targets, values)], [0.0], all_reduce)
    return 1 - (rest / spread) ** 2 if spread else math.nan
