"""Means are one global sum over one global count: whatever shares a micro-batch, a minibatch or a rank, the
same is learnt."""

import contextlib
import copy
import math
import random

import pytest
import torch

import ppo
import sft
from distributed.processes import Processes
from envs import GeneralPoints
from llama.batches import parts
from test_ppo import critic_of, episode, settings
from rollout import Conversation, Episode, Turn


def ragged(turns=((30, 2), (2,), (7, 1, 12)), samples=2):
    """Episodes of two hands each, with turns of so many sampled tokens between forced ones, and rewards that
    differ."""
    rng, episodes = random.Random(0), []
    for hand in range(2):
        for k, lengths in enumerate(turns[:samples] if hand else turns):
            conversation, own = Conversation(), []
            for attempt, n in enumerate(lengths):
                told, start = rng.randint(2, 9), len(conversation.ids)
                conversation.ids += [rng.randint(6, 900) for _ in range(told + n)]
                conversation.sampled += [False] * told + [True] * n
                conversation.logprobs += [0.0] * told + [rng.uniform(-8, -5) for _ in range(n)]
                conversation.weights += [0.0] * told + [0.5] * (n // 2) + [1.0] * (n - n // 2)
                hidden = torch.tensor([rng.gauss(0, 1) for _ in range(32)])
                reward = rng.choice([-1.0, 5.0, -2.0])
                own.append(Turn(0, start + told, start + told + n, reward, {"attempt": attempt}, hidden))
            episodes.append(Episode(hand, [conversation], own))
    return episodes


def learn(model, processor, budget, critic, **changes):
    """Gradients of an update as one vector, and its metrics."""
    module = critic_of(copy.deepcopy(model), critic)
    args = settings(critic=critic, token_budget=budget, epochs=1, minibatches=1, entropy_coef=0.5, **changes)
    metrics = ppo.update(module, processor, ragged(), args, step=lambda loss: loss, seed=0,
                         reference=contextlib.nullcontext)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients]), metrics


COMBINATIONS = [(loss, unit, "gae") for loss, entry in ppo.LOSSES.items() for unit in ("turn", "token")
                if not entry.unit or unit == "token"]
COMBINATIONS += [("grpo", "token", "gae-token"), ("gspo", "turn", "reinforce++"),
                 ("ppo", "turn", "monte-carlo"), ("dapo", "token", "gae-two-level")]


@pytest.mark.parametrize("loss, unit, advantage", COMBINATIONS)
def test_the_token_budget_changes_nothing(model, processor, loss, unit, advantage):
    """Turns of 30 and of 2 tokens apart and together. Sums in another order differ by some 1e-7 of what they
    add up."""
    critics = ("shared", "detached", "separate") if ppo.ESTIMATORS[advantage].values else ("detached",)
    critic = critics[COMBINATIONS.index((loss, unit, advantage)) % len(critics)]
    kl = dict(kl_coef=0.1, kl_estimator="k2") if loss == "dual-clip" else {}
    whole, a = learn(model, processor, 10**6, critic, loss=loss, unit=unit, advantage=advantage, **kl)
    for budget in (1, 60):
        gradient, b = learn(model, processor, budget, critic, loss=loss, unit=unit, advantage=advantage, **kl)
        assert (gradient - whole).norm() < 1e-5 * whole.norm()
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6, nan_ok=True)


def test_entropy_and_drawn_vs_scored_are_means_over_tokens(model, processor):
    """Against one pass over all conversations, token by token."""
    args, episodes = settings(), ragged()
    items = ppo.conversations_of(episodes)
    batch, tensors, _ = ppo.make_batch(processor, items, "cpu")
    logprobs, entropy, _ = critic_of(model, "detached")(batch, tensors, args.temperature)
    drawn = tensors.turn_of >= 0
    off = (logprobs - tensors.old_logprobs)[drawn].abs()
    for budget in (1, 10**6):
        _, metrics = learn(model, processor, budget, "detached")
        assert metrics["entropy"] == pytest.approx(entropy[drawn].mean().item(), rel=1e-5)
        assert metrics["drawn_vs_scored"] == pytest.approx(off.mean().item(), rel=1e-5)
    assert off.mean() > 0.1 and drawn.sum() == 88 and metrics["drawn_tokens"] == 88


def test_metrics_of_an_update_are_means_over_all_of_it(model, processor):
    """Five conversations in two minibatches, or in one: the same, where no step is made in between."""
    metrics, step = [], lambda loss: 1.0
    for n in (1, 2, 3):
        module, args = critic_of(copy.deepcopy(model), "detached"), settings(minibatches=n, epochs=2)
        found = ppo.update(module, processor, ragged(), args, step=step, seed=0)
        metrics.append({name: x for name, x in found.items() if name != "drawn_vs_scored"})
    for found in metrics[1:]:
        assert found == pytest.approx(metrics[0], rel=1e-5, abs=1e-7)


def test_minibatches_without_a_conversation_are_no_steps(model, processor):
    steps = []
    metrics = ppo.update(critic_of(model, "detached"), processor, ragged(), settings(minibatches=9, epochs=2),
                         step=lambda loss: steps.append(loss) or 1.0, seed=0)
    assert len(steps) == 10 and metrics["empty_minibatches"] == 8
    assert metrics["trained_tokens"] == 2 * metrics["rollout_tokens"]


# ------------------------------------------------------------------------------------------------------------
# -------- ties

TIES = [name for name, entry in ppo.ESTIMATORS.items()]


def tied(name, reward, noise=0.0, turns=1):
    """Two samples of each of four hands with the same rewards, valued alike but for rounding."""
    per, rng, episodes = ppo.ESTIMATORS[name].per, random.Random(1), []
    for hand in range(4):
        for _ in range(2):
            own = [Turn(0, 3 * k, 3 * k + 1, reward, {"attempt": k}) for k in range(turns)]
            for turn in own:
                value = float(torch.tensor(0.3 * (1 + noise * rng.uniform(-1, 1))))          # in float32
                turn.value = [value] if per == "token" else value
            episodes.append(Episode(hand, turns=own))
    return episodes


def worth(name, episodes, **changes):
    args = settings(**{"reward_scale": 0.2} | changes)
    turns = [turn for each in episodes for turn in each.turns]
    ppo.ESTIMATORS[name].f(episodes, args)
    if ppo.ESTIMATORS[name].normalize:
        ppo.normalize_advantages(turns, args)
    return torch.tensor(ppo.flat(turns, "advantage"), dtype=torch.float64)


@pytest.mark.parametrize("name", TIES)
@pytest.mark.parametrize("reward", [5.0, -1.0, 0.1, 0.0])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_tied_rewards_are_worth_nothing(name, reward, noise):
    """Also where float32 gives the same state values that differ in their last digits. Exactly 0: there is no
    next to nothing, for an optimizer that divides by the size of what it gets."""
    assert (worth(name, tied(name, reward, noise)) == 0).all()
    if ppo.ESTIMATORS[name].per == "turn" and not ppo.ESTIMATORS[name].normalize:
        assert (worth(name, tied(name, reward, turns=3)) == 0).all()


@pytest.mark.parametrize("name", [name for name in TIES if ppo.ESTIMATORS[name].normalize])
@pytest.mark.parametrize("more", [1.0, 1e-2, 1e-4, -1e-4])
def test_small_but_real_differences_still_count(name, more):
    """One hand of four brings a little more: 1 of 4 apart by d is 3/4 d from the mean, with a deviation of
    sqrt(3)/4 d."""
    episodes = tied(name, 5.0)
    for each in episodes[:2]:
        each.turns[0].reward += more
    if name == "gae-loo":                      # compares samples of a hand: let one of them have it
        episodes[1].turns[0].reward -= more
        expected = [2.0, -2.0] + [0.0] * 6
    else:
        expected = [3**0.5] * 2 + [-(3**-0.5)] * 6
    sign = 1 if more > 0 else -1
    assert worth(name, episodes).tolist() == pytest.approx([sign * x for x in expected], rel=1e-3)


@pytest.mark.parametrize("name", ["monte-carlo", "gae", "grpo", "reinforce++"])
@pytest.mark.parametrize("reward, tokens", [(5.0, 1), (0.0, 30)])
def test_penalties_that_are_rounding_tie_too(name, reward, tokens):
    """Before the first step the policy is its own reference: log-probs of some nats differ in their last
    digits."""
    episodes, rng = tied(name, reward), random.Random(0)
    for each in episodes:
        turn = each.turns[0]
        turn.end = turn.start + tokens
        turn.penalties = [0.1 * rng.uniform(-1e-7, 1e-7) for _ in range(tokens)]
    assert worth(name, episodes, kl_coef=0.1).abs().max() < 1e-12
    for turn in episodes[1].turns + episodes[4].turns:
        turn.penalties[0] += 1e-3
    assert worth(name, episodes, kl_coef=0.1).abs().max() > 0.5


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_nothing_to_explain(offset):
    """The variance of targets that tie is rounding: NaN, also far from 0; of those that differ it is
    explained there, too."""
    turns = [Turn(0, 0, 1, 0, {}, value=offset + k / 2, target=offset + 0.1 + 1e-9 * k) for k in range(9)]
    assert math.isnan(ppo.explained_variance(turns))
    for k, turn in enumerate(turns):
        turn.target = offset + k
    assert ppo.explained_variance(turns) == pytest.approx(0.75)    # half of it is error: of a quarter its variance


@pytest.mark.parametrize("name", TIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_is_not_hidden(name, bad):
    """A policy or a reference that broke down: the step is to find a loss that is not finite, and all ranks
    to skip it."""
    episodes = tied(name, 5.0)
    episodes[0].turns[0].penalties = [bad]
    assert not worth(name, episodes).isfinite().all()


def test_a_single_turn_is_worth_nothing():
    """Nothing to compare it with."""
    assert (worth("gae", [episode([5], [0.2])]) == 0).all()


# -------------------------------------------------------------------------------------------------------
# minibatches of all

@pytest.mark.parametrize("n", [1, 4, 7, 40])
@pytest.mark.parametrize("world, hands", [(1, 8), (2, 8), (2, 9), (3, 13), (8, 8), (8, 9)])
def test_ranks_deal_the_minibatches_of_one(monkeypatch, world, hands, n):
    """Conversations vary in number from hand to hand; some have none."""
    counts = [random.Random(hand).randint(0, 4) for hand in range(hands)]
    everyone = [(hand, c) for hand, count in enumerate(counts) for c in range(count)]
    order = torch.randperm(len(everyone)).tolist()
    told = [(k * world + rank, n) for rank in range(world) for k, n in enumerate(counts[rank::world])]
    dealt, processes = [[] for _ in range(n)], Processes("cpu")
    monkeypatch.setattr("distributed.processes.gather", lambda own: told if set(own) <= set(told) else None)
    for processes.rank in range(world):
        processes.world = world
        own = [pair for pair in everyone if pair[0] % world == processes.rank]
        places = processes.places(counts[processes.rank::world])
        assert [everyone[place] for place in places] == own
        for minibatch, part in zip(dealt, parts(places, order, n), strict=True):
            minibatch.append([own[i] for i in part])
    for k, minibatch in enumerate(dealt):
        whole = [everyone[i] for i in order[k::n]]
        assert sorted(sum(minibatch, [])) == sorted(whole)
        assert all(part == [pair for pair in whole if pair in part] for part in minibatch)     # in its order


def both_paces(after, before=0):
    """A pace without and one with passes for others' sake."""
    own = lambda batches: [(batch, 1.0) for batch in batches]
    yield lambda batches, spare: own(batches)
    yield lambda batches, spare: before * [(spare, 0.0)] + own(batches) + after * [(spare, 0.0)]


@pytest.mark.parametrize("loss, advantage, critic", [
    ("ppo", "gae", "shared"), ("gspo", "gae", "separate"), ("grpo", "gae-token", "detached"),
    ("reinforce", "monte-carlo", "detached")])
def test_a_pass_for_others_sake_adds_nothing(model, processor, loss, advantage, critic):
    """Not even where the conversation that is passed, which another minibatch learns from, has a loss that is
    not finite."""
    spare, *chunk = ppo.conversations_of(ragged())
    for name in ("logprobs", "weights"):
        setattr(spare[0], name, [math.nan] * len(spare[0].ids))
    for turn in [turn for _, turns in chunk for turn in turns]:
        for name, x in (("value", 0.1), ("advantage", 0.7), ("target", 0.8)):
            setattr(turn, name, [x] * (turn.end - turn.start) if advantage == "gae-token" else x)
    args, found = settings(loss=loss, advantage=advantage, unit="token", critic=critic, entropy_coef=0.1), []
    same = lambda x: x
    for pace in both_paces(1, before=1):
        module = critic_of(copy.deepcopy(model), critic)
        metrics = ppo.one_step(module, processor, chunk, spare[0], args, same, True, same, pace, "cpu")
        found.append((metrics, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}))
    (a, expected), (b, gradients) = found
    assert a == b and set(expected) <= set(gradients)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected.get(name, torch.zeros_like(gradient))), name


@pytest.mark.parametrize("loss", sft.LOSSES)
def test_a_pass_for_others_sake_teaches_nothing(model, processor, loss):
    spare, *examples = sft.make_batch(processor, [(GeneralPoints(), 1.0)], range(3), mistakes=0.0)
    sft.score(model, processor, examples, spare, settings())
    spare.before, found, same = torch.full((sum(spare.sampled),), math.nan), [], lambda x: x
    for pace in both_paces(2):
        copied, args = copy.deepcopy(model), settings(sft_loss=loss)
        metrics = sft.one_step(copied, processor, examples, spare, args, same, same, pace, "cpu")
        found.append((metrics, [p.grad for p in copied.parameters() if p.grad is not None]))
    (a, expected), (b, gradients) = found
    assert a == b and all(torch.equal(x, y) for x, y in zip(expected, gradients, strict=True))
