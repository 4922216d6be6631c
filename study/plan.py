"""What a run will take before it takes it: memory per rank, and the FLOPs of a PPO update against the
released code's schedule.

    python -m study.plan --gpus 8 --task gp-vl --algo ppo --model Llama-3.2-11B-Vision       # no weights, no
    GPU

The model's own code runs on PyTorch's meta device, where a tensor has a shape and no values, under a mode
that adds up the bytes of what is alive. Nothing is multiplied out by hand but what FSDP does around the
layers. GB are 10^9 bytes.
"""
import json
import math
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import model
import ppo
from harness import flops, ranges
from harness.check import attempt, settle
from harness.ranges import SettingError
from harness.settings import parse, spelled
from harness.terminal import command
from kernels import logits, logprob
from llama.batches import Batch
from llama.cache import KVCache
from llama.config import Config
from llama.frozen import remember
from llama.generate import draw_tokens
from llama.images import Images
from model import CrossLayer, Llama, SelfLayer, VisionLayer
from variants import algorithm
from variants.tune import freeze, vision_frozen

HERE = Path(__file__).resolve().parent
HEADROOM = 0.1          # share of a GPU for what no plan sees: CUDA's context, NCCL's buffers, fragmentation
BUILT_IN = ("Llama-3.2-11B-Vision", "Llama-3.2-11B-Vision-Instruct")
LLAMA_11B = {           # config.json of meta-llama/Llama-3.2-11B-Vision-Instruct, as far as it is read here
    "model_type": "mllama", "image_token_index": 128256,
    "text_config": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
    "vision_config": {"image_size": 560}}


# ------------------------------------------------------------------------------------------------------------
# A device without memory

INDICES = 2**20         # integers up to this many keep their values


class Bytes(TorchDispatchMode):
    """Runs code on the meta device and adds up the bytes that are `live`, and their `peak`: of all tensors
    made inside, views once.

    Masks and positions decide what the model does next, so small integer and bool tensors keep their values:
    they stay on the CPU when the code believes them on the device.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tensors(args)}
        out = without_memory(op, args, kwargs or {})
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:                    # else a view of an argument, or the argument
                known.add(storage._cdata)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)


def tensors(values):
    """Return the tensors among an operator's arguments or results."""
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def without_memory(op, args, kwargs):
    """Do one operator, on the meta device if an argument is there or the result is large, else as it
    comes."""
    given, packet = tensors(args), op.overloadpacket
    if any(t.is_meta for t in given) or is_large(op, given):
        if packet in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            args = (args[0], [i for x in args[1] for i in positions(x)], *args[2:])
        return op(*tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, args), **kwargs)
    out = op(*args, **kwargs)
    small = isinstance(out, torch.Tensor) and not out.is_floating_point() and out.numel() <= INDICES
    return op(*args, **kwargs | {"device": "cpu"}) if small and out.is_meta else out


def is_large(op, given):
    shape = torch.broadcast_shapes(*(t.shape for t in given)) if torch.Tag.pointwise in op.tags else ()
    return math.prod(shape) > INDICES


def positions(index):
    """Turn a mask with values into the places of its ones, whose number the meta device could not know."""
    mask = index is not None and index.dtype == torch.bool
    return index.nonzero().unbind(1) if mask else [index]


def fused_attention(q, k, v, visible=None, scale=None):
    """Keep what our kernel keeps for the backward pass: its inputs, its result and a number per query and
    head. It needs no mask."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(q.transpose(1, 2), k, v, 0.0, False)[0].transpose(1, 2)


def fused_norm(norm, x):
    """Keep the input and a number or two per row."""
    return F.layer_norm(x, norm.shape, norm.weight, None, norm.eps)


class FusedLogprobs(torch.autograd.Function):
    """The products of kernels/logprob.py in slabs of the vocabulary of `workspace` bytes, without the sums
    over them, which are small."""

    @staticmethod
    def forward(ctx, hidden, weight, workspace):
        ctx.save_for_backward(hidden, weight)
        ctx.slabs = weight.split(max(1, workspace // (max(1, len(hidden)) * hidden.element_size())))
        for slab in ctx.slabs:
            hidden @ slab.T
        return tuple(hidden.new_empty(2, len(hidden), dtype=torch.float32))

    @staticmethod
    def backward(ctx, *upstream):
        hidden, weight = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden, dtype=torch.float32), torch.empty_like(weight)
        for slab in ctx.slabs:
            dlogits = hidden @ slab.T
            dlogits @ slab, dlogits.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None


def score(hidden, weight, targets, temperature=1.0, workspace=logits.WORKSPACE):
    """Do what token_logprobs does, as far as memory goes."""
    asked = (targets >= 0).nonzero()[:, 0]
    found = FusedLogprobs.apply(hidden[asked], weight, workspace)
    return [x.new_zeros(len(targets)).index_copy(0, asked.to(x.device), x) for x in found]


PIECES = partial(score, workspace=3 * 4 * math.prod(logprob.PIECE))            # as the twin on a CPU takes
ON_CUDA = [(model, "token_logprobs", score), (model, "attention", fused_attention),
           (model.RMSNorm, "__call__", fused_norm)]


@contextmanager
def as_kernels(cuda=True):
    """While open, the model keeps what kernels keep; the meta device would go the long ways of a CPU."""
    stand_ins = ON_CUDA if cuda else [(model, "token_logprobs", PIECES)]
    own = [getattr(owner, name) for owner, name, _ in stand_ins]
    for owner, name, function in stand_ins:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name, _), function in zip(stand_ins, own):
            setattr(owner, name, function)


# ------------------------------------------------------------------------------------------------------------
# What is measured on it

@dataclass
class Micro:
    """A micro-batch: conversations with their padded length and, of it, the tokens that are scored."""
    rows: int
    length: int
    targets: int


def make_module(config, args, dtype=torch.bfloat16):
    """Make what is trained, without memory. The value head is float32, as it computes."""
    with torch.device("meta"):
        llama = Llama(config).to(dtype)
        freeze(llama, args.tune)
        return ppo.ActorCritic(llama, args.critic) if args.algo == "ppo" else llama


def make_images(config, rows):
    """Make an image per row, with all tiles real."""
    vision = config.vision
    tiles = torch.ones(rows, vision.max_num_tiles, dtype=torch.int64)
    shape = vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size
    pixels = [torch.empty(shape, device="meta") for _ in range(rows)]
    return Images(pixels, tiles[:, 0], tiles, torch.arange(rows))


def features_of(config, images, dtype):
    """Make what llama/frozen.py remembers of images."""
    size = config.vision.max_num_tiles * config.vision.num_patches, config.vision.output_size
    return {pixels: torch.empty(size, dtype=dtype, device="meta") for pixels in images.pixel_values}


def remembers(args):
    """Tell whether features are kept from the rollout to the update."""
    return args.algo == "ppo" and args.image and vision_frozen(args.tune)


def make_ids(config, rows, length, image):
    ids = torch.zeros(rows, length, dtype=torch.int64)
    if image:
        ids[:, 1] = config.image_token_id
    return ids


def blocks(module):
    """Return what is sharded, gathered and recomputed as one."""
    return [block for block in module.modules() if isinstance(block, (SelfLayer, CrossLayer, VisionLayer))]


def measure_update(module, micro, image, *, known=False, cuda=True, recompute=False):
    """Pass a micro-batch forward and backward -> bytes (kept by the forward pass, peak), without weights and
    gradients. known: are the images' features remembered? recompute: activation checkpointing, by block."""
    config, dtype = getattr(module, "policy", module).config, next(module.parameters()).dtype
    images = make_images(config, micro.rows) if image else None
    features = features_of(config, images, dtype) if known else None
    checkpointed = blocks(module) if recompute else []
    for block in checkpointed:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
             for p in module.parameters() if p.requires_grad]
    with Bytes() as memory, as_kernels(cuda), remember(module, features):
        ids = make_ids(config, micro.rows, micro.length, image)
        targets = torch.where(torch.arange(micro.length) >= micro.length - micro.targets, 0, -100)
        lengths = torch.full((micro.rows,), micro.length)
        loss = micro_loss(module, Batch(ids, lengths, targets.repeat(micro.rows, 1), images))
        kept = memory.live
        loss.backward()
    for hook in hooks:
        hook.remove()
    for block in checkpointed:
        del block.forward
    return kept, memory.peak


def micro_loss(module, batch):
    """Compute a loss that needs what the real ones need (ppo.batch_loss, sft.update)."""
    if not isinstance(module, ppo.ActorCritic):
        return module(**batch.inputs(), targets=batch.targets).logprobs.sum()
    rows = torch.arange(len(batch.input_ids))
    logprobs, entropy, values = module(batch, ppo.Turns(rows, rows, *[None] * 7), 1.0)
    return (logprobs + entropy).sum() + values.sum()


def measure_rollout(llama, rows, lengths, image, *, cuda=True):
    """Play `rows` conversations in lockstep, as ppo.rollout does -> bytes (self keys, image keys, peak),
    without weights. lengths: [forced, drawn, forced, drawn, ...] tokens."""
    config = llama.config
    with torch.inference_mode(), Bytes() as memory, as_kernels(cuda):
        cache = KVCache(config, rows, "meta", llama.embed_tokens.weight.dtype)
        for turn, (forced, drawn) in enumerate(zip(lengths[::2], lengths[1::2])):
            cache.reserve(int(cache.lengths.max()) + forced + max(drawn, forced))      # as generate does
            first = image and turn == 0
            llama(make_ids(config, rows, forced, first), lengths=torch.full((rows,), forced), cache=cache,
                  logits="last", images=make_images(config, rows) if first else None)
            cache.lengths += drawn - 1                         # all steps but the last, which is the longest
            last = llama(make_ids(config, rows, 1, False), cache=cache, logits="last").logits
            draw_tokens(last, torch.empty(rows, device="meta"), 1.0)
        keys, image_keys = (sum(layer.nbytes for layer in layers) for layers in (cache.kv, cache.cross))
        return keys, image_keys, memory.peak


def measure_optimizer(sizes, cuda=True):
    """Step AdamW over float32 tensors of these shapes -> bytes (state, peak of a step beside it)."""
    weights = [torch.empty(size, device="meta", requires_grad=True) for size in sizes]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    with Bytes() as memory:
        optimizer = torch.optim.AdamW(weights, foreach=cuda)
        optimizer.step()
        state = memory.live
        memory.peak = 0
        optimizer.step()                                       # the second finds the state there
    return state, memory.peak - state


# ------------------------------------------------------------------------------------------------------------
# Memory of a rank

@dataclass
class Sizes:
    """What the settings and the recorded lengths of a task say of its batches, per rank: the worst case."""
    rollout_rows: int
    rollout: list           # [forced, drawn, ...] tokens: the longest prompt and replies, and answers of
                            # --max-new-tokens
    micro: Micro            # as many conversations, so images, as the token budget takes of the shortest
    images: int             # of an update, whose features the host keeps where the encoder is frozen


def recorded():
    """Return {set: episodes}, token counts of real ones: an episode is a list of conversations, a
    conversation [forced, drawn, forced, ...].

    The tiny model played them at temperature 0.2 on its training rule (gp-vl: its init; the others: its
    foundation) and, where the set's name says so, on the other rule. Counted with Llama 3's own tokenizer
    (npm's llama3-tokenizer-js 1.2.0).
    """
    return json.loads((HERE / "episodes.json").read_text(encoding="utf-8"))


def sizes_of(config, args, gpus):
    episodes = recorded()[args.task]
    conversations = [c for episode in episodes for c in episode]
    prompts, shortest = [c[0] for c in conversations], min(c[0] + c[1] for c in conversations)
    reply = max((n for c in conversations for n in c[2::2]), default=0)
    rollout = [max(prompts), args.max_new_tokens] + [reply, args.max_new_tokens] * (args.attempts - 1)
    if args.algo == "ppo":
        played, longest = -(-args.hands * args.samples // gpus), sum(rollout)
        images = played * max(map(len, episodes))
        share = -(-images // args.minibatches)                 # conversations of an optimizer step
    else:
        played, images, share = 0, 0, -(-args.batch_size // gpus)
        longest = max(sum(c if args.mistakes else c[:2]) for c in conversations)
    beside = config.image_tokens(vision_frozen(args.tune)) if args.image else 0
    rows = max(1, min(args.token_budget // (shortest + beside), share))
    length = max(shortest, min(args.token_budget // rows - beside, longest))
    return Sizes(min(args.rollout_batch, max(played, -(-args.eval_hands // gpus))), rollout,
                 Micro(rows, length, length - min(prompts)), images)


def shards(parameters, gpus):
    """Return shapes of a rank's parts: FSDP cuts the first dimension, rounded up."""
    return [(-(-p.shape[0] // gpus), *p.shape[1:]) for p in parameters]


def memory(config, args, gpus):
    """Return the sizes and {phase: {what: bytes}} on the fullest rank."""
    module, sizes = make_module(config, args), sizes_of(config, args, gpus)
    policy, all_weights = getattr(module, "policy", module), list(module.parameters())
    count = lambda part: sum(p.numel() for p in part.parameters())
    own = lambda parameters: 4 * sum(map(math.prod, shards(parameters, gpus)))
    trained = [p for p in all_weights if p.requires_grad]
    head = list(module.value_head.parameters()) if args.algo == "ppo" else []
    in_blocks = list(map(count, blocks(module)))
    block, root = max(in_blocks), count(module) - sum(in_blocks)
    state, step = measure_optimizer(shards(trained, gpus))
    in_flight = 2 * (root + 2 * block) if gpus > 1 else 2 * count(module)      # one GPU: autocast's copies
    base = {"weights, float32": own(all_weights) - own(head), "value head, float32": own(head),
            "optimizer state": state}
    gradients = {"gradients, float32": own(trained)}
    keys, image_keys, peak = measure_rollout(policy, sizes.rollout_rows, sizes.rollout, args.image)
    cache = {"self KV cache": keys, "cross KV cache": image_keys,
             "prefill, growing caches, draws": peak - keys - image_keys}
    phases = {"rollout": base | {"gathered weights": 2 * count(policy)} | cache}
    for name, recompute in (("update", False), ("update, recomputing", True)):
        kept, peak = measure_update(module, sizes.micro, args.image, known=remembers(args),
                                    recompute=recompute)
        phases[name] = base | gradients | {
            "gathered weights": in_flight,                     # the block before is being reduced
            "gradients before reduction": 2 * (root + block) + 4 * block if gpus > 1 else 0,
            "activations": kept, "backward pass, log-probs": peak - kept}
    temporaries = max(step, 4 * root if gpus > 1 else 0)
    phases["optimizer step"] = base | gradients | {"temporaries of the step": temporaries}
    return sizes, phases


# ------------------------------------------------------------------------------------------------------------
# FLOPs of a PPO update

def passed(config, conversations, image, encode=True):
    """Return the quantities (harness/flops.py) of conversations, [forced, drawn, ...] tokens each."""
    tiles = {"tiles": config.vision.max_num_tiles, "before": 1} if image else {}
    return sum((flops.quantities(config, sum(c) - 1, sum(c[1::2]), encode=encode, **tiles)
                for c in conversations), Counter())


def ours(config, args, conversations):
    """Return the FLOPs of (rollout, scoring, update) as this project does them, by part."""
    module, values = make_module(config, args), sum(map(len, conversations)) // 2
    seen = passed(config, conversations, args.image)
    known = passed(config, conversations, args.image, encode=not module.policy.vision_frozen)
    return flops.of_ppo(args, module, algorithm(args)[0], seen, known, values)


def released(config, args, conversations):
    """Return the same as the released code schedules it (PAPER's sections 4 and 8): every turn is a sequence
    of its own, with all that went before and the image: prefilled to answer, passed again for log-probs and
    value, and trained on in every epoch.

    Same model code, same answers; its sixth, never judged answer and its logits of prompt tokens are left out
    in its favour.
    """
    turns = [[sum(c[:k]), c[k]] for c in conversations for k in range(1, len(c), 2)]
    module, done = make_module(config, replace(args, critic="shared")), passed(config, turns, args.image)
    rollout, _, update = flops.of_ppo(args, module, ppo.Estimator(ppo.gae), done, done, len(turns))
    return rollout, rollout, update


# ------------------------------------------------------------------------------------------------------------
# What is printed

def read_config(name, game):
    """Read a folder's config.json, or the built-in one of tiny or of Llama-3.2-11B-Vision, should no folder
    have that name."""
    folder = HERE.parent / "docs" / "tiny" / game if name == "tiny" else Path(name)
    if folder.name in BUILT_IN and not folder.is_dir():
        return Config.from_dict(LLAMA_11B)
    return Config.from_pretrained(folder)


def table(columns):
    """Write {column: {row: number}}; nothing where it is 0."""
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    lines = [["", *columns]]
    lines += [[row, *(column.get(row) for column in columns.values())] for row in rows]
    lines.append(["total", *(sum(column.values()) for column in columns.values())])
    text = lambda cell: cell if isinstance(cell, str) else f"{cell:.2f}" if cell else ""
    return "\n".join(f"  {title:<30}" + "".join(f"{text(cell):>21}" for cell in cells)
                     for title, *cells in lines)


GROWS = {               # phase: the setting that it grows with, and what grows
    "rollout": ("--rollout-batch", ("self KV cache", "cross KV cache", "prefill, growing caches, draws")),
    "update": ("--token-budget", ("activations", "backward pass, log-probs")),
    "optimizer step": ("", ())}


def advice(phases, sizes, args, room):
    """Return the flag to give, the peak with it, and what to change if that is over `room`, in the unit of
    the phases."""
    total, changes = {name: sum(phase.values()) for name, phase in phases.items()}, []
    recompute = total["update"] > room
    used = {name: name for name in GROWS} | {"update": "update, recomputing" if recompute else "update"}
    now = {"--rollout-batch": sizes.rollout_rows, "--token-budget": args.token_budget}
    for name, (setting, grows) in GROWS.items():
        over, growing = total[used[name]] - room, sum(phases[used[name]][what] for what in grows)
        fits = int(now[setting] * (1 - over / growing)) if grows else 0
        if over > 0:
            changes.append(f"about {setting} {fits}" if fits > 0 else "more GPUs (--gpus)")
    peak = max(total[name] for name in used.values())
    return " with --checkpoint-activations" * recompute, peak, list(dict.fromkeys(changes))


def show(config, args, gpus, gpu_memory):
    """Print the memory plan of a run with complete settings."""
    sizes, phases = memory(config, args, gpus)
    phases = {name: {what: size / 1e9 for what, size in phase.items()} for name, phase in phases.items()}
    flag, peak, changes = advice(phases, sizes, args, gpu_memory * (1 - HEADROOM))
    micro, verdict = sizes.micro, "does NOT fit" if changes else "fits"
    print(f"{args.task} {args.algo}, {args.model} on {gpus} GPUs: GB a rank, bfloat16 compute\n\n"
          f"{table(phases)}\n\nrollout: {sizes.rollout_rows} conversations of at most "
          f"{sum(sizes.rollout)} tokens; update: "
          f"micro-batches of at most {micro.rows} conversations{' with an image each' * args.image}, "
          f"{micro.rows * micro.length} padded tokens")
    if remembers(args):
        features, = features_of(config, make_images(config, 1), torch.bfloat16).values()
        size = sizes.images * features.nbytes / 1e9
        print(f"host: {size:.1f} GB a rank for what the frozen vision encoder makes of at most "
              f"{sizes.images} images")
    print(f"{verdict} into {gpu_memory:g} GB, less {HEADROOM:.0%} for what is not planned: at most "
          f"{peak:.1f} GB{flag}", *(f"  change: {change}" for change in changes), sep="\n")


def show_flops(config, args):
    """Print the FLOPs of one PPO update on each recorded set of the task, beside those of the released
    schedule."""
    for tune in ("all", "no-vision") if args.image else ("all",):
        for name, episodes in recorded().items():
            if name.split()[0] != args.task:
                continue
            conversations = [c for episode in episodes for c in episode]
            columns = {}
            for schedule in (ours, released):
                spent = schedule(config, replace(args, tune=tune), conversations)
                phases = zip(("rollout", "values, log-probs", "epochs"), spent)
                columns[schedule.__name__] = {phase: sum(parts.values()) / 1e15 for phase, parts in phases}
            theirs, own = (sum(columns[which].values()) for which in ("released", "ours"))
            turns = sum(map(len, conversations)) / 2 / len(conversations)
            print(f"\nPFLOPs of one PPO update, {name}, --tune {tune}: {len(episodes)} episodes, {turns:.2f} "
                  f"turns a conversation\n{table(columns)}\n  {theirs / own:.2f} times fewer than released")


def main(argv=None):
    parser = ranges.command_line("python -m study.plan", __doc__, epilog="All other options: train.py --help")
    parser.add_argument("--gpus", type=ranges.integer(1, 10**5), default=8, help="ranks (default: 8)")
    parser.add_argument("--gpu-memory", type=ranges.above(0), default=80.0, help="GB of each (default: 80)")
    own, rest = parser.parse_known_args(argv)
    try:
        args, typed = parse(rest)
        for name, unplanned in (("algo", args.algo not in ("sft", "ppo")), ("lora_rank", args.lora_rank),
                                ("resume", args.resume)):
            if unplanned:
                raise SettingError(f"{spelled(args, name)}: expected with train.py; planned are --algo sft "
                                   "and ppo, from the start and without adapters (python -m study.costs)")
        expected = f"tiny, {', '.join(BUILT_IN)} or a folder with a config.json"
        config = attempt(args, "model", expected, read_config, args.model, args.game)
        settle(args, config, typed, own.gpus)
    except SettingError as error:
        parser.error(str(error))
    show(config, args, own.gpus, own.gpu_memory)
    if args.algo == "ppo":
        show_flops(config, args)


if __name__ == "__main__":
    command(main)
