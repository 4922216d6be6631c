"""Means are one global sum over one global count: whatever shares a micro-batch, a minibatch or a rank, the
same is learnt."""

import copy
import math
import random
from functools import partial
from itertools import cycle

import pytest
import torch

import ppo
import sft
from distributed.processes import Processes
from llama.batches import OneProcess, collate, parts, passes
from rollout import Conversation, Episode, Turn, conversations_of, trees_of_hands, turns_of
from tables import cases, numbers
from test_ppo import critic_of, episode, gradients, play, settings, update
from test_sft import dialogues
from variants import ESTIMATORS, LOSSES, SFT_LOSSES
from variants.reference import score


def ragged():
    """Five episodes of two hands, each hand with its prompt, with turns of so many sampled tokens between
    forced ones, and rewards that differ."""
    draw, episodes = random.Random(0).choices, []
    for hand, lengths in zip((0, 0, 0, 1, 1), ("30 2", "2", "7 1 12", "30 2", "2")):
        c = Conversation()
        for attempt, n in enumerate(map(int, lengths.split())):
            ids, nats = draw(range(6, 900), k=n + 5), (-8.0, -7.0, -6.0, -5.0)
            c.append(ids[n:] if attempt else [6 + hand] * 5, False)
            c.append(ids[:n], True, draw(nats, k=n), draw((0.5, 1.0), k=n))
            c.reference += [0.0] * 5 + draw(nats, k=n)
            [reward], hidden = draw((-1.0, 5.0, -2.0)), torch.tensor(draw((-1.0, 1.0), k=32))
            c.turns.append(Turn(len(c.ids) - n, len(c.ids), reward, {"attempt": attempt}, hidden))
        episodes.append(Episode(hand, [c]))
    return episodes


COMBINATIONS = [(loss, unit, "gae") for loss, entry in LOSSES.items() for unit in ("turn", "token")
                if not entry.unit or unit == "token"] + [
    ("grpo", "token", "gae-token"), ("gspo", "turn", "reinforce++"), ("ppo", "turn", "monte-carlo"),
    ("dapo", "token", "gae-two-level"), ("ppo", "token", "gae-token"), ("gspo", "turn", "grpo"),
    ("reinforce", "turn", "rloo")]


@cases("names, critic", list(
    zip(COMBINATIONS, cycle(("shared", "detached", "separate")))))
def test_the_token_budget_changes_nothing(model, processor, names, critic):
    """Turns of 30 and of 2 tokens apart and together, samples of a hand behind one prompt, some of them, or
    alone. Sums in another order differ by some 1e-7 of what they add up."""
    changes = dict(zip(("loss", "unit", "advantage"), names), entropy_coef=0.5)
    changes |= dict(kl_coef=0.1, kl_estimator="k2") if "dual-clip" in names else {}
    (whole, a), *others = [gradients(model, processor, ragged(), critic, token_budget=budget, **changes)
                           for budget in (10**6, 1, 60)]
    vector = lambda found: torch.cat([found[name].flatten() for name in whole])
    for found, b in others:
        assert (vector(found) - vector(whole)).norm() < 1e-5 * vector(whole).norm()
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6, nan_ok=True)


def test_a_picture_is_learnt_from_once_a_hand(model, processor):
    """Three samples of two hands, behind one prompt and picture each, and alone."""
    episodes = play(model, processor, "gp-vl", hands=2, samples=3)
    trees = sum(trees_of_hands(episodes), [])
    [(_, batch, _)] = passes(model, processor, trees, 10**6, OneProcess())
    assert len(batch.images.rows) == len(batch.input_ids) == 2 and batch.count == 6
    found = [gradients(model, processor, episodes, token_budget=budget)[0] for budget in (10**6, 1)]
    together, alone = (torch.cat([gradient.flatten() for gradient in each.values()]) for each in found)
    assert (together - alone).norm() < 1e-5 * together.norm()
    assert found[0]["policy.multi_modal_projector.weight"].any()


def test_entropy_and_drawn_vs_scored_are_means_over_tokens(model, processor):
    """Against one pass over all conversations, token by token."""
    conversations = conversations_of(ragged())
    batch = collate(processor, [[c] for c in conversations])
    turns = ppo.stack_turns(conversations, batch)
    logprobs, entropy, _ = critic_of(model)(batch, turns, 1.0)
    off = (logprobs - turns.old_logprobs).abs()
    _, metrics = gradients(model, processor, ragged(), token_budget=60)
    assert metrics["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert metrics["drawn_vs_scored"] == pytest.approx(off.mean().item(), rel=1e-5)
    assert off.mean() > 0.1 and len(off) == metrics["drawn_tokens"] == 88


def test_metrics_of_an_update_are_means_over_all_of_it(model, processor):
    """Two hands in one minibatch, two, three or nine: the same, where no step is made in between. Minibatches
    without a conversation are no steps."""
    steps, metrics = [], []
    for n in (1, 2, 3, 9):
        found = update(critic_of(copy.deepcopy(model)), processor, ragged(),
                       settings(epochs=2, minibatches=n), lambda loss: steps.append(n) or 1.0)
        assert found.pop("drawn_vs_scored") > 0 and found.pop("empty_minibatches") == 2 * n - steps.count(n)
        metrics.append(found)
    assert steps.count(9) == 2 * 2 and metrics[0]["trained_tokens"] == 2 * metrics[0]["rollout_tokens"]
    assert metrics == [pytest.approx(metrics[0], rel=1e-5, abs=1e-7)] * 4


# ------------------------------------------------------------------------------------------------------------
# Ties

NORMALIZED = [name for name, entry in ESTIMATORS.items() if entry.normalize]


def tied(name, reward, noise=0.0, turns=1):
    """Two samples of each of four hands with the same rewards, valued alike but for rounding."""
    rng, episodes = random.Random(1), []
    for hand in (0, 0, 1, 1, 2, 2, 3, 3):
        own = [Turn(3 * k, 3 * k + 1, reward, {"attempt": k}) for k in range(turns)]
        for turn in own:
            value = torch.tensor([0.3 * (1 + noise * rng.uniform(-1, 1))]).tolist()      # in float32
            turn.value = value if ESTIMATORS[name].per == "token" else value[0]
        episodes.append(Episode(hand, [Conversation(turns=own)]))
    return episodes


def worth(name, episodes, **changes):
    args, turns = settings(reward_scale=0.2, **changes), turns_of(conversations_of(episodes))
    ESTIMATORS[name].f(episodes, args)
    if ESTIMATORS[name].normalize:
        ppo.normalize_advantages(turns, args)
    return torch.tensor(ppo.flat(turns, "advantage"), dtype=torch.float64)


@cases("name", ESTIMATORS)
@cases("reward", [5.0, -1.0, 0.1, 0.0])
@cases("noise", [0.0, 1e-7])
def test_tied_rewards_are_worth_nothing(name, reward, noise):
    """Also where float32 gives the same state values that differ in their last digits. Exactly 0: there is no
    next to nothing, for an optimizer that divides by the size of what it gets."""
    for turns in (1,) if name in NORMALIZED else (1, 3):
        assert (worth(name, tied(name, reward, noise, turns)) == 0).all()
    assert (worth("gae", [episode("5", "0.2")]) == 0).all()    # nothing to compare it with


@cases("name", NORMALIZED)
@cases("more", [1.0, 1e-2, 1e-4, -1e-4])
def test_small_but_real_differences_still_count(name, more):
    """One hand of four brings a little more: 1 of 4 apart by d is 3/4 d from the mean, with a deviation of
    sqrt(3)/4 d."""
    episodes, expected = tied(name, 5.0), [3**0.5] * 2 + [-(3**-0.5)] * 6
    for each in episodes[:2]:
        each.turns[0].reward += more
    if name == "gae-loo":                      # compares samples of a hand: let one of them have it
        episodes[1].turns[0].reward -= more
        expected = [2.0, -2.0] + [0.0] * 6
    found = math.copysign(1, more) * worth(name, episodes)
    assert found.tolist() == pytest.approx(expected, rel=1e-3)


@cases("name", ["monte-carlo", "gae", "grpo", "reinforce++"])
@cases("reward, tokens", [(5.0, 1), (0.0, 30)])
def test_penalties_that_are_rounding_tie_too(name, reward, tokens):
    """Before the first step the policy is its own reference: log-probs of some nats differ in their last
    digits."""
    episodes, rng = tied(name, reward), random.Random(0)
    turns = [each.turns[0] for each in episodes]
    for turn in turns:
        turn.end = turn.start + tokens
        turn.penalties = [rng.uniform(-1e-8, 1e-8) for _ in range(tokens)]
    assert worth(name, episodes, kl_coef=0.1).abs().max() < 1e-12
    for turn in turns[1::3]:
        turn.penalties[0] += 1e-3
    assert worth(name, episodes, kl_coef=0.1).abs().max() > 0.5


@cases("offset", [0.0, 1e3, 1e6])
def test_explained_variance(offset):
    """The variance of targets that tie is rounding: NaN, also far from 0."""
    for v, t, expected in map(numbers, ("0.5 1e-9 nan", "0.5 1 0.75", "1 1 1", "0 1 0")):
        turns = [Turn(0, 1, 0, {}, value=offset + v * k, target=offset + 0.1 + t * k) for k in range(9)]
        assert ppo.explained_variance(turns) == pytest.approx(expected, nan_ok=True)


@cases("name", ESTIMATORS)
@cases("bad", [math.nan, math.inf])
def test_a_number_that_is_none_is_not_hidden(name, bad):
    """A policy or a reference that broke down: the step is to find a loss that is not finite, and all ranks
    to skip it."""
    episodes = tied(name, 5.0)
    episodes[0].turns[0].penalties = [bad]
    assert not worth(name, episodes).isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# Minibatches of all

@cases("n", [1, 4, 7, 40])
@cases("world, hands", [(1, 8), (2, 8), (2, 9), (3, 13), (8, 8), (8, 9)])
def test_ranks_deal_the_minibatches_of_one(monkeypatch, world, hands, n):
    """Conversations vary in number from hand to hand; some have none."""
    counts = list(enumerate(random.Random(hands).choices(range(5), k=hands)))
    listed = lambda counts: [(hand, c) for hand, count in counts for c in range(count)]
    everyone, processes = listed(counts), Processes("cpu")
    order = torch.randperm(len(everyone)).tolist()
    monkeypatch.setattr("distributed.processes.gather", lambda own: counts * (set(own) <= set(counts)))
    processes.world = world
    for processes.rank in range(world):
        own = listed(processes.share(counts))
        places = processes.positions([count for _, count in processes.share(counts)])
        for k, part in zip(range(n), parts(places, order, n), strict=True):                    # in its order
            assert [own[i] for i in part] == [everyone[i] for i in order[k::n] if everyone[i] in own]


class Waiting(OneProcess):
    """A rank that makes passes for others' sake, before and after its own."""

    def lockstep(self, batches, filler):
        return [(filler, 0.0), *super().lockstep(batches, filler), (filler, 0.0)]


def assert_waiting_adds_nothing(module, learn):
    """Neither to the losses nor to the gradients of the steps that learn(module, step=, ranks=) makes."""
    found = []
    for ranks in (OneProcess(), Waiting()):
        steps, learning = [], copy.deepcopy(module)

        def step(loss):
            steps.append((loss, [torch.zeros_like(p) if p.grad is None else p.grad
                                 for p in learning.parameters()]))
            learning.zero_grad(set_to_none=True)
            return 1.0

        found.append((learn(learning, step=step, ranks=ranks), steps))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    assert any(math.isfinite(loss) for loss, _ in steps)


@cases("loss, advantage, critic", [
    ("ppo", "gae", "shared"), ("gspo", "gae", "separate"), ("grpo", "gae-token", "detached"),
    ("reinforce", "monte-carlo", "detached")])
def test_a_pass_for_others_sake_adds_nothing(model, processor, loss, advantage, critic):
    """Not even where the conversation that is passed, which another minibatch learns from, has a loss that is
    not finite."""
    episodes = ragged()
    filler = episodes[0].conversations[0]
    filler.logprobs = filler.weights = [math.nan] * len(filler.ids)
    args = settings(loss=loss, advantage=advantage, unit="token", entropy_coef=0.1, minibatches=2)
    assert_waiting_adds_nothing(critic_of(model, critic), partial(
        update, processor=processor, episodes=episodes, args=args))


@cases("name", SFT_LOSSES)
def test_a_pass_for_others_sake_teaches_nothing(model, processor, name):
    filler, *examples = dialogues(processor, 3)
    score(model, processor, [[e] for e in examples], 10**6)
    filler.reference = [math.nan] * len(filler.ids)
    assert_waiting_adds_nothing(model, partial(
        sft.update, processor=processor, examples=examples, args=settings("sft"), loss=SFT_LOSSES[name].f,
        filler=filler))
