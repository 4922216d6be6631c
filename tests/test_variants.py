"""Variants: estimators and losses against hand-worked numbers, limits that must agree, what is forced, and
the reference policy."""

import copy
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

import ppo
from llama.batches import OneProcess, collate
from rollout import Conversation, Episode, Turn, conversations_of, of_sampled, turns_of
from tables import cases, numbers, rows
from test_ppo import critic_of, gradients, play, settings, spy, update
from test_train import in_parts, on_two_ranks, records, run
from variants import ESTIMATORS, LOSSES, algorithm, official, reference, score_values
from variants.losses import KL
from variants.tune import freeze


# ------------------------------------------------------------------------------------------------------------
# The example, by hand
#
# Two samples of one hand, three turns each, of 2, 1 and 2 tokens. Values are V before each token; an
# estimator over turns has the first. gamma = lambda = 1/2 from turn to turn, gamma 1 and lambda 1/2 from
# token to token, so that all numbers are exact.

REWARDS = (-1, -1, 4), (-1, -2, -4)
VALUES = ([1, 2], [0], [2, 3]), ([0, -1], [-2], [-2, -3])
SETTINGS = dict(gamma=0.5, lam=0.5, token_gamma=1.0, token_lam=0.5, reward_scale=1.0)
every_estimator = cases("name", ESTIMATORS)


def example(name="gae", rewards=REWARDS, told=(3, 2, 2)):
    """The two episodes for an estimator, with `told` tokens before each turn. Log-probs are 5 below the
    values; where a turn has two, the first weighs half."""
    per, episodes = ESTIMATORS[name].per, []
    for earned, values in zip(rewards, VALUES):
        c = Conversation()
        for k, (reward, value) in enumerate(zip(earned, values)):
            c.append([9] * told[k], sampled=False)
            start = len(c.ids)
            c.append([9] * len(value), True, [v - 5.0 for v in value], [0.5, 1.0][-len(value):])
            value = value if per == "token" else value[0]
            c.turns.append(Turn(start, len(c.ids), reward, {"attempt": k}, value=value, advantage=value))
        c.reference = [x / 3 - 1 for x in c.logprobs]
        episodes.append(Episode(0, [c]))
    return episodes


def flat(episodes, name="advantage"):
    return ppo.flat(turns_of(conversations_of(episodes)), name)


def estimate(name, episodes=None, **changes):
    """The advantages of the example, or of other episodes, as one list."""
    args = settings(advantage=name, **SETTINGS | changes)
    episodes = episodes or example(name)
    algorithm(args)[0].f(episodes, args)
    return flat(episodes)


WORKED = {
    #   G_3 = 4, G_2 = -1 + 4/2 = 1, G_1 = -1 + 1/2 = -1/2
    #   G_3 = -4, G_2 = -2 - 4/2 = -4, G_1 = -1 - 4/2 = -3
    "monte-carlo": "-0.5 1 4   -3 -4 -4",
    #   delta = -1 + 0/2 - 1, -1 + 2/2 - 0, 4 - 2 = -2, 0, 2;    A_3 = 2, A_2 = 0 + 2/4, A_1 = -2 + 0.5/4
    #   delta = -1 - 2/2 - 0, -2 - 2/2 + 2, -4 + 2 = -2, -1, -2; A_3 = -2, A_2 = -1 - 2/4, A_1 = -2 - 1.5/4
    "gae": "-1.875 0.5 2   -2.375 -1.5 -2",
    #   the episodes returned G_1 = -1/2 and -3: each less the other
    "rloo": "2.5 2.5 2.5   -2.5 -2.5 -2.5",
    #   less their mean -7/4;  over their deviation, 5/4
    "grpo-no-std": "1.25 1.25 1.25   -1.25 -1.25 -1.25",
    "grpo": "1 1 1   -1 -1 -1",
    #   rewards 0 -1 | -1 | 0 4 and 0 -1 | -2 | 0 -4, summed from the end
    "reinforce++": "2 2  3  4 4   -7 -7  -6  -4 -4",
    #   delta = 0+2-1, -1+0-2, -1+2-0, 0+3-2, 4-3 = 1 -3 | 1 | 1 1;          A = delta + A'/2 from the end
    #   delta = 0-1-0, -1-2+1, -2-2+2, 0-3+2, -4+3 = -1 -2 | -2 | -1 -1
    "gae-token": "-0.0625 -2.125  1.75  1.5 1   -2.6875 -3.375  -2.75  -1.5 -1",
    #   turns bring A + V of "gae": -7/8, 1/2, 4 and -19/8, -7/2, -4, each with its last token
    #   delta = 2-1, -7/8-2 | 1/2-0 | 3-2, 4-3  and  -1-0, -19/8+1 | -7/2+2 | -3+2, -4+3
    #   A = delta + A'/2 inside a turn
    "gae-two-level": "-0.4375 -2.875  0.5  1.5 1   -1.6875 -1.375  -1.5  -1.5 -1",
}


@cases("name", [name for name in ESTIMATORS if name != "gae-loo"])     # which test_ppo.py works
def test_estimator_by_hand(name):
    entry, episodes = ESTIMATORS[name], example(name)
    found = estimate(name, episodes)
    assert found == pytest.approx(numbers(WORKED[name]), abs=2e-6)
    assert isinstance(episodes[0].turns[0].advantage, list) == (entry.per == "token")
    if entry.values:
        targets = [a + v for a, v in zip(found, flat(episodes, "value"))]
        assert flat(episodes, "target") == pytest.approx(targets)


# ------------------------------------------------------------------------------------------------------------
# Limits that agree

@cases("gae, returns, lam", [
    ("gae", "monte-carlo", "lam"), ("gae-token", "reinforce++", "token_lam")])
def test_lambda_one_is_the_return_less_the_value(gae, returns, lam):
    expected = [g - v for g, v in zip(estimate(returns, token_gamma=0.9), flat(example(gae), "value"))]
    assert estimate(gae, token_gamma=0.9, **{lam: 1.0}) == pytest.approx(expected)


def test_two_levels_begin_like_one():
    """Without discount or lambda inside a turn, its first token has the advantage of the turn."""
    found = estimate("gae-two-level", token_lam=1.0)
    assert [found[first] for first in (0, 2, 3, 5, 7, 8)] == numbers(WORKED["gae"])


@cases("name", ["gae-token", "gae-two-level"])
def test_turns_of_one_token_are_tokens(name):
    episodes = example(name)
    for turn in turns_of(conversations_of(episodes)):
        turn.end, turn.value = turn.start + 1, turn.value[:1]
    assert estimate(name, episodes, token_gamma=0.5) == numbers(WORKED["gae"])


@cases("name", ["grpo", "grpo-no-std", "rloo"])
def test_equal_rewards_in_a_group_are_worth_nothing(name):
    """Another hand's rewards do not matter."""
    others = [replace(episode, seed=1) for episode in example(rewards=[(5, 5, 5)] * 2)]
    assert estimate(name, example(rewards=[(-1, 0.1, 0.7)] * 2) + others) == [0] * 12


def test_rloo_is_grpo_without_std_but_for_a_factor():
    """R_i - mean of the others = n/(n-1) (R_i - mean of all)."""
    three = example(rewards=[*REWARDS]) + example(rewards=[(1, 2, 3)])
    rloo = estimate("rloo", three)
    assert rloo == pytest.approx([1.5 * a for a in estimate("grpo-no-std", three)])


@every_estimator
def test_penalties_are_negative_rewards(name):
    """A penalty on the last token of a turn is worth as much less reward; on its first it is less reward
    there."""
    penalised, early, poorer = example(name), example(name), example(name, [(-1, -1.5, 4), REWARDS[1]])
    penalised[0].turns[1].penalties = [0.5]
    assert estimate(name, penalised) == pytest.approx(estimate(name, poorer))
    early[0].turns[2].penalties = [0.5, 0.25]
    estimate(name, early)
    chained = [1 - 0.5 + (1 - 0.25) / 2, 1 - 0.25]
    last = {"reinforce++": [4 - 0.75, 4 - 0.25], "gae-token": chained, "gae-two-level": chained,
            "monte-carlo": 4 - 0.75, "gae": 2 - 0.75}
    assert name not in last or early[0].turns[2].advantage == pytest.approx(last[name])


# ------------------------------------------------------------------------------------------------------------
# What is forced is free

@every_estimator
def test_a_longer_verifier_message_changes_no_advantage_and_no_unit(processor, name):
    """Nor old log-probs, penalties and weights in the mean, as the loss sees them. Positions of values are
    the critic's own business."""
    per = ESTIMATORS[name].per
    for unit in ["turn", "token", "sequence"][per == "token":]:
        loss, seen = reference.with_penalty(ppo.Loss(None, unit, "sequences"), settings(kl_coef=0.5)), []
        for told in ((3, 2, 2), (3, 9, 2), (30, 0, 1)):
            estimate(name, episodes := example(name, told=told))
            conversations = conversations_of(episodes)
            batch = collate(processor, [[c] for c in conversations])
            turns = ppo.stack_turns(conversations, batch, per)
            units = ppo.Units(turns, batch, loss)
            penalty = loss.penalty(conversations, turns.old_logprobs, units.pool)
            seen.append(vars(turns) | vars(units) | {"penalty": penalty, "value_places": None})
        assert penalty.min() > 0 and len(penalty) == ppo.count(conversations)[unit]
        for other in seen[1:]:
            torch.testing.assert_close(other, seen[0], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Losses

every_loss = cases("name", LOSSES)
RATIO = torch.tensor([1.0, 1.2, 1.5, 0.5, 1.5, 5.0, 0.5])
ADVANTAGE = torch.tensor([2.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
CLIPPED = "-2.0 -1.1 -1.1 -0.5 1.5 5.0 0.9"                    # clip 0.1, clip-high 0.28, dual clip 3
HIGHER = "-2.0 -1.2 -1.28 -0.5 1.5 5.0 0.9"
LOSSES_WORKED = {
    "ppo": CLIPPED, "grpo": CLIPPED, "gspo": CLIPPED, "clip-higher": HIGHER, "dapo": HIGHER,
    "dual-clip": "-2.0 -1.1 -1.1 -0.5 1.5 3.0 0.9",
    #   0, -ln 1.2, -ln 1.5, ln 2, ln 1.5, ln 5, -ln 2
    "reinforce": "0 -0.182322 -0.405465 0.693147 0.405465 1.609438 -0.693147",
}


@every_loss
def test_loss_by_hand(name):
    loss, metrics = LOSSES[name].f(RATIO.log(), torch.zeros(7), ADVANTAGE, settings(clip=0.1))
    assert loss.tolist() == pytest.approx(numbers(LOSSES_WORKED[name]), abs=1e-6)
    kl = numbers("0 0.017678 0.094535 0.193147 0.094535 2.390562 0.193147")    # r - 1 - ln r
    assert metrics["approx_kl"].tolist() == pytest.approx(kl, abs=1e-6)
    outside = {HIGHER: [0, 0, 1, 1, 1, 1, 1], LOSSES_WORKED["reinforce"]: [0] * 7}
    assert metrics["clipfrac"].tolist() == outside.get(LOSSES_WORKED[name], [0, 1, 1, 1, 1, 1, 1])


@every_loss
def test_at_the_old_policy_every_gradient_is_the_policy_gradient(name):
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantage = torch.tensor([2.0, -1.0, 0.5])
    loss, _ = LOSSES[name].f(logprobs, logprobs.detach(), advantage, settings())
    assert torch.equal(torch.autograd.grad(loss.sum(), logprobs)[0], -advantage)


#   GRPO: of each conversation the mean over its tokens, then the mean of these. DAPO: all tokens alike.
@cases("unit, mean, name, new, old, worth, loss", """
    turn     | units     | gae       | -2.5 -3 -7 -11       | -5 -5 -3.5 -8.5      | 1 0 2 0        | 0.75
    turn     | sequences | gae       | -2.5 -3 -7 -11       | -5 -5 -3.5 -8.5      | 1 0 2 0        | 0.5
    token    | units     | gae       | -1 -2 -3 -4 -5 -6 -8 | -4 -3 -5 -3 -2 -5 -6 | 1 1 0 2 2 0 0  | 0.857143
    token    | units     | gae-token | -1 -2 -3 -4 -5 -6 -8 | -4 -3 -5 -3 -2 -5 -6 | 1 2 0 2 3 0 -1 | 1
    token    | sequences | gae-token | -1 -2 -3 -4 -5 -6 -8 | -4 -3 -5 -3 -2 -5 -6 | 1 2 0 2 3 0 -1 | 0.55
    sequence | units     | gae-token | -3 -7                | -3.4 -5.5            | 1.6 -0.5       | 0.55
    sequence | units     | gae       | -3 -7                | -3.4 -5.5            | 1.2 0          | 0.6""")
def test_units_and_means_by_hand(processor, unit, mean, name, new, old, worth, loss):
    """Of two conversations, with turns of 2, 1 and 2 tokens and of 2. Advantages are values, losses are
    advantages."""
    f = lambda *given: seen.extend(x.tolist() for x in given[:3]) or (given[2], {})
    scored = lambda *batch, with_values: (torch.tensor([-1.0, -2, -3, -4, -5, -6, -8]), torch.zeros(7), None)
    seen, conversations = [], conversations_of(example(name, [REWARDS[0], (0,)]))
    _, metrics = ppo.batch_loss(
        scored, conversations, collate(processor, [[c] for c in conversations]), settings(),
        replace(ESTIMATORS[name], values=False), ppo.Loss(f, unit, mean), ppo.count(conversations))
    assert seen == [pytest.approx(numbers(x)) for x in (new, old, worth)]
    assert metrics["policy_loss"].item() == pytest.approx(float(loss))


def with_gradient(loss, log_ratio, advantage):
    """Value, gradient and approximate KL of a loss in float32 at a log ratio, with old log-probs of -1."""
    new, old = torch.tensor([log_ratio - 1.0], requires_grad=True), torch.tensor([-1.0])
    value, metrics = algorithm(loss)[1].f(new, old, torch.tensor([advantage]), loss)
    return value.item(), torch.autograd.grad(value, new)[0].item(), metrics["approx_kl"].item()


#   of -min(r A, clip(r) A); larger ratios count as e^20 = 485165195; then r - 1 - log r
@every_loss
@cases("log_ratio, advantage, value, gradient, kl", [numbers(line) for [line] in rows("""
     100    1  -1.1       0          485165094
     1e4    2  -2.2       0          485155194
     100   -1   485165195 485165195  485165094
     1e4   -1   485165195 485165195  485155194
    -100    1   0         0          99
    -1e4    1   0         0          9999
    -100   -1   0.9       0          99
    -1e4   -2   1.8       0          9999
     100    0   0         0          485165094""")])
def test_far_from_the_old_policy_all_is_finite(name, log_ratio, advantage, value, gradient, kl):
    """0 where the gate is shut; where it is open and leads back, a gradient of the right sign and a finite
    size."""
    if name == "dual-clip" and log_ratio > 0 > advantage:
        value, gradient = -3 * advantage, 0
    if name == "reinforce":
        value, gradient = -(log_ratio - 1) * advantage, -advantage
    found = with_gradient(settings(loss=name, unit="turn", clip=0.1, clip_high=0.1), log_ratio, advantage)
    assert found == pytest.approx((value, gradient, kl), rel=1e-5, abs=1e-30)


@cases("log_ratio", [19, 20, 21, 88, 89, 1e30])
def test_a_shut_gate_passes_nothing_at_any_distance(log_ratio):
    for name in ("ppo", "clip-higher", "dual-clip", "gspo"):
        assert with_gradient(settings(loss=name, compat="ratio-10"), log_ratio, 1.0)[1] == 0
    value, gradient, _ = with_gradient(settings(compat="ratio-10", clip=0.1), log_ratio, -1.0)
    assert value == pytest.approx(1.1) and gradient == 0


# ------------------------------------------------------------------------------------------------------------
# KL

@cases("x, k1, k2, k3, gradient", [numbers(line) for [line] in rows("""
     0      0   0     0          0
     1      1   0.5   0.3678794  0.6321206
     100    100 5000  99         1
     1e4    1e4 5e7   9999       1
    -100   -100 5000  485165094 -485165194
    -1e4   -1e4 5e7   485155194 -485165194""")])
def test_kl_far_from_the_reference(x, k1, k2, k3, gradient):
    """x = log p - log q. The gradients of log p are 1, x and 1 - q / p: it is pulled towards the reference,
    however far."""
    for name, value, slope in (("k1", k1, 1), ("k2", k2, x), ("k3", k3, gradient)):
        p = torch.tensor(x - 2.0, requires_grad=True)
        found = KL[name](p, torch.tensor(-2.0))
        assert found.item() == pytest.approx(value, rel=1e-5)
        assert torch.autograd.grad(found, p)[0].item() == pytest.approx(slope, rel=1e-5)


def test_kl_estimators_in_expectation():
    """Over all outcomes of two distributions, exactly: means, and gradients of what is sampled from p."""
    torch.manual_seed(0)
    z = torch.randn(6, dtype=torch.float64, requires_grad=True)
    p, q = z.log_softmax(0), torch.randn(6, dtype=torch.float64).log_softmax(0)
    forward, backward = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
    k1, k2, k3 = ((p.detach().exp() * KL[name](p, q)).sum() for name in ("k1", "k2", "k3"))
    gradient = lambda x: torch.autograd.grad(x, z, retain_graph=True)[0]
    assert torch.allclose(k1, forward) and torch.allclose(k3, forward)
    assert k2.item() != pytest.approx(forward.item(), rel=1e-3)
    assert gradient(k1).abs().max() < 1e-15
    assert torch.allclose(gradient(k2), gradient(forward))
    assert torch.allclose(gradient(k3), gradient(backward))


@torch.no_grad()
def moved(model):
    """The model with its weights shifted a little."""
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    for parameter in other.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return other


def score(model, processor, conversations):
    """The log-probs of all that was sampled, (tokens,)."""
    batch = collate(processor, [[c] for c in conversations])
    return model(**batch.inputs(), targets=batch.targets).logprobs[batch.targets >= 0]


@cases("part, half", [("all", False), ("no-vision", False), ("all", True)])
def test_the_reference_is_the_policy_as_it_was(model, processor, part, half):
    """Inside the context to the bit, and the trained one to the bit after it, also after an error. half:
    autocast keeps copies of weights."""
    freeze(model, part)
    conversations = conversations_of(play(model, processor, "gp-vl", hands=2))
    before, swapped_in = copy.deepcopy(model), reference.initial(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * parameter.requires_grad
    trained = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        after = score(model, processor, conversations)
        with pytest.raises(KeyError), swapped_in():
            found = score(model, processor, conversations)
            raise KeyError
        assert torch.equal(after, score(model, processor, conversations))
        assert torch.equal(found, score(before, processor, conversations)) and not torch.equal(found, after)
    torch.testing.assert_close(dict(model.state_dict()), dict(trained), rtol=0, atol=0)


@cases("estimator", KL)
def test_reference_logprobs_and_penalties(model, processor, estimator):
    """Another model scores each conversation; the penalties are of the sampled tokens, and so is the
    metric."""
    episodes, policy = play(model, processor, hands=3), moved(model)
    swap = reference.initial(policy)                           # as if the run had begun there
    policy.load_state_dict(model.state_dict())
    args = settings(kl_coef=0.5, kl_in="reward", kl_estimator=estimator)
    metrics = reference.score_reference(policy, processor, episodes, args, swap, OneProcess())
    conversations = conversations_of(episodes)
    theirs = score(moved(model), processor, conversations)
    expected = KL[estimator](of_sampled(conversations, "logprobs"), theirs)
    assert flat(episodes, "penalties") == pytest.approx((0.5 * expected).tolist(), abs=1e-4)
    assert all(len(turn.penalties) == turn.length for turn in turns_of(conversations))
    assert metrics == {"kl_reference": pytest.approx(expected.mean().item(), abs=1e-4)}
    assert expected.mean().abs() > 1e-3


def test_rescored_logprobs_are_those_of_training(model, processor):
    """What other weights drew counts as drawn by these; what was forced stays 0."""
    episodes, policy = play(model, processor, hands=3), moved(model)
    conversations = conversations_of(episodes)
    before, theirs = of_sampled(conversations, "logprobs"), score(policy, processor, conversations)
    metrics = reference.rescore(policy, processor, episodes, settings(), OneProcess())
    assert metrics == {"drawn_vs_scored": pytest.approx((before - theirs).abs().mean().item(), rel=1e-4)}
    torch.testing.assert_close(of_sampled(conversations, "logprobs"), theirs, atol=1e-5, rtol=0)
    assert sum(x != 0 for c in conversations for x in c.logprobs) == len(theirs)


@cases("loss, unit", [
    ("ppo", "token"), ("ppo", "turn"), ("grpo", "token"), ("gspo", "sequence")])
def test_kl_in_the_loss_adds_its_gradient(model, processor, loss, unit):
    """Against autograd on one padded batch, written out anew."""
    episodes, other = play(model, processor, hands=4), moved(model)
    conversations = conversations_of(episodes)
    reference.score(other, processor, [[c] for c in conversations], 300)
    args = dict(loss=loss, unit=unit.replace("sequence", "turn"), token_budget=300)
    with_it, without = (gradients(model, processor, episodes, kl_coef=coef, **args)[0] for coef in (0.5, 0.0))
    found = with_it["policy.lm_head.weight"] - without["policy.lm_head.weight"]
    mine, theirs = (score(m, processor, conversations) for m in (model, other))
    kl = (theirs.detach() - mine).exp() - 1 - (theirs.detach() - mine)
    if loss == "ppo":
        mean = kl.sum() / ppo.count(conversations)[unit]
    else:
        mean = torch.stack([row.mean() for row in kl.split([sum(c.sampled) for c in conversations])]).mean()
    expected = torch.autograd.grad(0.5 * mean, model.lm_head.weight)[0]
    assert torch.allclose(found, expected, atol=1e-6, rtol=1e-3) and expected.abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------
# The update

def shared_hand(model, processor):
    """Two samples of each of three hands, with rewards that differ."""
    episodes = play(model, processor, hands=3, samples=2)
    for k, episode in enumerate(episodes):
        episode.turns[-1].reward = k * k
    return episodes


@cases("name", [name for name, entry in ESTIMATORS.items() if not entry.values])
def test_no_critic_is_asked_or_trained_without_need(model, processor, name, monkeypatch):
    monkeypatch.delattr(ppo.ActorCritic, "head")
    grads, metrics = gradients(model, processor, shared_hand(model, processor), advantage=name, unit="token")
    assert metrics["value_loss"] == 0 and math.isnan(metrics["explained_variance"])
    assert not any(key.startswith("value_head") for key in grads) and grads["policy.lm_head.weight"].any()


@cases("name", ["rloo", "reinforce++"])
def test_only_what_says_so_is_normalised(model, processor, name):
    """Over tokens: long turns count more."""
    episodes, args = shared_hand(model, processor), settings(advantage=name, unit="token")
    update(critic_of(model), processor, episodes, args)
    found = torch.tensor(flat(episodes), dtype=torch.float64)
    ESTIMATORS[name].f(episodes, args)
    own = torch.tensor(flat(episodes), dtype=torch.float64)
    expected = own if name == "rloo" else (own - own.mean()) / own.std(correction=0)
    assert torch.allclose(found, expected, atol=1e-6) and own.std() > 0


# ------------------------------------------------------------------------------------------------------------
# From the outside

@cases("extra", [
    "--kl-in loss --loss dapo", "--kl-in reward --kl-estimator k1 --advantage gae-token --unit token"])
def test_resumed_equals_uninterrupted_with_a_reference(small, tmp_path, extra):
    """The reference is the model of step 0, not that of the checkpoint; also from a checkpoint that a resumed
    run wrote."""
    whole = in_parts(tmp_path, "--kl-coef 0.1 --attempts 2 --model", small[0], extra, stops=(1, 2, 3))
    kl = [record["kl_reference"] for record in records(whole, "step")]
    assert abs(kl[0]) < 1e-5 and min(map(abs, kl[1:])) > 1e-5


@cases("shard, extra", [
    ("on", "--kl-in reward --advantage gae-token --loss grpo"),
    ("on", "--kl-in loss --advantage reinforce++ --loss dapo"),
    ("off", "--kl-in loss --advantage monte-carlo --loss dual-clip")])
def test_two_ranks_equal_one(small, tmp_path, working_folder, shard, extra):
    """Slices of the reference, and as many passes on either rank."""
    on_two_ranks(tmp_path, working_folder, small[0], "--kl-coef 0.1", extra,
                 two=f"--shard {shard} --token-budget 200")
    assert records(tmp_path / "two", "step")[2]["kl_reference"] > 1e-5


# ------------------------------------------------------------------------------------------------------------
# As the released code does

def test_leaking_gae_by_hand():
    """The first episode used up its attempts: V and A of the second's first turn, 1 and -3.375, flow into its
    last.

    A_1 of the second: -1 - 2/2 - 1 - 1.5/4.
    Of the first: A_3 = 4 + 1/2 - 2 - 3.375/4, A_2 = 0 + A_3/4, A_1 = -2 + A_2/4.
    """
    episodes = example()
    episodes[0].terminated, episodes[1].turns[0].value = False, 1.0
    leaking = estimate("gae", episodes, compat="leaking-gae")
    assert leaking == numbers("-1.896484375 0.4140625 1.65625  -3.375 -1.5 -2")
    assert estimate("gae", episodes)[:3] == [-1.875, 0.5, 2]


@cases("compat, ratios, worked", """
             | 11 11 0.5     | 11   -1.1 -0.5  # -min(-11, -1.1), -min(11, 1.1), -min(0.5, 0.9)
    ratio-10 | 11 11 0.5     | 1.1  -1.1 -0.5  # the first clipped alone
    ratio-10 | 9.9 9.9 0.5   | 9.9  -1.1 -0.5""")
def test_ratio_10_by_hand(compat, ratios, worked):
    """A = -1, 1, 1; clip range 0.1. What shares its micro-batch is judged by itself, as in the released
    code's, which hold one turn."""
    args, advantages = settings(clip=0.1, compat=compat), torch.tensor([-1.0, 1.0, 1.0])
    loss, _ = algorithm(args)[1].f(torch.tensor(numbers(ratios)).log(), torch.zeros(3), advantages, args)
    assert loss.tolist() == pytest.approx(numbers(worked))


@cases("compat", ["", "bf16-logprobs,first-token-unscored"])
def test_bf16_logprobs_and_unscored_first_tokens(model, processor, compat):
    episodes, (loss, seen) = play(model, processor), spy("token")
    official.change_model(model, official.switches(compat))
    update(critic_of(model), processor, episodes, settings(compat=compat), loss=loss)
    first = {c.weights[turn.start] for c in conversations_of(episodes) for turn in c.turns}
    assert first == {0.0} if compat else 0.0 not in first
    for logprobs in list(map(torch.cat, zip(*seen)))[:2]:      # new and old
        assert torch.equal(logprobs, logprobs.bfloat16().float()) == bool(compat)


def test_rank_advantages_need_no_other_rank(model, processor):
    """Two sums over ranks fewer: of the advantages and of their squares."""
    sums = []
    for compat in ("", "rank-advantages"):
        ranks = mock.Mock(wraps=OneProcess(), device="cpu")
        update(critic_of(model), processor, play(model, processor), settings(compat=compat), ranks=ranks)
        sums.append(ranks.total.call_count)
    assert sums[0] - sums[1] == 2


@cases("task, answers", [("gp-l", 5), ("virl-l", 2)])
def test_all_of_it_runs(small, tmp_path, task, answers):
    """The answer that nobody judges is trained on and counted nowhere: five judged ones a hand, two at the
    first point of a route."""
    run("--task", task, "--model", small[0], "--steps 1 --compat official --out", tmp_path)
    [step], evals = records(tmp_path, "step"), records(tmp_path, "eval")
    assert evals[0]["eval"]["id"]["turns"] == answers == step["turns"]


@cases("per, critic, passed", [
    ("turn", "shared", False), ("turn", "separate", True), ("token", "shared", True)])
@cases("unit", ["turn", "token"])
def test_what_a_user_leaves_open_is_filled_in(monkeypatch, per, critic, passed, unit):
    """Estimators over tokens and separate critics read values in a pass; a loss goes by --unit."""
    monkeypatch.setitem(ESTIMATORS, "mine", ppo.Estimator(ppo.gae, per))
    monkeypatch.setitem(LOSSES, "mine", ppo.Loss(ppo.clip))
    estimator, loss = algorithm(settings(advantage="mine", loss="mine", unit=unit, critic=critic))
    assert loss.unit == unit and bool(estimator.read) == passed
    assert not passed or (estimator.read.func, estimator.read.args) == (score_values, (per,))


def test_a_separate_critic_does_not_read_the_states_of_the_policy():
    with pytest.raises(AssertionError, match="a separate critic needs"):
        ppo.read_values(mock.Mock(trunk="a copy"), None, [], None, None)
