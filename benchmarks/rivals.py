"""What `bench` measures: cases, all ways to compute them, and their exact answers. Without the kernels, this is what one would use.

A case is made for one device and type: sets of inputs, FLOPs and bytes that the task needs, and functions that prepare each way:
import a library, compile, build a dense mask. They raise Refused where a way cannot be had.
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
from kernels.logprob import token_logprobs, token_logprobs_reference
from kernels.visible import Visible

# Log-probs: (tokens, channels, vocabulary). Attention: (B, T, S, H, K, D), and the name's first word says who sees whom: `see_whom`.
LARGE = {"logprob": (8192, 4096, 128256), "logprob-entropy": (8192, 4096, 128256),
         "causal-2k": (4, 2048, 2048, 32, 8, 128), "causal-4k": (2, 4096, 4096, 32, 8, 128), "causal-narrow": (4, 2048, 2048, 32, 8, 64),
         "ragged": (8, 2048, 2048, 32, 8, 128), "resumed": (8, 512, 2048, 32, 8, 128), "cross": (4, 1024, 4 * 1601, 32, 8, 128),
         "vision": (4, 4 * 1608, 4 * 1608, 16, 16, 80), "decode-1": (1, 1, 2048, 32, 8, 128), "decode-64": (64, 1, 2560, 32, 8, 128)}
SMALL = {"logprob": (512, 256, 16384), "logprob-entropy": (512, 256, 16384), "vocabulary-128k": (2048, 512, 128256),
         "causal": (2, 512, 512, 8, 2, 64), "ragged": (4, 256, 256, 8, 2, 64), "resumed": (4, 64, 512, 8, 2, 64),
         "cross": (4, 64, 4 * 65, 8, 2, 64), "vision": (4, 4 * 72, 4 * 72, 4, 4, 80),
         "decode-1": (1, 1, 512, 8, 2, 64), "decode-64": (64, 1, 512, 8, 2, 64)}
ON_REQUEST = {"vocabulary-128k"}                               # takes minutes
SETS = 3                                                       # of inputs


class Refused(Exception):
    """Why an implementation does not run a case, in three words."""


@dataclass
class Case:
    name: str
    part: str                  # what is timed: forward, backward, or both
    sets: list                 # of (arguments, those that get gradients, gradient of the output or None for a loss)
    ways: dict                 # implementation -> function that prepares it and returns a function of the arguments
    exact: object              # dtype -> the output and all gradients for sets[0], computed in that type
    flops: int
    bytes: int
    terms: int                 # of the longest sum: over keys, or the vocabulary
    real: torch.Tensor | None = None                           # (B, T) queries that are no padding: whose outputs count

    def begin(self, way, args):
        """What comes before the timed part."""
        return way(*args) if self.part == "backward" else None

    def finish(self, way, args, wanted, upstream, out):
        """The timed part -> (output, *gradients)"""
        if self.part == "forward":
            with torch.no_grad():
                return (way(*args),)
        out = way(*args) if out is None else out
        return out, *torch.autograd.grad(out, wanted, upstream)


def compiled(function, allowed):
    if not allowed:
        raise Refused("needs --compile flag")
    return torch.compile(function, dynamic=False)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs. g and e: gradients of log-prob and entropy of each row, as in PPO; None: of minus the sum, which every rival can do


def our_loss(hidden, weight, targets, g, e, function):
    logprobs, entropy, _ = function(hidden, weight, targets)
    return -logprobs.sum() if e is None else (logprobs * g + entropy * e).sum()


def naive_loss(hidden, weight, targets, g, e):
    logits = hidden @ weight.T                                                                # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if e is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    logp = logits.log_softmax(-1)
    return (logp.gather(1, targets[:, None])[:, 0] * g - (logp.exp() * logp).sum(-1) * e).sum()


def fused_loss(name, entropy, gpu):
    """Other ways without the whole logits."""
    if entropy:
        raise Refused("gives no entropy")
    if name == "torch chunks":
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Refused("torch lacks it")
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda hidden, weight, targets, g, e: F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)
    if not gpu:
        raise Refused("needs a GPU")
    if name == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda hidden, weight, targets, g, e: loss(weight, hidden, targets)
    from cut_cross_entropy import linear_cross_entropy         # leaves out small gradients unless told not to
    options = {"filter_eps": None} if name.endswith("all gradients") else {}
    return lambda hidden, weight, targets, g, e: linear_cross_entropy(hidden, weight, targets, reduction="sum", **options)


def exact_loss(args, dtype):
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in args[:2])
    total = 0
    for rows in torch.arange(len(hidden), device=hidden.device).split(512):                   # logits of 512 rows at a time
        loss = naive_loss(hidden[rows], weight, *(x if x is None else x[rows] for x in args[2:]))
        loss.backward()
        total += loss.detach()
    return total, hidden.grad, weight.grad


def logprob_cases(name, sizes, device, dtype, compiling):
    """FLOPs: logits and the gradients of hidden and weight are 2 N V D each (ours makes the logits twice, which does not count).
    Bytes: hidden and weight are read, their gradients written."""
    (N, D, V), entropy = sizes, name == "logprob-entropy"
    sets = []
    for seed in range(SETS):
        random = dict(generator=torch.Generator(device).manual_seed(seed), device=device)
        draw, targets = partial(torch.randn, **random), torch.randint(0, V, (N,), **random)
        weight = draw(V, D) * D**-0.5
        hidden = draw(N, D)
        if not entropy:                                        # sharp, p = 1/2 or so of the target, as cut-cross-entropy expects it
            hidden += math.log(V) * weight[targets]            # (in bfloat16, gradients of a naive entropy would be off by 6 % then)
        hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        sets.append(((hidden, weight, targets, *((draw(N), draw(N)) if entropy else (None, None))), (hidden, weight), None))
    ways = {"ours": lambda: partial(our_loss, function=token_logprobs)}
    if use_triton(hidden):
        ways["twin"] = lambda: partial(our_loss, function=token_logprobs_reference)
    ways |= {"naive": lambda: naive_loss, "naive compiled": partial(compiled, naive_loss, compiling)}
    for label in ("torch chunks", "liger", "cut-cross-entropy", "cut-cross-entropy, all gradients"):
        ways[label] = partial(fused_loss, label, entropy, device.type == "cuda")
    yield Case(name, "both", sets, ways, partial(exact_loss, sets[0][0]), 6 * N * V * D, 2 * (N + V) * D * hidden.element_size(), V)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def see_whom(kind, B, T, S, device):
    """The mask arguments of `attention` for a kind of case. Rows differ, as conversations of a batch do."""
    b, t, s = (torch.arange(n, device=device) for n in (B, T, S))
    tiles, patches = torch.tensor([4, 2, 1, 3], device=device)[b % 4], (S // 4 - 1) // 8 * 8 + 1     # 1601, which the encoder pads to 1608
    real = (s // (S // 4) < tiles[:, None]) & (s % (S // 4) < patches)                               # (B, S)
    fall = partial(torch.linspace, steps=B, dtype=torch.float64, device=device)
    return {"causal": dict(causal=True),
            "ragged": dict(causal=True, lengths=fall(T, T // 8).long()),
            "resumed": dict(causal=True, starts=fall(S - T, 0).long()),                              # a later turn of a conversation
            "decode": dict(causal=True, starts=fall(S - 1, S // 2).long()),
            "cross": dict(key_mask=real, see_all=(t < T // 16).expand(B, T).contiguous()),           # a few tokens precede <|image|>
            "vision": dict(key_mask=real, see_all=real)}[kind]


def sees(masks, b, t, s, padding=False):
    """Whether query t of row b sees key s, for indices whose shapes go together. padding: whether queries beyond `lengths` see, too."""
    seen = s >= 0
    if "key_mask" in masks:
        seen = masks["key_mask"][b, s] | masks["see_all"][b, t]
    if "causal" in masks:
        seen = seen & (s <= t + (masks["starts"][b] if "starts" in masks else 0))
    return seen & (t < masks["lengths"][b]) if "lengths" in masks and not padding else seen


def dense(masks, B, T, S, device):
    """(B, 1, T, S), True: sees; None if all see all. As is usual for padding, its keys are closed, but its queries see (or give NaN)."""
    b, t, s = (torch.arange(n, device=device) for n in (B, T, S))
    mask = sees(masks, b[:, None, None], t[:, None], s, padding=True).expand(B, T, S)[:, None]
    if "lengths" in masks:
        mask = mask & (s < masks["lengths"][:, None])[:, None, None]
    return None if mask.all() else mask.contiguous()


def repeat(x, q):
    return x.repeat_interleave(q.shape[2] // x.shape[1], 1)


def naive_attention(q, k, v, mask):
    """All scores at once, and keys repeated for the heads that share them."""
    scores = q.transpose(1, 2) @ repeat(k, q).mT * q.shape[-1]**-0.5                          # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1, torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ repeat(v, q)).transpose(1, 2)


def sdpa(q, k, v, backend, mask, causal):
    if backend == SDPBackend.EFFICIENT_ATTENTION:              # knows no shared key heads
        k, v = repeat(k, q), repeat(v, q)
    shared = q.shape[2] != k.shape[1]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared).transpose(1, 2)


def flex(masks, B, T, S, device):
    if device.type != "cuda":
        raise Refused("needs a GPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    blocks = create_block_mask(lambda b, h, t, s: sees(masks, b, t, s), B, None, T, S, device=device)
    run = partial(compiled(flex_attention, True), block_mask=blocks)
    return lambda q, k, v: run(q.transpose(1, 2), k, v, enable_gqa=q.shape[2] != k.shape[1]).transpose(1, 2)


def exact_attention(q, k, v, upstream, masks, dtype):
    """Output and gradients, one key head of one row at a time. Padding queries stay zero."""
    (B, T, H, D), (K, S) = q.shape, k.shape[1:3]
    results = [torch.zeros_like(x, dtype=dtype) for x in (q, q, k, v)]
    t, s = (torch.arange(n, device=q.device) for n in (T, S))
    for b, j in itertools.product(range(B), range(K)):
        n, heads = int(masks["lengths"][b]) if "lengths" in masks else T, slice(j * H // K, (j + 1) * H // K)
        x, y, z = (tensor.detach().to(dtype).requires_grad_() for tensor in (q[b, :n, heads], k[b, j], v[b, j]))
        scores = torch.einsum("tgd,sd->gts", x, y) * D**-0.5
        out = torch.einsum("gts,sd->tgd", scores.masked_fill(~sees(masks, b, t[:n, None], s), float("-inf")).softmax(-1), z)
        gradients = torch.autograd.grad(out, (x, y, z), upstream[b, :n, heads].to(dtype))
        for result, place, value in zip(results, [(b, slice(n), heads)] * 2 + [(b, j)] * 2, (out.detach(), *gradients)):
            result[place] = value
    return results


def attention_cases(name, sizes, device, dtype, compiling):
    """FLOPs: forward, q k^T and p v are 2 D each for a query that sees a key, in each head; backward has five products for these two.
    Bytes: forward reads q, k, v and writes the output; backward reads these four and a gradient, and writes three. Padding is free."""
    (B, T, S, H, K, D), kind = sizes, name.split("-")[0]
    masks, t, s = see_whom(kind, B, T, S, device), torch.arange(T, device=device), torch.arange(S, device=device)
    real = t < masks["lengths"][:, None] if "lengths" in masks else None                      # (B, T)
    sets = []
    for seed in range(SETS):
        draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)
        kv = draw(B, 2, K, S, D) if kind in ("decode", "resumed") else draw(B, 2, S, K, D).transpose(2, 3)     # a cache, or projections
        args, upstream = [x.detach().requires_grad_() for x in (draw(B, T, H, D), *kv.unbind(1))], draw(B, T, H, D)
        sets.append((args, args, upstream if real is None else upstream.masked_fill(~real[:, :, None, None], 0)))
    mask = partial(dense, masks, B, T, S, device)
    masked = "" if mask() is None else ", mask"
    ours = {"ours": attention} | ({"twin": attention_reference} if use_triton(args[0]) else {})
    ways = {label: partial(partial, function, visible=Visible(**masks)) for label, function in ours.items()}
    ways |= {"naive": lambda: partial(naive_attention, mask=mask()),
             "naive compiled": lambda: partial(compiled(naive_attention, compiling), mask=mask())}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        label, run = "sdpa " + backend.name.split("_")[0].lower(), partial(sdpa, backend=backend)
        if kind in ("causal", "ragged"):                       # padding at the end needs no mask: what is computed for it is dropped
            ways[label] = partial(partial, run, mask=None, causal=True)
        if kind != "causal":
            ways[label + masked] = lambda run=run: partial(run, mask=mask(), causal=False)
    ways["flex"] = partial(flex, masks, B, T, S, device)
    seen = [sees(masks, b, t[:, None], s).expand(T, S) for b in range(B)]
    pairs, keys = sum(int(x.sum()) for x in seen), sum(int(x.any(0).sum()) for x in seen)
    queries, exact = B * T if real is None else int(real.sum()), cache(partial(exact_attention, *sets[0][0], sets[0][2], masks))
    traffic = 2 * (H * queries + K * keys) * D * args[0].element_size()
    yield Case(name, "forward", sets, ways, exact, 4 * D * H * pairs, traffic, S, real)
    if kind != "decode":
        yield Case(name, "backward", sets, ways, exact, 10 * D * H * pairs, 2 * traffic, S, real)
