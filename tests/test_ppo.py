"""PPO: advantages against hand-worked numbers, ratios of one, masks, and one prefill per conversation."""

import copy
import math
import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import ppo
from envs import GeneralPoints, Navigation
from harness.settings import Args, apply_preset
from llama.batches import OneProcess, collate, passes
from llama.frozen import remember
from llama.generate import Sample
from rollout import Conversation, Episode, Turn, rollout
from variants import ESTIMATORS, algorithm, score_values
from variants.reference import score
from variants.tune import freeze

GAMES = {"gp-l": GeneralPoints, "gp-vl": lambda: GeneralPoints(image=True, size=(224, 56)),
         "virl-vl": lambda: Navigation(image=True, size=112, after_failure="walk-on")}     # an image a point
in_text_and_pictures = pytest.mark.parametrize("task", ["gp-l", "gp-vl"])
per_turn_and_token = pytest.mark.parametrize("unit", ["turn", "token"])


def settings(algo="ppo", **changes):
    """Settings of the tiny preset, with the temperature of `play`."""
    return replace(apply_preset(Args(task="gp-l", algo=algo, preset="tiny", temperature=1.0), 32), **changes)


def episode(rewards, values):
    turns = [Turn(0, 1, reward, {"attempt": k}, value=value)
             for k, (reward, value) in enumerate(zip(rewards, values))]
    return Episode(0, [Conversation(turns=turns)])


def noted(name, episodes):
    """The values, advantages or targets of each episode's turns."""
    return [[getattr(turn, name) for turn in each.turns] for each in episodes]


def play(model, processor, task="gp-l", hands=4, **changes):
    how = {"temperature": 1.0, "max_new_tokens": 12} | changes
    return rollout(model, processor, GAMES[task], range(hands), **how)


def critic_of(model, critic="detached", std=1.0):
    """An actor-critic with a value head that is not zero."""
    torch.manual_seed(0)
    actor_critic = ppo.ActorCritic(model, critic)
    torch.nn.init.normal_(actor_critic.value_head[-1].weight, std=std)
    return actor_critic


def update(module, processor, episodes, args, step=lambda loss: 0.0, **more):
    """ppo.update with the estimator and the loss that the settings name."""
    estimator, loss = algorithm(replace(args, critic=module.critic))
    more = {"estimator": estimator, "loss": loss} | more
    return ppo.update(module, processor, episodes, args, step=step, seed=0, **more)


def gradients(model, processor, episodes, critic="detached", features=None, **changes):
    """Gradients of one whole update's loss by name, and its metrics."""
    module = critic_of(copy.deepcopy(model), critic, std=0.1)
    with remember(module, features):
        metrics = update(module, processor, episodes, settings(**{"epochs": 1, "minibatches": 1} | changes))
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, metrics


def spy(unit):
    """A loss, and a list of the (log-probs, old log-probs, advantages) of units that it is given."""
    seen = []
    return ppo.Loss(lambda *units: seen.append(units[:3]) or ppo.clip(*units), unit=unit), seen


# ------------------------------------------------------------------------------------------------------------
# Advantages

def test_gae_by_hand():
    """gamma 0.9, lambda 0.95, so gamma lambda = 0.855; worked on paper."""
    solved = episode([-1, 5], [0.5, 1.0])
    #   delta_2 = 5 - 1 = 4                       A_2 = 4
    #   delta_1 = -1 + 0.9 * 1 - 0.5 = -0.6       A_1 = -0.6 + 0.855 * 4 = 2.82
    failed = episode([-1, -1, -2], [0.0, -1.0, -2.0])
    #   delta_3 = -2 + 2 = 0                      A_3 = 0     (out of attempts is the end: no value follows)
    #   delta_2 = -1 - 1.8 + 1 = -1.8             A_2 = -1.8
    #   delta_1 = -1 - 0.9 = -1.9                 A_1 = -1.9 - 0.855 * 1.8 = -3.439
    for order in ([solved, failed], [failed, solved]):         # neighbours do not leak into each other
        ppo.gae(order, settings(reward_scale=1.0))
        assert noted("advantage", [solved, failed]) == [
            pytest.approx(x) for x in ([2.82, 4.0], [-3.439, -1.8, 0.0])]
        assert noted("target", [solved]) == [pytest.approx([3.32, 5.0])]
    scaled = episode([-1, 5], [0.0, 0.0])
    ppo.gae([scaled], settings(reward_scale=0.2))
    assert noted("advantage", [scaled]) == [pytest.approx([-0.2 + 0.855, 1.0])]


def test_gae_loo_by_hand():
    """Three samples of one hand and one of another; gamma 0, so that a GAE advantage is reward - value."""
    same = [episode([-1, 5], [0, 0]), episode([5], [0]), episode([-2, -1], [0, 0])]
    other = replace(episode([-3], [1]), seed=1)
    ESTIMATORS["gae-loo"].f([*same, other], settings(reward_scale=1.0, gamma=0.0))
    #   turn 1: -1 against (5 - 2) / 2,  5 against (-1 - 2) / 2,  -2 against (-1 + 5) / 2
    #   turn 2: 5 and -1 against each other; the other hand is alone: plain GAE
    assert noted("advantage", [*same, other]) == [[-2.5, 6.0], [6.5], [-4.0, -6.0], [-4.0]]
    assert noted("target", same) == [[-1, 5], [5], [-2, -1]]   # values still learn the returns


def test_gae_loo_compares_the_same_point():
    """Two samples of a route; the second needs two attempts at point 0. gamma 0: advantage is reward less the
    other's reward."""
    once, twice = episode([1, -1], [0, 0]), episode([-1, 1, 1], [0, 0, 0])
    for turn, (point, attempt) in zip(once.turns + twice.turns, [(0, 1), (1, 1), (0, 1), (0, 2), (1, 1)]):
        turn.info = {"point": point, "attempt": attempt}
    ESTIMATORS["gae-loo"].f([once, twice], settings(reward_scale=1.0, gamma=0.0))
    assert noted("advantage", [once, twice]) == [[2.0, -2.0], [-2.0, 1.0, 2.0]]


@pytest.mark.parametrize("estimator", ["gae", "gae-loo"])
def test_conversations_do_not_matter_to_advantages(estimator):
    """A route is one episode: five turns in one conversation, in two or in five are worth the same."""
    results = []
    for starts in ([0], [0, 2], [0, 1, 2, 3, 4]):
        rng, episodes = random.Random(3), []
        for _ in range(2):
            turns = episode(*[[rng.gauss(0, 1) for _ in range(5)] for _ in range(2)]).turns
            episodes.append(Episode(0, [Conversation(turns=turns[start:end])
                                        for start, end in zip(starts, [*starts[1:], 5])]))
        ESTIMATORS[estimator].f(episodes, settings())
        results.append(sum(noted("advantage", episodes) + noted("target", episodes), []))
    assert results[0] == results[1] == results[2] and len(set(results[0])) == 20


def test_normalized_advantages_over_ranks():
    """Two ranks with 4 and 7 turns: each all_reduce adds what the other would have sent."""
    rng = random.Random(0)
    values, found = [rng.gauss(3, 2) for _ in range(11)], []
    mean = sum(values) / 11
    for own, sums in ((values, [[0] * 4, [0]]), *[
            (own, [[len(other), sum(other), 2 * len(other), sum(map(abs, other))],
                   [sum((x - mean) ** 2 for x in other)]])
            for own, other in ((values[:4], values[4:]), (values[4:], values[:4]))]):
        turns, sent = [Turn(0, 1, 0, {}, advantage=x) for x in own], iter(sums)
        two = SimpleNamespace(total=lambda own: [float(a) + b for a, b in zip(own, next(sent), strict=True)])
        ppo.normalize_advantages(turns, settings(), two)
        found += ppo.flat(turns, "advantage")
    alone = torch.tensor(found[:11])
    assert alone.mean().abs() < 1e-6 and abs(alone.std(correction=0) - 1) < 1e-6
    assert found[11:] == pytest.approx(found[:11], abs=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Losses

def test_clip_by_hand():
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5, 1.05])
    advantage = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    loss, metrics = ppo.clip(ratio.log(), torch.zeros(6), advantage, settings(clip=0.1))
    #   same; capped at 1.1; -1.5 is worse than -1.1; 0.5 is worse than 0.9; capped at 0.9; inside
    assert loss.tolist() == pytest.approx([-2.0, -1.1, 1.5, -0.5, 0.9, -1.05])
    assert metrics["clipfrac"].tolist() == [0, 1, 1, 1, 1, 0]
    assert metrics["approx_kl"][1].item() == pytest.approx(0.5 - math.log(1.5))


def test_value_loss_by_hand():
    values, old, targets = torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 0.0]])
    assert ppo.value_loss(values, old, targets, clip=0).tolist() == [0.5, 0.5]
    # clipped to 0.1: errors 1.9 and 0.1; the worse of clipped and unclipped counts
    assert ppo.value_loss(values, old, targets, clip=0.1).tolist() == pytest.approx([0.5 * 1.9**2, 0.5])


# ------------------------------------------------------------------------------------------------------------
# Rollout

@pytest.fixture
def scripted(monkeypatch, processor):
    """Play the first hand with a list of answers in place of the model's."""
    def played(answers):
        rest = iter(answers)

        def generate(model, conversations, **how):
            ids = [processor.encode(next(rest)) + [processor.end_id] for _ in conversations]
            cache = SimpleNamespace(keep=lambda rows: None)
            return [Sample(row, [-0.1] * len(row), True) for row in ids], cache

        monkeypatch.setattr("rollout.generate", generate)
        return play(None, processor, hands=1)[0]

    return played


def test_wrong_then_right(scripted, processor):
    """The paper's rewards for a wrong value, a foreign number, the right answer; the dialogue as it was."""
    env = GeneralPoints()
    a, b, c, d = env.reset(0)[1]["numbers"]
    assert a + b + c + d != 24
    answers = [f'{{"cards": [], "number": [], "formula": "{a}+{b}+{c}+{last}=24"}}' for last in (d, 99)]
    answers.append(env.oracle())
    played = scripted(answers)
    assert [turn.reward for turn in played.turns] == [-1, -2, 5] and played.success
    assert [text for who, text in played.transcript if who == "assistant"] == answers
    [conversation] = played.conversations
    assert [processor.decode(conversation.ids[t.start:t.end]) for t in played.turns] == answers
    # tokens before the answer key weigh half, from the key on they weigh one
    last = played.turns[-1]
    weights = conversation.weights[last.start:last.end]
    key = weights.index(1.0)
    assert set(weights[:key]) == {0.5} and set(weights[key:]) == {1.0}
    for span, there in ((slice(last.start, last.start + key), False), (slice(last.start + key, last.end), True)):
        assert ('"formula"' in processor.decode(conversation.ids[span])) == there


def test_attempts_run_out(scripted):
    played = scripted(["nonsense"] * 5)
    assert [turn.reward for turn in played.turns] == [-3, -3, -3, -3, -4]      # -1 more: exhausted
    assert not played.success and set(played.conversations[0].weights) == {0.0, 1.0}       # no key: all one


@in_text_and_pictures
def test_masks_mark_exactly_the_sampled_tokens(model, processor, task):
    for c in [c for played in play(model, processor, task) for c in played.conversations]:
        drawn = [any(turn.start <= i < turn.end for turn in c.turns) for i in range(len(c.ids))]
        assert c.sampled == drawn == [weight > 0 for weight in c.weights] and drawn[-1]    # ends with an answer
        assert len(c.logprobs) == len(drawn) and all(x == 0 for x, by_it in zip(c.logprobs, drawn) if not by_it)


@in_text_and_pictures
def test_each_prefix_is_prefilled_once(model, processor, task, monkeypatch):
    """Every token of a conversation is fed to the model exactly once, but for the last drawn one, which is
    never fed."""
    fed, images = [], []
    forward, vision = type(model).forward, model.vision_model.forward

    def count(self, ids, *, lengths=None, **more):
        fed.append(int(ids.numel() if lengths is None else lengths.sum()))
        return forward(self, ids, lengths=lengths, **more)

    monkeypatch.setattr(type(model), "forward", count)
    monkeypatch.setattr(model.vision_model, "forward", lambda x: images.extend(x.rows) or vision(x))
    episodes = play(model, processor, task, hands=5)
    assert sum(fed) == sum(len(c.ids) - 1 for e in episodes for c in e.conversations)
    assert len(images) == (5 if task == "gp-vl" else 0)


@in_text_and_pictures
def test_an_episode_does_not_depend_on_its_batch(model, processor, task):
    for a, b in zip(play(model, processor, task, hands=5), play(model, processor, task, hands=5, batch=1)):
        assert [c.ids for c in a.conversations] == [c.ids for c in b.conversations]
        assert a.conversations[0].logprobs == pytest.approx(b.conversations[0].logprobs, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Update

def units_seen(module, processor, episodes, unit, **changes):
    """What a loss is given in one pass over all episodes."""
    loss, seen = spy(unit)
    args = settings(epochs=1, minibatches=1, token_budget=10**6, **changes)
    update(module, processor, episodes, args, loss=loss)
    return seen[0]


@in_text_and_pictures
@pytest.mark.parametrize("hands", [1, 6])
@per_turn_and_token
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ratio_is_one_before_the_first_step(model, processor, task, hands, unit, temperature):
    episodes = play(model, processor, task, hands=hands, temperature=temperature)
    new, old, _ = units_seen(critic_of(model), processor, episodes, unit, temperature=temperature)
    assert (new - old).exp().sub(1).abs().max() < 1e-4
    n = {"turn": sum(len(e.turns) for e in episodes),
         "token": sum(sum(c.sampled) for e in episodes for c in e.conversations)}
    assert len(new) == n[unit] == ppo.count([c for e in episodes for c in e.conversations])[unit]


def test_units_by_hand(processor):
    """Two turns in one conversation with a forced token between them; weights 0.5 and 1."""
    turns = [Turn(1, 3, 0.0, {}, advantage=1.0), Turn(4, 5, 0.0, {}, advantage=-1.0)]
    c = Conversation([9] * 5, [False, True, True, False, True], None, [0, -1, -2, 0, -3], [0, 0.5, 1, 0, 1], turns)
    scored = lambda *batch: (torch.tensor([-2.0, -4.0, -6.0]), torch.zeros(3), torch.zeros(2))
    for unit, worked in (("turn", ([-5, -6], [-2.5, -3], [1, -1])),
                         ("token", ([-2, -4, -6], [-1, -2, -3], [1, 1, -1]))):
        loss, seen = spy(unit)
        ppo.batch_loss(scored, [c], collate(processor, [c]), settings(), ppo.Estimator(ppo.gae), loss, ppo.count([c]))
        assert tuple(x.tolist() for x in seen[0]) == worked


@per_turn_and_token
def test_what_is_told_changes_no_advantage_and_no_unit(model, processor, unit):
    """Not even where 7 more forced tokens lie before the second turn."""
    short = play(model, processor, hands=3)
    long = copy.deepcopy(short)
    for c in [c for each in long for c in each.conversations]:
        at = c.turns[1].start
        for name, filler in (("ids", 9), ("sampled", False), ("logprobs", 0.0), ("weights", 0.0)):
            getattr(c, name)[at:at] = [filler] * 7
        for turn in c.turns[1:]:
            turn.start, turn.end = turn.start + 7, turn.end + 7
    (_, old, advantages), seen = [
        units_seen(critic_of(model), processor, episodes, unit) for episodes in (short, long)]
    assert torch.equal(old, seen[1]) and torch.equal(advantages, seen[2])
    assert noted("advantage", short) == noted("advantage", long) and len(set(advantages.tolist())) > 10


@in_text_and_pictures
@pytest.mark.parametrize("batch", [1, 5])
def test_values_read_in_the_rollout_are_those_scored(model, processor, task, batch):
    """Of first turns and of continued ones, some rows alone by then: as a copy of the policy scores whole
    conversations."""
    episodes = play(model, processor, task, hands=5, batch=batch)
    conversations = [c for e in episodes for c in e.conversations]
    score_values("turn", critic_of(model, "separate"), processor, conversations, settings(), OneProcess())
    scored = sum(noted("value", episodes), [])
    ppo.read_values(critic_of(model, "shared"), processor, conversations, settings(), OneProcess())
    assert sum(noted("value", episodes), []) == pytest.approx(scored, abs=2e-5)
    assert len(set(scored)) == len(scored) > 10


@pytest.mark.parametrize("critic", ["shared", "detached"])
def test_only_a_separate_critic_needs_a_pass_for_values(model, processor, critic, monkeypatch):
    """Each epoch passes every conversation once, and nothing else does."""
    rows, forward = [], type(model).forward
    episodes = play(model, processor)
    monkeypatch.setattr(
        type(model), "forward", lambda self, **how: rows.extend(how["input_ids"]) or forward(self, **how))
    for each, times in ((critic, 2), ("separate", 1 + 2 * 2)):
        rows.clear()
        update(critic_of(model, each), processor, episodes, settings(epochs=2, minibatches=2))
        assert len(rows) == times * len(episodes)


@in_text_and_pictures
def test_value_is_read_at_the_last_prompt_token(model, processor, task):
    """V of a turn equals V of the conversation cut off right before the turn: it sees nothing of the
    answer."""
    [*_, c] = play(model, processor, task, hands=2)[1].conversations
    score = partial(score_values, "turn", critic_of(model, "separate"), processor, args=settings(),
                    ranks=OneProcess())
    score([c])
    turn, last = c.turns[1], Turn(c.turns[1].start, c.turns[1].start + 1, 0.0, {})
    lists = {name: getattr(c, name)[:last.end] for name in ("ids", "sampled", "logprobs", "weights")}
    score([replace(c, turns=[last], **lists)])
    assert turn.value != 0 and last.value == pytest.approx(turn.value, abs=1e-4)


@pytest.mark.parametrize("task, critic, tune", [
    ("gp-vl", "shared", "no-vision"), ("gp-vl", "separate", "no-vision-no-adapter"),
    ("virl-vl", "separate", "no-vision")])
def test_a_frozen_encoder_sees_each_picture_once(model, processor, task, critic, tune, monkeypatch):
    """Equal ones, as those of a hand's samples, share their tiles. Then no pass of the update needs it, and
    gradients are those from pixels."""
    freeze(model, tune)
    how = dict(task=task, hands=2, samples=2, max_new_tokens=8)
    expected, a = gradients(model, processor, plain := play(model, processor, **how), critic)
    encoder, seen, features = type(model.vision_model), [], {}
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda self, x: seen.extend(x.rows) or forward(self, x))
    with remember(model, features):
        kept = play(model, processor, **how)
    found, b = gradients(model, processor, kept, critic, features)
    drawn = [[(c.ids, c.logprobs) for e in some for c in e.conversations] for some in (plain, kept)]
    pictures = [picture.tobytes() for e in kept for picture in e.pictures]
    assert drawn[0] == drawn[1] and len(seen) == len(features) == len(set(pictures)) < len(pictures)
    assert (max(len(e.conversations) for e in kept) > 1) == (task == "virl-vl")
    assert a == pytest.approx(b, abs=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
    assert ("policy.multi_modal_projector.weight" in expected) == (tune == "no-vision")
    assert expected["policy.layers.1.cross_attn.k_proj.weight"].abs().max() > 0


def test_buckets_count_images(model, processor):
    """A budget of two conversations and of their images' tokens; a frozen encoder's images take less."""
    conversations = [c for e in play(model, processor, "gp-vl", hands=6) for c in e.conversations]
    longest = max(len(c.ids) for c in conversations)
    #   4 tiles of 17 patches: 16 channels in 1 + 1 layers of the encoder; keys of 2 heads of 8 channels; a
    #   token: 32 channels in 3 layers
    for tune, tokens, rows in (("all", 68 * (32 + 16) // 96, 2), ("no-vision", 68 * 16 // 96, 3)):
        freeze(model, tune)
        groups = passes(model, processor, conversations, rows * (longest + tokens), OneProcess())
        assert [len(group) for group, _, _ in groups] == [rows] * (6 // rows)


@pytest.mark.parametrize("critic", ["shared", "detached", "separate"])
def test_where_the_value_gradient_flows(model, processor, critic):
    """Without a policy loss, only a shared critic moves the policy; a separate one has a trunk of its own to
    move."""
    module = critic_of(model, critic)
    update(module, processor, play(model, processor), settings(epochs=1, minibatches=1), train_policy=False)
    moved = {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"value_head"} | {"shared": {"policy"}, "separate": {"trunk"}}.get(critic, set())


def test_ppo_learns_what_is_rewarded(model, processor):
    """Three updates on hand-made rewards raise the log-prob of what was rewarded and lower the other's."""
    episodes = play(model, processor, hands=8)
    for e in episodes:
        for k, turn in enumerate(e.turns):
            turn.reward = -1.0 if k else 1.0
    module = ppo.ActorCritic(model, "detached")
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def step(loss):
        optimizer.step()
        optimizer.zero_grad()
        return 0.0

    update(module, processor, episodes, settings(epochs=3, minibatches=1, gamma=0.0, clip=10.0), step)
    conversations, change = [c for e in episodes for c in e.conversations], {1.0: [], -1.0: []}
    score(model, processor, conversations, 10**6)
    for c in conversations:
        for turn in c.turns:
            drawn = slice(turn.start, turn.end)
            change[turn.reward].append(sum(c.reference[drawn]) - sum(c.logprobs[drawn]))
    rewarded, other = (sum(x) / len(x) for x in change.values())
    assert rewarded > 0.01 and other < rewarded - 0.01
