"""SFT: loss on the expert's own tokens only, and what is frozen stays."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import sft
import train
from distributed.processes import Processes
from envs import GeneralPoints
from harness.progress import describe
from llama.batches import bucket, collate, row_length
from rollout import Conversation, Episode, Turn
from tables import cases, numbers
from test_ppo import GAMES, gradients_of, in_text_and_pictures, learner, settings
from variants import SFT_LOSSES
from variants.own_answers import own_answers
from variants.reference import score


def dialogues(processor, n, mistakes=0.0, task="gp-l"):
    return sft.make_batch(processor, [(GAMES[task](), 1.0)], range(n), mistakes)


def update(model, processor, examples, step=lambda loss: 0.0, sft_loss="nll", filler=None, **changes):
    return sft.update(model, processor, examples, settings("sft", **changes), step=step, filler=filler,
                      loss=SFT_LOSSES[sft_loss].f)


# ------------------------------------------------------------------------------------------------------------
# Data

@in_text_and_pictures
@cases("mistakes, prompts", [(0, False), (1, False), (4, False), (2, True)])
def test_only_right_answers_are_learnt(processor, task, mistakes, prompts):
    """After the very tokens that RL prompts with. In pre-training prompts are learnt, too, but never a
    mistake or an image."""
    env = GAMES[task]()
    prompt = processor.render(env.reset(3)[0].messages).ids
    example = sft.make_example(processor, env, 3, mistakes, prompts)
    learnt, others = ([i for i, wanted in zip(example.ids, example.sampled) if wanted == kind]
                      for kind in (True, False))
    said, told = map(processor.decode, (learnt, others))
    assert env.oracle() in said and env.oracle() not in told and learnt[-1] == processor.end_id
    assert example.ids[:len(prompt)] == prompt and told.count('"formula"') == mistakes + (not prompts)
    assert ("Use" in said, "Use" in told) == (prompts, not prompts)      # words of the prompt
    assert prompts or said == env.oracle() and example.sampled == sorted(example.sampled)    # one stretch
    assert (processor.image_token_id in others) == (example.image is not None) == (task == "gp-vl")


def test_mixture_and_mistakes_follow_the_seed(processor):
    mixture = [(GeneralPoints(rule=rule), 0.5) for rule in ("10", "11-12-13")]
    a, b, right = (sft.make_batch(processor, mixture, range(40), mistakes) for mistakes in (0.5, 0.5, 0.0))
    revised = lambda examples: sum(e.ids.count(processor.end_id) > 2 for e in examples)
    assert a == b and 10 < revised(a) < 30 and revised(right) == 0
    assert 8 < sum("J counts as 11" in processor.decode(e.ids) for e in a) < 32


def test_collate_aligns_targets(processor):
    batch = collate(processor, [[Conversation([5, 6, 7, 8], [False, False, True, True])],
                                [Conversation([5, 9], [False, True])]])
    assert batch.input_ids.tolist() == [[5, 6, 7], [5] + [processor.pad_id] * 2]
    assert batch.targets.tolist() == [[-100, 7, 8], [9, -100, -100]] and batch.lengths.tolist() == [3, 1]


def test_bucket_covers_all_within_the_budget():
    trees = [[Conversation([0] * (n + 1), [False] + n * [True])] for n in (7, 300, 12, 90, 90, 15, 1, 44)]
    groups = bucket(trees, 100, image_cost=lambda tree: 0)
    assert sorted(map(row_length, sum(groups, []))) == sorted(map(row_length, trees)) and len(groups) < 8
    assert all(len(group) == 1 or len(group) * max(map(row_length, group)) <= 100 for group in groups)


# ------------------------------------------------------------------------------------------------------------
# Updates

@in_text_and_pictures
def test_loss_is_the_mean_over_target_tokens(model, processor, task):
    """Against torch's cross_entropy on full logits, whatever shares a micro-batch. In a first minibatch
    ratios are 1: what is scored is what the next pass finds, and PSFT's gradient that of plain SFT."""
    examples = dialogues(processor, 6, mistakes=0.5, task=task)
    batch = collate(processor, [[e] for e in examples])
    logits = model(**batch.inputs(), logits="all").logits.flatten(0, 1).double()
    expected = torch.nn.functional.cross_entropy(logits, batch.targets.flatten())    # but for those of -100
    found = []
    for name, budget in (("nll", 1), ("nll", 10**6), ("psft", 100)):
        copied = copy.deepcopy(model)
        score(copied, processor, [[e] for e in examples], budget)
        metrics = update(copied, processor, examples, sft_loss=name, token_budget=budget)
        assert metrics["nll"] == pytest.approx(expected.item(), abs=1e-5)
        found.append(gradients_of(copied))
    expected.backward()
    torch.testing.assert_close(found, [gradients_of(model)] * 3, atol=1e-5, rtol=1e-3)


def test_sft_learns(model, processor):
    """Thirty steps on four dialogues cut the loss to a third."""
    examples, step = dialogues(processor, 4), learner(model, 3e-3)
    losses = [update(model, processor, examples, step)["nll"] for _ in range(30)]
    assert losses[-1] < losses[0] / 3


@cases("loss", SFT_LOSSES)
def test_minibatches_and_epochs(model, processor, loss):
    """Means are over all target tokens: a minibatch of two dialogues counts twice as much as one of one. The
    fourth has nothing to learn from, and makes no step."""
    examples, losses = dialogues(processor, 5), []
    score(model, processor, [[e] for e in examples], 10**6)
    learn = partial(update, model, processor, step=lambda loss: losses.append(loss) or len(losses),
                    sft_loss=loss, filler=examples[0], epochs=2, minibatches=4)
    examples[3] = replace(examples[3], sampled=[False] * len(examples[3].ids))
    metrics = learn(examples)
    tokens = [sum(sum(e.sampled) for e in examples[k::4]) for k in range(3)] * 2
    mean = sum(x * n for x, n in zip(losses, tokens, strict=True)) / sum(tokens)
    assert metrics["loss"] == pytest.approx(mean) and len(set(tokens)) > 1
    assert loss != "nll" or metrics["loss"] == metrics["nll"]
    assert metrics["grad_norm"] == 3.5 and metrics["empty_minibatches"] == 2
    assert metrics["trained_tokens"] == 2 * sum(len(e.ids) for e in examples if any(e.sampled))
    assert all(map(math.isfinite, metrics.values()))
    assert learn([]) == dict.fromkeys(metrics) | {"trained_tokens": 0, "empty_minibatches": 8}
    assert len(losses) == 6


# ------------------------------------------------------------------------------------------------------------
# Other losses

def token_losses(name, logprobs, before, rows):
    """Values and gradients of a loss, where an earlier model gave the tokens the log-probs `before`."""
    logprobs = torch.tensor(logprobs, requires_grad=True)
    examples = [Conversation(sampled=[True] * len(before), reference=before), Conversation()]
    losses = SFT_LOSSES[name].f(logprobs, torch.tensor(rows), examples, settings("sft", clip=0.2))
    return losses.tolist(), torch.autograd.grad(losses.sum(), logprobs)[0].tolist()


@cases("loss, now, before, gradient", [
    ("nll", "0.25 0.5 1", "", "-1 -1 -1"),
    ("dft", "0.25 0.5 1", "", "-0.25 -0.5 -1"),
    # d(-ratio) / d log p = -ratio, until the ratio leaves 1.2; what has become less likely is still pulled
    ("psft", "1 1.1 1.3 0.5", "1 1 1 1", "-1 -1.1 0 -0.5"),
    # two dialogues: ratios 1.1 * 1.1, and 0.9 * (2.0, clipped to 1.2)
    ("iw-sft", "1.1 1.1 0.9 2", "1 1 1 1", "-1.21 -1.21 -1.08 -1.08"),
    ("iw-sft", "1.1 1.1 0.9 2", "1.1 1.1 0.9 2", "-1 -1 -1 -1")])
def test_gradients_by_hand(loss, now, before, gradient):
    """Of the log-probs of tokens with these probabilities."""
    now, before = ([math.log(p) for p in numbers(x)] for x in (now, before))
    assert token_losses(loss, now, before, [0, 0, 1, 1][:len(now)])[1] == pytest.approx(numbers(gradient))


@cases("case", [
    "psft 100 -1.2 0", "psft 1e4 -1.2 0", "psft -100 0 0", "psft -1e4 0 0",
    "iw-sft 100 -118.8 -1.2", "iw-sft 1e4 -11998.8 -1.2", "iw-sft -100 80.8 -0.8", "iw-sft -1e4 8000.8 -0.8",
    "dft -100 0 0", "dft -1e4 0 0"])
def test_far_from_the_earlier_model_all_is_finite(case):
    """A loss; x, by how much a log-prob is more than the earlier model's, -1; value, gradient. dft: p log p
    of a token that cannot be."""
    name, numerals = case.split(maxsplit=1)
    x, *expected = numbers(numerals)
    assert sum(token_losses(name, [x - 1], [-1.0], [0]), []) == pytest.approx(expected, rel=1e-5, abs=1e-30)


def test_the_weight_of_a_long_dialogue_is_finite():
    """iw-sft: a product of 2000 ratios of 1.2."""
    _, gradient = token_losses("iw-sft", [-1.0] * 2000, [-2.0] * 2000, [0] * 2000)
    assert gradient == pytest.approx([-math.exp(20)] * 2000, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Other data

def test_own_right_answers_become_examples():
    """Each with what led to it: the wrong answer before it is context."""
    turns = [Turn(start, end, 0.0, {"correct": correct})
             for start, end, correct in ((5, 8, False), (12, 15, True), (6, 9, False))]
    a, b = Conversation(list(range(20)), image="a", turns=turns[:2]), Conversation([1] * 9, turns=turns[2:])
    [example] = own_answers([Episode(0, [a, b]), Episode(1, [b])])
    assert example.ids == list(range(15)) and example.image == "a"
    assert [i for i, learnt in enumerate(example.sampled) if learnt] == [12, 13, 14]


def test_own_answers_through_the_trainer(model, processor, monkeypatch):
    """Without a single right answer nothing is learnt and nothing has failed; with some, it learns from them
    alone."""
    args = settings("sft", batch_size=3, sft_data="own", max_new_tokens=4)
    trainer = train.Trainer(args, model, processor, Processes("cpu"))
    weights = lambda: torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    before, play = weights(), trainer.play
    for i in range(args.max_skipped + 1):
        metrics = trainer.update(i)                            # of a random model: none is right
        assert metrics["nll"] is None and metrics["empty_minibatches"] == 1 and metrics["trained_tokens"] == 0
    assert trainer.skipped == 0 and torch.equal(weights(), before)
    said = describe(1, args, metrics | {"skipped": 0, "tokens_per_second": 0.0}, 0)
    assert "nothing to learn from  empty 1" in said

    def lucky(seeds):
        nonlocal episodes
        episodes = play(seeds)
        episodes[0].turns[0].info["correct"] = True
        return episodes

    episodes = None
    monkeypatch.setattr(trainer, "play", lucky)
    metrics, [example] = trainer.update(1), own_answers(episodes)
    assert trainer.skipped == 0 and math.isfinite(metrics["nll"]) and not torch.equal(weights(), before)
    assert metrics["trained_tokens"] == len(example.ids)
