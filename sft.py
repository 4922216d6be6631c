"""Supervised fine-tuning on expert dialogues, with loss on the expert's own tokens only.

    torchrun train.py --task gp-l --algo sft

The data comes from the environments' oracles and is made as it is needed: one dialogue per seed, rendered by
the very Processor that renders RL prompts. With `--mistakes` some dialogues hold wrong answers and the
verifier's replies before the right one (the paper's sub-optimal trajectories, its figure 15); the wrong
answers are context, never targets.
"""

import random

import torch

from games.seeds import derive
from llama.batches import OneProcess, parts, passes
from llama.metrics import averages
from rollout import Conversation


def make_example(processor, env, seed, mistakes=0, learn_prompts=False):
    """Return an expert's dialogue with so many mistakes. The loss is on right answers; with `learn_prompts`
    on all but wrong answers."""
    messages = env.demonstrate(seed, mistakes=mistakes)
    if learn_prompts:
        # Wrong answers say "train": False themselves.
        messages = [{"train": True} | message for message in messages]
    rendered = processor.render(messages, reply=False)
    return Conversation(rendered.ids, rendered.sampled, rendered.images[0] if rendered.images else None)


def make_batch(processor, mixture, seeds, mistakes, learn_prompts=False):
    """Return an example per seed. mixture: list of (environment, weight); mistakes: share of dialogues with
    wrong turns; learn_prompts: as in make_example."""
    examples = []
    for seed in seeds:
        rng = random.Random(derive("dialogue", seed))          # a stream apart from the one that deals
        env = rng.choices([env for env, _ in mixture], [weight for _, weight in mixture])[0]
        wrong = rng.randint(1, env.attempts - 1) if env.attempts > 1 and rng.random() < mistakes else 0
        examples.append(make_example(processor, env, seed, wrong, learn_prompts))
    return examples


def nll(logprobs, rows, examples, args):
    """Return the negative log-likelihood of each target token, (tokens,) -> (tokens,).

    rows: which of the `examples` a token lies in, (tokens,). Other losses: variants/sft_losses.py.
    """
    return -logprobs


def update(model, processor, examples, args, *, loss=nll, step, places=None, filler=None, ranks=OneProcess()):
    """Learn from a batch of examples: one optimizer step on the mean loss per target token, over all ranks,
    or --epochs passes of --minibatches steps each.

    Return the metrics: means over all target tokens (None if the batch has none) and over the steps that were
    made. step(loss): reduces the gradients over ranks, clips them, steps the optimizer and returns the
    gradient norm; no step is made where loss or gradients are not finite. places: where this rank's examples
    stand among those of all ranks (see `parts`); None: this is the only rank. filler: see
    llama.batches.passes. ranks: see llama.batches.OneProcess.
    """
    places = range(len(examples)) if places is None else places
    total, tokens = ranks.total([len(examples), sum(len(e.ids) for e in examples if any(e.sampled))])
    minibatches = parts(places, range(int(total)), args.minibatches)       # the same in each epoch
    steps = [one_step(model, processor, [examples[i] for i in minibatch], args, loss, step,
                      filler or examples[0], ranks)
             for _ in range(args.epochs) for minibatch in minibatches]
    return dict.fromkeys(("nll", "loss", "entropy", "grad_norm")) | averages(steps) | {
        "trained_tokens": args.epochs * tokens}


def one_step(model, processor, examples, args, loss, step, filler, ranks):
    """Make one optimizer step on this rank's part of a minibatch.

    Return {metric: (mean, how many it is a mean over)}; nothing where no rank has a target, and then no step
    is made.
    """
    [n] = ranks.total([sum(sum(e.sampled) for e in examples)])
    if not n:
        return {}
    sums = torch.zeros(3, dtype=torch.float64)                 # of nll, loss and entropy
    trees = [[example] for example in examples]                # a row of the batch each
    for group, batch, weight in passes(model, processor, trees, args.token_budget, ranks, filler):
        out = model(**batch.inputs(), targets=batch.targets)
        is_target = batch.targets >= 0
        logprobs, rows = out.logprobs[is_target], is_target.nonzero()[:, 0]
        loss_sum = loss(logprobs, rows, group, args).sum()
        (weight * loss_sum / n).backward()
        own = torch.stack([-logprobs.sum(), loss_sum, out.entropy[is_target].sum()])
        sums += weight * own.detach().cpu().double()                 # Apple's GPUs have no float64
    nll_mean, loss_mean, entropy = [total / n for total in ranks.total(sums.tolist())]
    grad_norm = step(loss_mean)
    return {"nll": (nll_mean, n), "loss": (loss_mean, n), "entropy": (entropy, n),
            "grad_norm": (grad_norm, 1)}
