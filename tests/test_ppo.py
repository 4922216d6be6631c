"""PPO: advantages against hand-worked numbers, ratios of one, masks, and one prefill per conversation."""

import copy
import math
import random

import pytest
import torch

import ppo
import sft
from harness.settings import apply_preset
from envs import GeneralPoints, Navigation
from llama.generate import Sample
from harness.settings import Args
from rollout import Episode, Turn, rollout

GP = {"gp-l": lambda: GeneralPoints(), "gp-vl": lambda: GeneralPoints(image=True, size=(224, 56))}


def settings(**changes):
    args = apply_preset(Args(task="gp-l", algo="ppo", preset="tiny", temperature=1.0), 32)     # that of `play`
    for name, value in changes.items():
        assert hasattr(args, name)
        setattr(args, name, value)
    return args


def episode(rewards, values):
    turns = [Turn(0, 0, 1, reward, {"attempt": k}, value=value) for k, (reward, value) in enumerate(zip(rewards, values))]
    return Episode(0, turns=turns)


def play(model, processor, task="gp-l", hands=4, **kwargs):
    return rollout(model, processor, GP[task], range(hands), **({"temperature": 1.0, "max_new_tokens": 12} | kwargs))


def scripted(monkeypatch, processor, answers):
    """Replace the model by a list of answers a row."""
    rows = iter(answers)

    def generate(model, conversations, *, cache, **kwargs):
        texts = [next(rows) for _ in conversations]
        ids = [processor.encode(text) + [processor.end_id] for text in texts]
        return [Sample(row, [-0.1] * len(row), True) for row in ids], type("Cache", (), {"keep": lambda self, rows: None})()

    monkeypatch.setattr("rollout.generate", generate)


# ------------------------------------------------------------------------------------------------------------- advantages

def test_gae_by_hand():
    """gamma 0.9, lambda 0.95, so gamma lambda = 0.855; worked on paper."""
    solved = episode([-1, 5], [0.5, 1.0])
    #   delta_2 = 5 - 1 = 4                       A_2 = 4
    #   delta_1 = -1 + 0.9 * 1 - 0.5 = -0.6       A_1 = -0.6 + 0.855 * 4 = 2.82
    failed = episode([-1, -1, -2], [0.0, -1.0, -2.0])
    #   delta_3 = -2 + 2 = 0                      A_3 = 0        (out of attempts is the end: no value follows)
    #   delta_2 = -1 - 1.8 + 1 = -1.8             A_2 = -1.8
    #   delta_1 = -1 - 0.9 = -1.9                 A_1 = -1.9 - 0.855 * 1.8 = -3.439
    for order in ([solved, failed], [failed, solved]):      # neighbours do not leak into each other
        ppo.gae(order, settings(reward_scale=1.0))
        assert [t.advantage for t in solved.turns] == pytest.approx([2.82, 4.0])
        assert [t.target for t in solved.turns] == pytest.approx([3.32, 5.0])
        assert [t.advantage for t in failed.turns] == pytest.approx([-3.439, -1.8, 0.0])


def test_gae_scales_rewards():
    scaled = episode([-1, 5], [0.0, 0.0])
    ppo.gae([scaled], settings(reward_scale=0.2))
    assert [t.advantage for t in scaled.turns] == pytest.approx([-0.2 + 0.855, 1.0])


def test_gae_loo_by_hand():
    """Three samples of one hand and one of another; gamma 0, so that a GAE advantage is reward - value."""
    same = [episode([-1, 5], [0, 0]), episode([5], [0]), episode([-2, -1], [0, 0])]
    other = episode([-3], [1])
    other.seed = 1
    ppo.gae_loo([*same, other], settings(reward_scale=1.0, gamma=0.0))
    #   turn 1: -1 against (5 - 2) / 2,  5 against (-1 - 2) / 2,  -2 against (-1 + 5) / 2;   turn 2: 5 and -1 against each other
    assert [[t.advantage for t in e.turns] for e in same] == [[-2.5, 6.0], [6.5], [-4.0, -6.0]]
    assert [[t.target for t in e.turns] for e in same] == [[-1, 5], [5], [-2, -1]]       # values still learn the returns
    assert other.turns[0].advantage == -4.0                                             # alone: plain GAE


def test_gae_loo_compares_the_same_point():
    """Two samples of a route; the first needs two attempts at point 0. gamma 0: advantage is reward less the other's reward."""
    once, twice = episode([1, -1], [0, 0]), episode([-1, 1, 1], [0, 0, 0])
    for sample, states in ((once, [(0, 1), (1, 1)]), (twice, [(0, 1), (0, 2), (1, 1)])):
        for turn, (point, attempt) in zip(sample.turns, states):
            turn.info = {"point": point, "attempt": attempt}
    ppo.gae_loo([once, twice], settings(reward_scale=1.0, gamma=0.0))
    assert [[t.advantage for t in e.turns] for e in (once, twice)] == [[2.0, -2.0], [-2.0, 1.0, 2.0]]


@pytest.mark.parametrize("estimator", ["gae", "gae-loo"])
def test_conversations_do_not_matter_to_advantages(estimator):
    """A route is one episode: five turns in one conversation, in two or in five give the same advantages and targets."""
    rng, results = random.Random(3), []
    numbers = [([rng.gauss(0, 1) for _ in range(5)], [rng.gauss(0, 1) for _ in range(5)]) for _ in range(2)]
    for conversations in ([0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 2, 3, 4]):
        episodes = [episode(*both) for both in numbers]
        for one in episodes:
            for turn, conversation in zip(one.turns, conversations):
                turn.conversation = conversation
        ppo.ESTIMATORS[estimator].f(episodes, settings())
        results.append([(turn.advantage, turn.target) for one in episodes for turn in one.turns])
    assert results[0] == results[1] == results[2] and len(set(results[0])) == 10


def test_normalized_advantages_over_ranks():
    rng = random.Random(0)
    values = [rng.gauss(3, 2) for _ in range(11)]
    everything = episode([0] * 11, [0] * 11).turns
    for turn, value in zip(everything, values):
        turn.advantage = value
    ppo.normalize_advantages(everything, settings())
    advantages = torch.tensor([t.advantage for t in everything])
    assert advantages.mean().abs() < 1e-6 and abs(advantages.std(correction=0) - 1) < 1e-6

    # two ranks with 4 and 7 turns: each all_reduce adds what the other would have sent
    parts = [copy.deepcopy(everything[:4]), copy.deepcopy(everything[4:])]
    for part, own in zip(parts, (values[:4], values[4:])):
        for turn, value in zip(part, own):
            turn.advantage = value
    mean = sum(values) / 11
    for part, other in ((parts[0], values[4:]), (parts[1], values[:4])):
        sent = iter([torch.tensor([len(other), sum(other), 2 * len(other), sum(map(abs, other))], dtype=torch.float64),
                     torch.tensor(sum((x - mean) ** 2 for x in other), dtype=torch.float64)])
        ppo.normalize_advantages(part, settings(), lambda x: x + next(sent))
    assert [t.advantage for part in parts for t in part] == pytest.approx(advantages.tolist(), abs=1e-6)


def test_explained_variance():
    turns = [Turn(0, 0, 1, 0, {}, value=v, target=t) for v, t in ((1, 1), (2, 2), (4, 4))]
    assert ppo.explained_variance(turns) == pytest.approx(1.0)
    for turn in turns:
        turn.value = 7.0
    assert ppo.explained_variance(turns) == pytest.approx(0.0)


# ------------------------------------------------------------------------------------------------------------------ losses

def test_ppo_clip_by_hand():
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5, 1.05])
    advantage = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    loss, metrics = ppo.ppo_clip(ratio.log(), torch.zeros(6), advantage, settings(clip=0.1))
    #                            same; capped at 1.1; -1.5 is worse than -1.1; 0.5 is worse than 0.9; capped at 0.9; inside
    assert loss.tolist() == pytest.approx([-2.0, -1.1, 1.5, -0.5, 0.9, -1.05])
    assert metrics["clipfrac"].tolist() == [0, 1, 1, 1, 1, 0]
    assert metrics["approx_kl"][1].item() == pytest.approx(0.5 - math.log(1.5))


def test_value_loss_by_hand():
    values, old, targets = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 0.0])
    assert ppo.value_loss(values, old, targets, clip=0).tolist() == [0.5, 0.5]
    # clipped to 0.1: errors 1.9 and 0.1; the worse of clipped and unclipped counts
    assert ppo.value_loss(values, old, targets, clip=0.1).tolist() == pytest.approx([0.5 * 1.9**2, 0.5])


# ----------------------------------------------------------------------------------------------------------------- rollout

def test_wrong_then_right(monkeypatch, processor):
    """The rewards of the paper for a wrong value, a foreign number, and the right answer; the dialogue as it was."""
    env = GeneralPoints()
    a, b, c, d = env.reset(0)[1]["numbers"]
    right = env.oracle()
    wrong = f'{{"cards": [], "number": [], "formula": "{a}+{b}+{c}+{d}=24"}}'
    foreign = f'{{"cards": [], "number": [], "formula": "{a}+{b}+{c}+99=24"}}'
    assert a + b + c + d != 24
    scripted(monkeypatch, processor, [wrong, foreign, right])
    played = rollout(None, processor, GP["gp-l"], [0], temperature=1.0, max_new_tokens=60)[0]
    assert [t.reward for t in played.turns] == [-1, -2, 5]
    assert played.success and len(played.conversations) == 1
    said = [text for who, text in played.transcript if who == "assistant"]
    assert said == [wrong, foreign, right]
    conversation = played.conversations[0]
    assert [processor.decode(conversation.ids[t.start:t.end]) for t in played.turns] == said
    # tokens before the answer key weigh half, from the key on they weigh one
    turn = played.turns[-1]
    weights = conversation.weights[turn.start:turn.end]
    key = weights.index(1.0)
    assert set(weights[:key]) == {0.5} and set(weights[key:]) == {1.0}
    assert '"formula"' in processor.decode(conversation.ids[turn.start + key:turn.end])
    assert '"formula"' not in processor.decode(conversation.ids[turn.start:turn.start + key])


def test_attempts_run_out(monkeypatch, processor):
    scripted(monkeypatch, processor, ["nonsense"] * 5)
    played = rollout(None, processor, GP["gp-l"], [0], temperature=1.0, max_new_tokens=60)[0]
    assert [t.reward for t in played.turns] == [-3, -3, -3, -3, -4] and not played.success      # -1 more: exhausted
    assert set(played.conversations[0].weights) == {0.0, 1.0}                                  # no key: all of it weighs one


@pytest.mark.parametrize("task", GP)
def test_masks_mark_exactly_the_sampled_tokens(model, processor, task):
    for played in play(model, processor, task):
        for k, conversation in enumerate(played.conversations):
            spans = [t for t in played.turns if t.conversation == k]
            drawn = {i for t in spans for i in range(t.start, t.end)}
            n = len(conversation.ids)
            assert len(conversation.sampled) == len(conversation.logprobs) == len(conversation.weights) == n
            assert {i for i in range(n) if conversation.sampled[i]} == drawn
            assert all((conversation.weights[i] > 0) == (i in drawn) for i in range(n))
            assert all(conversation.logprobs[i] == 0 for i in range(n) if i not in drawn)
            assert spans[-1].end == n                                       # the last thing in a record is an answer


@pytest.mark.parametrize("task", GP)
def test_each_prefix_is_prefilled_once(model, processor, task, monkeypatch):
    """Every token of a conversation is fed to the model exactly once, but for the last drawn one, which is never fed."""
    fed, images = [], []
    forward, vision = type(model).forward, model.vision_model.forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, *, lengths=None, **kw: (
        fed.append(int(ids.numel() if lengths is None else lengths.sum())), forward(self, ids, lengths=lengths, **kw))[1])
    monkeypatch.setattr(model.vision_model, "forward", lambda x: (images.append(len(x.pixel_values)), vision(x))[1])
    episodes = play(model, processor, task, hands=5)
    assert sum(fed) == sum(len(c.ids) - 1 for e in episodes for c in e.conversations)
    assert sum(images) == (5 if task == "gp-vl" else 0)


@pytest.mark.parametrize("task", GP)
def test_an_episode_does_not_depend_on_its_batch(model, processor, task):
    together = play(model, processor, task, hands=5)
    apart = play(model, processor, task, hands=5, batch=1)
    for a, b in zip(together, apart):
        assert [c.ids for c in a.conversations] == [c.ids for c in b.conversations]
        assert a.conversations[0].logprobs == pytest.approx(b.conversations[0].logprobs, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------------ update

@pytest.mark.parametrize("task", GP)
@pytest.mark.parametrize("hands", [1, 6])
@pytest.mark.parametrize("unit", ["turn", "token"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ratio_is_one_before_the_first_step(model, processor, task, hands, unit, temperature):
    episodes = play(model, processor, task, hands=hands, temperature=temperature)
    batch, tensors, turns = ppo.make_batch(processor, ppo.conversations_of(episodes), "cpu")
    logprobs, _, values = ppo.ActorCritic(model, "detached")(batch, tensors, temperature)
    new, old, advantages = ppo.units(logprobs, tensors, unit)
    assert (new - old).exp().sub(1).abs().max() < 1e-4
    assert len(new) == ppo.count_units(ppo.conversations_of(episodes))[unit]
    assert values.shape == (len(turns),) and len(turns) == sum(len(e.turns) for e in episodes)


def test_units_by_hand():
    """Two turns in one conversation with a forced token between them; weights 0.5 and 1."""
    tensors = ppo.TurnTensors(
        rows=torch.tensor([0, 0]), positions=torch.tensor([0, 3]), turn_of=torch.tensor([[0, 0, -1, 1]]),
        weights=torch.tensor([[0.5, 1.0, 0.0, 1.0]]), old_logprobs=torch.tensor([[-1.0, -2.0, 0.0, -3.0]]),
        advantages=torch.tensor([1.0, -1.0]), old_values=torch.zeros(2), targets=torch.zeros(2))
    logprobs = torch.tensor([[-2.0, -4.0, -9.0, -6.0]])
    new, old, advantages = ppo.units(logprobs, tensors, "turn")
    assert new.tolist() == [-5.0, -6.0] and old.tolist() == [-2.5, -3.0] and advantages.tolist() == [1.0, -1.0]
    new, old, advantages = ppo.units(logprobs, tensors, "token")
    assert new.tolist() == [-2.0, -4.0, -6.0] and old.tolist() == [-1.0, -2.0, -3.0] and advantages.tolist() == [1.0, 1.0, -1.0]


def critic_of(model, critic):
    """With a value head that is not zero."""
    torch.manual_seed(0)
    actor_critic = ppo.ActorCritic(model, critic)
    torch.nn.init.normal_(actor_critic.value_head[-1].weight)
    return actor_critic


def values(episodes):
    return [turn.value for episode in episodes for turn in episode.turns]


@pytest.mark.parametrize("task", GP)
@pytest.mark.parametrize("batch", [1, 5])
def test_values_read_in_the_rollout_are_those_scored(model, processor, task, batch):
    """Of first turns and of continued ones, some rows alone by then: as a copy of the policy scores whole conversations."""
    episodes = play(model, processor, task, hands=5, batch=batch)
    scored = copy.deepcopy(episodes)
    ppo.score_values(critic_of(model, "separate"), processor, scored, 10**6, "cpu")
    ppo.read_values(critic_of(model, "shared"), episodes)
    assert values(episodes) == pytest.approx(values(scored), abs=2e-5) and len(set(values(scored))) == len(values(scored)) > 10


@pytest.mark.parametrize("critic", ["shared", "detached"])
def test_only_a_separate_critic_needs_a_pass_for_values(model, processor, critic, monkeypatch):
    """Each epoch passes every conversation once, and nothing else does."""
    rows, forward = [], type(model).forward
    episodes = play(model, processor)
    monkeypatch.setattr(type(model), "forward", lambda self, ids, **kw: (rows.append(len(ids)), forward(self, ids, **kw))[1])
    for each, passes in ((critic, 2), ("separate", 1 + 2 * 2)):
        ppo.update(critic_of(model, each), processor, episodes, settings(epochs=2, minibatches=2, critic=each), step=lambda loss: 0.0, seed=0)
        assert sum(rows) == passes * len(episodes)
        rows.clear()


@pytest.mark.parametrize("task", GP)
def test_value_is_read_at_the_last_prompt_token(model, processor, task):
    """V of a turn equals V of the conversation cut off right before the turn: it sees nothing of the answer."""
    actor_critic = critic_of(model, "separate")
    episodes = play(model, processor, task, hands=2)
    ppo.score_values(actor_critic, processor, episodes, 10**6, "cpu")
    turn = episodes[1].turns[1]
    cut = copy.deepcopy(episodes[1].conversations[0])
    for name in ("ids", "sampled", "logprobs", "weights"):
        setattr(cut, name, getattr(cut, name)[:turn.start + 1])
    last = Turn(0, turn.start, turn.start + 1, 0.0, {})
    ppo.score_values(actor_critic, processor, [Episode(0, [cut], [last])], 10**6, "cpu")
    assert turn.value != 0 and last.value == pytest.approx(turn.value, abs=1e-4)


def gradients(model, processor, episodes, critic="detached", **changes):
    """Gradients of one whole update's loss, as a vector, with the metrics."""
    torch.manual_seed(0)
    module = ppo.ActorCritic(copy.deepcopy(model), critic)
    for parameter in module.value_head[-1].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    args = settings(**({"epochs": 1, "minibatches": 1, "critic": critic} | changes))
    metrics = ppo.update(module, processor, copy.deepcopy(episodes), args, step=lambda loss: 0.0, seed=0)
    return {name: p.grad for name, p in module.named_parameters()}, metrics


SEEING = {"gp-vl": GP["gp-vl"], "virl-vl": lambda: Navigation(image=True, size=112, after_failure="walk-on")}     # an image a point


@pytest.mark.parametrize("task, critic, tune", [("gp-vl", "shared", "no-vision"), ("gp-vl", "separate", "no-vision-no-adapter"),
                                                ("virl-vl", "separate", "no-vision")])
def test_kept_features_give_the_gradients_of_pixels(model, processor, task, critic, tune, monkeypatch):
    """With a frozen encoder. It sees each image once, in the rollout; what is drawn does not depend on whether that is kept."""
    sft.freeze(model, tune)
    kept, plain = (rollout(model, processor, SEEING[task], range(3), temperature=1.0, max_new_tokens=8, keep_features=keep)
                   for keep in (True, False))
    seen = [[(c.ids, c.logprobs) for e in episodes for c in e.conversations] for episodes in (kept, plain)]
    assert seen[0] == seen[1] and all(c.features is not None for e in kept for c in e.conversations)
    assert (max(len(e.conversations) for e in kept) > 1) == (task == "virl-vl")
    expected, a = gradients(model, processor, plain, critic, token_budget=10**6)
    monkeypatch.delattr(type(model.vision_model), "forward")
    found, b = gradients(model, processor, kept, critic, token_budget=10**6)
    assert a == pytest.approx(b, abs=1e-5)
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None) and (gradient is None or torch.allclose(gradient, found[name], atol=1e-7)), name
    assert (expected["policy.multi_modal_projector.weight"] is None) == (tune == "no-vision-no-adapter")
    assert expected["policy.layers.1.cross_attn.k_proj.weight"].abs().max() > 0


def test_buckets_count_images(model, processor):
    """A budget of two conversations and of their images' tokens; a frozen encoder's images take less."""
    items = ppo.conversations_of(play(model, processor, "gp-vl", hands=6))
    config, longest = model.config, max(len(c.ids) for c, _ in items)
    trained, frozen = (config.image_tokens(frozen) for frozen in (False, True))
    #   4 tiles of 17 patches: 16 channels in 1 + 1 layers of the encoder; keys of 2 heads of 8 channels; a token: 32 channels in 3 layers
    assert (trained, frozen) == (68 * (32 + 16) // 96, 68 * 16 // 96)
    assert [len(group) for group in ppo.buckets_of(items, config, 2 * (longest + trained))] == [2, 2, 2]
    for c, _ in items:
        c.features = True
    assert [len(group) for group in ppo.buckets_of(items, config, 3 * (longest + frozen))] == [3, 3]


@pytest.mark.parametrize("unit", ["turn", "token"])
def test_micro_batches_add_up(model, processor, unit):
    """A minibatch cut into many micro-batches has the gradient of the whole."""
    episodes = play(model, processor, hands=6)
    whole, a = gradients(model, processor, episodes, token_budget=10**6, unit=unit)
    parts, b = gradients(model, processor, episodes, token_budget=1, unit=unit)
    for name, gradient in whole.items():
        if gradient is not None:
            assert torch.allclose(gradient, parts[name], atol=1e-5, rtol=1e-3), name
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "drawn_vs_scored"):
        assert a[name] == pytest.approx(b[name], abs=1e-5)


@pytest.mark.parametrize("critic", ["shared", "detached", "separate"])
def test_where_the_value_gradient_flows(model, processor, critic):
    """Without a policy loss, only a shared critic moves the policy; a separate one has a trunk of its own to move."""
    torch.manual_seed(0)
    module = ppo.ActorCritic(model, critic)
    torch.nn.init.normal_(module.value_head[-1].weight, std=0.1)
    ppo.update(module, processor, play(model, processor), settings(epochs=1, minibatches=1, critic=critic),
               step=lambda loss: 0.0, seed=0, train_policy=False)
    moved = lambda part: any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())
    assert moved(module.value_head)
    assert moved(module.policy) == (critic == "shared")
    assert (module.trunk is not None and moved(module.trunk)) == (critic == "separate")


def test_a_longer_verifier_message_changes_no_advantage_and_no_unit(model, processor):
    episodes = play(model, processor, hands=3)
    longer = copy.deepcopy(episodes)
    for e in longer:                                             # insert 7 forced tokens before the second turn
        at, c = e.turns[1].start, e.conversations[0]
        for name, filler in (("ids", 9), ("sampled", False), ("logprobs", 0.0), ("weights", 0.0)):
            values = getattr(c, name)
            setattr(c, name, values[:at] + [filler] * 7 + values[at:])
        for turn in e.turns[1:]:
            turn.start, turn.end = turn.start + 7, turn.end + 7
    for some in (episodes, longer):
        for e in some:
            for k, turn in enumerate(e.turns):
                turn.value = 0.1 * k
        ppo.gae(some, settings())
    assert [t.advantage for e in episodes for t in e.turns] == [t.advantage for e in longer for t in e.turns]
    for unit in ("turn", "token"):
        olds = [ppo.units(torch.zeros_like(t.weights), t, unit)[1] for _, t, _ in (
            ppo.make_batch(processor, ppo.conversations_of(some), "cpu") for some in (episodes, longer))]
        assert torch.allclose(*olds)


def test_ppo_learns_what_is_rewarded(model, processor):
    """Three updates on hand-made rewards raise the log-prob of what was rewarded and lower the other's."""
    episodes = play(model, processor, hands=8)
    for e in episodes:
        for k, turn in enumerate(e.turns):
            turn.reward = 1.0 if k == 0 else -1.0
    module = ppo.ActorCritic(model, "detached")
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def step(loss):
        optimizer.step()
        optimizer.zero_grad()
        return 0.0

    args = settings(epochs=3, minibatches=1, gamma=0.0, critic="detached", clip=10.0)
    ppo.update(module, processor, episodes, args, step=step, seed=0)
    batch, tensors, turns = ppo.make_batch(processor, ppo.conversations_of(episodes), "cpu")
    with torch.no_grad():
        new, old, _ = ppo.units(module(batch, tensors, 1.0)[0], tensors, "turn")
    change = {k: torch.stack([d for d, t in zip(new - old, turns) if (t.reward > 0) == k]).mean() for k in (True, False)}
    assert change[True] > 0.01 and change[False] < change[True] - 0.01
