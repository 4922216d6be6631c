"""LoRA (Hu et al. 2021, arXiv 2106.09685): the weights stay as they are, and what is learnt beside each is a
product of two thin matrices.

    torchrun train.py --task gp-l --algo ppo --lora-rank 16    # --tune says where
    python -m study.plan --task gp-l --algo sft --lora-rank 16 --model Llama-3.2-11B-Vision    # its memory

A linear layer with weight W (out, in) becomes

    y = W x + (alpha / r) B A x,        A (r, in),  B (out, r),  r much smaller than in and out

W is frozen. A starts with normal draws and B at zero, so the model starts as what it was. As d loss / d A =
(alpha / r) B^T (d loss / d W) and d loss / d B = (alpha / r) (d loss / d W) A^T, the first step moves B
alone. The factor alpha / r avoids tuning the learning rate again when r changes (section 4.1). The presets'
learning rates are meant for training all weights.

What it saves. A weight that learns needs itself, its gradient and Adam's two moments, 16 bytes in float32; a
frozen one of a linear layer needs its own 2, in bfloat16 (harness/load.py). Planned for one GPU and
Llama-3.2-11B-Vision, r = 16, adapters on every linear layer but the head:

                              learnt    GB: all weights    gradients    moments
    without           10,670,220,835               42.7         42.7       85.4
    all                   67,362,816               22.8          0.3        0.5
    attention             23,592,960               22.6          0.1        0.2
    mlp                   43,581,440               22.7          0.2        0.3

The matrix products for gradients of frozen weights are saved, too; `counted_tflops` in the log takes that
into account, `tflops` (6 N per token) does not. The activations that the backward pass needs still take
memory; for these there is --checkpoint-activations.

What it does not do. A rollout computes W x and B A x apart, as training does, so that tokens are drawn and
scored with the same numbers. (W + B A) x would be faster, but differ in rounding. Only the exported weights
are merged. And the model before training is still there, without a second copy: `disabled` switches the
adapters off, which makes a frozen reference for a KL penalty.
"""
import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from harness.ranges import above, arg, integer, one_of, several

# What --lora-modules can name: these groups, and their members. The head is not among them: its log-probs are
# computed from its weight.
GROUPS = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
          "mlp": ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")}
GROUPS["all"] = GROUPS["attention"] + GROUPS["mlp"] + ("multi_modal_projector",)


@dataclass
class LoraSettings:
    """Settings of adapters."""
    lora_rank: int = arg(0, integer(0, 10**5),
                         "train adapters of this rank beside frozen weights; 0: the weights themselves",
                         "--algo sft or ppo")
    lora_alpha: float = arg(16.0, above(0), "an adapter's update counts alpha / rank times",
                            "--lora-rank above 0")
    lora_modules: str = arg("all", several(one_of((*GROUPS, *GROUPS["all"]))),
                            "which linear layers that --tune leaves get adapters: attention, mlp, all, or "
                            "names as q_proj, by commas", "--lora-rank above 0")


class Adapted(nn.Module):
    """A linear layer with its low-rank update beside it; called directly, as model.Linear."""

    def __init__(self, base, rank, alpha, generator):
        super().__init__()
        out, inputs = base.weight.shape
        self.base, self.scale, self.on = base, alpha / rank, True
        # so that A x is as large as x; the paper leaves it open
        A = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        self.lora_A = nn.Parameter(A.to(base.weight))
        self.lora_B = nn.Parameter(base.weight.new_zeros(out, rank))

    def __call__(self, x):
        y = self.base(x)
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B) if self.on else y


def adapt(llama, modules, rank, alpha, seed=0):
    """Freeze a Llama and put adapters on those of its linear layers that `modules` names and
    `tune.freeze` left to learn.

    modules: names of layers or of GROUPS, joined by commas. A is drawn from `seed`, the same on every rank
    and device. ValueError where nothing is left to adapt.
    """
    wanted = {name for group in modules.split(",") for name in GROUPS.get(group, [group])}
    found = [(parent, name, child) for parent in llama.modules() for name, child in parent.named_children()
             if name in wanted and child.weight.requires_grad]
    if not found:
        raise ValueError(f"--lora-modules {modules}: none of these layers learns")
    llama.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent, name, child in found:
        setattr(parent, name, Adapted(child, rank, alpha, generator))


@torch.no_grad()
def merge(llama):
    """Put W + (alpha / r) B A in place of each adapted W: an ordinary Llama again, whose update cannot be
    taken out exactly any more."""
    for parent in list(llama.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Adapted):
                child.base.weight += child.scale * child.lora_B @ child.lora_A
                setattr(parent, name, child.base)


@contextlib.contextmanager
def disabled(module):
    """Inside, a Llama (or what holds one) computes what it did before training."""
    adapted = [part for part in module.modules() if isinstance(part, Adapted) and part.on]
    for part in adapted:
        part.on = False
    try:
        yield
    finally:
        for part in adapted:
            part.on = True
