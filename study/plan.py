"""Estimate what a run needs before it starts: memory per rank.

    python -m study.plan --gpus 8 --task gp-vl --algo ppo --model Llama-3.2-11B-Vision

It needs no weights and no GPU: the model's own code runs on PyTorch's meta device, where a tensor has a shape
and no values, under a mode that adds up the bytes of what is alive. Only what FSDP does around the layers is
worked out by hand. GB are 10^9 bytes.
"""
import json
import math
import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import model
import ppo
from distributed import shard
from envs import TASKS
from harness import ranges, tiny
from harness.check import attempt, settle
from harness.load import choose_what_learns, halve_frozen
from harness.settings import parse, spelled
from harness.terminal import command
from kernels import logits
from llama.batches import collate
from llama.cache import KVCache
from llama.config import Config
from llama.frozen import remember
from llama.generate import draw_tokens
from llama.images import Images
from llama.processor import Processor
from rollout import Conversation
from study.tables import markdown

aten = torch.ops.aten
HERE = Path(__file__).resolve().parent
HEADROOM = 0.1          # share of a GPU for what no plan sees: CUDA's context, NCCL's buffers, fragmentation
LLAMA_11B = Config.from_pretrained(HERE / "llama-11b")        # as far as config.json is read here


# ------------------------------------------------------------------------------------------------------------
# A device without memory

class Bytes(TorchDispatchMode):
    """Runs code on the meta device and adds up the bytes that are `live`, and their `peak`: of all tensors
    made inside, views once.

    Masks and positions decide what the model does next, so integer and bool tensors keep their values: they
    stay on the CPU when the code believes them on the device.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        known, kwargs = storages(args), kwargs or {}
        if any(storage.device.type == "meta" for storage in known.values()):
            if op.overloadpacket in (aten.index, aten.index_put_):
                # The meta device could not know how many ones a mask has: their places do.
                places = [x.nonzero().unbind(1) if x is not None and x.dtype == torch.bool else [x]
                          for x in args[1]]
                args = (args[0], [*chain(*places)], *args[2:])
            out = op(*tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args), **kwargs)
        else:
            out = op(*args, **kwargs)
            if isinstance(out, torch.Tensor) and out.is_meta and not out.is_floating_point():
                out = op(*args, **kwargs | {"device": "cpu"})
        for name, storage in storages(out).items():
            if name not in known:                              # else a view of an argument, or the argument
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)


def storages(values):
    """Return the memory of the tensors among an operator's arguments or results, each piece once."""
    found = [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
    return {storage._cdata: storage for storage in found}


def fused_attention(q, k, v, visible=None):
    """Keep what our kernel keeps for the backward pass: its inputs, its result and a number per query and
    head. It needs no mask."""
    return aten._scaled_dot_product_flash_attention(q.transpose(1, 2), k, v, 0.0, False)[0].transpose(1, 2)


def fused_norm(norm, x):
    """Keep the input and a number or two per row."""
    return F.layer_norm(x, norm.shape, norm.weight, None, norm.eps)


class FusedLogprobs(torch.autograd.Function):
    """The products of kernels/logprob.py in the backward pass, in slabs of the vocabulary of WORKSPACE bytes.
    Those of the forward pass stay on the chip."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return tuple(hidden.new_empty(2, len(hidden), dtype=torch.float32))

    @staticmethod
    def backward(ctx, *upstream):
        hidden, weight = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden, dtype=torch.float32), torch.empty_like(weight)
        for slab in weight.split(logits.WORKSPACE // hidden[:, 0].nbytes):
            dlogits = hidden @ slab.T
            dlogits @ slab, dlogits.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight


def fused_logprobs(hidden, weight, targets, temperature):
    """Do what token_logprobs does, as far as memory goes."""
    asked = (targets >= 0).nonzero()[:, 0]
    found = FusedLogprobs.apply(hidden[asked], weight)
    return [x.new_zeros(len(targets)).index_copy(0, asked.to(x.device), x) for x in found]


STAND_INS = [(model, "token_logprobs", fused_logprobs), (model, "attention", fused_attention),
             (model.RMSNorm, "__call__", fused_norm)]


@contextmanager
def as_kernels():
    """While open, the model keeps what kernels keep; the meta device would go the long ways of a CPU."""
    with ExitStack() as stack:
        for stand_in in STAND_INS:
            stack.enter_context(mock.patch.object(*stand_in))
        yield


# ------------------------------------------------------------------------------------------------------------
# What is measured on it

def make_module(config, args, dtype=torch.bfloat16):
    """Make what is trained, without memory. The value head is float32, as it computes."""
    with torch.device("meta"):
        llama = model.Llama(config).to(dtype)
        choose_what_learns(llama, args)
        return ppo.ActorCritic(llama, args.critic) if args.algo == "ppo" else llama


def blank(config, counts, image):
    """Make a conversation of [forced, drawn, forced, ...] tokens, with an image whose tiles are all real."""
    ids, images, vision = [0] * sum(counts), None, config.vision
    if image:
        ids[1] = config.image_token_id
        side, tiles = vision.image_size, torch.ones(1, vision.max_num_tiles, dtype=torch.int64)
        pixels = torch.empty(vision.max_num_tiles, vision.num_channels, side, side, device="meta")
        images = Images([pixels], tiles[0, :1], tiles, torch.tensor([0]))
    return Conversation(ids, [k % 2 > 0 for k, n in enumerate(counts) for _ in range(n)], images)


def blank_batch(config, rows, length, targets=0, image=False):
    """Make a Batch of rows of one conversation, of which the last `targets` tokens are scored."""
    processor = SimpleNamespace(pad_id=0, cut=lambda image: image)
    processor.images = partial(Processor.images, processor)
    return collate(processor, [[blank(config, [length + 1 - targets, targets], image)] for _ in range(rows)])


def measure_update(module, batch):
    """Pass a micro-batch forward and backward -> {what: bytes}, without weights and gradients, which are
    there from the one before, and without what llama/frozen.py remembers of its images."""
    policy, features = getattr(module, "policy", module), None
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    if batch.images and policy is not module and policy.vision_frozen:         # since the rollout
        vision = policy.config.vision
        known = torch.empty(vision.max_num_tiles * vision.num_patches, vision.output_size,
                            dtype=policy.lm_head.weight.dtype, device="meta")
        features = dict.fromkeys(batch.images.pixel_values, known)
    with Bytes() as memory, as_kernels(), remember(module, features):
        loss = micro_loss(module, batch)
        kept = memory.live
        loss.backward()
    return {"activations": kept, "backward pass, log-probs": memory.peak - kept}


def micro_loss(module, batch):
    """Compute a loss that needs what the real ones need (ppo.batch_loss, sft.update)."""
    if not isinstance(module, ppo.ActorCritic):
        return module(**batch.inputs(), targets=batch.targets).logprobs.sum()
    places = torch.arange(len(batch.input_ids))                # of values: any, one per conversation
    return sum(x.sum() for x in module(batch, ppo.Turns(places, *[None] * 8), 1.0))


def measure_rollout(llama, rows, lengths, image):
    """Play `rows` conversations in lockstep, as rollout.rollout does -> {what: bytes}, without weights.
    lengths: [forced, drawn, forced, drawn, ...] tokens."""
    config = llama.config
    prompts = [blank_batch(config, rows, forced, image=image and not turn)     # their tiles wait on the host
               for turn, forced in enumerate(lengths[::2])]
    with torch.inference_mode(), Bytes() as memory, as_kernels():
        cache = KVCache(config, rows, "meta", llama.embed_tokens.weight.dtype)
        for prompt, forced, drawn in zip(prompts, lengths[::2], lengths[1::2]):
            cache.reserve(int(cache.lengths.max()) + forced + max(drawn, forced))      # as generate does
            llama(**prompt.inputs(), cache=cache, logits="last")
            cache.lengths += drawn - 1                         # all steps but the last, which is the longest
            last = llama(prompt.input_ids[:, -1:], cache=cache, logits="last").logits
            draw_tokens(last, torch.empty(rows, device="meta"), 1.0)
        keys, image_keys = (sum(layer.nbytes for layer in layers) for layers in (cache.kv, cache.cross))
    return {"self KV cache": keys, "cross KV cache": image_keys,
            "prefill, growing caches, draws": memory.peak - keys - image_keys}


# ------------------------------------------------------------------------------------------------------------
# Memory of a rank

@dataclass
class Sizes:
    """The largest batches of a rank, by the settings and by the recorded lengths of the task."""
    rollout_rows: int
    rollout: list           # [forced, drawn, ...] tokens: the longest prompt and replies, and answers of
                            # --max-new-tokens
    rows: int               # of a micro-batch: as many conversations, so images, as the token budget takes of
                            # the shortest
    length: int             # to which they are padded
    targets: int            # tokens that are scored of each


def sizes_of(config, args, gpus, vision_frozen):
    """Take the lengths from episodes.json: {task: episodes}, token counts of real ones. An episode is a list
    of conversations, a conversation [forced, drawn, forced, ...].

    The tiny model played them at temperature 0.2 on its training rule (gp-vl: its init; the others: its
    foundation). Counted with Llama 3's own tokenizer (npm's llama3-tokenizer-js 1.2.0).
    """
    recorded, new = json.loads((HERE / "episodes.json").read_text(encoding="utf-8")), args.max_new_tokens
    episodes = recorded[args.task]
    conversations = sum(episodes, [])
    prompts, shortest = [c[0] for c in conversations], min(c[0] + c[1] for c in conversations)
    reply = max((n for c in conversations for n in c[2::2]), default=0)
    rollout = [max(prompts), *[new, reply] * (args.attempts - 1), new]
    played = args.hands * args.samples if args.algo == "ppo" else args.batch_size * (args.sft_data == "own")
    if played:
        longest = sum(rollout)
        share = math.ceil(played / gpus) * max(map(len, episodes)) / args.minibatches     # of a step
    else:
        longest = max(sum(c if args.mistakes else c[:2]) for c in conversations)
        share = args.batch_size / gpus
    beside = config.image_tokens(vision_frozen) if args.image else 0
    rows = max(1, min(args.token_budget // (shortest + beside), math.ceil(share)))
    length = max(shortest, min(args.token_budget // rows - beside, longest))
    in_rollout = min(args.rollout_batch, math.ceil(max(1, played, args.eval_hands) / gpus))
    return Sizes(in_rollout, rollout, rows, length, length - min(prompts))


def slices(parameters, gpus):
    """Count the bytes of a rank's part: FSDP cuts the first dimension, rounded up."""
    return sum(p.element_size() * -(-len(p) // gpus) * p[0].numel() for p in parameters)


def memory(config, args, gpus):
    """Return the sizes and what the fullest rank holds, {phase: {what: bytes}}."""
    module, whole = make_module(config, args), make_module(config, args, torch.float32)
    policy, kept = (getattr(each, "policy", each) for each in (module, whole))
    sizes = sizes_of(config, args, gpus, policy.vision_frozen)
    gpus = 1 if args.lora_rank or args.shard == "off" else gpus     # adapters come beside whole weights
    if gpus == 1:
        halve_frozen(whole)
    all_weights = list(whole.parameters())
    count = lambda part: sum(p.numel() for p in part.parameters() if p.dtype == torch.float32)
    in_blocks = list(map(count, shard.blocks(whole)))
    block, root, several = max(in_blocks), count(whole) - sum(in_blocks), gpus > 1
    learnt = slices([p for p in all_weights if p.requires_grad], gpus)
    base = {"weights": slices(all_weights, gpus), "optimizer state": 2 * learnt}       # two moments
    learning = base | {"gradients, float32": learnt}
    update = learning | {                                      # one GPU: autocast's copies
        "gathered weights": 2 * (root + 2 * block) if several else 2 * count(whole),   # one is being reduced
        # a block's in bfloat16 and float32
        "gradients before reduction": several * (2 * root + 6 * block)}
    batch = blank_batch(config, sizes.rows, sizes.length, sizes.targets, args.image)
    rollout = measure_rollout(policy, sizes.rollout_rows, sizes.rollout, args.image)
    phases = {"rollout": base | {"gathered weights": 2 * count(kept)} | rollout,
              "update": update | measure_update(module, batch)}
    shard.checkpoint_activations(module)
    phases["update, recomputing"] = update | measure_update(module, batch)
    # Adam divides one moment by the root of the other, for all weights at once.
    phases["optimizer step"] = learning | {"temporaries of the step": max(learnt, several * 4 * root)}
    return sizes, phases


# ------------------------------------------------------------------------------------------------------------
# What is printed

def read_config(name, task):
    """Read a folder's config.json, or the built-in one of tiny or of Llama-3.2-11B-Vision and -Instruct,
    should no folder have that name."""
    folder = tiny.FOUNDATIONS / task if name == "tiny" else Path(name)
    built_in = folder.name.removesuffix("-Instruct") == "Llama-3.2-11B-Vision" and not folder.is_dir()
    return LLAMA_11B if built_in else Config.from_pretrained(folder)


def memory_table(phases):
    """Lay out GB per phase; nothing where it is 0."""
    held = [phase | {"total": sum(phase.values())} for phase in phases.values()]
    rows = [[what, *(f"{phase[what] / 1e9:.2f}" if phase.get(what) else "" for phase in held)]
            for what in [*dict.fromkeys(chain(*phases.values())), "total"]]
    return markdown(["GB a rank", *phases], rows)


def show(args, gpus, gpu_memory, sizes, phases):
    """Print what each phase of a run takes, the peak, and the flag that this needs."""
    room, total = gpu_memory * (1 - HEADROOM), {name: sum(phase.values()) for name, phase in phases.items()}
    recompute = total["update"] > 1e9 * room
    del total["update" if recompute else "update, recomputing"]
    most = max(total.values()) / 1e9
    print(f"{args.task} {args.algo}, {args.model} on {gpus} GPUs, bfloat16 compute\n\n"
          f"{memory_table(phases)}\n\n"
          f"rollout: {sizes.rollout_rows} conversations (--rollout-batch) of at most {sum(sizes.rollout)} "
          f"tokens; update: micro-batches of {sizes.rows * sizes.length} padded tokens (--token-budget), "
          f"at most {sizes.rows} conversations{' with an image each' * args.image}\n"
          f"{'fits' if most <= room else 'does NOT fit'} into {gpu_memory:g} GB, less {HEADROOM:.0%} for "
          f"what is not planned: at most {most:.1f} GB{' with --checkpoint-activations' * recompute}")


def main(argv=None):
    parser = ranges.command_line("python -m study.plan", __doc__, epilog="All other options: train.py --help")
    parser.add_argument("--gpus", type=ranges.integer(1, 10**5), default=8, help="ranks (default: 8)")
    parser.add_argument("--gpu-memory", type=ranges.above(0), default=80.0, help="GB of each (default: 80)")
    own, rest = parser.parse_known_args(argv)
    try:
        args, typed = parse(rest)
        for name, known in (("resume", [False]), ("algo", ["sft", "ppo"]), ("task", TASKS)):
            if getattr(args, name) not in known:
                raise ranges.SettingError(f"{spelled(args, name)}: works only with train.py; planned are SFT "
                                          "and PPO on the built-in games, from the start")
        expected = "tiny, Llama-3.2-11B-Vision, the same with -Instruct, or a folder with a config.json"
        config = attempt(args, "model", expected, read_config, args.model, args.task)
        settle(args, config, typed, own.gpus)
    except ranges.SettingError as error:
        parser.error(str(error))
    show(args, own.gpus, own.gpu_memory, *memory(config, args, own.gpus))


if __name__ == "__main__":
    command(main)
