"""The frozen policy that a KL penalty (or an SFT loss) is measured from, without a second copy of it on the device.

    torchrun train.py --task gp-l --algo ppo --kl-coef 0.05
    torchrun train.py --task gp-l --algo sft --sft-loss iw-sft

A reference is a function without arguments that returns a context; inside of it the policy computes as the reference does. `initial` makes
one that swaps the weights that are trained. With adapters, `lora.disabled` is one that costs nothing at all.
"""

from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def initial(policy):
    """The policy as it is now. The weights that are trained (of sharded ones: this rank's slices) are kept in host memory, and while they
    are swapped in, the trained ones are there, too."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    remembered = on_host(parameters)

    @contextmanager
    def swapped_in():
        trained = on_host(parameters)
        write(policy, parameters, remembered)
        try:
            yield
        finally:
            write(policy, parameters, trained)

    return swapped_in


def local(parameter):
    """What this rank holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def on_host(parameters):
    return [local(parameter.detach()).to("cpu", copy=True) for parameter in parameters]


@torch.no_grad()
def write(policy, parameters, tensors):
    """Fill the parameters in place, and forget what was computed from their old content: gathered weights, autocast's copies."""
    for parameter, tensor in zip(parameters, tensors):
        local(parameter).copy_(tensor)
    for unit in policy.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    torch.clear_autocast_cache()
