"""Make the cases that `python -m benchmarks.kernels` measures, with all ways to compute each.

A case is made for one dtype. It holds sets of inputs, the FLOPs and bytes that the task needs, and functions
that compute it: ours, and those that one would use without our kernels. A function that cannot run here (this
PyTorch lacks it, or has no kernel for the case) raises its own error when it is called.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import DEVICE, GPU
from kernels.attention import attention
from kernels.logprob import token_logprobs
from kernels.visible import Visible


def table(text):
    """Read lines of a name and numbers -> {name: [numbers]}."""
    return {name: [*map(int, sizes)] for name, *sizes in map(str.split, text.strip().splitlines())}


# Log-probs: tokens, channels, vocabulary.
# Attention: B, T, S, H, K, D; the first word of the name says who sees whom, see `see_whom`.
# The encoder pads the 1601 patches of a tile of the image to 1608.
LARGE = table("""
    logprob          8192  4096 128256
    logprob-entropy  8192  4096 128256
    causal-2k           4  2048  2048  32   8 128
    causal-4k           2  4096  4096  32   8 128
    causal-narrow       4  2048  2048  32   8  64
    ragged              8  2048  2048  32   8 128
    resumed             8   512  2048  32   8 128
    cross               4  1024  6404  32   8 128
    vision              4  6432  6432  16  16  80
    decode-1            1     1  2048  32   8 128
    decode-64          64     1  2560  32   8 128
""")
SMALL = table("""
    logprob           512   256  16384
    logprob-entropy   512   256  16384
    causal              2   512   512   8   2  64
    ragged              4   256   256   8   2  64
    resumed             4    64   512   8   2  64
    cross               4    64   260   8   2  64
    vision              4   288   288   4   4  80
    decode-1            1     1   512   8   2  64
    decode-64          64     1   512   8   2  64
""")
SIZES = LARGE if GPU else SMALL


@dataclass
class Case:
    name: str
    part: str          # what is timed: forward, backward, or both
    inputs: tuple      # arguments, and the gradient of the output or None for a loss
    ways: dict         # implementation -> function of the arguments; first the naive one
    exact: object      # the naive function in little memory, for arguments in float64
    flops: int
    bytes: int
    real: object = ...     # (B, T) queries that are no padding: their outputs count

    def prepare(self, way, args, upstream):
        """Do what comes before the timed part. Return that, a function -> (output, *gradients of the
        arguments that want one)."""
        made = way(*args) if self.part == "backward" else None

        def timed():
            if self.part == "forward":
                with torch.no_grad():
                    return (way(*args),)
            out = way(*args) if made is None else made
            return out.detach(), *torch.autograd.grad(out, [x for x in args if x.requires_grad], upstream)

        return timed


# ------------------------------------------------------------------------------------------------------------
# Log-probs
#
# g and e are the gradients of log-prob and entropy of each row, as in PPO. Without them, the loss is minus
# the sum of log-probs, which every rival can do.


def our_loss(hidden, weight, targets, g=None, e=None):
    logprobs, entropy, _ = token_logprobs(hidden, weight, targets)
    return -logprobs.sum() if e is None else (logprobs * g + entropy * e).sum()


def naive_loss(hidden, weight, targets, g=None, e=None):
    """Compute the loss from all logits, in float32 or better."""
    logits = hidden @ weight.T                                                 # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if e is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    logp = logits.log_softmax(-1)
    return (logp.gather(1, targets[:, None])[:, 0] * g - (logp.exp() * logp).sum(-1) * e).sum()


def exact_loss(hidden, weight, *others):
    """Compute the naive loss with the logits of few rows at a time."""
    rows = zip(*(x.split(512) for x in (hidden, *others)))
    return sum(checkpoint(naive_loss, x, weight, *its, use_reentrant=False) for x, *its in rows)


def torch_chunks(hidden, weight, targets):
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum",
                                  options=torch.nn.LinearCrossEntropyOptions())


def logprob_cases(name, sizes, dtype):
    """Make the case of log-probs.

    FLOPs: logits and the gradients of hidden and weight are 2 N V D each. (Ours makes the logits twice,
    which does not count.) Bytes: hidden and weight are read, their gradients written.
    """
    (N, D, V), entropy = sizes, name == "logprob-entropy"
    random = dict(generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    targets = torch.randint(0, V, (N,), **random)
    weight = torch.randn(V, D, **random) * D**-0.5
    hidden = torch.randn(N, D, **random)
    if not entropy:
        # The target's p is 1/2 or so, as a trained model's. Of such sharp rows, a naive entropy's gradients
        # would be off by 6 % in bfloat16.
        hidden += math.log(V) * weight[targets]
    learnt = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    inputs = (*learnt, targets, *torch.randn(2 * entropy, N, **random)), None
    ways = {"naive": naive_loss, "ours": our_loss}
    if not entropy:
        ways["torch chunks"] = torch_chunks
    yield Case(name, "both", inputs, ways, exact_loss, 6 * N * V * D, 2 * (N + V) * D * dtype.itemsize)


# ------------------------------------------------------------------------------------------------------------
# Attention


def see_whom(kind, B, T, S):
    """Return the arguments of `Visible` for a kind of case. Rows differ, as conversations of a batch do."""
    ends = {"ragged": (T, T // 8), "resumed": (S - T, 0), "decode": (S - 1, S // 2)}.get(kind)
    if ends:                                                   # resumed: a later turn of a conversation
        fall = torch.linspace(*ends, B, dtype=torch.float64, device=DEVICE).long()
        return {"causal": True, "lengths" if kind == "ragged" else "starts": fall}
    if kind == "causal":
        return {"causal": True}
    b, s = (torch.arange(n, device=DEVICE) for n in (B, S))
    tiles = torch.tensor([4, 2, 1, 3], device=DEVICE)[b % 4, None]
    patches = (S // 4 - 1) // 8 * 8 + 1                        # 1601 of 1608
    real = (s // (S // 4) < tiles) & (s % (S // 4) < patches)                  # (B, S)
    return {"key_mask": real} | ({"see_all": real} if kind == "vision" else {})


def sees(masks, b, t, s):
    """Tell whether query t of row b sees key s, for indices whose shapes go together."""
    seen = masks["key_mask"][b, s] if "key_mask" in masks else s >= 0
    if "see_all" in masks:
        seen = seen | masks["see_all"][b, t]
    if "causal" in masks:
        seen = seen & (s <= t + (masks["starts"][b] if "starts" in masks else 0))
    return seen & (t < masks["lengths"][b]) if "lengths" in masks else seen


def repeat(x, q):
    return x.repeat_interleave(q.shape[2] // x.shape[1], 1)


def naive_attention(q, k, v, mask):
    """Compute all scores at once, with keys repeated for the heads that share them."""
    scores = q.transpose(1, 2) @ repeat(k, q).mT * q.shape[-1]**-0.5           # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    p = scores.softmax(-1, torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return (p @ repeat(v, q)).transpose(1, 2)


def exact_attention(q, k, v, mask):
    """Compute the same from one row at a time."""
    rows = zip(*(x.split(1) for x in (q, k, v, mask)))
    return torch.cat([checkpoint(naive_attention, *row, use_reentrant=False) for row in rows])


def sdpa(q, k, v, backend, mask=None):
    """Call PyTorch's attention; without a mask it is causal if T and S are the same."""
    if backend == SDPBackend.EFFICIENT_ATTENTION:              # knows no shared key heads
        k, v = repeat(k, q), repeat(v, q)
    causal = mask is None and q.shape[1] == k.shape[2]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=causal,
                                             enable_gqa=q.shape[2] != k.shape[1])
    return out.transpose(1, 2)


def attention_ways(kind, masks, mask):
    """Return all ways to compute a case: name -> function."""
    ways = {"naive": partial(naive_attention, mask=mask),
            "ours": partial(attention, visible=Visible(**masks))}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        label = f"sdpa {name.split('_')[0].lower()}"
        run = partial(sdpa, backend=getattr(SDPBackend, name))
        if mask is None or kind in ("causal", "ragged"):       # padding at the end needs no mask
            ways[label] = run
        if mask is not None and kind != "causal":
            ways[f"{label}, mask"] = partial(run, mask=mask)
    return ways


def attention_cases(name, sizes, dtype):
    """Make the case of the forward pass and, but for decoding, that of the backward pass.

    FLOPs: q k^T and p v are 2 D each for a query that sees a key, in each head; backward has five products
    for these two. Bytes: forward reads q, k, v and writes the output; backward reads these four and a
    gradient, and writes three. Padding is free.
    """
    (B, T, S, H, K, D), kind = sizes, name.split("-")[0]
    masks = see_whom(kind, B, T, S)
    b, t, s = (torch.arange(n, device=DEVICE) for n in (B, T, S))
    seen = sees(masks, b[:, None, None], t[:, None], s).expand(B, T, S)
    real = seen.any(2)
    mask = (seen | ~real[:, :, None])[:, None]                 # padding sees all: else it would be NaN
    draw = partial(torch.randn, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE, dtype=dtype)
    # Keys and values are a cache, or views of projections.
    kv = draw(B, 2, K, S, D) if kind in ("decode", "resumed") else draw(B, 2, S, K, D).transpose(2, 3)
    args = [x.detach().requires_grad_() for x in (draw(B, T, H, D), *kv.unbind(1))]
    inputs = args, draw(B, T, H, D) * real[:, :, None, None]
    pairs, traffic = int(seen.sum()), 2 * D * dtype.itemsize * int(H * real.sum() + K * seen.any(1).sum())
    ways = attention_ways(kind, masks, None if mask.all() else mask)
    exact = partial(exact_attention, mask=mask)
    yield Case(name, "forward", inputs, ways, exact, 4 * D * H * pairs, traffic, real)
    if kind != "decode":
        yield Case(name, "backward", inputs, ways, exact, 10 * D * H * pairs, 2 * traffic, real)
