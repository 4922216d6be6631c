"""Supervised fine-tuning on expert dialogues, with loss on the expert's own tokens only.

    torchrun train.py --task gp-l --algo sft

The data comes from the environments' oracles and is made as it is needed: one dialogue a seed, rendered by
the very Processor that renders RL prompts. With `--mistakes` some dialogues hold wrong answers and the
verifier's replies before the right one (the paper's sub-optimal trajectories, its figure 15); the wrong
answers are context, never targets.
"""

import random
from dataclasses import dataclass, replace

import torch

from games.seeds import derive
from llama.batches import alone, bucket, collate, parts
from llama.metrics import averages
from variants import sft_losses
from variants.sft_losses import Loss


@dataclass
class Example:
    ids: list[int]
    sampled: list[bool]        # True: a token the model must produce, so a token with a loss
    image: object              # PIL image or None
    before: object = None      # (targets,) log-probs by an earlier model, if the loss asks for them


def make_example(processor, env, seed, mistakes=0, prompts=False):
    """One expert dialogue as token ids with the mask of what is learnt: right answers and, with `prompts`,
    what is not an answer."""
    messages = env.demonstrate(seed, mistakes=mistakes)
    if prompts:
        # Wrong answers say "train": False themselves.
        messages = [{"train": True} | message for message in messages]
    rendered = processor.render(messages, reply=False)
    return Example(rendered.ids, rendered.sampled, rendered.images[0] if rendered.images else None)


def make_batch(processor, mixture, seeds, mistakes, prompts=False):
    """One example per seed. `mixture`: list of (environment, weight); `mistakes`: share of dialogues with
    wrong turns; `prompts`: as in make_example."""
    examples = []
    for seed in seeds:
        rng = random.Random(derive("dialogue", seed))          # not the stream of which the environment deals
        env = rng.choices([env for env, _ in mixture], [weight for _, weight in mixture])[0]
        wrong = rng.randint(1, env.attempts - 1) if env.attempts > 1 and rng.random() < mistakes else 0
        examples.append(make_example(processor, env, seed, wrong, prompts))
    return examples


def own_answers(episodes):
    """The right answers of episodes (see ppo.Episode) as examples, each with the conversation that led to it
    (rejection sampling: RAFT, arXiv 2304.06767). Wrong answers before a right one are context."""
    examples = []
    for episode in episodes:
        for k, conversation in enumerate(episode.conversations):
            for turn in [turn for turn in episode.turns if turn.conversation == k and turn.info["correct"]]:
                sampled = [turn.start <= i < turn.end for i in range(turn.end)]
                examples.append(Example(conversation.ids[:turn.end], sampled, conversation.image))
    return examples


def nll(logprobs, before, rows, args):
    """Negative log-likelihood of each target token, (tokens,) -> (tokens,)."""
    return -logprobs


LOSSES = {"nll": Loss(nll)} | sft_losses.LOSSES


def blank(example):
    """The example with nothing to learn from: passed for other ranks' sake it adds 0 to every sum."""
    return replace(example, sampled=[False] * len(example.ids), before=torch.zeros(0))


def passes(model, processor, examples, spare, args, pace, device):
    """Pass all examples, alike in length together; yield (examples, batch, model's output, weight). `spare`:
    an example for passes that others need (see `alone`)."""
    beside = [0 if e.image is None else model.config.image_tokens(model.vision_frozen) for e in examples]
    groups = bucket([len(e.ids) for e in examples], args.token_budget, beside)
    for micro, weight in pace([[examples[i] for i in group] for group in groups], [blank(spare)]):
        batch = collate(processor, *zip(*[(e.ids, e.sampled, e.image) for e in micro])).to(device)
        out = model(batch.input_ids, lengths=batch.lengths, images=batch.images, targets=batch.targets)
        yield micro, batch, out, weight


@torch.no_grad()
def score(model, processor, examples, spare, args, *, pace=alone, device="cpu"):
    """Note in each example the log-probs that its targets have now, as `before`."""
    for micro, batch, out, _ in passes(model, processor, examples, spare, args, pace, device):
        for example, logprobs, targets in zip(micro, out.logprobs.cpu(), batch.targets.cpu()):
            example.before = logprobs[targets >= 0]


def update(model, processor, examples, args, *, step, places=None, spare=None, all_reduce=lambda x: x,
           pace=alone, device="cpu"):
    """Learn from a batch of examples: one optimizer step on the mean loss per target token, over all ranks,
    or --epochs passes of --minibatches steps each. Returns the metrics: means over all target tokens (None
    where there are none) and over the steps that were made.

    `step(loss)` reduces the gradients over ranks, clips them, steps the optimizer and returns the gradient
    norm. `places`: where this rank's examples stand among those of all ranks (see `parts`); None: there are
    no others. `spare`: an example to pass for others' sake, for a rank that may have none. `pace`: see
    `alone`.
    """
    places = range(len(examples)) if places is None else places
    spare = spare or examples[0]
    if LOSSES[args.sft_loss].before == "step":
        score(model, processor, examples, spare, args, pace=pace, device=device)
    total = int(all_reduce(torch.tensor(len(examples), dtype=torch.float64)))
    steps = []
    for part in args.epochs * parts(places, range(total), args.minibatches):
        chunk = [examples[i] for i in part]
        steps.append(one_step(model, processor, chunk, spare, args, step, all_reduce, pace, device))
    return dict.fromkeys(("nll", "loss", "entropy", "grad_norm")) | averages(steps) | {
        "trained_tokens": sum(metrics["trained_tokens"][0] for metrics in steps if metrics)}


def one_step(model, processor, examples, spare, args, step, all_reduce, pace, device):
    """One optimizer step on this rank's part of a minibatch; see `update`. Returns {metric: (mean, how many
    it is a mean over)}; nothing where no rank has a target, and then no step is made."""
    counts = [sum(sum(e.sampled) for e in examples), sum(len(e.ids) for e in examples)]
    n, trained_tokens = all_reduce(torch.tensor(counts, dtype=torch.float64)).tolist()
    if not n:
        return {}
    sums = torch.zeros(3, dtype=torch.float64)
    for micro, batch, out, weight in passes(model, processor, examples, spare, args, pace, device):
        asked = batch.targets >= 0
        logprobs, rows = out.logprobs[asked], asked.nonzero()[:, 0]
        before = torch.cat([e.before for e in micro]).to(device) if LOSSES[args.sft_loss].before else None
        loss = weight * LOSSES[args.sft_loss].f(logprobs, before, rows, args).sum() / n
        loss.backward()
        own = torch.stack([-logprobs.sum(), loss * n, out.entropy[asked].sum()])
        sums += weight * own.detach().double().cpu()
    nll_mean, loss, entropy = (all_reduce(sums) / n).tolist()
    return {"nll": (nll_mean, n), "loss": (loss, n), "entropy": (entropy, n), "grad_norm": (step(loss), 1),
            "trained_tokens": (trained_tokens, 1)}


# --tune -> does the parameter of this name learn? Cross-attention layers are the language model's: their
# projections and norms of queries and keys count as attention, their MLP as mlp. Gates and the layers' norms
# belong to neither.
VISION = ("vision_model.", "multi_modal_projector.")
TUNE = {
    "all": lambda name: True,
    "no-vision": lambda name: not name.startswith("vision_model."),
    "no-vision-no-adapter": lambda name: not name.startswith(VISION),
    "text": lambda name: not name.startswith(VISION),          # the same by the name of what learns
    "vision": lambda name: name.startswith(VISION),
    "attention": lambda name: not name.startswith(VISION) and "_attn." in name,
    "mlp": lambda name: not name.startswith(VISION) and ".mlp." in name,
    "no-embeddings": lambda name: not name.startswith(("embed_tokens.", "lm_head.")),
}


def vision_frozen(tune):
    """True if --tune leaves the vision encoder as it is."""
    return not TUNE[tune]("vision_model.")


def freeze(model, tune):
    """Stop the gradients of what is not tuned: a key of TUNE, the first three of which the paper compares in
    its figure 16. ValueError if nothing is left."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TUNE[tune](name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("this model has no such weights")
