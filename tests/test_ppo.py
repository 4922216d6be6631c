"""PPO: advantages against hand-worked numbers, ratios of one, masks, and one prefill per conversation."""

import copy
from dataclasses import replace
from functools import partial
from itertools import count
from unittest.mock import Mock

import pytest
import torch

import ppo
from envs import GeneralPoints, Navigation
from harness.settings import Args, apply_preset
from llama.batches import OneProcess, passes
from llama.frozen import remember
from llama.generate import Sample
from rollout import Conversation, Episode, Turn, conversations_of, rollout
from tables import cases, numbers
from variants import ESTIMATORS, algorithm, score_values
from variants.tune import freeze

GAMES = {"gp-l": GeneralPoints, "gp-vl": lambda: GeneralPoints(image=True, size=(224, 56)),
         "virl-vl": lambda: Navigation(image=True, size=112, after_failure="walk-on")}     # an image a point
in_text_and_pictures = cases("task", ["gp-l", "gp-vl"])


def settings(algo="ppo", **changes):
    """Settings of gp-l and the tiny preset, with the temperature of `play`."""
    return replace(apply_preset(Args(algo=algo, preset="tiny", temperature=1.0), 32), **changes)


def episode(rewards, values):
    """Turns with such rewards and values; | begins another conversation."""
    values, attempts, conversations = iter(numbers(values)), count(), []
    for part in rewards.split("|"):
        conversations.append(Conversation(turns=[
            Turn(0, 1, reward, {"attempt": next(attempts)}, value=next(values)) for reward in numbers(part)]))
    return Episode(0, conversations)


def noted(name, episodes):
    """The values, advantages or targets of each episode's turns."""
    return [[getattr(turn, name) for turn in each.turns] for each in episodes]


def worked(*rows):
    return [pytest.approx(numbers(row)) for row in rows]


def play(model, processor, task="gp-l", hands=4, **changes):
    how = {"temperature": 1.0, "max_new_tokens": 12} | changes
    return rollout(model, processor, GAMES[task], range(hands), **how)


def critic_of(model, critic="detached", std=1.0):
    """An actor-critic with a value head that is not zero."""
    torch.manual_seed(0)
    actor_critic = ppo.ActorCritic(model, critic)
    torch.nn.init.normal_(actor_critic.value_head[-1].weight, std=std)
    return actor_critic


def update(module, processor, episodes, args, step=lambda loss: 0.0, loss=None, **more):
    """ppo.update with the estimator and, if no other is given, the loss that the settings name."""
    estimator, named = algorithm(replace(args, critic=module.critic))
    return ppo.update(module, processor, episodes, args, estimator=estimator, loss=loss or named, step=step,
                      seed=0, **more)


def gradients_of(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def gradients(model, processor, episodes, critic="detached", features=None, **changes):
    """Gradients of one whole update's loss by name, and its metrics."""
    module = critic_of(copy.deepcopy(model), critic, std=0.1)
    with remember(module, features):
        metrics = update(module, processor, episodes, settings(epochs=1, minibatches=1, **changes))
    return gradients_of(module), metrics


def spy(unit):
    """A loss, and a list of the (log-probs, old log-probs, advantages) of units that it is given."""
    seen = []
    return ppo.Loss(lambda *units: seen.append(units[:3]) or ppo.clip(*units), unit=unit), seen


def learner(module, lr):
    """What steps an optimizer of a module, to be given to an update."""
    optimizer = torch.optim.Adam(module.parameters(), lr)

    def step(loss):
        optimizer.step()
        optimizer.zero_grad()
        return 0.0

    return step


# ------------------------------------------------------------------------------------------------------------
# Advantages

def test_gae_by_hand():
    """gamma 0.9, lambda 0.95, so gamma lambda = 0.855; worked on paper."""
    solved = episode("-1 5", "0.5 1")
    #   delta_2 = 5 - 1 = 4                       A_2 = 4
    #   delta_1 = -1 + 0.9 * 1 - 0.5 = -0.6       A_1 = -0.6 + 0.855 * 4 = 2.82
    failed = episode("-1 | -1 -2", "0 -1 -2")                  # a route: one chain over all conversations
    #   delta_3 = -2 + 2 = 0                      A_3 = 0     (out of attempts is the end: no value follows)
    #   delta_2 = -1 - 1.8 + 1 = -1.8             A_2 = -1.8
    #   delta_1 = -1 - 0.9 = -1.9                 A_1 = -1.9 - 0.855 * 1.8 = -3.439
    for order in ([solved, failed], [failed, solved]):         # neighbours do not leak into each other
        ppo.gae(order, settings(reward_scale=1.0))
        assert noted("advantage", [solved, failed]) == worked("2.82 4", "-3.439 -1.8 0")
        assert noted("target", [solved]) == worked("3.32 5")
    scaled = [episode("-1 5", "0 0")]
    ppo.gae(scaled, settings(reward_scale=0.2))
    assert noted("advantage", scaled) == worked("0.655 1")     # 0.855 - 0.2


def test_gae_loo_by_hand():
    """Three samples of one hand and one of another; gamma 0, so that a GAE advantage is reward - value."""
    same = [episode("-1 5", "0 0"), episode("5", "0"), episode("-2 -1", "0 0")]
    other = replace(episode("-3", "1"), seed=1)
    ESTIMATORS["gae-loo"].f([*same, other], settings(reward_scale=1.0, gamma=0.0))
    #   turn 1: -1 against (5 - 2) / 2,  5 against (-1 - 2) / 2,  -2 against (-1 + 5) / 2
    #   turn 2: 5 and -1 against each other; the other hand is alone: plain GAE
    assert noted("advantage", [*same, other]) == worked("-2.5 6", "6.5", "-4 -6", "-4")
    assert noted("target", same) == worked("-1 5", "5", "-2 -1")       # values still learn the returns


def test_gae_loo_compares_the_same_point():
    """Two samples of a route; the second needs two attempts at point 0. gamma 0: advantage is reward less the
    other's reward."""
    both = once, twice = episode("1 | -1", "0 0"), episode("-1 1 | 1", "0 0 0")
    for turn, (point, attempt) in zip(once.turns + twice.turns, "01 11 01 02 11".split()):
        turn.info = {"point": point, "attempt": attempt}
    ESTIMATORS["gae-loo"].f(both, settings(reward_scale=1.0, gamma=0.0))
    assert noted("advantage", both) == worked("2 -2", "-2 1 2")


def test_normalized_advantages_over_ranks():
    """Ranks with 4 and 7 turns are answered with the sums of one that has all, and send what adds up to
    them."""
    everyone, sums, found = [float(k * k) for k in range(11)], [], []
    for own in (everyone, everyone[:4], everyone[4:]):
        turns, answers = [Turn(0, 1, 0, {}, advantage=x) for x in own], iter(sums[:2])
        total = lambda numbers: sums.append(OneProcess().total(numbers)) or next(answers, sums[-1])
        ppo.normalize_advantages(turns, settings(), Mock(total=total))
        found += ppo.flat(turns, "advantage")
    alone, sums = torch.tensor(found[:11]), list(map(torch.tensor, sums))
    assert alone.mean().abs() < 1e-6 and abs(alone.std(correction=0) - 1) < 1e-6
    assert found[11:] == pytest.approx(found[:11], abs=1e-6)
    assert all(map(torch.allclose, sums, (sums[2] + sums[4], sums[3] + sums[5])))


# ------------------------------------------------------------------------------------------------------------
# Losses


def test_values_are_float32_under_autocast(model):
    critic, hidden = critic_of(model), torch.randn(5, model.config.hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        found = critic.head(hidden)
    assert torch.equal(found, critic.head(hidden))


def test_value_loss_by_hand():
    loss = partial(ppo.value_loss, *torch.tensor([[1.0, 1], [0, 0], [2, 0]]))      # values, old ones, targets
    assert loss(clip=0).tolist() == [0.5, 0.5]
    # clipped to 0.1: errors 1.9, half the square of which is 1.805, and 0.1; the worse of both counts
    assert loss(clip=0.1).tolist() == pytest.approx([1.805, 0.5])


# ------------------------------------------------------------------------------------------------------------
# Rollout


def test_wrong_then_right(monkeypatch, processor):
    """The paper's rewards for a wrong value, a foreign number, nonsense, the right answer; the dialogue as it
    was."""
    env = GeneralPoints()
    a, b, c, d = env.reset(0)[1]["numbers"]
    answers = [f'{{"cards": [], "number": [], "formula": "{a}+{b}+{c}+{last}=24"}}' for last in (d, 99)]
    answers += ["nonsense", env.oracle()]
    drawn = [processor.encode(answer) + [processor.end_id] for answer in answers]
    samples = [([Sample(ids, [-0.1] * len(ids), True)], Mock()) for ids in drawn]
    monkeypatch.setattr("rollout.generate", Mock(side_effect=samples))
    [played] = play(None, processor, hands=1)
    assert [turn.reward for turn in played.turns] == [-1, -2, -3, 5] and played.success
    assert [text for who, text in played.transcript if who == "assistant"] == answers
    [c] = played.conversations
    assert [c.ids[turn.start:turn.end] for turn in played.turns] == drawn
    # tokens before the answer key weigh half, from the key on they weigh one; without a key all weigh one
    *_, nonsense, right = [c.weights[turn.start:turn.end] for turn in played.turns]
    key = right.index(1.0)
    assert set(nonsense) == {1.0} and right == [0.5] * key + [1.0] * (len(right) - key)
    before, after = map(processor.decode, (drawn[-1][:key], drawn[-1][key:]))
    assert '"formula"' not in before and '"formula"' in after


@in_text_and_pictures
def test_masks_mark_exactly_the_sampled_tokens(model, processor, task):
    episodes = play(model, processor, task)
    assert not any(e.success or e.terminated for e in episodes)        # the attempts run out
    for c in conversations_of(episodes):
        drawn = [any(turn.start <= i < turn.end for turn in c.turns) for i in range(len(c.ids))]
        assert c.sampled == drawn == [weight > 0 for weight in c.weights]
        assert drawn[-1]                                       # the last thing in a record is an answer
        assert all(x == 0 or yes for x, yes in zip(c.logprobs, drawn, strict=True))


def counted(monkeypatch, module, count):
    """Return a list of what `count` lists of the arguments of each forward pass of such modules."""
    seen, forward = [], type(module).forward
    monkeypatch.setattr(type(module), "forward",
                        lambda self, *x, **how: seen.extend(count(*x, **how)) or forward(self, *x, **how))
    return seen


@in_text_and_pictures
def test_each_prefix_is_prefilled_once(model, processor, task, monkeypatch):
    """Every token of a conversation is fed to the model exactly once, but for the last drawn one, which is
    never fed."""
    fed = counted(monkeypatch, model, lambda ids, lengths=None, **how: (
        [ids.numel()] if lengths is None else lengths.tolist()))
    images = counted(monkeypatch, model.vision_model, lambda images: images.rows)
    episodes = play(model, processor, task, hands=5)
    assert sum(fed) == sum(len(c.ids) - 1 for c in conversations_of(episodes))
    assert len(images) == (5 if task == "gp-vl" else 0)


@in_text_and_pictures
def test_an_episode_does_not_depend_on_its_batch(model, processor, task):
    """Nor do values, of first turns and of continued ones, some rows alone by then: they are those that a
    copy of the policy scores in whole conversations."""
    together, apart = (play(model, processor, task, hands=5, batch=n) for n in (5, 1))
    for a, b in zip(conversations_of(together), conversations_of(apart), strict=True):
        assert a.ids == b.ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    values = []
    for episodes, critic, read in ((together, "separate", partial(score_values, "turn")),
                                   (together, "shared", ppo.read_values), (apart, "shared", ppo.read_values)):
        read(critic_of(model, critic), processor, conversations_of(episodes), settings(), OneProcess())
        values.append(sum(noted("value", episodes), []))
    assert values == [pytest.approx(values[0], abs=2e-5)] * 3 and len(set(values[0])) == len(values[0]) > 10


# ------------------------------------------------------------------------------------------------------------
# Update

def units_seen(module, processor, episodes, unit, **changes):
    """What a loss is given in one pass over all episodes."""
    loss, seen = spy(unit)
    args = settings(epochs=1, minibatches=1, token_budget=10**6, **changes)
    update(module, processor, episodes, args, loss=loss)
    return seen[0]


@in_text_and_pictures
@cases("hands", [1, 6])
@cases("unit", ["turn", "token"])
@cases("temperature", [1.0, 0.5])
def test_ratio_is_one_before_the_first_step(model, processor, task, hands, unit, temperature):
    episodes = play(model, processor, task, hands=hands, temperature=temperature)
    new, old, _ = units_seen(critic_of(model), processor, episodes, unit, temperature=temperature)
    assert (new - old).exp().sub(1).abs().max() < 1e-4
    assert len(new) == ppo.count(conversations_of(episodes))[unit]


@cases("critic, times", [("shared", 2), ("detached", 2), ("separate", 1 + 2 * 2)])
def test_only_a_separate_critic_needs_a_pass_for_values(model, processor, critic, times, monkeypatch):
    """Each epoch passes every conversation once, and nothing else does."""
    episodes = play(model, processor)
    rows = counted(monkeypatch, model, lambda **how: how["input_ids"])
    update(critic_of(model, critic), processor, episodes, settings(epochs=2, minibatches=2))
    assert len(rows) == times * len(episodes)


@in_text_and_pictures
@cases("critic", ["detached", "separate"])
def test_a_value_is_read_before_what_it_values(model, processor, task, critic):
    """V of a turn, and of each of its tokens, is that of a turn which would begin there: it has seen what was
    said before, and nothing after."""
    module, rest = critic_of(model, critic), (settings(), OneProcess())
    [c] = conversations_of(play(model, processor, task, hands=1))
    turn = c.turns[1]
    score_values("turn", module, processor, [c], *rest)
    first = turn.value
    score_values("token", module, processor, [c], *rest)
    for end, value in enumerate(turn.value, turn.start + 1):
        last = Turn(end - 1, end, 0.0, {})
        cut = replace(c, ids=c.ids[:end], sampled=[False] * (end - 1) + [True], turns=[last])
        score_values("turn", module, processor, [cut], *rest)
        assert last.value == pytest.approx(value, abs=1e-4)
    assert first == pytest.approx(turn.value[0], abs=1e-4)
    assert len(set(turn.value)) == len(turn.value) == turn.length > 5


@cases("task, critic, tune", [
    ("gp-vl", "shared", "no-vision"), ("gp-vl", "separate", "no-vision-no-adapter"),
    ("virl-vl", "separate", "no-vision")])
def test_a_frozen_encoder_sees_each_picture_once(model, processor, task, critic, tune, monkeypatch):
    """Equal ones, as those of a hand's samples, share their tiles. Then no pass of the update needs it, and
    gradients are those from pixels."""
    freeze(model, tune)
    how = dict(task=task, hands=2, samples=2, max_new_tokens=8)
    expected, a = gradients(model, processor, plain := play(model, processor, **how), critic)
    seen, features = counted(monkeypatch, model.vision_model, lambda images: images.rows), {}
    with remember(model, features):
        kept = play(model, processor, **how)
    found, b = gradients(model, processor, kept, critic, features)
    drawn = [[(c.ids, c.logprobs) for c in conversations_of(some)] for some in (plain, kept)]
    pictures = [picture.tobytes() for e in kept for picture in e.pictures]
    assert drawn[0] == drawn[1] and len(seen) == len(features) == len(set(pictures)) < len(pictures)
    assert (len(features) > 2) == (task == "virl-vl")          # more than one of a hand
    assert a == pytest.approx(b, abs=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
    assert ("policy.multi_modal_projector.weight" in expected) == (tune == "no-vision")
    assert expected["policy.layers.1.cross_attn.k_proj.weight"].abs().max() > 0


def test_buckets_count_images(model, processor):
    """A budget of two conversations and of their images' tokens; a frozen encoder's images take less."""
    conversations = conversations_of(play(model, processor, "gp-vl", hands=6))
    longest = max(len(c.ids) for c in conversations)
    #   4 tiles of 17 patches: 16 channels in 1 + 1 layers of the encoder; keys of 2 heads of 8 channels; a
    #   token: 32 channels in 3 layers. 34 = 68 (32 + 16) / 96, 11 = 68 * 16 / 96
    for tune, tokens, rows in (("all", 34, 2), ("no-vision", 11, 3)):
        freeze(model, tune)
        alone = [[c] for c in conversations]
        groups = passes(model, processor, alone, rows * (longest + tokens), OneProcess())
        assert [len(group) for group, _, _ in groups] == [rows] * (6 // rows)


@cases("critic", ["shared", "detached", "separate"])
def test_where_the_value_gradient_flows(model, processor, critic):
    """Without a policy loss, only a shared critic moves the policy; a separate one has a trunk of its own to
    move."""
    def nothing(logprobs, old_logprobs, advantages, args):
        return 0 * logprobs, {}

    module, args = critic_of(model, critic), settings(epochs=1, minibatches=1, entropy_coef=0.0)
    update(module, processor, play(model, processor), args, loss=ppo.Loss(nothing, "turn"))
    moved = {name.split(".")[0] for name, gradient in gradients_of(module).items() if gradient.any()}
    assert moved == {"value_head"} | {"shared": {"policy"}, "separate": {"trunk"}}.get(critic, set())


def test_ppo_learns_what_is_rewarded(model, processor):
    """Three updates on hand-made rewards raise the log-prob of what was rewarded and lower the other's."""
    episodes = play(model, processor, hands=8)
    for turn in [turn for e in episodes for turn in e.turns]:
        turn.reward = -1.0 if turn.info["attempt"] > 1 else 1.0
    module, args = critic_of(model, std=0.0), settings(epochs=3, minibatches=1, gamma=0.0, clip=10.0)
    update(module, processor, episodes, args, learner(module, 1e-3))
    new, old, advantages = units_seen(module, processor, episodes, "turn", advantage="monte-carlo", gamma=0.0)
    rewarded, other = ((new - old)[sign * advantages > 0].mean() for sign in (1, -1))
    assert rewarded > 0.01 and other < rewarded - 0.01
