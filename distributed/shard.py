"""One model over several processes: each keeps a slice of every weight (FSDP2; ZeRO-3, arXiv 1910.02054) and of its gradient and moments.

    torchrun --nproc-per-node 8 train.py --task gp-vl --algo ppo --model Llama-3.2-11B-Vision-Instruct

A block gathers its weights before it computes, frees them afterwards, and its gradients are summed slice by slice. So each forward and
each backward pass is a collective: all ranks must make the same number of them, in the same order, with or without images. `Processes.lockstep`
sees to that in training. In a rollout, where ranks finish at their own time, the weights are gathered once (`gathered`), or ranks go in lockstep.
"""

import contextlib
import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from distributed.checkpoint import is_checkpoint, load_policy, rows
from distributed.processes import gather
from llama.folders import find_tensors, read_weights
from llama.images import Images
from model import CrossLayer, Llama, SelfLayer, VisionLayer

BLOCKS = (SelfLayer, CrossLayer, VisionLayer)


# ---------------------------------------------------------------------------------------------------------------------
# Cutting a model into slices

def shard(module, folder, device, world):
    """Shard a Llama, or an ActorCritic around one or two; each Llama lies on the meta device and is filled from `folder` (see `fill`).

    The master weights are float32. On CUDA a Llama computes in bfloat16 and its gradients are summed in float32; the value head is
    float32 throughout. Each of them is a root of its own, because rollouts run the policy without its critic.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")      # which nobody changes in place
    mesh = init_device_mesh(device.type, (world,))
    compute = torch.bfloat16 if device.type == "cuda" else None
    for llama in [part for part in module.modules() if isinstance(part, Llama)]:
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=compute and torch.float32, cast_forward_inputs=False)
        for block in [part for part in llama.modules() if isinstance(part, BLOCKS)]:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(llama, mesh=mesh, mp_policy=policy)
        fill(llama, folder, device)
    if hasattr(module, "value_head"):
        fully_shard(module.value_head.to(device), mesh=mesh)
    for unit in units(module):
        unit.set_gradient_divide_factor(1.0)                           # a sum: the losses are divided by global counts already
        unit.set_force_sum_reduction_for_comms(True)                   # gloo knows no other


def units(module):
    """The modules whose weights are gathered together."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def fill(llama, folder, device):
    """Give a Llama on the meta device its memory, and the weights of a Hugging Face folder or a checkpoint of
    training. folder None: they come later."""
    if folder and not is_checkpoint(folder):
        find_tensors(folder, llama)             # refuse it before memory is taken
    llama.to_empty(device=device)
    if llama.config.tie_word_embeddings:
        llama.lm_head.weight = llama.embed_tokens.weight               # to_empty makes two of a tied weight
    if folder and is_checkpoint(folder):
        load_policy(folder, llama)
    elif folder:
        read_slices(llama, folder)


@torch.no_grad()
def read_slices(llama, folder):
    """Fill a sharded Llama from a Hugging Face folder; a rank reads its own rows only. Errors are those of
    Llama.from_pretrained, on all ranks: NaN in the rows of one, the others do not see."""
    weights, problems = dict(llama.named_parameters()), []
    try:
        for name, tensor in read_weights(folder, llama, rows):
            weights[name].to_local().copy_(tensor)
    except ValueError as error:
        problems = [str(error)]
    if problems := gather(problems):
        raise ValueError(problems[0])


def checkpoint_activations(module):
    """Keep a block's input only and compute the rest again in the backward pass: a third more compute for a fraction of the memory."""
    def cheaper(forward):
        return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)

    for block in module.modules():
        if isinstance(block, BLOCKS):
            block.forward = cheaper(block.forward)


# ---------------------------------------------------------------------------------------------------------------------
# Training

def clip(parameters, max_norm):
    """Clip the gradients of whole or of sharded parameters to a global norm, which is returned: the same on all ranks."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# Rollout

def for_rollout(model, agree, lockstep):
    """A context with what `generate` can run: the model itself if it is whole, else its weights gathered, or its stand-in in lockstep."""
    if not units(model):
        return contextlib.nullcontext(model)
    return in_lockstep(model, agree) if lockstep else gathered(model)


@contextlib.contextmanager
def gathered(model):
    """All weights on every rank, as a plain Llama without hooks, so that nobody waits for anybody. They are gone when this ends."""
    for unit in units(model):
        unit.unshard()
    with torch.device("meta"):
        plain = Llama(model.config)
    plain.load_state_dict({name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}, assign=True)
    try:
        yield plain
    finally:
        for unit in units(model):
            unit.reshard()


@contextlib.contextmanager
def in_lockstep(model, agree):
    """Weights stay sharded, but for those outside of the blocks. A rank that leaves early makes empty steps until all have left."""
    for unit in units(model):
        unit.unshard()                         # makes its buffers here: made in inference mode, autograd would refuse them later
        unit.reshard()
    model.unshard()                            # the embedding's dtype is then that of the computation, as `generate` expects
    stand_in = Lockstep(model, agree)
    try:
        yield stand_in
        with torch.no_grad():
            stand_in.follow(0)
    finally:
        model.reshard()


class Lockstep:
    """Called like the model. Before each pass all ranks agree on its kind: 2 with images (the vision encoder is gathered, too),
    1 without, 0 when all are done. A rank that wants the lesser kind makes an empty pass of the greater one, and asks again."""

    def __init__(self, model, agree):
        self.model, self.agree, self.config, self.embed_tokens = model, agree, model.config, model.embed_tokens

    def __call__(self, input_ids, *, images=None, **kwargs):
        self.follow(1 if images is None else 2)
        return self.model(input_ids, images=images, **kwargs)

    def follow(self, kind):
        """Make empty passes until it is the turn of `kind`."""
        while (now := self.agree(kind)) != kind:
            images, token = (None, 0) if now == 1 else (blank_image(self.config.vision), self.config.image_token_id)
            self.model(torch.tensor([[token]], device=self.embed_tokens.weight.device), images=images)


def blank_image(vision):
    """Images with one of a single black tile."""
    tiles, size = vision.max_num_tiles, vision.image_size
    return Images(torch.zeros(1, tiles, vision.num_channels, size, size), torch.ones(1, dtype=torch.int64),
                  (torch.arange(tiles) < 1).long()[None], torch.zeros(1, dtype=torch.int64))
