"""Supervised fine-tuning on expert dialogues, with loss on the expert's own tokens only.

    torchrun train.py --task gp-l --algo sft

The data comes from the environments' oracles and is made as it is needed: one dialogue a seed, rendered by the very
Processor that renders RL prompts. With `--mistakes` some dialogues hold wrong answers and the verifier's replies before
the right one (the paper's sub-optimal trajectories, its figure 15); the wrong answers are context, never targets.
"""

import random
from dataclasses import dataclass

import torch

from model import alone, bucket, collate


@dataclass
class Example:
    ids: list[int]
    sampled: list[bool]        # True: a token the model must produce, so a token with a loss
    image: object              # PIL image or None


def make_example(processor, env, seed, mistakes=0, prompts=False):
    """One expert dialogue as token ids with the mask of what is learnt: right answers and, with `prompts`, what is not an answer."""
    messages = env.demonstrate(seed, mistakes=mistakes)
    if prompts:
        messages = [{"train": True} | message for message in messages]         # wrong answers say "train": False themselves
    rendered = processor.render(messages, reply=False)
    return Example(rendered.ids, rendered.sampled, rendered.images[0] if rendered.images else None)


def make_batch(processor, mixture, seeds, mistakes, prompts=False):
    """One example per seed. `mixture`: list of (environment, weight); `mistakes`: share of dialogues with wrong turns; `prompts`: as
    in make_example."""
    examples = []
    for seed in seeds:
        rng = random.Random(seed)
        env = rng.choices([env for env, _ in mixture], [weight for _, weight in mixture])[0]
        wrong = rng.randint(1, env.attempts - 1) if env.attempts > 1 and rng.random() < mistakes else 0
        examples.append(make_example(processor, env, seed, wrong, prompts))
    return examples


def nll(logprobs):
    """Negative log-likelihood of each target token, (tokens,) -> (tokens,)."""
    return -logprobs


LOSSES = {"nll": nll}


def update(model, processor, examples, args, *, step, all_reduce=lambda x: x, pace=alone, device="cpu"):
    """One optimizer step on a batch of examples: the mean loss a target token, over all ranks.

    `step(loss)` reduces the gradients over ranks, clips them, steps the optimizer and returns the gradient norm. `pace`: see `alone`.
    """
    counts = torch.tensor([sum(sum(e.sampled) for e in examples), sum(len(e.ids) for e in examples)], dtype=torch.float64)
    n_tokens, trained_tokens = all_reduce(counts).tolist()
    sums = torch.zeros(3, dtype=torch.float64)
    beside = [0 if e.image is None else model.config.image_tokens(model.vision_frozen) for e in examples]
    for indices, weight in pace(bucket([len(e.ids) for e in examples], args.token_budget, beside), [0]):
        micro = [examples[i] for i in indices]
        batch = collate(processor, [e.ids for e in micro], [e.sampled for e in micro], [e.image for e in micro]).to(device)
        out = model(batch.input_ids, lengths=batch.lengths, images=batch.images, targets=batch.targets)
        asked = batch.targets >= 0
        logprobs = out.logprobs[asked]
        loss = weight * LOSSES[args.sft_loss](logprobs).sum() / n_tokens
        loss.backward()
        sums += weight * torch.stack([-logprobs.sum(), loss * n_tokens, out.entropy[asked].sum()]).detach().double().cpu()
    nll_mean, loss, entropy = (all_reduce(sums) / n_tokens).tolist()
    return {"nll": nll_mean, "loss": loss, "entropy": entropy, "grad_norm": step(loss), "trained_tokens": trained_tokens}


# --tune -> does the parameter of this name learn? Cross-attention layers are the language model's: their projections and norms of queries and
# keys count as attention, their MLP as mlp. Gates and the layers' norms belong to neither.
VISION = ("vision_model.", "multi_modal_projector.")
TUNE = {
    "all": lambda name: True,
    "no-vision": lambda name: not name.startswith("vision_model."),
    "no-vision-no-adapter": lambda name: not name.startswith(VISION),
    "text": lambda name: not name.startswith(VISION),          # the same by the name of what learns
    "vision": lambda name: name.startswith(VISION),
    "attention": lambda name: not name.startswith(VISION) and any(part in name for part in (".self_attn.", ".cross_attn.")),
    "mlp": lambda name: not name.startswith(VISION) and ".mlp." in name,
}


def vision_frozen(tune):
    """True if --tune leaves the vision encoder as it is."""
    return not TUNE[tune]("vision_model.")


def freeze(model, tune):
    """Stop the gradients of what is not tuned: a key of TUNE, the first three of which the paper compares in its figure 16. ValueError if
    nothing is left."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TUNE[tune](name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--tune {tune}: this model has no such weights")
