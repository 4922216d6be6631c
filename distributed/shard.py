"""One model over several processes: each keeps a slice of every weight (FSDP2; ZeRO-3, arXiv 1910.02054), of
its gradient and of its moments.

    torchrun --nproc-per-node 8 train.py --task gp-vl --algo ppo --model Llama-3.2-11B-Vision-Instruct

A block gathers its weights before it computes, frees them afterwards, and its gradients are summed slice by
slice. So each forward and each backward pass is a collective: all ranks must make the same number of them, in
the same order (`Processes.lockstep` sees to that in training), all with images or all without. In a
rollout, where ranks finish at their own time, the weights are gathered once (`for_rollout`).
"""

import contextlib
import functools
import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from distributed.checkpoint import is_checkpoint, load_policy, rows
from llama.folders import local, read_weights
from model import CrossLayer, Llama, SelfLayer, VisionLayer


# ------------------------------------------------------------------------------------------------------------
# Cutting a model into slices

def shard(module, folder, device, world):
    """Shard a Llama, or an ActorCritic around one or two; each Llama lies on the meta device and is filled
    from `folder` (see `fill`).

    The master weights are float32. On CUDA a Llama computes in bfloat16 and its gradients are summed in
    float32; the value head is float32 throughout. Each of them is a root of its own, because rollouts run the
    policy without its critic.
    """
    # A view that nobody changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (world,))
    compute = torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=compute and torch.float32,
                                  cast_forward_inputs=False)
    for llama in [part for part in module.modules() if isinstance(part, Llama)]:
        for part in [*blocks(llama), llama]:
            fully_shard(part, mesh=mesh, mp_policy=policy)
        fill(llama, folder, device)
    if hasattr(module, "value_head"):
        fully_shard(module.value_head.to(device), mesh=mesh)
    for unit in units(module):
        unit.set_gradient_divide_factor(1.0)           # a sum: losses are divided by global counts already
        unit.set_force_sum_reduction_for_comms(True)           # gloo knows no other


def blocks(module):
    return [part for part in module.modules() if isinstance(part, (SelfLayer, CrossLayer, VisionLayer))]


def units(module):
    """Return the modules whose weights are gathered together."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def fill(llama, folder, device):
    """Give a Llama on the meta device its memory, and the weights of a Hugging Face folder or a checkpoint of
    training. folder None: they come later."""
    llama.to_empty(device=device)
    if llama.config.tie_word_embeddings:
        llama.lm_head.weight = llama.embed_tokens.weight       # to_empty makes two of a tied weight
    if folder and is_checkpoint(folder):
        load_policy(folder, llama)
    elif folder:
        read_slices(llama, folder)


@torch.no_grad()
def read_slices(llama, folder):
    """Fill a Llama, sharded or whole, from a Hugging Face folder; a rank reads its own rows only. Errors are
    those of Llama.from_pretrained."""
    weights = dict(llama.named_parameters())
    for name, tensor in read_weights(folder, llama, rows):
        local(weights[name]).copy_(tensor)


def checkpoint_activations(module):
    """Keep a block's input only and compute the rest again in the backward pass: a third more compute for a
    fraction of the memory."""
    def cheaper(forward):
        again = functools.partial(checkpoint, forward, use_reentrant=False)
        return lambda *inputs: (again if torch.is_grad_enabled() else forward)(*inputs)

    for block in blocks(module):
        block.forward = cheaper(block.forward)


# ------------------------------------------------------------------------------------------------------------
# Training and rollout

def clip_gradients(parameters, max_norm):
    """Clip the gradients of whole or of sharded parameters to a global norm, and return that: the same on all
    ranks."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@contextlib.contextmanager
def for_rollout(model):
    """Give what `generate` can run: the model itself if it is whole; else all weights on every rank, as a
    plain Llama without hooks, so that nobody waits for anybody. They are gone when this ends."""
    if not units(model):
        yield model
        return
    for unit in units(model):
        unit.unshard()
    with torch.device("meta"):
        plain = Llama(model.config)
    weights = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    plain.load_state_dict(weights, assign=True)
    try:
        yield plain
    finally:
        for unit in units(model):
            unit.reshard()
