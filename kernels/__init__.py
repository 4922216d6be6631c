"""Triton kernels and their plain-torch twins. This file chooses: kernels on a GPU, twins elsewhere.

    KERNELS=torch python train.py ...                 # twins everywhere
    KERNELS=triton TRITON_INTERPRET=1 python ...      # kernels on a CPU, for tests: 1000 times slower

A kernel is launched as many *programs*, which run the same code, each on its own part of the data.
"""
import os
import warnings
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:            # macOS and Windows have no triton: this is enough of it to define a kernel
    triton, tl = SimpleNamespace(jit=lambda function: function, missing=True), SimpleNamespace(constexpr=None)

constexpr = tl.constexpr       # what a kernel is compiled for: each value makes a kernel of its own


def use_triton(tensor):
    """Tell whether kernels, rather than twins, compute on this tensor."""
    wanted = os.environ.get("KERNELS", "triton" if tensor.is_cuda else "torch")
    if wanted not in ("triton", "torch"):
        raise ValueError(f"KERNELS must be triton or torch, not {wanted!r}")
    return wanted == "triton" and has_triton()


@cache
def has_triton():
    """Tell whether triton is installed; say once what it means if not."""
    if missing := hasattr(triton, "missing"):
        warnings.warn(
            "triton is not installed: attention and log-probs run on their slower plain-torch twins")
    return not missing


@cache
def chip(device):
    """Return the architecture and the number of multiprocessors of a GPU, on which tiles and splits depend.

    ("cpu", 1) where kernels are interpreted.
    """
    if device.type != "cuda":
        return "cpu", 1
    found = torch.cuda.get_device_properties(device)
    name = found.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"
    return name, found.multi_processor_count


def product_type(tensor):
    """Return the type of matrix products with this tensor: autocast's if it is on, else its own."""
    kind = tensor.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else tensor.dtype


def without_autocast(tensor):
    """Return a context for products whose types are chosen already."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
