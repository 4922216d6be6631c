"""SFT: loss on the expert's own tokens only, and what is frozen stays."""

import copy
import math
from dataclasses import replace

import pytest
import torch

import sft
import train
from distributed.processes import Processes
from envs import GeneralPoints
from harness.progress import describe
from harness.settings import Args, apply_preset
from llama.batches import bucket, collate
from rollout import Conversation, Episode, Turn
from test_ppo import GAMES, in_text_and_pictures, settings
from variants import SFT_LOSSES
from variants.own_answers import own_answers
from variants.reference import score


def dialogues(processor, n, mistakes=0.0, task="gp-l"):
    return sft.make_batch(processor, [(GAMES[task](), 1.0)], range(n), mistakes)


def update(model, processor, examples, step=lambda loss: 0.0, sft_loss="nll", filler=None, **changes):
    return sft.update(model, processor, examples, settings("sft", **changes), step=step, filler=filler,
                      loss=SFT_LOSSES[sft_loss].f)


def trainer_of(model, processor, **changes):
    args = apply_preset(Args(algo="sft", preset="tiny", **changes), 32)
    return train.Trainer(args, model, processor, Processes("cpu"))


# ------------------------------------------------------------------------------------------------------------
# Data

def split(processor, example):
    """The ids that are learnt, and the text of the others."""
    learnt, others = ([i for i, wanted in zip(example.ids, example.sampled) if wanted == kind]
                      for kind in (True, False))
    return learnt, others, processor.decode(others)


@in_text_and_pictures
def test_only_right_answers_are_learnt(processor, task):
    """After the very tokens that RL prompts with."""
    env = GAMES[task]()
    prompt = processor.render(env.reset(3)[0].messages).ids
    for mistakes in (0, 1, 4):
        example = sft.make_example(processor, env, seed=3, mistakes=mistakes)
        learnt, _, told = split(processor, example)
        assert processor.decode(learnt) == env.oracle() and learnt[-1] == processor.end_id
        assert example.sampled == sorted(example.sampled)      # one stretch, at the end
        assert example.ids[:len(prompt)] == prompt and (example.image is not None) == (task == "gp-vl")
        assert told.count('"formula"') == mistakes + 1         # wrong ones, and the prompt's own


@in_text_and_pictures
def test_prompts_are_learnt_in_pre_training_but_never_a_mistake_or_an_image(processor, task):
    env = GAMES[task]()
    example = sft.make_example(processor, env, seed=3, mistakes=2, prompts=True)
    _, others, left_out = split(processor, example)
    assert "Use" in processor.decode(example.ids) and "Use" not in left_out
    assert left_out.count('"formula"') == 2 and env.oracle() not in left_out
    assert (processor.image_token_id in others) == (task == "gp-vl")


def test_mixture_and_mistakes_follow_the_seed(processor):
    mixture = [(GeneralPoints(), 0.5), (GeneralPoints(rule="11-12-13"), 0.5)]
    a, b, right = (sft.make_batch(processor, mixture, range(40), mistakes) for mistakes in (0.5, 0.5, 0.0))
    assert [e.ids for e in a] == [e.ids for e in b]
    assert 8 < sum("J counts as 11" in processor.decode(e.ids) for e in a) < 32
    assert 10 < sum(e.ids.count(processor.end_id) > 2 for e in a) < 30
    assert not any(e.ids.count(processor.end_id) > 2 for e in right)


def test_collate_aligns_targets(processor):
    batch = collate(processor, [Conversation([5, 6, 7, 8], [False, False, True, True]),
                                Conversation([5, 9], [False, True])])
    assert batch.input_ids.tolist()[0] == [5, 6, 7] and batch.input_ids[1, 0] == 5
    assert batch.targets.tolist() == [[-100, 7, 8], [9, -100, -100]] and batch.lengths.tolist() == [3, 1]


def test_bucket_covers_all_within_the_budget():
    lengths = [7, 300, 12, 90, 90, 15, 1, 44]
    groups = bucket(lengths, 100)
    assert sorted(sum(groups, [])) == list(range(len(lengths))) and len(groups) < len(lengths)
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 100 for group in groups)


# ------------------------------------------------------------------------------------------------------------
# Updates

@in_text_and_pictures
def test_loss_is_the_mean_over_target_tokens(model, processor, task):
    """Against torch's cross_entropy on full logits, whatever shares a micro-batch. In a first minibatch
    ratios are 1: what is scored is what the next pass finds, and PSFT's gradient that of plain SFT."""
    examples = dialogues(processor, 6, mistakes=0.5, task=task)
    batch = collate(processor, examples)
    logits = model(**batch.inputs(), logits="all").logits.flatten(0, 1).double()
    expected = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=-100)
    found = []
    for name, budget in (("nll", 1), ("nll", 10**6), ("psft", 100)):
        learner = copy.deepcopy(model)
        score(learner, processor, examples, budget)
        metrics = update(learner, processor, examples, sft_loss=name, token_budget=budget)
        assert metrics["nll"] == pytest.approx(expected.item(), abs=1e-5)
        found.append({key: p.grad for key, p in learner.named_parameters() if p.grad is not None})
    expected.backward()
    exact = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for gradients in found:
        torch.testing.assert_close(gradients, exact, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("tune, frozen", [
    ("all", set()), ("no-vision", {"vision_model"}),
    ("no-vision-no-adapter", {"vision_model", "multi_modal_projector"})])
def test_frozen_parts_stay(model, processor, tune, frozen):
    before = copy.deepcopy(model.state_dict())
    trainer_of(model, processor, task="gp-vl", tune=tune, batch_size=4).update(0)
    moved = {name.split(".")[0] for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved.isdisjoint(frozen)
    assert {"layers", "lm_head"} | ({"vision_model", "multi_modal_projector"} - frozen) <= moved


def test_sft_learns(model, processor):
    """Thirty steps on four dialogues cut the loss to a third."""
    examples, optimizer = dialogues(processor, 4), torch.optim.Adam(model.parameters(), lr=3e-3)

    def step(loss):
        optimizer.step()
        optimizer.zero_grad()
        return 0.0

    losses = [update(model, processor, examples, step)["nll"] for _ in range(30)]
    assert losses[-1] < losses[0] / 3


def test_minibatches_and_epochs(model, processor):
    """Means are over all target tokens: a minibatch of two dialogues counts twice as much as one of one."""
    examples, losses = dialogues(processor, 5), []
    step = lambda loss: losses.append(loss) or len(losses)
    metrics = update(model, processor, examples, step, epochs=2, minibatches=3)
    tokens = [sum(sum(e.sampled) for e in examples[k::3]) for k in range(3)] * 2
    assert len(losses) == 6 and len(set(tokens)) > 1
    mean = sum(x * n for x, n in zip(losses, tokens)) / sum(tokens)
    assert metrics["loss"] == metrics["nll"] == pytest.approx(mean)
    assert metrics["grad_norm"] == 3.5 and metrics["empty_minibatches"] == 0
    assert metrics["trained_tokens"] == 2 * sum(len(e.ids) for e in examples)


@pytest.mark.parametrize("loss", SFT_LOSSES)
def test_minibatches_without_an_example_are_no_steps(model, processor, loss):
    """Three dialogues in seven minibatches, one with nothing to learn from, and none at all."""
    examples, losses = dialogues(processor, 3), []
    score(model, processor, examples, 10**6)
    how = dict(step=lambda loss: losses.append(loss) or 1.0, sft_loss=loss, filler=examples[0], epochs=2,
               minibatches=7)
    blank = replace(examples[2], sampled=[False] * len(examples[2].ids))
    metrics = update(model, processor, [*examples[:2], blank], **how)
    assert len(losses) == 4 and metrics["empty_minibatches"] == 10
    assert all(map(math.isfinite, metrics.values()))
    assert metrics["trained_tokens"] == 2 * sum(len(e.ids) for e in examples[:2])
    assert update(model, processor, [], **how) == {
        "nll": None, "loss": None, "entropy": None, "grad_norm": None, "trained_tokens": 0,
        "empty_minibatches": 14}
    assert len(losses) == 4


# ------------------------------------------------------------------------------------------------------------
# Other losses

def token_losses(name, logprobs, before, rows):
    """Values and gradients of a loss, where an earlier model gave the tokens the log-probs `before`."""
    logprobs = torch.tensor(logprobs, requires_grad=True)
    examples = [Conversation(sampled=[True] * len(before), reference=before)]
    losses = SFT_LOSSES[name].f(logprobs, torch.tensor(rows), examples, settings("sft", clip=0.2))
    return losses.tolist(), torch.autograd.grad(losses.sum(), logprobs)[0].tolist()


@pytest.mark.parametrize("loss, now, before, gradient", [
    ("nll", [0.25, 0.5, 1.0], [], [-1, -1, -1]),
    ("dft", [0.25, 0.5, 1.0], [], [-0.25, -0.5, -1]),
    # d(-ratio) / d log p = -ratio, until the ratio leaves 1.2; what has become less likely is still pulled
    ("psft", [1.0, 1.1, 1.3, 0.5], [1] * 4, [-1, -1.1, 0, -0.5]),
    # two dialogues: ratios 1.1 * 1.1, and 0.9 * (2.0, clipped to 1.2)
    ("iw-sft", [1.1, 1.1, 0.9, 2.0], [1] * 4, [-1.21, -1.21, -1.08, -1.08]),
    ("iw-sft", [1.1, 1.1, 0.9, 2.0], [1.1, 1.1, 0.9, 2.0], [-1, -1, -1, -1])])
def test_gradients_by_hand(loss, now, before, gradient):
    now, before = ([math.log(p) for p in x] for x in (now, before))
    assert token_losses(loss, now, before, [0, 0, 1, 1][:len(now)])[1] == pytest.approx(gradient)


@pytest.mark.parametrize("loss, x, value, gradient", [
    *[("psft", x, -1.2 if x > 0 else 0, 0) for x in (100, 1e4, -100, -1e4)],
    *[("iw-sft", x, -w * (x - 1), -w) for x, w in ((100, 1.2), (1e4, 1.2), (-100, 0.8), (-1e4, 0.8))],
    ("dft", -100, 0, 0), ("dft", -1e4, 0, 0)])
def test_far_from_the_earlier_model_all_is_finite(loss, x, value, gradient):
    """dft: p log p of a token that cannot be."""
    [found], [slope] = token_losses(loss, [x - 1.0], [-1.0], [0])
    assert (found, slope) == pytest.approx((value, gradient), rel=1e-5, abs=1e-30)


def test_the_weight_of_a_long_dialogue_is_finite():
    """iw-sft: a product of 2000 ratios of 1.2."""
    _, gradient = token_losses("iw-sft", [-1.0] * 2000, [-2.0] * 2000, [0] * 2000)
    assert gradient == pytest.approx([-math.exp(20)] * 2000, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Other data

def test_own_right_answers_become_examples():
    """Each with what led to it: the wrong answer before it is context."""
    turn = lambda start, end, correct: Turn(start, end, 0.0, {"correct": correct})
    turns = [turn(5, 8, False), turn(12, 15, True)], [turn(6, 9, False)]
    a, b = (Conversation(list(range(20)), image=name, turns=own) for name, own in zip("ab", turns))
    [example] = own_answers([Episode(0, [a, b]), Episode(1, [b])])
    assert example.ids == list(range(15)) and example.image == "a"
    assert [i for i, learnt in enumerate(example.sampled) if learnt] == [12, 13, 14]


def test_own_answers_through_the_trainer(model, processor, monkeypatch):
    """Without a single right answer nothing is learnt and nothing has failed; with some, it learns from them
    alone."""
    trainer = trainer_of(model, processor, task="gp-l", batch_size=3, sft_data="own", max_new_tokens=4)
    before, play = copy.deepcopy(model.state_dict()), trainer.play
    moved = lambda: any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())
    for i in range(trainer.args.max_skipped + 1):
        metrics = trainer.update(i)                            # of a random model: none is right
        assert metrics["nll"] is None and metrics["empty_minibatches"] == 1 and metrics["trained_tokens"] == 0
    assert trainer.skipped == 0 and not moved()
    said = describe(1, trainer.args, metrics | {"skipped": 0, "tokens_per_second": 0.0}, 0)
    assert "nothing to learn from  empty 1" in said

    def lucky(seeds):
        episodes = play(seeds)
        episodes[0].turns[0].info["correct"] = True
        return episodes

    monkeypatch.setattr(trainer, "play", lucky)
    metrics, [example] = trainer.update(1), trainer.batch
    assert trainer.skipped == 0 and math.isfinite(metrics["nll"]) and moved()
    assert metrics["trained_tokens"] == len(example.ids)
