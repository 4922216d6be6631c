"""FLOPs that training takes, counted by part and phase beside the paper's 6 N D: the x axis that is fair to both algorithms.

    python -m harness.flops                    # what 6 N D says and what is counted, for Llama-3.2-11B-Vision

6 N D (and 2 N D where nothing is learnt) takes every parameter to work once on every text token. The embedding table does no products at all,
the head works where a log-prob is asked, the vision tower once on every patch of an image and not on text, a frozen weight has no gradient,
and attention has no parameters for its products. So here a forward pass is

    FLOPs = sum over q of  number[q] x rate[q],      q: tokens, pairs of a query and a key that it sees, patches, targets, ...

`quantities` takes the numbers from what the pass was given, `rates` the FLOPs of one from the weights of the model. A multiply-add is 2 FLOPs,
norms, RoPE, softmax and the optimizer are left out (they are no products of matrices), and what is counted is what the maths asks for:

- Padding and hidden keys cost nothing, although CPUs compute them. (The tower's padding does cost: real patches see it.)
- A pair takes 2 FLOPs a channel and head for its score and 2 for its value; a query sees the keys up to its own, cached ones too.
- Backward, a product has two more, of which one is asked if the weight learns and one if a gradient goes on to the input. So all that learns
  costs twice its forward pass, what is frozen between that and the loss once, and what is frozen below it (--tune, the base of LoRA) nothing.
  Features of an image that a frozen encoder left in the rollout cost nothing in the update.
- What is computed a second time to save memory (--checkpoint-activations, scores in flash attention, logits) is counted once: the settings
  that a resumed run may change do not bend the axis.
- Passes that a rank makes only because another has more to do are not counted. So ranks do not change the sum.
"""

import contextlib
from collections import defaultdict
from functools import partial

import torch
from torch import nn

from harness.terminal import command
from model import CrossLayer, Llama
from variants.lora import Adapted

PHASES = "rollout", "scoring", "update"
PART = {"tokens": "text", "pairs": "text",                                     # of the text with itself
        "patches": "vision", "vision tokens": "vision", "vision pairs": "vision", "features": "vision",
        "image keys": "cross_attention", "looks": "cross_attention", "glances": "cross_attention",
        "targets": "head", "values": "critic"}
PARTS = tuple(dict.fromkeys(PART.values()))


# ---------------------------------------------------------------------------------------------------------------------
# How often

def quantities(config, input_ids, *, lengths=None, images=None, cache=None, targets=None, logits=None, **_):
    """How much of what a call of `Llama` with these arguments does -> {quantity: number}. A cache is as the call left it.

    tokens, pairs: in self-attention layers, new tokens and the keys that each of them sees
    patches, vision tokens, vision pairs: in the tower, which takes all tiles of an image, black ones too, and pads the patches of each
    features, image keys: what is projected, and made into keys and values
    looks, glances: in cross-attention layers, new tokens from <|image|> on, and what each sees of it
    targets: positions that the head works on
    """
    B, T = input_ids.shape
    new = torch.full((B,), T) if lengths is None else lengths.cpu()                           # (B,)
    past = 0 if cache is None else cache.lengths - new
    done = {"tokens": int(new.sum()), "pairs": int((new * past + new * (new + 1) // 2).sum())}
    done["targets"] = {"all": done["tokens"], "last": B, None: 0}[logits] + (0 if targets is None else int((targets >= 0).sum()))
    if images is not None:
        P, (N, tiles), new = config.vision.num_patches, images.aspect_ratio_mask.shape, new[images.rows.cpu()]
        real = P * images.aspect_ratio_mask.sum(1).cpu()                                      # (N,)
        S = tiles * (P + -P % 8)
        if images.features is None:                            # padding sees what is real, which sees everything
            done |= {"patches": N * tiles * (P - 1), "vision tokens": N * S, "vision pairs": int((2 * real * S - real**2).sum())}
        before = (input_ids[images.rows.to(input_ids.device)] == config.image_token_id).int().argmax(1).cpu()
        new = new - before                                     # what precedes <|image|> does not look
        done |= {"features": N * tiles * P, "image keys": N * tiles * P,
                 "looks": int(new.sum()), "glances": int((new * real).sum())}
    elif cache is not None and cache.has_image.any():
        seen = cache.cross[0].shape[3] if cache.cross_mask is None else cache.cross_mask.sum(1).cpu()[cache.has_image]
        new = new[cache.has_image]
        done |= {"looks": int(new.sum()), "glances": int((new * seen).sum())}
    return done


# ---------------------------------------------------------------------------------------------------------------------
# How many FLOPs each

def linear(rate, layer, flows):
    """Add a linear layer's FLOPs a row of its input to `rate`, [forward, backward]. flows: does a gradient go on to that input? Returns whether
    one comes to its output."""
    weights = [layer.base.weight] + [layer.lora_A, layer.lora_B] * layer.on if isinstance(layer, Adapted) else [layer.weight]
    for weight in weights:                                     # before B comes A, which learns
        rate[0] += 2 * weight.numel()
        rate[1] += 2 * weight.numel() * (flows + weight.requires_grad)
        flows = flows or weight.requires_grad
    return flows


def block(layer, token, key, pair, width, flows, seen=None):
    """Add a layer's FLOPs to the rates of a query token, of a token that gives a key and of a pair. width: channels of all heads; flows, seen:
    have its tokens, and the image that they look at, a gradient to hand on? Returns whether its output has."""
    attn = layer.cross_attn if isinstance(layer, CrossLayer) else layer.self_attn
    x = flows or learns(layer.input_layernorm)
    source = x if seen is None else seen
    q = linear(token, attn.q_proj, x) or seen is not None and learns(attn.q_norm)
    k = linear(key, attn.k_proj, source) or seen is not None and learns(attn.k_norm)
    v = linear(key, attn.v_proj, source)
    pair[0] += 2 * 2 * width                                   # scores, values
    pair[1] += 2 * width * (v + (q or k) + q + k)              # gradients of values, probabilities, queries and keys
    flows = linear(token, attn.o_proj, q or k or v) or flows
    x = flows or learns(layer.post_attention_layernorm)
    *first, last = layer.mlp.children()
    hidden = any([linear(token, one, x) for one in first])
    return linear(token, last, hidden) or flows or learns(layer)


def learns(module):
    return any(weight.requires_grad for weight in module.parameters())


def rates(llama):
    """FLOPs of one of each quantity, {quantity: [forward, backward]}, from the weights of a Llama (on any device, sharded or not)."""
    config, rate, seen = llama.config, defaultdict(lambda: [0, 0]), False
    if config.vision:
        tower = llama.vision_model
        seen = linear(rate["patches"], tower.patch_embedding, False)
        for layer in [*tower.transformer.layers, *tower.global_transformer.layers]:
            seen = block(layer, rate["vision tokens"], rate["vision tokens"], rate["vision pairs"], config.vision.hidden_size, seen)
        seen = linear(rate["features"], llama.multi_modal_projector, seen)
    flows, width = llama.embed_tokens.weight.requires_grad, config.num_attention_heads * config.head_dim
    for layer in llama.layers:
        if isinstance(layer, CrossLayer):
            flows = block(layer, rate["looks"], rate["image keys"], rate["glances"], width, flows, seen)
        else:
            flows = block(layer, rate["tokens"], rate["tokens"], rate["pairs"], width, flows)
    linear(rate["targets"], llama.lm_head, flows)
    return rate


def flops(rate, done, way):
    """{part: FLOPs} of a forward (way 0) or backward (1) pass over what is `done`."""
    sums = defaultdict(int)
    for name, number in done.items():
        sums[PART[name]] += number * rate[name][way]
    return sums


# ---------------------------------------------------------------------------------------------------------------------
# The ledger

def empty():
    return {phase: dict.fromkeys(PARTS, 0) for phase in PHASES}


class Ledger:
    """FLOPs of a run, {phase: {part: FLOPs}}: `total` over all ranks, and `own`, which `settle` has not added to it yet.

    It looks on through forward hooks, only inside of a `phase`. Whether there is a backward pass, and through what, it learns from autograd:
    it is counted when a gradient arrives at the hidden states or at the log-probs.
    """

    def __init__(self):
        self.total, self.own, self.idle = empty(), empty(), False

    def add(self, phase, rate, done, way):
        for part, number in flops(rate, done, way).items():
            self.own[phase][part] += number

    @contextlib.contextmanager
    def phase(self, name, module):
        """Inside, what `module` (a Llama or an ActorCritic) computes belongs to the phase "rollout" or "update";
        an update without gradients is "scoring"."""
        llamas = [part for part in module.modules() if isinstance(part, Llama)]
        hooks = [llama.register_forward_hook(partial(self.passed, name, {}), with_kwargs=True) for llama in llamas]
        if hasattr(module, "value_head"):
            hooks.append(module.value_head.register_forward_hook(self.valued))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def passed(self, name, known, llama, args, kwargs, output):
        """A forward pass of a Llama is done. known: its rates, kept from one token of a rollout to the next."""
        cached = kwargs.get("cache") is not None
        if self.idle:
            return
        rate = known["rate"] = known["rate"] if cached and known else rates(llama)
        done = quantities(llama.config, *args, **kwargs)
        if name == "update" and "forward" in vars(getattr(llama, "vision_model", llama)):      # llama/frozen.py remembers
            done = {what: n for what, n in done.items() if what not in ("patches", "vision tokens", "vision pairs")}
        self.add("scoring" if name == "update" and not torch.is_grad_enabled() else name, rate, done, 0)
        targets = {"targets": done.pop("targets")}
        for tensor, below in ((output.logprobs, targets), (output.hidden, done)):
            self.await_gradient(tensor, rate, below)

    def valued(self, head, args, values):
        """A forward pass of the value head is done."""
        rate, flows = {"values": [0, 0]}, args[0].requires_grad
        for layer in head:
            if isinstance(layer, nn.Linear):
                flows = linear(rate["values"], layer, flows)
        if not self.idle:
            self.add("update" if torch.is_grad_enabled() else "scoring", rate, {"values": len(values)}, 0)
            self.await_gradient(values, rate, {"values": len(values)})

    def await_gradient(self, tensor, rate, done):
        """Count the backward pass of what is `done` when, and if, the gradient of its result arrives."""
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(lambda gradient: self.add("update", rate, done, 1))

    def paced(self, pace):
        """`pace` (see llama.batches.alone); what it yields with weight 0, for the other ranks' sake, is not counted."""
        def counted(batches, spare):
            for batch, weight in pace(batches, spare):
                self.idle = weight == 0
                yield batch, weight
            self.idle = False
        return counted

    def settle(self, all_reduce=lambda x: x):
        """Add what all ranks did since the last time to the total."""
        own = all_reduce(torch.tensor([list(parts.values()) for parts in self.own.values()], dtype=torch.float64)).tolist()
        self.total = {phase: dict(zip(parts, map(sum, zip(parts.values(), row)))) for (phase, parts), row in zip(self.total.items(), own)}
        self.own = empty()

    @property
    def tflops(self):
        return sum(sum(parts.values()) for parts in self.total.values()) / 1e12

    def summary(self):
        """What the log says of it, in TFLOPs since the run began."""
        return {"counted_tflops": self.tflops,
                "flops": {phase: {part: round(number / 1e12, 6) for part, number in parts.items()} for phase, parts in self.total.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# What it comes to

def table(config, length, answers):
    """GFLOPs a token of a dialogue of `length` tokens, `answers` of them answers, without and with an image of all tiles."""
    from distributed.plan import make_ids, make_images
    from harness.load import count_parameters
    with torch.device("meta"):
        llama = Llama(config)
    lines = [f"{'GFLOPs a token':<34}" + "".join(f"{name:>17}" for name in (*PARTS, "counted", "2ND or 6ND"))]
    for image in (False, True):
        targets = torch.arange(length)[None] - (length - answers)
        done = quantities(config, make_ids(config, 1, length, image), targets=targets, images=make_images(config, 1) if image else None)
        forward, backward = (flops(rates(llama), done, way) for way in (0, 1))
        for name, factor, counted in (("scoring", 2, forward), ("update", 6, {part: forward[part] + backward[part] for part in forward})):
            numbers = [counted.get(part, 0) for part in PARTS]
            cells = [*numbers, sum(numbers), factor * length * count_parameters(llama, "gp-vl" if image else "gp-l")]
            lines.append(f"{name + (', with an image' if image else ', text alone'):<34}" + "".join(f"{x / length / 1e9:>17.2f}" for x in cells))
    return "\n".join(lines)


def main():
    from distributed.plan import LLAMA_11B
    from harness.ranges import command_line
    from llama.config import Config
    command_line("python -m harness.flops", __doc__).parse_args()
    print(table(Config.from_dict(LLAMA_11B), 512, 128))


if __name__ == "__main__":
    command(main)
