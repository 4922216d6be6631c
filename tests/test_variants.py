"""Variants: estimators and losses against hand-worked numbers, limits that must agree, what is forced, and the reference policy."""

import contextlib
import copy
import math
import sys

import pytest
import torch

import ppo
import sft
from test_ppo import critic_of, gradients, play, settings
from test_train import command, learnt, records, run, weights
from variants import losses, reference
from envs import GAMES
from rollout import Conversation, Episode, Turn, rollout


# ------------------------------------------------------------------------------------------------- the example, by hand
# Two samples of one hand, three turns each, of 2, 1 and 2 tokens. Values are V before each token; an estimator over turns has the first.
# gamma = lambda = 1/2 from turn to turn, gamma 1 and lambda 1/2 from token to token, so that all numbers are exact.

REWARDS = [(-1, -1, 4), (-1, -2, -4)]
VALUES = [([1, 2], [0], [2, 3]), ([0, -1], [-2], [-2, -3])]
SETTINGS = dict(gamma=0.5, lam=0.5, token_gamma=1.0, token_lam=0.5, reward_scale=1.0)


def example(per="turn", rewards=REWARDS, forced=(3, 2, 2)):
    """The two episodes, with `forced` tokens told before each turn."""
    episodes = []
    for own, values in zip(rewards, VALUES):
        turns, at = [], 0
        for k, (reward, value, told) in enumerate(zip(own, values, forced)):
            turns.append(Turn(0, at + told, at + told + len(value), reward, {"attempt": k}, value=value[0] if per == "turn" else list(value)))
            at = turns[-1].end
        episodes.append(Episode(0, turns=turns))
    return episodes


def estimate(name, *, episodes=None, **changes):
    """Advantages of the example by an estimator: a list an episode."""
    episodes = episodes or example(ppo.ESTIMATORS[name].per)
    ppo.ESTIMATORS[name].f(episodes, settings(**SETTINGS | changes))
    return [[turn.advantage for turn in episode.turns] for episode in episodes]


WORKED = {
    #   G_3 = 4, G_2 = -1 + 4/2 = 1, G_1 = -1 + 1/2 = -1/2;      G_3 = -4, G_2 = -2 - 4/2 = -4, G_1 = -1 - 4/2 = -3
    "monte-carlo": [[-0.5, 1, 4], [-3, -4, -4]],
    #   delta = -1 + 0/2 - 1, -1 + 2/2 - 0, 4 - 2 = -2, 0, 2;    A_3 = 2, A_2 = 0 + 2/4, A_1 = -2 + 0.5/4
    #   delta = -1 - 2/2 - 0, -2 - 2/2 + 2, -4 + 2 = -2, -1, -2; A_3 = -2, A_2 = -1 - 2/4, A_1 = -2 - 1.5/4
    "gae": [[-1.875, 0.5, 2], [-2.375, -1.5, -2]],
    #   the episodes returned G_1 = -1/2 and -3: each less the other
    "rloo": [[2.5] * 3, [-2.5] * 3],
    #   less their mean -7/4;  over their deviation, 5/4
    "grpo-no-std": [[1.25] * 3, [-1.25] * 3],
    "grpo": [[1] * 3, [-1] * 3],
    #   rewards 0 -1 | -1 | 0 4 and 0 -1 | -2 | 0 -4, summed from the end
    "reinforce++": [[[2, 2], [3], [4, 4]], [[-7, -7], [-6], [-4, -4]]],
    #   delta = 0+2-1, -1+0-2, -1+2-0, 0+3-2, 4-3 = 1 -3 | 1 | 1 1;          A = delta + A'/2 from the end
    #   delta = 0-1-0, -1-2+1, -2-2+2, 0-3+2, -4+3 = -1 -2 | -2 | -1 -1
    "gae-token": [[[-0.0625, -2.125], [1.75], [1.5, 1]], [[-2.6875, -3.375], [-2.75], [-1.5, -1]]],
    #   turns bring A + V of "gae": -7/8, 1/2, 4 and -19/8, -7/2, -4, each with its last token
    #   delta = 2-1, -7/8-2 | 1/2-0 | 3-2, 4-3  and  -1-0, -19/8+1 | -7/2+2 | -3+2, -4+3;   A = delta + A'/2 inside a turn
    "gae-two-level": [[[-0.4375, -2.875], [0.5], [1.5, 1]], [[-1.6875, -1.375], [-1.5], [-1.5, -1]]],
}


def test_every_estimator_is_worked_by_hand():
    assert set(WORKED) == set(ppo.ESTIMATORS) - {"gae-loo"}                     # which test_ppo.py works


@pytest.mark.parametrize("name", WORKED)
def test_estimator_by_hand(name):
    for found, worked in zip(estimate(name), WORKED[name]):
        assert ppo.flat([Turn(0, 0, 1, 0, {}, advantage=a) for a in found], "advantage") == pytest.approx(
            ppo.flat([Turn(0, 0, 1, 0, {}, advantage=a) for a in worked], "advantage"), abs=2e-6)
        assert [type(a) for a in found] == [list if ppo.ESTIMATORS[name].per == "token" else float] * 3


@pytest.mark.parametrize("name", ["gae-token", "gae-two-level"])
def test_targets_are_advantages_plus_values(name):
    episodes = example("token")
    estimate(name, episodes=episodes)
    for turn in [turn for episode in episodes for turn in episode.turns]:
        assert turn.target == pytest.approx([a + v for a, v in zip(turn.advantage, turn.value)])


# ------------------------------------------------------------------------------------------------------ limits that agree

def test_lambda_one_is_monte_carlo_minus_value():
    values = [[turn.value for turn in episode.turns] for episode in example()]
    for found, returned, value in zip(estimate("gae", lam=1.0), estimate("monte-carlo"), values):
        assert found == pytest.approx([g - v for g, v in zip(returned, value)])
    for found, returned, value in zip(estimate("gae-token", token_lam=1.0, token_gamma=0.9), estimate("reinforce++", token_gamma=0.9), VALUES):
        assert sum(found, []) == pytest.approx([g - v for g, v in zip(sum(returned, []), sum(value, []))])


def test_two_levels_begin_like_one():
    """Without discount or lambda inside a turn, its first token has the advantage of the turn."""
    assert [[a[0] for a in own] for own in estimate("gae-two-level", token_lam=1.0)] == WORKED["gae"]


def test_turns_of_one_token_are_tokens():
    episodes = example("token")
    for turn in [turn for episode in episodes for turn in episode.turns]:
        turn.end, turn.value = turn.start + 1, turn.value[:1]
    same = dict(episodes=episodes, token_gamma=0.5, token_lam=0.5)
    for name in ("gae-token", "gae-two-level"):
        assert [sum(own, []) for own in estimate(name, **same)] == WORKED["gae"]


@pytest.mark.parametrize("name", ["grpo", "grpo-no-std", "rloo"])
def test_equal_rewards_in_a_group_are_worth_nothing(name):
    episodes = example(rewards=[(-1, 0.1, 0.7)] * 2)
    other = example(rewards=[(5, 5, 5)] * 2)
    for episode in other:
        episode.seed = 1                                                        # another hand's rewards do not matter
    assert estimate(name, episodes=episodes + other) == [[0, 0, 0]] * 4


def test_rloo_is_grpo_without_std_but_for_a_factor():
    """R_i - mean of the others = n/(n-1) (R_i - mean of all)."""
    three = lambda: example() + example(rewards=[(1, 2, 3)])
    assert sum(estimate("rloo", episodes=three()), []) == pytest.approx([1.5 * a for a in sum(estimate("grpo-no-std", episodes=three()), [])])


@pytest.mark.parametrize("name", ppo.ESTIMATORS)
def test_penalties_are_negative_rewards(name):
    """One KL penalty on the last token of the second turn is worth as much less reward; on its first token it is less reward there."""
    per = ppo.ESTIMATORS[name].per
    penalised, poorer = example(per), example(per, rewards=[(-1, -1.5, 4), (-1, -2, -4)])
    penalised[0].turns[1].penalties = [0.5]
    for a, b in zip(estimate(name, episodes=penalised), estimate(name, episodes=poorer)):
        assert a == pytest.approx(b) if per == "turn" else [pytest.approx(x) for x in a] == b
    early = example(per)
    early[0].turns[2].penalties = [0.5, 0.25]
    found = estimate(name, episodes=early)[0][2]
    chained = [1 - 0.5 + (1 - 0.25) / 2, 1 - 0.25]
    last = {"reinforce++": [4 - 0.75, 4 - 0.25], "gae-token": chained, "gae-two-level": chained, "monte-carlo": 4 - 0.75, "gae": 2 - 0.75}
    assert name not in last or found == pytest.approx(last[name])


# --------------------------------------------------------------------------------------------------- what is forced is free

@pytest.mark.parametrize("name", ppo.ESTIMATORS)
def test_a_longer_verifier_message_changes_no_advantage(name):
    per = ppo.ESTIMATORS[name].per
    assert estimate(name) == estimate(name, episodes=example(per, forced=(3, 9, 2))) == estimate(name, episodes=example(per, forced=(30, 0, 1)))


def insert_forced(episodes, n):
    """n more forced tokens before the second turn of each episode that has one."""
    longer = copy.deepcopy(episodes)
    for episode in [e for e in longer if len(e.turns) > 1]:
        at, c = episode.turns[1].start, episode.conversations[0]
        for name, filler in (("ids", 9), ("sampled", False), ("logprobs", 0.0), ("weights", 0.0), ("reference", 0.0)):
            own = getattr(c, name)
            setattr(c, name, own[:at] + [filler] * n + own[at:])
        for turn in episode.turns[1:]:
            turn.start, turn.end = turn.start + n, turn.end + n
    return longer


@pytest.mark.parametrize("unit, name", [("turn", "gae"), ("token", "gae"), ("sequence", "grpo"), ("token", "gae-token"), ("sequence", "reinforce++")])
def test_a_longer_verifier_message_changes_no_unit(model, processor, unit, name):
    """Old log-probs, advantages, reference and what counts how much, as the loss sees them; values are the critic's own business."""
    per, generator, seen = ppo.ESTIMATORS[name].per, torch.Generator().manual_seed(0), []
    episodes = play(model, processor, hands=3)
    for episode in episodes:
        c = episode.conversations[0]
        c.reference = [x * y for x, y in zip(c.logprobs, torch.rand(len(c.ids), generator=generator).tolist())]
        for turn in episode.turns:
            turn.value = torch.randn(turn.end - turn.start, generator=generator).tolist()
            turn.value = turn.value if per == "token" else turn.value[0]
    for some in (episodes, insert_forced(episodes, 7)):
        ppo.ESTIMATORS[name].f(some, settings())
        _, tensors, _ = ppo.make_batch(processor, ppo.conversations_of(some), "cpu", per)
        drawn = tensors.turn_of >= 0
        assert torch.equal(tensors.old_logprobs[tensors.rows, tensors.positions], tensors.old_logprobs[drawn]) or per == "turn"
        seen.append([*ppo.units(tensors.old_logprobs, tensors, unit, per)[1:], tensors.reference[drawn]]
                    + ([] if unit == "sequence" else [ppo.counts(tensors, unit, "sequences")]))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True)) and len(seen[0][0]) == ppo.count_units(ppo.conversations_of(episodes))[unit]


# ------------------------------------------------------------------------------------------------------------------ losses

RATIO = torch.tensor([1.0, 1.2, 1.5, 0.5, 1.5, 5.0, 0.5])
ADVANTAGE = torch.tensor([2.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
LOSSES_WORKED = {
    #                 at one; -1.2 or -1.1; ...   clip 0.1, clip-high 0.28, dual clip 3
    "ppo":         [-2.0, -1.1, -1.1, -0.5, 1.5, 5.0, 0.9],
    "grpo":        [-2.0, -1.1, -1.1, -0.5, 1.5, 5.0, 0.9],
    "gspo":        [-2.0, -1.1, -1.1, -0.5, 1.5, 5.0, 0.9],
    "clip-higher": [-2.0, -1.2, -1.28, -0.5, 1.5, 5.0, 0.9],
    "dapo":        [-2.0, -1.2, -1.28, -0.5, 1.5, 5.0, 0.9],
    "dual-clip":   [-2.0, -1.1, -1.1, -0.5, 1.5, 3.0, 0.9],
    "reinforce":   [0.0, -math.log(1.2), -math.log(1.5), math.log(2), math.log(1.5), math.log(5), -math.log(2)],
}


@pytest.mark.parametrize("name", ppo.LOSSES)
def test_loss_by_hand(name):
    loss, metrics = ppo.LOSSES[name].f(RATIO.log(), torch.zeros(7), ADVANTAGE, settings(clip=0.1))
    assert loss.tolist() == pytest.approx(LOSSES_WORKED[name])
    assert metrics["approx_kl"].tolist() == pytest.approx([r - 1 - math.log(r) for r in RATIO.tolist()], abs=1e-6)
    outside = [r < 0.9 or r > (1.28 if name in ("clip-higher", "dapo") else 1.1) for r in RATIO.tolist()]
    assert metrics["clipfrac"].tolist() == ([0.0] * 7 if name == "reinforce" else outside)


@pytest.mark.parametrize("name", ppo.LOSSES)
def test_at_the_old_policy_every_gradient_is_the_policy_gradient(name):
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantage = torch.tensor([2.0, -1.0, 0.5])
    loss, _ = ppo.LOSSES[name].f(logprobs, logprobs.detach(), advantage, settings())
    assert torch.equal(torch.autograd.grad(loss.sum(), logprobs)[0], -advantage)


def tensors_by_hand(per):
    """Two conversations: turns of 2 and 1 tokens, and of 1 token."""
    worth = torch.tensor([1.0, 4.0, -1.0] if per == "turn" else [1.0, 2.0, 6.0, -1.0])
    return ppo.TurnTensors(
        rows=torch.tensor([0, 0, 1]), positions=torch.tensor([0, 3, 0]), turn_of=torch.tensor([[0, 0, -1, 1], [2, -1, -1, -1]]),
        weights=torch.tensor([[0.5, 1.0, 0.0, 1.0], [1.0, 0, 0, 0]]), old_logprobs=torch.tensor([[-1.0, -2.0, 0.0, -6.0], [-4.0, 0, 0, 0]]),
        advantages=worth, old_values=worth, targets=worth)


def test_units_of_sequences_and_of_tokens_by_hand():
    logprobs = torch.tensor([[-2.0, -4.0, 9.0, -3.0], [-1.0, 9.0, 9.0, 9.0]])
    new, old, worth = ppo.units(logprobs, tensors_by_hand("turn"), "sequence")
    assert (new.tolist(), old.tolist(), worth.tolist()) == ([-3, -1], [-3, -4], [2, -1])        # (1 + 1 + 4) / 3
    assert ppo.units(logprobs, tensors_by_hand("token"), "sequence", "token")[2].tolist() == [3, -1]
    new, old, worth = ppo.units(logprobs, tensors_by_hand("token"), "token", "token")
    assert (new.tolist(), old.tolist(), worth.tolist()) == ([-2, -4, -3, -1], [-1, -2, -6, -4], [1, 2, 6, -1])


def test_means_by_hand():
    """GRPO: of each conversation the mean over its tokens, then the mean of these. DAPO: all tokens alike."""
    x, tensors = torch.tensor([1.0, 2.0, 6.0, 11.0]), tensors_by_hand("token")
    assert (ppo.counts(tensors, "token", "sequences") * x).sum().item() / 2 == pytest.approx((3 + 11) / 2)
    assert (ppo.counts(tensors, "token", "units") * x).sum().item() / 4 == 5
    assert (ppo.counts(tensors_by_hand("turn"), "turn", "sequences") * torch.tensor([1.0, 3.0, 7.0])).sum().item() / 2 == pytest.approx((2 + 7) / 2)


def with_gradient(loss, log_ratio, advantage, name="old"):
    """Values and gradients in float32 of a loss at a log ratio, where what it is compared with is -1."""
    new = torch.full((3,), log_ratio - 1.0, requires_grad=True)
    value, metrics = loss(new, torch.full((3,), -1.0), torch.full((3,), advantage))
    return value.tolist()[0], torch.autograd.grad(value.sum(), new)[0].tolist()[0], metrics["approx_kl"].tolist()[0]


MOST = math.exp(20)            # what larger ratios count as
#          log ratio, A: value and gradient of -min(r A, clip(r) A), and r - 1 - log r
FAR = {(100, 1): (-1.1, 0, MOST - 101), (1e4, 2): (-2.2, 0, MOST - 10001), (100, -1): (MOST, MOST, MOST - 101), (1e4, -1): (MOST, MOST, MOST - 10001),
       (-100, 1): (0, 0, 99), (-1e4, 1): (0, 0, 9999), (-100, -1): (0.9, 0, 99), (-1e4, -2): (1.8, 0, 9999), (100, 0): (0, 0, MOST - 101)}


@pytest.mark.parametrize("name", ppo.LOSSES)
@pytest.mark.parametrize("log_ratio, advantage", FAR)
def test_far_from_the_old_policy_all_is_finite(name, log_ratio, advantage):
    """0 where the gate is shut; where it is open and leads back, a gradient of the right sign and a finite size."""
    value, gradient, kl = with_gradient(lambda *x: ppo.LOSSES[name].f(*x, settings(clip=0.1, clip_high=0.1)), log_ratio, float(advantage))
    expected = FAR[log_ratio, advantage]
    if name == "dual-clip" and log_ratio > 0 > advantage:
        expected = (-3 * advantage, 0, expected[2])
    if name == "reinforce":
        expected = (-(log_ratio - 1) * advantage, -advantage, expected[2])
    assert (value, gradient, kl) == pytest.approx(expected, rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("log_ratio", [19, 20, 21, 88, 89, 1e30])
def test_a_shut_gate_passes_nothing_at_any_distance(log_ratio):
    for name in ("ppo", "clip-higher", "dual-clip", "gspo"):
        assert with_gradient(lambda *x: ppo.LOSSES[name].f(*x, settings(compat="ratio-10")), log_ratio, 1.0)[1] == 0
    assert with_gradient(lambda *x: ppo.ppo_clip(*x, settings(compat="ratio-10", clip=0.1)), log_ratio, -1.0)[:2] == (pytest.approx(1.1), 0)


@pytest.mark.parametrize("x, k1, k2, k3, gradient", [
    (0, 0, 0, 0, 0), (1, 1, 0.5, math.exp(-1), 1 - math.exp(-1)), (100, 100, 5000, 99, 1), (1e4, 1e4, 5e7, 9999, 1),
    (-100, -100, 5000, MOST - 101, 1 - MOST), (-1e4, -1e4, 5e7, MOST - 10001, 1 - MOST)])
def test_kl_far_from_the_reference(x, k1, k2, k3, gradient):
    """x = log p - log q. The gradients of log p are 1, x and 1 - q / p: it is pulled towards the reference, however far."""
    for name, value, slope in (("k1", k1, 1), ("k2", k2, x), ("k3", k3, gradient)):
        p = torch.tensor(x - 2.0, requires_grad=True)
        found = losses.KL[name](p, torch.tensor(-2.0))
        assert found.item() == pytest.approx(value, rel=1e-5)
        assert torch.autograd.grad(found, p)[0].item() == pytest.approx(slope, rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------- KL

def test_kl_estimators_in_expectation():
    """Over all outcomes of two distributions, exactly: means, and gradients of what is sampled from p."""
    torch.manual_seed(0)
    z = torch.randn(6, dtype=torch.float64, requires_grad=True)
    p, q = z.log_softmax(0), torch.randn(6, dtype=torch.float64).log_softmax(0)
    forward, backward = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
    expected = {name: (p.detach().exp() * f(p, q)).sum() for name, f in losses.KL.items()}
    gradient = lambda x: torch.autograd.grad(x, z, retain_graph=True)[0]
    assert expected["k1"].item() == pytest.approx(forward.item()) and expected["k3"].item() == pytest.approx(forward.item())
    assert expected["k2"].item() != pytest.approx(forward.item(), rel=1e-3)
    assert gradient(expected["k1"]).abs().max() < 1e-15
    assert torch.allclose(gradient(expected["k2"]), gradient(forward)) and torch.allclose(gradient(expected["k3"]), gradient(backward))


@torch.no_grad()
def moved(model, by=0.02):
    """The model with its weights shifted a little."""
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    for parameter in other.parameters():
        parameter += by * torch.randn_like(parameter)
    return other


def score(model, processor, episodes):
    batch, tensors, _ = ppo.make_batch(processor, ppo.conversations_of(episodes), "cpu")
    return ppo.ActorCritic(model, "detached")(batch, tensors, 1.0)[0], tensors


@pytest.mark.parametrize("tune, half", [("all", False), ("no-vision", False), ("all", True)])
def test_the_reference_is_the_policy_as_it_was(model, processor, tune, half):
    """Inside the context to the bit, and the trained one to the bit after it, also after an error. half: autocast keeps copies of weights."""
    sft.freeze(model, tune)
    episodes = play(model, processor, "gp-vl", hands=2)
    before, swapped_in = copy.deepcopy(model), reference.initial(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    trained = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        after = score(model, processor, episodes)[0]
        with pytest.raises(KeyError), swapped_in():
            found = score(model, processor, episodes)[0]
            raise KeyError
        assert torch.equal(after, score(model, processor, episodes)[0])
        assert torch.equal(found, score(before, processor, episodes)[0]) and not torch.equal(found, after)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())


def step(loss):
    return 0.0


@pytest.mark.parametrize("estimator", losses.KL)
def test_reference_logprobs_and_penalties(model, processor, estimator):
    """What is stored of each conversation is what another model scores; the penalties are of the sampled tokens, and so is the metric."""
    episodes, other = play(model, processor, hands=3), moved(model)
    swap = reference.initial(other)                                  # as if the run had begun there
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters()):
            mine.copy_(theirs)
    args = settings(kl_coef=0.5, kl_in="reward", kl_estimator=estimator, epochs=1, minibatches=1)
    metrics = ppo.update(critic_of(other, "detached"), processor, episodes, args, step=step, seed=0, reference=swap)
    scored, tensors = score(moved(model), processor, episodes)
    drawn, worth = tensors.turn_of >= 0, []
    assert torch.allclose(tensors.reference[drawn], scored[drawn], atol=1e-5)
    for turn in [turn for episode in episodes for turn in episode.turns]:
        assert len(turn.penalties) == turn.end - turn.start
        worth += turn.penalties
    expected = 0.5 * losses.KL[estimator](tensors.old_logprobs[drawn], scored[drawn])
    assert worth == pytest.approx(expected.tolist(), abs=1e-4)
    assert metrics["kl_reference"] == pytest.approx(expected.mean().item() / 0.5, abs=1e-4) and abs(metrics["kl_reference"]) > 1e-3


@pytest.mark.parametrize("loss, unit", [("ppo", "token"), ("ppo", "turn"), ("grpo", "token"), ("gspo", "sequence")])
def test_kl_in_the_loss_adds_its_gradient(model, processor, loss, unit):
    """Against autograd on one padded batch, written out anew."""
    episodes, other, found = play(model, processor, hands=4), moved(model), []

    @contextlib.contextmanager
    def as_other():
        policy.load_state_dict(other.state_dict())
        yield
        policy.load_state_dict(model.state_dict())

    for coef in (0.5, 0.0):
        policy = copy.deepcopy(model)
        module = ppo.ActorCritic(policy, "detached")
        args = settings(loss=loss, unit="token" if unit == "token" else "turn", kl_coef=coef, epochs=1, minibatches=1, token_budget=300)
        ppo.update(module, processor, copy.deepcopy(episodes), args, step=step, seed=0, reference=as_other)
        found.append(policy.lm_head.weight.grad)
    policy = copy.deepcopy(model)
    with torch.no_grad():
        theirs, tensors = score(other, processor, episodes)
    mine = score(policy, processor, episodes)[0]
    kl = (theirs - mine).exp() - 1 - (theirs - mine)
    drawn = tensors.turn_of >= 0
    rows = [kl[b][drawn[b]] for b in range(len(kl))]
    if loss == "ppo":
        mean = torch.cat(rows).sum() / (drawn.sum() if unit == "token" else sum(len(e.turns) for e in episodes))
    else:
        mean = torch.stack([row.mean() for row in rows]).mean()
    expected = torch.autograd.grad(0.5 * mean, policy.lm_head.weight)[0]
    assert torch.allclose(found[0] - found[1], expected, atol=1e-6, rtol=1e-3) and expected.abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------- the update

@pytest.mark.parametrize("critic", ["detached", "separate"])
def test_values_before_each_token(model, processor, critic):
    """Each is that of a turn which would begin there: it has seen what was said before and nothing after."""
    module = critic_of(model, critic)
    episodes = play(model, processor, hands=2)
    ppo.score_values(module, processor, episodes, 10**6, "cpu", per="token")
    turn, c = episodes[1].turns[1], episodes[1].conversations[0]
    for k in range(turn.end - turn.start):
        cut = Conversation(*[getattr(c, name)[:turn.start + k + 1] for name in ("ids", "sampled", "logprobs", "weights")])
        last = Turn(0, turn.start + k, turn.start + k + 1, 0.0, {})
        ppo.score_values(module, processor, [Episode(0, [cut], [last])], 10**6, "cpu")
        assert last.value == pytest.approx(turn.value[k], abs=1e-4)
    assert len(turn.value) == turn.end - turn.start > 5 and len(set(turn.value)) == len(turn.value)


def shared_hand(model, processor, hands=3, samples=2):
    """Samples of each hand, as a rollout with --samples 2 has them, with rewards that differ."""
    episodes = rollout(model, processor, GAMES["gp"], range(hands), samples=samples, temperature=1.0, max_new_tokens=12)
    for k, episode in enumerate(episodes):
        episode.turns[-1].reward = k * k
    return episodes


@pytest.mark.parametrize("name", [name for name, entry in ppo.ESTIMATORS.items() if not entry.values])
def test_no_critic_is_asked_or_trained_without_need(model, processor, name, monkeypatch):
    monkeypatch.delattr(ppo.ActorCritic, "head")
    grads, metrics = gradients(model, processor, shared_hand(model, processor), advantage=name, unit="token")
    assert metrics["value_loss"] == 0 and math.isnan(metrics["explained_variance"])
    assert all(grad is None for key, grad in grads.items() if key.startswith("value_head"))
    assert grads["policy.lm_head.weight"].abs().max() > 0


@pytest.mark.parametrize("name", ["rloo", "reinforce++"])
def test_only_what_says_so_is_normalised(model, processor, name):
    episodes = shared_hand(model, processor)
    ppo.update(critic_of(model, "detached"), processor, episodes, settings(advantage=name, unit="token"), step=step, seed=0)
    turns = [turn for episode in episodes for turn in episode.turns]
    found = torch.tensor(ppo.flat(turns, "advantage"), dtype=torch.float64)
    ppo.ESTIMATORS[name].f(episodes, settings())
    own = torch.tensor(ppo.flat(turns, "advantage"), dtype=torch.float64)
    expected = own if name == "rloo" else (own - own.mean()) / own.std(correction=0)       # over tokens: long turns count more
    assert torch.allclose(found, expected, atol=1e-6) and own.std() > 0


@pytest.mark.parametrize("name, loss, unit", [("gae", "grpo", "turn"), ("gae-token", "ppo", "token"), ("gae-two-level", "dapo", "turn"),
                                              ("grpo", "gspo", "turn"), ("reinforce++", "grpo", "turn"), ("rloo", "reinforce", "turn")])
def test_micro_batches_add_up(model, processor, name, loss, unit):
    """A minibatch cut into many micro-batches has the gradient of the whole."""
    episodes = shared_hand(model, processor)
    changes = dict(advantage=name, loss=loss, unit=unit, entropy_coef=0.0)
    whole, a = gradients(model, processor, episodes, token_budget=10**6, **changes)
    parts, b = gradients(model, processor, episodes, token_budget=1, **changes)
    for key, gradient in whole.items():
        assert (gradient is None) == (parts[key] is None) and (gradient is None or torch.allclose(gradient, parts[key], atol=1e-5, rtol=1e-3)), key
    for key in ("policy_loss", "value_loss", "approx_kl"):
        assert a[key] == pytest.approx(b[key], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- from the outside


@pytest.mark.parametrize("extra", [["--kl-in", "loss", "--loss", "dapo"],
                                   ["--kl-in", "reward", "--kl-estimator", "k1", "--advantage", "gae-token", "--unit", "token"]])
def test_resumed_equals_uninterrupted_with_a_reference(small, tmp_path, extra):
    """The reference is the model of step 0, not that of the checkpoint; also from a checkpoint that a resumed run wrote."""
    common = ["--task", "gp-l", "--model", small[0], "--lr-schedule", "constant", "--lr", "1e-3", "--kl-coef", 0.1, "--attempts", 2, *extra]
    run(*common, "--steps", 3, "--out", tmp_path / "whole")
    run(*common, "--steps", 1, "--out", tmp_path / "parts")
    for steps in (2, 3):
        run("--steps", steps, "--out", tmp_path / "parts", "--resume", "--override")
    a, b = weights(tmp_path / "whole/final"), weights(tmp_path / "parts/final")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert learnt(tmp_path / "whole", "step") == learnt(tmp_path / "parts", "step")
    kl = [record["kl_reference"] for record in records(tmp_path / "whole", "step")]
    assert abs(kl[0]) < 1e-5 and min(map(abs, kl[1:])) > 1e-5


@pytest.mark.parametrize("shard, extra", [("on", ["--kl-in", "reward", "--advantage", "gae-token", "--loss", "grpo"]),
                                          ("on", ["--kl-in", "loss", "--advantage", "reinforce++", "--loss", "dapo"]),
                                          ("off", ["--kl-in", "loss", "--advantage", "monte-carlo", "--loss", "dual-clip"])])
def test_two_ranks_equal_one(small, tmp_path, working_folder, shard, extra):
    """Slices of the reference, and as many passes on either rank."""
    common = ["--task", "gp-l", "--model", small[0], "--steps", 3, "--lr", "1e-3", "--adam-eps", "1e-3", "--minibatches", 1, "--kl-coef", 0.1,
              "--lr-schedule", "constant", *extra]
    run(*common, "--out", tmp_path / "one")
    two = command(*common, "--out", tmp_path / "two", "--shard", shard, "--token-budget", 200, cwd=working_folder,
                  launcher=(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    output, _ = two.communicate(timeout=300)
    assert two.returncode == 0, output
    a, b = weights(tmp_path / "one/final"), weights(tmp_path / "two/final")
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    for x, y in zip(records(tmp_path / "one", "step"), records(tmp_path / "two", "step"), strict=True):
        names = ["reward", "policy_loss", "value_loss", "kl_reference"]
        assert [x[name] for name in names] == pytest.approx([y[name] for name in names], abs=1e-4)
    assert records(tmp_path / "two", "step")[2]["kl_reference"] > 1e-5


# ------------------------------------------------------------------------------------------------- as the released code does

def test_leaking_gae_by_hand():
    """The first episode used up its attempts: V and A of the second's first turn, 1 and -3.375, flow into its last.

    A_1 of the second: -1 - 2/2 - 1 - 1.5/4;   of the first: A_3 = 4 + 1/2 - 2 - 3.375/4, A_2 = 0 + A_3/4, A_1 = -2 + A_2/4.
    """
    episodes = example()
    episodes[0].terminated, episodes[1].turns[0].value = False, 1.0
    assert estimate("gae", episodes=episodes, compat="leaking-gae") == [[-1.896484375, 0.4140625, 1.65625], [-3.375, -1.5, -2]]
    assert estimate("gae", episodes=episodes)[0] == [-1.875, 0.5, 2]


def test_ratio_10_by_hand():
    """A = -1 and A = 1 at a ratio of 11, A = 1 at 1/2, clip range 0.1: -min(-11, -1.1), -min(11, 1.1), -min(0.5, 0.9). The first
    clipped alone: 1.1. What shares its micro-batch is judged by itself, as in the released code's, which hold one turn."""
    new, old, advantages = torch.tensor([11, 11, 0.5]).log(), torch.zeros(3), torch.tensor([-1.0, 1.0, 1.0])
    loss = lambda new, compat: ppo.ppo_clip(new, old, advantages, settings(clip=0.1, compat=compat))[0].tolist()
    assert loss(new, "") == pytest.approx([11, -1.1, -0.5]) and loss(new, "ratio-10") == pytest.approx([1.1, -1.1, -0.5])
    assert loss(new - 0.1, "ratio-10") == loss(new - 0.1, "")                  # 9.95: as ever


def test_bf16_logprobs_and_unscored_first_tokens(model, processor, monkeypatch):
    seen = []
    spy = lambda new, old, advantages, args: seen.append((new.detach(), old)) or ppo.ppo_clip(new, old, advantages, args)
    monkeypatch.setitem(ppo.LOSSES, "ppo", losses.Loss(spy))
    for compat in ("", "bf16-logprobs,first-token-unscored"):
        episodes = play(model, processor)
        ppo.update(critic_of(model, "detached"), processor, episodes, settings(compat=compat, unit="token"), step=lambda loss: 0.0, seed=0)
        first = [episode.conversations[turn.conversation].weights[turn.start] for episode in episodes for turn in episode.turns]
        assert set(first) == {0.0} if compat else 0.0 not in first
        for x in torch.cat([torch.stack(pair, 1) for pair in seen]).T:
            assert torch.equal(x, x.bfloat16().float()) == bool(compat)
        seen.clear()


def test_rank_advantages_need_no_other_rank(model, processor):
    """Two sums over ranks fewer: of the advantages and of their squares."""
    counts = []
    for compat in ("", "rank-advantages"):
        calls = []
        ppo.update(critic_of(model, "detached"), processor, play(model, processor), settings(compat=compat), step=lambda loss: 0.0, seed=0,
                   all_reduce=lambda x: calls.append(1) or x)
        counts.append(len(calls))
    assert counts[0] - counts[1] == 2


@pytest.mark.parametrize("task", ["gp-l", "virl-l"])
def test_all_of_it_runs(small, tmp_path, task):
    """The answer that nobody judges is trained on and counted nowhere: five judged ones a hand, two at the first point of a route."""
    run("--task", task, "--algo", "ppo", "--model", small[0], "--steps", 1, "--out", tmp_path / "run", "--compat", "official")
    [step], evals = records(tmp_path / "run", "step"), records(tmp_path / "run", "eval")
    assert evals[0]["eval"]["id"]["turns"] == {"gp-l": 5, "virl-l": 2}[task] == step["turns"]
