"""SFT: loss on the expert's own tokens only, and what is frozen stays."""

import copy
import math

import pytest
import torch

import sft
import train
from harness.settings import apply_preset
from envs import GeneralPoints
from llama.batches import bucket, collate
from distributed.processes import Processes
from harness.settings import Args
from rollout import Conversation, Episode, Turn

GP = {"gp-l": lambda: GeneralPoints(), "gp-vl": lambda: GeneralPoints(image=True, size=(224, 56))}


def settings(**changes):
    args = apply_preset(Args(task="gp-l", algo="sft", preset="tiny"), 32)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


@pytest.mark.parametrize("task", GP)
def test_only_right_answers_are_learnt(processor, task):
    env = GP[task]()
    for mistakes in (0, 1, 4):
        example = sft.make_example(processor, env, seed=3, mistakes=mistakes)
        learnt = [i for i, wanted in zip(example.ids, example.sampled) if wanted]
        assert processor.decode(learnt) == env.oracle() and learnt[-1] == processor.end_id
        assert example.sampled == sorted(example.sampled)               # one stretch, at the end
        assert (example.image is not None) == (task == "gp-vl")
        text = processor.decode([i for i, wanted in zip(example.ids, example.sampled) if not wanted])
        assert text.count('"formula"') == mistakes + 1                  # the wrong answers and the prompt's own example


@pytest.mark.parametrize("task", GP)
def test_prompts_are_learnt_in_pre_training_but_never_a_mistake_or_an_image(processor, task):
    env = GP[task]()
    example = sft.make_example(processor, env, seed=3, mistakes=2, prompts=True)
    left_out = [i for i, wanted in zip(example.ids, example.sampled) if not wanted]
    assert ("Use" in processor.decode(example.ids)) and "Use" not in processor.decode(left_out)
    assert processor.decode(left_out).count('"formula"') == 2 and env.oracle() not in processor.decode(left_out)
    assert (processor.image_token_id in left_out) == (task == "gp-vl")


def test_prompts_of_sft_and_rl_are_the_same_tokens(processor):
    env = GeneralPoints()
    prompt = processor.render(env.reset(5)[0].messages).ids
    assert sft.make_example(processor, env, seed=5).ids[:len(prompt)] == prompt


def test_mixture_and_mistakes_follow_the_seed(processor):
    mixture = [(GeneralPoints(), 0.5), (GeneralPoints(rule="11-12-13"), 0.5)]
    a, b = (sft.make_batch(processor, mixture, range(40), mistakes=0.5) for _ in range(2))
    assert [e.ids for e in a] == [e.ids for e in b]
    share = sum("J counts as 11" in processor.decode(e.ids) for e in a) / 40
    assert 0.2 < share < 0.8
    multi = sum(e.ids.count(processor.end_id) > 2 for e in a) / 40
    assert 0.25 < multi < 0.75
    assert not any(e.ids.count(processor.end_id) > 2 for e in sft.make_batch(processor, mixture, range(40), mistakes=0.0))


def test_collate_aligns_targets(processor):
    batch = collate(processor, [[5, 6, 7, 8], [5, 9]], [[False, False, True, True], [False, True]], [None, None])
    assert batch.input_ids.tolist()[0] == [5, 6, 7] and batch.input_ids[1, 0] == 5
    assert batch.targets.tolist() == [[-100, 7, 8], [9, -100, -100]] and batch.lengths.tolist() == [3, 1]


def test_bucket_covers_all_within_the_budget():
    lengths = [7, 300, 12, 90, 90, 15, 1, 44]
    groups = bucket(lengths, 100)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 100 for group in groups)
    assert len(groups) < len(lengths)


@pytest.mark.parametrize("task", GP)
def test_loss_is_the_mean_over_target_tokens(model, processor, task):
    """Against torch's cross_entropy on full logits; and micro-batches add up to the batch's gradient."""
    examples = sft.make_batch(processor, [(GP[task](), 1.0)], range(6), mistakes=0.5)
    results = []
    for budget in (1, 10**6):
        copied = copy.deepcopy(model)
        metrics = sft.update(copied, processor, examples, settings(token_budget=budget), step=lambda loss: 0.0)
        results.append((metrics["nll"], torch.cat([p.grad.flatten() for p in copied.parameters() if p.grad is not None])))
    batch = collate(processor, [e.ids for e in examples], [e.sampled for e in examples], [e.image for e in examples])
    logits = model(batch.input_ids, lengths=batch.lengths, images=batch.images, logits="all").logits
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), batch.targets.flatten(), ignore_index=-100)
    for nll, gradient in results:
        assert nll == pytest.approx(reference.item(), abs=1e-5)
        assert torch.allclose(gradient, results[0][1], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("tune, frozen", [("all", []), ("no-vision", ["vision_model"]),
                                          ("no-vision-no-adapter", ["vision_model", "multi_modal_projector"])])
def test_frozen_parts_stay(model, processor, tune, frozen):
    before = copy.deepcopy(model.state_dict())
    args = apply_preset(Args(task="gp-vl", algo="sft", preset="tiny", tune=tune, batch_size=4), 32)
    trainer = train.Trainer(args, model, processor, Processes("cpu"))
    trainer.update(0)
    moved = {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved.isdisjoint(frozen)
    assert {"layers", "lm_head"} | ({"vision_model", "multi_modal_projector"} - set(frozen)) <= moved


def test_sft_learns(model, processor):
    """Thirty steps on four dialogues cut the loss to a third."""
    args = settings()
    examples = sft.make_batch(processor, [(GeneralPoints(), 1.0)], range(4), mistakes=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def step(loss):
        optimizer.step()
        optimizer.zero_grad()
        return 0.0

    losses = [sft.update(model, processor, examples, args, step=step)["nll"] for _ in range(30)]
    assert losses[-1] < losses[0] / 3


# ---------------------------------------------------------------------------------------------------------------------
# Other losses, other data

def gradient(loss, logprobs, before=None, rows=None, **changes):
    logprobs = torch.tensor(logprobs, requires_grad=True)
    rows = torch.zeros(len(logprobs), dtype=torch.int64) if rows is None else torch.tensor(rows)
    before = None if before is None else torch.tensor(before)
    sft.LOSSES[loss].f(logprobs, before, rows, settings(clip=0.2, **changes)).sum().backward()
    return logprobs.grad.tolist()


def test_dft_weighs_a_token_by_its_probability():
    assert gradient("dft", [math.log(0.25), math.log(0.5)]) == pytest.approx([-0.25, -0.5])
    assert gradient("dft", [0.0]) == gradient("nll", [0.0]) == [-1.0]          # p = 1 is plain SFT


def test_psft_stops_at_the_clip_range():
    """d(-ratio)/d log p = -ratio, until the ratio leaves 1.2; a token that has become less likely is still pulled."""
    now = [math.log(x) for x in (1.0, 1.1, 1.3, 0.5)]
    assert gradient("psft", now, before=[0.0] * 4) == pytest.approx([-1.0, -1.1, 0.0, -0.5])


def test_iw_weighs_a_dialogue_by_how_its_probability_changed():
    """Two dialogues: ratios 1.1 * 1.1, and 0.9 * (2.0, clipped to 1.2)."""
    now, rows = [math.log(x) for x in (1.1, 1.1, 0.9, 2.0)], [0, 0, 1, 1]
    assert gradient("iw-sft", now, before=[0.0] * 4, rows=rows) == pytest.approx([-1.21, -1.21, -1.08, -1.08])
    assert gradient("iw-sft", now, before=now, rows=rows) == pytest.approx([-1.0] * 4)     # nothing changed: plain SFT


@pytest.mark.parametrize("task", GP)
def test_scored_is_what_the_next_pass_finds(model, processor, task):
    """So the ratios of a first minibatch are 1, and PSFT's gradient is that of plain SFT, whatever lies in a micro-batch together."""
    examples, gradients = sft.make_batch(processor, [(GP[task](), 1.0)], range(5), mistakes=0.5), []
    for loss, budget in (("nll", 10**6), ("psft", 100)):
        copied = copy.deepcopy(model)
        sft.update(copied, processor, examples, settings(sft_loss=loss, token_budget=budget), step=lambda loss: 0.0)
        gradients.append(torch.cat([p.grad.flatten() for p in copied.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-5, rtol=1e-3)


def test_minibatches_and_epochs(model, processor):
    """Means are over all target tokens: a minibatch of two dialogues counts twice as much as one of one."""
    examples, losses = sft.make_batch(processor, [(GeneralPoints(), 1.0)], range(5), mistakes=0.0), []
    metrics = sft.update(model, processor, examples, settings(epochs=2, minibatches=3), step=lambda loss: losses.append(loss) or len(losses))
    tokens = [sum(sum(e.sampled) for e in examples[k::3]) for k in range(3)] * 2
    assert len(losses) == 6 and len(set(tokens)) > 1
    assert metrics["loss"] == metrics["nll"] == pytest.approx(sum(x * n for x, n in zip(losses, tokens)) / sum(tokens))
    assert metrics["grad_norm"] == 3.5 and metrics["empty_minibatches"] == 0
    assert metrics["trained_tokens"] == 2 * sum(len(e.ids) for e in examples)


@pytest.mark.parametrize("loss", sft.LOSSES)
def test_minibatches_without_an_example_are_no_steps(model, processor, loss):
    """Three dialogues in seven minibatches, one with nothing to learn from, and none at all."""
    examples, steps = sft.make_batch(processor, [(GeneralPoints(), 1.0)], range(3), mistakes=0.0), []
    sft.score(model, processor, examples, examples[0], settings())
    update = lambda some: sft.update(model, processor, some, settings(epochs=2, minibatches=7, sft_loss=loss), spare=examples[0],
                                     step=lambda loss: steps.append(loss) or 1.0)
    metrics = update([*examples[:2], sft.blank(examples[2])])
    assert len(steps) == 4 and metrics["empty_minibatches"] == 10 and all(math.isfinite(x) for x in metrics.values())
    assert metrics["trained_tokens"] == 2 * sum(len(e.ids) for e in examples[:2])
    assert update([]) == {"nll": None, "loss": None, "entropy": None, "grad_norm": None, "trained_tokens": 0, "empty_minibatches": 14}
    assert len(steps) == 4


@pytest.mark.parametrize("loss, x, value, gradient", [
    ("psft", 100, -1.2, 0), ("psft", 1e4, -1.2, 0), ("psft", -100, 0, 0), ("psft", -1e4, 0, 0),
    ("iw-sft", 100, -1.2 * 99, -1.2), ("iw-sft", 1e4, -1.2 * 9999, -1.2), ("iw-sft", -100, 0.8 * 101, -0.8), ("iw-sft", -1e4, 0.8 * 10001, -0.8)])
def test_far_from_the_earlier_model_all_is_finite(loss, x, value, gradient):
    now = torch.tensor([x - 1.0], requires_grad=True)
    found = sft.LOSSES[loss].f(now, torch.tensor([-1.0]), torch.tensor([0]), settings(clip=0.2))
    assert found.item() == pytest.approx(value, rel=1e-5, abs=1e-30)
    assert torch.autograd.grad(found.sum(), now)[0].item() == pytest.approx(gradient, rel=1e-5, abs=1e-30)


def test_weights_of_long_and_of_impossible_dialogues_are_finite():
    """iw-sft: a product of 2000 ratios of 1.2; dft: p log p of a token that cannot be."""
    now = torch.full((2000,), -1.0, requires_grad=True)
    loss = sft.LOSSES["iw-sft"].f(now, now.detach() - 1, torch.zeros(2000, dtype=torch.int64), settings(clip=0.2))
    assert torch.allclose(torch.autograd.grad(loss.sum(), now)[0], torch.tensor(-math.exp(20)))
    for far in (-100.0, -1e4):
        p = torch.tensor([far], requires_grad=True)
        loss = sft.LOSSES["dft"].f(p, None, torch.tensor([0]), settings())
        assert loss.item() == pytest.approx(0, abs=1e-30) and torch.autograd.grad(loss.sum(), p)[0].item() == pytest.approx(0, abs=1e-30)


def test_own_right_answers_become_examples():
    conversations = [Conversation(ids=list(range(20)), image="a"), Conversation(ids=list(range(9)), image="b")]
    turn = lambda k, start, end, correct: Turn(k, start, end, 0.0, {"correct": correct})
    solved = Episode(0, conversations, [turn(0, 5, 8, False), turn(0, 12, 15, True), turn(1, 6, 9, False)])
    failed = Episode(1, [Conversation(ids=[1, 2, 3])], [turn(0, 1, 3, False)])
    [example] = sft.own_answers([solved, failed])
    assert example.ids == list(range(15)) and example.image == "a"                 # the wrong answer before it is context
    assert [i for i, learnt in enumerate(example.sampled) if learnt] == [12, 13, 14]


def test_own_answers_through_the_trainer(model, processor, monkeypatch):
    """Without a single right answer nothing is learnt and nothing has failed; with some, it learns from them alone."""
    args = apply_preset(Args(task="gp-l", algo="sft", preset="tiny", batch_size=3, sft_data="own", max_new_tokens=4), 32)
    trainer = train.Trainer(args, model, processor, Processes("cpu"))
    before = copy.deepcopy(model.state_dict())
    for i in range(args.max_skipped + 1):
        metrics = trainer.update(i)                                                # of a random model: none is right
        assert metrics["nll"] is None and metrics["empty_minibatches"] == 1 and metrics["trained_tokens"] == 0
    assert trainer.skipped == 0 and all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    said = train.describe(1, args, metrics | {"skipped": 0, "tokens_per_second": 0.0}, 0)
    assert "nothing to learn from  empty 1" in said
    real = trainer.play

    def lucky(seeds):
        episodes = real(seeds)
        episodes[0].turns[0].info["correct"] = True
        return episodes

    monkeypatch.setattr(trainer, "play", lucky)
    metrics = trainer.update(1)
    assert trainer.skipped == 0 and len(trainer.batch) == 1 and math.isfinite(metrics["nll"])
    assert metrics["trained_tokens"] == len(trainer.batch[0].ids)
    assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())
