"""Make the cases that `python -m benchmarks.kernels` measures, with all ways to compute each.

A case is made for one device and type. It holds sets of inputs, the FLOPs and bytes that the task needs,
and a function per way that prepares it: imports a library, compiles, builds a dense mask. They raise
Refused where a way cannot be had. Without our kernels, one would use these ways.
"""
import itertools
import math
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import use_triton
from kernels.attention import attention, attention_reference
from kernels.logprob import TWINS, token_logprobs
from kernels.visible import Visible

# Log-probs: (tokens, channels, vocabulary).
# Attention: (B, T, S, H, K, D); the first word of the name says who sees whom, see `see_whom`.
LARGE = {
    "logprob": (8192, 4096, 128256),
    "logprob-entropy": (8192, 4096, 128256),
    "causal-2k": (4, 2048, 2048, 32, 8, 128),
    "causal-4k": (2, 4096, 4096, 32, 8, 128),
    "causal-narrow": (4, 2048, 2048, 32, 8, 64),
    "ragged": (8, 2048, 2048, 32, 8, 128),
    "resumed": (8, 512, 2048, 32, 8, 128),
    "cross": (4, 1024, 4 * 1601, 32, 8, 128),
    "vision": (4, 4 * 1608, 4 * 1608, 16, 16, 80),
    "decode-1": (1, 1, 2048, 32, 8, 128),
    "decode-64": (64, 1, 2560, 32, 8, 128),
}
SMALL = {
    "logprob": (512, 256, 16384),
    "logprob-entropy": (512, 256, 16384),
    "vocabulary-128k": (2048, 512, 128256),
    "causal": (2, 512, 512, 8, 2, 64),
    "ragged": (4, 256, 256, 8, 2, 64),
    "resumed": (4, 64, 512, 8, 2, 64),
    "cross": (4, 64, 4 * 65, 8, 2, 64),
    "vision": (4, 4 * 72, 4 * 72, 4, 4, 80),
    "decode-1": (1, 1, 512, 8, 2, 64),
    "decode-64": (64, 1, 512, 8, 2, 64),
}
ON_REQUEST = {"vocabulary-128k"}       # takes minutes
SETS = 3                               # of inputs
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}


class Refused(Exception):
    """Say why an implementation does not run a case, in three words."""


@dataclass
class Case:
    name: str
    part: str          # what is timed: forward, backward, or both
    sets: list         # of (arguments, those that get gradients, gradient of the output or None for a loss)
    ways: dict         # implementation -> function that prepares it and returns a function of the arguments
    exact: object      # dtype -> the output and all gradients for sets[0], computed in that type
    flops: int
    bytes: int
    terms: int         # of the longest sum: over keys, or the vocabulary
    real: torch.Tensor | None = None   # (B, T) queries that are no padding: their outputs count

    def begin(self, way, args):
        """Do what comes before the timed part."""
        return way(*args) if self.part == "backward" else None

    def finish(self, way, args, wanted, upstream, out):
        """Do the timed part -> (output, *gradients)."""
        if self.part == "forward":
            with torch.no_grad():
                return (way(*args),)
        out = way(*args) if out is None else out
        return out, *torch.autograd.grad(out, wanted, upstream)


def compiled(function, allowed):
    if not allowed:
        raise Refused("needs --compile flag")
    return torch.compile(function, dynamic=False)


# ------------------------------------------------------------------------------------------------------------
# Log-probs
#
# g and e are the gradients of log-prob and entropy of each row, as in PPO. Where they are None, the loss is
# minus the sum of log-probs, which every rival can do.


def our_loss(hidden, weight, targets, g, e, function):
    logprobs, entropy, _ = function(hidden, weight, targets)
    return -logprobs.sum() if e is None else (logprobs * g + entropy * e).sum()


def naive_loss(hidden, weight, targets, g, e):
    logits = hidden @ weight.T                                                 # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if e is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    logp = logits.log_softmax(-1)
    return (logp.gather(1, targets[:, None])[:, 0] * g - (logp.exp() * logp).sum(-1) * e).sum()


def fused_loss(name, entropy, gpu):
    """Prepare one of the other ways without the whole logits."""
    options = {}
    if entropy:
        raise Refused("gives no entropy")
    if name == "torch chunks":
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Refused("torch lacks it")
        loss, options = F.linear_cross_entropy, {"options": torch.nn.LinearCrossEntropyOptions()}
    elif not gpu:
        raise Refused("needs a GPU")
    elif name == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda hidden, weight, targets, g, e: liger(weight, hidden, targets)
    else:
        from cut_cross_entropy import linear_cross_entropy as loss
        if name.endswith("all gradients"):     # it leaves out small ones unless told not to
            options = {"filter_eps": None}
    return lambda hidden, weight, targets, g, e: loss(hidden, weight, targets, reduction="sum", **options)


def exact_loss(args, dtype):
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in args[:2])
    total = 0
    for rows in torch.arange(len(hidden), device=hidden.device).split(512):    # the logits of few at a time
        loss = naive_loss(hidden[rows], weight, *(x if x is None else x[rows] for x in args[2:]))
        loss.backward()
        total += loss.detach()
    return total, hidden.grad, weight.grad


def logprob_cases(name, sizes, device, dtype, compiling):
    """Make the case of log-probs.

    FLOPs: logits and the gradients of hidden and weight are 2 N V D each. (Ours makes the logits twice,
    which does not count.) Bytes: hidden and weight are read, their gradients written.
    """
    (N, D, V), entropy = sizes, name == "logprob-entropy"

    def inputs(seed):
        random = dict(generator=torch.Generator(device).manual_seed(seed), device=device)
        draw, targets = partial(torch.randn, **random), torch.randint(0, V, (N,), **random)
        weight = draw(V, D) * D**-0.5
        hidden = draw(N, D)
        if not entropy:
            # The target's p is 1/2 or so, as cut-cross-entropy expects it. Of such sharp rows, a naive
            # entropy's gradients would be off by 6 % in bfloat16.
            hidden += math.log(V) * weight[targets]
        learnt = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        return (*learnt, targets, *((draw(N), draw(N)) if entropy else (None, None))), learnt, None

    sets = [inputs(seed) for seed in range(SETS)]
    hidden = sets[0][0][0]
    ways = {"ours": lambda: partial(our_loss, function=token_logprobs)}
    if use_triton(hidden):
        ways["twin"] = lambda: partial(our_loss, function=partial(token_logprobs, ways=TWINS))
    ways |= {"naive": lambda: naive_loss, "naive compiled": partial(compiled, naive_loss, compiling)}
    for label in ("torch chunks", "liger", "cut-cross-entropy", "cut-cross-entropy, all gradients"):
        ways[label] = partial(fused_loss, label, entropy, device.type == "cuda")
    traffic = 2 * (N + V) * D * hidden.element_size()
    yield Case(name, "both", sets, ways, partial(exact_loss, sets[0][0]), 6 * N * V * D, traffic, V)


# ------------------------------------------------------------------------------------------------------------
# Attention


def see_whom(kind, B, T, S, device):
    """Return the arguments of `Visible` for a kind of case. Rows differ, as conversations of a batch do."""
    b, s = (torch.arange(n, device=device) for n in (B, S))
    tiles = torch.tensor([4, 2, 1, 3], device=device)[b % 4, None]
    patches = (S // 4 - 1) // 8 * 8 + 1                        # 1601, which the encoder pads to 1608
    real = (s // (S // 4) < tiles) & (s % (S // 4) < patches)                  # (B, S)
    fall = lambda *ends: torch.linspace(*ends, B, dtype=torch.float64, device=device).long()
    return {"causal": dict(causal=True),
            "ragged": dict(causal=True, lengths=fall(T, T // 8)),
            "resumed": dict(causal=True, starts=fall(S - T, 0)),       # a later turn of a conversation
            "decode": dict(causal=True, starts=fall(S - 1, S // 2)),
            "cross": dict(key_mask=real),
            "vision": dict(key_mask=real, see_all=real)}[kind]


def sees(masks, b, t, s, padding=False):
    """Tell whether query t of row b sees key s, for indices whose shapes go together.

    padding: whether queries beyond `lengths` see, too.
    """
    seen = masks["key_mask"][b, s] if "key_mask" in masks else s >= 0
    if "see_all" in masks:
        seen = seen | masks["see_all"][b, t]
    if "causal" in masks:
        seen = seen & (s <= t + (masks["starts"][b] if "starts" in masks else 0))
    return seen & (t < masks["lengths"][b]) if "lengths" in masks and not padding else seen


def dense(masks, B, T, S, device):
    """Return (B, 1, T, S), True: sees; None if all see all.

    As is usual, padding's keys are closed, but its queries see: they would give NaN.
    """
    b, t, s = (torch.arange(n, device=device) for n in (B, T, S))
    mask = sees(masks, b[:, None, None], t[:, None], s, padding=True).expand(B, T, S)[:, None]
    if "lengths" in masks:
        mask = mask & (s < masks["lengths"][:, None])[:, None, None]
    return None if mask.all() else mask.contiguous()


def repeat(x, q):
    return x.repeat_interleave(q.shape[2] // x.shape[1], 1)


def naive_attention(q, k, v, mask):
    """Compute all scores at once, with keys repeated for the heads that share them."""
    scores = q.transpose(1, 2) @ repeat(k, q).mT * q.shape[-1]**-0.5           # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    p = scores.softmax(-1, torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return (p @ repeat(v, q)).transpose(1, 2)


def sdpa(q, k, v, backend, mask, causal):
    if backend == SDPBackend.EFFICIENT_ATTENTION:              # knows no shared key heads
        k, v = repeat(k, q), repeat(v, q)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=causal,
                                             enable_gqa=q.shape[2] != k.shape[1])
    return out.transpose(1, 2)


def flex(masks, B, T, S, device):
    if device.type != "cuda":
        raise Refused("needs a GPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    blocks = create_block_mask(lambda b, h, t, s: sees(masks, b, t, s), B, None, T, S, device=device)
    run = partial(compiled(flex_attention, True), block_mask=blocks)
    return lambda q, k, v: run(q.transpose(1, 2), k, v, enable_gqa=q.shape[2] != k.shape[1]).transpose(1, 2)


def exact_attention(q, k, v, upstream, masks, dtype):
    """Return the output and gradients, from one key head of one row at a time. Padding queries stay zero."""
    (B, T, H, D), (K, S) = q.shape, k.shape[1:3]
    results = [torch.zeros_like(x, dtype=dtype) for x in (q, q, k, v)]
    t, s = (torch.arange(n, device=q.device) for n in (T, S))
    for b, j in itertools.product(range(B), range(K)):
        n = int(masks["lengths"][b]) if "lengths" in masks else T
        queries, keys = (b, slice(n), slice(j * H // K, (j + 1) * H // K)), (b, j)
        x, y, z = (part.detach().to(dtype).requires_grad_() for part in (q[queries], k[keys], v[keys]))
        scores = torch.einsum("tgd,sd->gts", x, y) * D**-0.5
        p = scores.masked_fill(~sees(masks, b, t[:n, None], s), float("-inf")).softmax(-1)
        out = torch.einsum("gts,sd->tgd", p, z)
        gradients = torch.autograd.grad(out, (x, y, z), upstream[queries].to(dtype))
        for result, place, value in zip(results, (queries, queries, keys, keys), (out.detach(), *gradients)):
            result[place] = value
    return results


def attention_ways(kind, masks, sizes, q, compiling):
    """Return all ways for queries like q: name -> function that prepares it."""
    mask = partial(dense, masks, *sizes, q.device)
    masked = "" if mask() is None else ", mask"
    ours = {"ours": attention} | ({"twin": attention_reference} if use_triton(q) else {})
    ways = {label: partial(partial, function, visible=Visible(**masks)) for label, function in ours.items()}
    ways |= {"naive": lambda: partial(naive_attention, mask=mask()),
             "naive compiled": lambda: partial(compiled(naive_attention, compiling), mask=mask())}
    for name, backend in BACKENDS.items():
        label, run = f"sdpa {name}", partial(sdpa, backend=backend)
        if kind in ("causal", "ragged"):       # padding at the end needs no mask: its results are dropped
            ways[label] = partial(partial, run, mask=None, causal=True)
        if kind != "causal":
            ways[label + masked] = lambda run=run: partial(run, mask=mask(), causal=False)
    return ways | {"flex": partial(flex, masks, *sizes, q.device)}


def attention_cases(name, sizes, device, dtype, compiling):
    """Make the case of the forward pass and, but for decoding, that of the backward pass.

    FLOPs: q k^T and p v are 2 D each for a query that sees a key, in each head; backward has five products
    for these two. Bytes: forward reads q, k, v and writes the output; backward reads these four and a
    gradient, and writes three. Padding is free.
    """
    (B, T, S, H, K, D), kind = sizes, name.split("-")[0]
    masks = see_whom(kind, B, T, S, device)
    t, s = (torch.arange(n, device=device) for n in (T, S))
    real = t < masks["lengths"][:, None] if "lengths" in masks else None       # (B, T)

    def inputs(seed):
        random = torch.Generator(device).manual_seed(seed)
        draw = partial(torch.randn, generator=random, device=device, dtype=dtype)
        cached = kind in ("decode", "resumed")                 # else keys and values are views of projections
        kv = draw(B, 2, K, S, D) if cached else draw(B, 2, S, K, D).transpose(2, 3)
        args = [x.detach().requires_grad_() for x in (draw(B, T, H, D), *kv.unbind(1))]
        upstream = draw(B, T, H, D)
        return args, args, upstream if real is None else upstream.masked_fill(~real[:, :, None, None], 0)

    sets = [inputs(seed) for seed in range(SETS)]
    args, _, upstream = sets[0]
    seen = [sees(masks, b, t[:, None], s).expand(T, S) for b in range(B)]
    pairs, keys = sum(int(x.sum()) for x in seen), sum(int(x.any(0).sum()) for x in seen)
    queries = B * T if real is None else int(real.sum())
    traffic = 2 * (H * queries + K * keys) * D * args[0].element_size()
    ways = attention_ways(kind, masks, (B, T, S), args[0], compiling)
    exact = cache(partial(exact_attention, *args, upstream, masks))
    yield Case(name, "forward", sets, ways, exact, 4 * D * H * pairs, traffic, S, real)
    if kind != "decode":
        yield Case(name, "backward", sets, ways, exact, 10 * D * H * pairs, 2 * traffic, S, real)
