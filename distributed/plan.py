"""What a run will take before it takes it: memory a rank, and the FLOPs of a PPO update against the released code's schedule.

    python -m distributed.plan --gpus 8 --task gp-vl --algo ppo --model Llama-3.2-11B-Vision       # no weights, no GPU
    python train.py --dry-run 8 --task gp-vl --algo ppo --model FOLDER                             # the memory alone

The model's own code runs on PyTorch's meta device, where a tensor has a shape and no values, under a mode that adds up the bytes
of what is alive. Nothing is multiplied out by hand but what FSDP does around the layers. GB are 10^9 bytes.
"""
import contextlib
import dataclasses
import json
import math
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ppo
from harness import ranges
from harness.check import attempt, settle
from harness.ranges import SettingError
from harness.settings import parse
from harness.terminal import command
from kernels import logits, logprob
from llama.batches import Batch, bucket
from llama.cache import KVCache
from llama.config import Config
from llama.generate import draw_tokens
from llama.images import Images
from model import CrossLayer, Llama, SelfLayer, VisionLayer
from variants.tune import freeze, vision_frozen

HERE = Path(__file__).resolve().parent
HEADROOM = 0.1          # share of a GPU for what no plan sees: CUDA's context, NCCL's buffers, fragmentation

BUILT_IN = ("Llama-3.2-11B-Vision", "Llama-3.2-11B-Vision-Instruct")
LLAMA_11B = {           # config.json of meta-llama/Llama-3.2-11B-Vision-Instruct, as far as this project reads it
    "model_type": "mllama", "image_token_index": 128256,
    "text_config": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 8, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192}},
    "vision_config": {"image_size": 560}}


# ---------------------------------------------------------------------------------------------------------------------
# A device without memory

INDICES = 2**20         # integers up to this many keep their values


class Ledger(TorchDispatchMode):
    """Runs code on the meta device and adds up the bytes that are `live`, and their `peak`: of all tensors made inside, views once.

    Masks and positions decide what the model does next, so small integer and bool tensors keep their values: they stay on the CPU
    when the code believes them on the device.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tensors(args)}
        out = without_memory(op, args, kwargs or {})
        for tensor in tensors((out,)):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:                    # else a view of an argument, or the argument itself
                known.add(storage._cdata)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)


def tensors(values):
    """The tensors among an operator's arguments or results, which may lie in lists."""
    return [t for v in values for t in (v if isinstance(v, (list, tuple)) else (v,)) if isinstance(t, torch.Tensor)]


def without_memory(op, args, kwargs):
    """One operator, on the meta device if an argument is there or the result is large, else as it comes."""
    given, packet = tensors(args), op.overloadpacket
    if any(t.is_meta for t in given) or is_large(op, given):
        if packet in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            args = (args[0], [i for x in args[1] for i in positions(x)], *args[2:])
        return op(*tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, args), **kwargs)
    out = op(*args, **kwargs)
    integers = isinstance(out, torch.Tensor) and out.is_meta and not out.is_floating_point() and out.numel() <= INDICES
    return op(*args, **kwargs | {"device": "cpu"}) if integers else out


def is_large(op, given):
    return torch.Tag.pointwise in op.tags and math.prod(torch.broadcast_shapes(*(t.shape for t in given))) > INDICES


def positions(index):
    """A mask with values -> the places of its ones, whose number the meta device could not know."""
    mask = index is not None and index.dtype == torch.bool
    return index.nonzero().unbind(1) if mask else [index]


def fused_attention(q, k, v, visible=None, scale=None):
    """What our kernel keeps for the backward pass: its inputs, its result and a number a query and head. It needs no mask."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q.transpose(1, 2), k, v, 0.0, False)[0].transpose(1, 2)


class FusedLogprobs(torch.autograd.Function):
    """The products of kernels/logprob.py in slabs of the vocabulary of `workspace` bytes, without the sums over them, which are small."""

    @staticmethod
    def forward(ctx, hidden, weight, workspace):
        ctx.save_for_backward(hidden, weight)
        ctx.slabs = weight.split(max(1, workspace // (max(1, len(hidden)) * hidden.element_size())))
        for slab in ctx.slabs:
            hidden @ slab.T
        return hidden.new_empty(len(hidden), dtype=torch.float32), hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx, *upstream):
        hidden, weight = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden, dtype=torch.float32), torch.empty_like(weight)
        for slab in ctx.slabs:
            dlogits = hidden @ slab.T
            dlogits @ slab, dlogits.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None


def score(hidden, weight, targets, temperature=1.0, workspace=logits.WORKSPACE):
    """token_logprobs as far as memory and FLOPs go."""
    asked = (targets >= 0).nonzero()[:, 0]
    found = FusedLogprobs.apply(hidden[asked], weight, workspace)
    return [x.new_zeros(len(targets)).index_copy(0, asked.to(x.device), x) for x in found]


def fused(cuda):
    """While open: keep what the kernels keep on CUDA; the meta device would go the long ways of the CPU."""
    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch("model.token_logprobs", score if cuda else partial(score, workspace=3 * 4 * math.prod(logprob.PIECE))))
    if cuda:
        norm = lambda x, shape, weight, eps: F.layer_norm(x, shape, weight, None, eps)         # keeps the input and a number or two a row
        patches.enter_context(mock.patch("model.attention", fused_attention))
        patches.enter_context(mock.patch.object(F, "rms_norm", norm))
    return patches


# ---------------------------------------------------------------------------------------------------------------------
# What is measured on it

def make_module(config, args, dtype):
    """What is trained, without memory. The value head is float32, as it computes."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
        freeze(model, args.tune)
        return ppo.ActorCritic(model, args.critic) if args.algo == "ppo" else model


def make_images(config, rows, features=None):
    """An image a row, with all tiles real; features: their dtype, where they are kept instead of pixels."""
    vision = config.vision
    tiles, ones = (rows, vision.max_num_tiles), torch.ones(rows, vision.max_num_tiles, dtype=torch.int64)
    if features is None:
        pixels = torch.empty(*tiles, vision.num_channels, vision.image_size, vision.image_size, device="meta")
        return Images(pixels, ones[:, 0], ones, torch.arange(rows))
    kept = torch.empty(rows, vision.max_num_tiles * vision.num_patches, vision.output_size, dtype=features, device="meta")
    return Images(None, ones[:, 0], ones, torch.arange(rows), kept)


def kept_dtype(module, args):
    """The dtype of the images' features where PPO keeps them from the rollout to the update, else None."""
    return next(module.parameters()).dtype if args.algo == "ppo" and args.image and vision_frozen(args.tune) else None


def make_ids(config, rows, length, image):
    ids = torch.zeros(rows, length, dtype=torch.int64)
    if image:
        ids[:, 1] = config.image_token_id
    return ids


def measure_update(module, shape, image, *, features=None, cuda=True, recompute=False):
    """One micro-batch forward and backward -> bytes (kept by the forward pass, peak), without weights and gradients.

    shape: a `Micro`. features: see make_images. recompute: activation checkpointing, a block at a time.
    """
    policy = getattr(module, "policy", module)
    checkpointed = blocks(module) if recompute else []
    for block in checkpointed:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in module.parameters() if p.requires_grad]
    with Ledger() as ledger, fused(cuda):
        ids = make_ids(policy.config, shape.rows, shape.length, image)
        targets = torch.where(torch.arange(shape.length) >= shape.length - shape.targets, 0, -100).repeat(shape.rows, 1)
        batch = Batch(ids, torch.full((shape.rows,), shape.length), targets,
                      make_images(policy.config, shape.rows, features) if image else None)
        loss = micro_loss(module, batch)
        kept = ledger.live
        loss.backward()
    for hook in hooks:
        hook.remove()
    for block in checkpointed:
        del block.forward
    return kept, ledger.peak


def blocks(module):
    """What is sharded, gathered and recomputed as one."""
    return [block for block in module.modules() if isinstance(block, (SelfLayer, CrossLayer, VisionLayer))]


def micro_loss(module, batch):
    """A loss that needs what the real ones need (ppo.batch_loss, sft.update)."""
    if not isinstance(module, ppo.ActorCritic):
        return module(batch.input_ids, lengths=batch.lengths, images=batch.images, targets=batch.targets).logprobs.sum()
    rows = torch.arange(len(batch.input_ids))
    logprobs, entropy, values = module(batch, ppo.Turns(rows, rows, *[None] * 7), 1.0)
    return (logprobs + entropy).sum() + values.sum()


def measure_rollout(model, rows, lengths, image, *, cuda=True):
    """`rows` conversations in lockstep, as rollout plays them -> bytes (self keys, image keys, peak), without weights.

    lengths: [forced, drawn, forced, drawn, ...] tokens.
    """
    with torch.inference_mode(), Ledger() as ledger, fused(cuda):
        cache = KVCache(model.config, rows, "meta", model.embed_tokens.weight.dtype)
        for turn, (forced, drawn) in enumerate(zip(lengths[::2], lengths[1::2])):
            cache.reserve(int(cache.lengths.max()) + forced + max(drawn, forced))              # as generate does
            first = image and turn == 0
            model(make_ids(model.config, rows, forced, first), lengths=torch.full((rows,), forced), cache=cache, logits="last",
                  images=make_images(model.config, rows) if first else None)
            cache.lengths += drawn - 1                                                        # all steps but the last, which is
            logits = model(make_ids(model.config, rows, 1, False), cache=cache, logits="last").logits      # the longest
            draw_tokens(logits, torch.empty(rows, device="meta"), 1.0)
        return sum(layer.nbytes for layer in cache.kv), sum(layer.nbytes for layer in cache.cross), ledger.peak


def measure_optimizer(sizes, cuda=True):
    """AdamW over float32 tensors of these shapes -> bytes (state, peak of a step beside it)."""
    weights = [torch.empty(size, device="meta", requires_grad=True) for size in sizes]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    with Ledger() as ledger:
        optimizer = torch.optim.AdamW(weights, foreach=cuda)
        optimizer.step()
        state = ledger.live
        ledger.peak = 0
        optimizer.step()                                       # the second finds the state there
    return state, ledger.peak - state


def measure_logprobs(model, targets):
    """Scoring that many tokens, forward and backward -> bytes at the peak."""
    weight = model.lm_head.weight
    hidden = torch.empty(targets, weight.shape[1], dtype=weight.dtype, device="meta", requires_grad=True)
    with Ledger() as ledger:
        ids = torch.zeros(targets, dtype=torch.int64, device="meta")
        logprobs, entropy = score(hidden, weight.detach().requires_grad_(), ids)
        (logprobs + entropy).sum().backward()
    return ledger.peak


# ---------------------------------------------------------------------------------------------------------------------
# Memory of a rank

@dataclass
class Micro:
    """A micro-batch: conversations with their padded length and, of it, the tokens that are scored."""
    rows: int
    length: int
    targets: int


@dataclass
class Sizes:
    """What the settings and the recorded lengths of a task say of its batches, a rank: the worst case of each."""
    rollout_rows: int
    rollout: list           # [forced, drawn, forced, drawn, ...] tokens: the longest prompt and replies, every answer --max-new-tokens long
    micro: Micro            # as many conversations, so as many images, as the token budget takes of the shortest
    images: int             # of an update, whose features the host keeps where the encoder is frozen


def recorded():
    """{set: episodes}, token counts of real ones: an episode is a list of conversations, a conversation [forced, drawn, forced, ...].

    The tiny model played them at temperature 0.2 on its training rule (gp-vl: its init; the others: its foundation) and, where the
    set's name says so, on the other rule. Counted with Llama 3's own tokenizer (npm's llama3-tokenizer-js 1.2.0).
    """
    return json.loads((HERE / "episodes.json").read_text(encoding="utf-8"))


def image_tokens(config, args):
    """What an image takes of the token budget."""
    return config.image_tokens(vision_frozen(args.tune)) if args.image else 0


def sizes_of(config, args, gpus):
    conversations = [c for episode in recorded()[args.task] for c in episode]
    prompt, reply = max(c[0] for c in conversations), max((n for c in conversations for n in c[2::2]), default=0)
    rollout = [prompt, args.max_new_tokens] + [reply, args.max_new_tokens] * (args.attempts - 1)
    if args.algo == "ppo":
        episodes, longest = -(-args.hands * args.samples // gpus), sum(rollout)
        played = episodes * max(map(len, recorded()[args.task]))
        share = -(-played // args.minibatches)                 # conversations of an optimizer step
    else:
        episodes, played, share, longest = 0, 0, -(-args.batch_size // gpus), max(sum(c if args.mistakes else c[:2]) for c in conversations)
    shortest = min(c[0] + c[1] for c in conversations)
    beside = image_tokens(config, args)
    rows = max(1, min(args.token_budget // (shortest + beside), share))
    length = max(shortest, min(args.token_budget // rows - beside, longest))
    micro = Micro(rows, length, length - min(c[0] for c in conversations))
    return Sizes(min(args.rollout_batch, max(episodes, -(-args.eval_hands // gpus))), rollout, micro, played)


def shards(parameters, gpus):
    """Shapes of a rank's parts: FSDP cuts the first dimension, rounded up."""
    return [(-(-p.shape[0] // gpus), *p.shape[1:]) for p in parameters]


def memory(config, args, gpus):
    """{phase: {what: bytes}} on the fullest rank."""
    module, sizes = make_module(config, args, torch.bfloat16), sizes_of(config, args, gpus)
    policy, count = getattr(module, "policy", module), lambda parameters: sum(p.numel() for p in parameters)
    own = lambda parameters: sum(map(math.prod, shards(parameters, gpus)))
    trained = [p for p in module.parameters() if p.requires_grad]
    head = list(module.value_head.parameters()) if args.algo == "ppo" else []
    whole, block = count(module.parameters()), max(count(b.parameters()) for b in blocks(module))
    root = whole - sum(count(b.parameters()) for b in blocks(module))
    state, step = measure_optimizer(shards(trained, gpus))
    in_flight = 2 * (root + 2 * block) if gpus > 1 else 2 * whole              # one GPU: autocast's copies
    base = {"weights, float32": 4 * (own(module.parameters()) - own(head)), "value head, float32": 4 * own(head), "optimizer state": state}
    gradients = {"gradients, float32": 4 * own(trained)}
    keys, image_keys, peak = measure_rollout(policy, sizes.rollout_rows, sizes.rollout, args.image)
    cache = {"self KV cache": keys, "cross KV cache": image_keys, "prefill, growing caches, draws": peak - keys - image_keys}
    phases = {"rollout": base | {"gathered weights": 2 * count(policy.parameters())} | cache,
              "rollout, sharded": base | {"gathered weights": in_flight} | cache}
    logprobs = measure_logprobs(policy, sizes.micro.rows * sizes.micro.targets)
    for name, recompute in (("update", False), ("update, recomputing", True)):
        kept, peak = measure_update(module, sizes.micro, args.image, features=kept_dtype(module, args), recompute=recompute)
        phases[name] = base | gradients | {
            "gathered weights": in_flight,
            "gradients before reduction": 2 * (root + block) + 4 * block if gpus > 1 else 0,      # the block before is being reduced
            "activations": kept, "log-prob workspace": logprobs, "rest of the backward pass": max(0, peak - kept - logprobs)}
    phases["optimizer step"] = base | gradients | {"temporaries of the step": max(step, 4 * root if gpus > 1 else 0)}
    return sizes, phases


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs of a PPO update

@dataclass
class Costs:
    """FLOPs of one pass, as they depend on what is in it."""
    image: float = 0.0      # encode an image, and its keys in all cross-attention layers
    token: float = 0.0
    pair: float = 0.0       # a token and a position that it attends to; masked ones are computed, too
    target: float = 0.0     # a token's log-prob and entropy

    def span(self, past, new):
        """`new` tokens after `past` others."""
        return new * (self.token + self.pair * (past + new))

    def decode(self, past, new):
        """The same one by one, without padding to attend to."""
        return new * self.token + self.pair * sum(range(past + 1, past + new + 1))


def count_flops(model, image, length, targets, train, features=None):
    """FLOPs of one conversation, counted operator by operator; train: with the backward pass; features: see make_images."""
    ids = make_ids(model.config, 1, length, image)
    asked = torch.where(torch.arange(length) >= length - targets, 0, -100)[None]
    images = make_images(model.config, 1, features) if image else None
    with Ledger(), fused(False), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        logprobs = model(ids, images=images, targets=asked).logprobs.sum()
        if train:
            logprobs.backward()
    model.zero_grad()
    return counter.get_total_flops()


def costs(model, image, train, features=None):
    """From counts at three lengths and one more target: FLOPs are exactly image + token T + pair T^2 + target N."""
    a, b, c = (count_flops(model, image, n, 1, train, features) for n in (64, 128, 192))
    target = (count_flops(model, image, 64, 33, train, features) - a) / 32
    pair = (a - 2 * b + c) / (2 * 64**2)
    token = (b - a) / 64 - pair * (64 + 128)
    return Costs(a - token * 64 - pair * 64**2 - target, token, pair, target)


def turns(conversation):
    """-> (tokens before, forced, drawn) of each turn."""
    past = 0
    for forced, drawn in zip(conversation[::2], conversation[1::2]):
        yield past, forced, drawn
        past += forced + drawn


def ours(conversations, args, beside, first, forward, backward):
    """FLOPs of one update as this project does it: (rollout, values, epochs). first: Costs in the rollout; forward, backward: later,
    when the images of a frozen encoder are known; beside: Config.image_tokens, or 0 without images.

    A turn's prefix is in the cache, a conversation is one sequence, its image is encoded once a pass, or once an update by a frozen
    encoder. Values come from states of the rollout, or from a pass of a separate critic, which is trained beside the policy.
    Micro-batches are padded as a rank pads them; what the rollout pads is left out.
    """
    rollout = sum(first.image + sum(first.span(past, forced) + first.decode(past + forced, drawn) + drawn * first.target
                                    for past, forced, drawn in turns(c)) for c in conversations)

    def padded(cost, items):
        groups = bucket([sum(c) for c in items], args.token_budget, [beside] * len(items))
        return sum(len(group) * (cost.image + cost.span(0, max(sum(items[i]) for i in group))) for group in groups)

    networks = 2 if args.critic == "separate" else 1
    epoch = networks * sum(padded(backward, conversations[k::args.minibatches]) for k in range(args.minibatches)) + \
        backward.target * sum(drawn for c in conversations for drawn in c[1::2])
    return rollout, (networks - 1) * padded(forward, conversations), args.epochs * epoch


def released(conversations, args, forward, backward):
    """The same as the released code schedules it (PAPER's sections 4 and 8): every turn is a sequence of its own, with all that went
    before and the image: prefilled to answer, passed again for log-probs and value, and trained on in every epoch, one at a time.

    Same model code, same answers; its sixth, never judged answer and its logits of prompt tokens are left out in its favour.
    """
    rollout = scored = trained = 0
    for past, forced, drawn in (turn for c in conversations for turn in turns(c)):
        prompt, whole = past + forced, past + forced + drawn
        rollout += forward.image + forward.span(0, prompt) + forward.decode(prompt, drawn) + drawn * forward.target
        scored += forward.image + forward.span(0, whole) + drawn * forward.target
        trained += backward.image + backward.span(0, whole) + drawn * backward.target
    return rollout, scored, args.epochs * trained


# ---------------------------------------------------------------------------------------------------------------------
# What is printed

def read_config(name, game):
    """A folder's config.json; 'tiny'; or the built-in one of Llama-3.2-11B-Vision, should no folder have that name."""
    folder = HERE.parent / "docs" / "tiny" / game if name == "tiny" else Path(name)
    if folder.name in BUILT_IN and not folder.is_dir():
        return Config.from_dict(LLAMA_11B)
    return Config.from_pretrained(folder)


def table(columns):
    """{column: {row: number}} -> text; nothing where it is 0."""
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    total = {name: sum(column.values()) for name, column in columns.items()}
    line = lambda title, cells: f"  {title:<30}" + "".join(f"{cell:>21}" for cell in cells)
    number = lambda value: f"{value:.2f}" if value else ""
    return "\n".join([line("", columns), *(line(row, [number(column.get(row)) for column in columns.values()]) for row in rows),
                      line("total", map(number, total.values()))])


ALTERNATIVES = [        # a phase, the same with less memory and the flag for that, the setting that it grows with, and what grows
    ("rollout", "rollout, sharded", "--rollout-sharded", "--rollout-batch",
     ("self KV cache", "cross KV cache", "prefill, growing caches, draws")),
    ("update", "update, recomputing", "--checkpoint-activations", "--token-budget",
     ("activations", "rest of the backward pass"))]


def advice(phases, sizes, args, room):
    """-> (flags to give, peak with them, what to change if that is over `room`), in the unit of the phases."""
    total, flags, changes = {name: sum(phase.values()) for name, phase in phases.items()}, [], []
    peak, now = total["optimizer step"], {"--rollout-batch": sizes.rollout_rows, "--token-budget": args.token_budget}
    for roomy, thrifty, flag, setting, grows in ALTERNATIVES:
        use = roomy if total[roomy] <= room else thrifty
        flags += [flag] * (use == thrifty)
        peak, growing = max(peak, total[use]), sum(phases[use][what] for what in grows)
        if total[use] > room:
            fits = int(now[setting] * (1 - (total[use] - room) / growing))
            changes.append(f"about {setting} {fits}" if fits > 0 else "more GPUs (--gpus)")
    changes += ["more GPUs (--gpus)"] * (total["optimizer step"] > room)
    return flags, peak, list(dict.fromkeys(changes))


def show(args, typed, gpus, gpu_memory=80.0):
    """Print the memory plan of a run. typed: names of the settings that the user gave."""
    expected = f"tiny, {', '.join(BUILT_IN)} or a folder with a config.json"
    config = attempt(args, "model", expected, read_config, args.model, args.game)
    args.dry_run = gpus
    settle(args, config, typed | {"dry_run"}, gpus)
    sizes, phases = memory(config, args, gpus)
    phases = {name: {what: size / 1e9 for what, size in phase.items()} for name, phase in phases.items()}
    flags, peak, changes = advice(phases, sizes, args, gpu_memory * (1 - HEADROOM))
    micro, host = sizes.micro, ""
    if args.image and vision_frozen(args.tune) and args.algo == "ppo":
        size = sizes.images * make_images(config, 1, torch.bfloat16).features.nbytes / 1e9
        host = f"host: {size:.1f} GB a rank for what the frozen vision encoder makes of at most {sizes.images} images\n"
    print(f"{args.task} {args.algo}, {args.model} on {gpus} GPUs: GB a rank, bfloat16 compute\n\n{table(phases)}\n\n"
          f"rollout: {sizes.rollout_rows} conversations of at most {sum(sizes.rollout)} tokens; update: micro-batches of at most "
          f"{micro.rows} conversations{' with an image each' * args.image}, {micro.rows * micro.length} padded tokens\n"
          f"{host}{'does NOT fit' if changes else 'fits'} into {gpu_memory:g} GB, less {HEADROOM:.0%} for what is not planned: "
          f"at most {peak:.1f} GB{' with ' * bool(flags)}{' '.join(flags)}" + "".join(f"\n  change: {change}" for change in changes))


def show_flops(args, config):
    """Print the FLOPs of one PPO update on each recorded set of the task, beside those of the released schedule."""
    sets = {name: episodes for name, episodes in recorded().items() if name.split()[0] == args.task}
    for tune in ("all", "no-vision") if args.image else ("all",):
        tuned = dataclasses.replace(args, tune=tune)
        model = make_module(config, tuned, torch.bfloat16).policy
        features, beside = kept_dtype(model, tuned), image_tokens(config, tuned)
        cost = {(train, kept): costs(model, args.image, train, kept) for train in (False, True) for kept in {None, features}}
        for name, episodes in sets.items():
            conversations = [c for episode in episodes for c in episode]
            flops = {"ours": ours(conversations, tuned, beside, cost[False, None], cost[False, features], cost[True, features]),
                     "released": released(conversations, tuned, cost[False, None], cost[True, None])}
            columns = {what: dict(zip(("rollout", "values, log-probs", "epochs"), (x / 1e15 for x in each))) for what, each in flops.items()}
            total = {what: sum(column.values()) for what, column in columns.items()}
            rate = sum(map(len, conversations)) / 2 / len(conversations)
            print(f"\nPFLOPs of one PPO update, {name}, --tune {tune}: {len(episodes)} episodes, {rate:.2f} turns a conversation\n"
                  f"{table(columns)}\n  {total['released'] / total['ours']:.2f} times fewer than released")


def main(argv=None):
    parser = ranges.command_line("python -m distributed.plan", __doc__,
                                 epilog="All other options: train.py --help")
    parser.add_argument("--gpus", type=ranges.integer(1, 10**5), default=8, help="ranks (default: 8)")
    parser.add_argument("--gpu-memory", type=ranges.above(0), default=80.0, help="GB of each (default: 80)")
    own, rest = parser.parse_known_args(argv)
    try:
        args, typed = parse(rest)
        if args.dry_run:
            raise SettingError("--dry-run: expected with train.py, not here")
        show(args, typed, own.gpus, own.gpu_memory)
    except SettingError as error:
        parser.error(str(error))
    if args.algo == "ppo":
        show_flops(args, read_config(args.model, args.game))


if __name__ == "__main__":
    command(main)
