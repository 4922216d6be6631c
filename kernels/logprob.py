"""Log-probability of a token, entropy and log-sum-exp, straight from hidden states: the logits exist only as tiles.

    z = hidden weight^T / temperature,  lse = log sum_v exp z_v,  p = exp(z - lse),  logprob = z_y - lse,  entropy = lse - sum_v p_v z_v

What it saves. 8192 tokens of Llama 3 (V = 128256) have 2.1 GB of bf16 logits; the plain way also keeps their float32 log-softmax and its
gradient, 4.2 GB each. Here forward keeps three numbers a token, and backward computes the logits once more, one slab of the vocabulary
after the other: 4 matrix products of 2 N V D FLOPs instead of 3, 224 MiB of workspace (N 8192, D 4096), and little other memory traffic.

Forward. A program owns a block of rows and walks over the tiles of one part of the vocabulary. As flash attention does, it carries the
largest logit m so far and s = sum exp(z - m), and for the entropy t = sum (z - m) exp(z - m). When m grows to m', both follow:
    t <- (t + s (m - m')) exp(m - m'),    s <- s exp(m - m').        At the end  lse = m + log s,    entropy = log s - t / s.
So the entropy of a sharp distribution is exact, too, where lse - sum p z would be the small difference of two large numbers.

Backward. With upstream gradients g, e, l of logprob, entropy and lse, and d entropy / dz = -p (log p + entropy):
    dz = p (a - e log p) + g onehot(y),    a = l - g - e entropy
    d hidden = dz weight / temperature,    d weight = dz^T hidden / temperature
A kernel writes dz of one slab; two ordinary matrix products use it up. d weight of the slab is then complete, and d hidden adds up
in float32 in a fixed order: no atomics. No part of dz is dropped for being small.

Inside the kernels logits are in units of log 2, since exp2 is what the hardware has: a factor of 1 / (temperature log 2) does it all.
"""
import math

import torch
from torch.autograd.function import once_differentiable

from kernels import chip, product_type, tl, triton, use_triton, without_autocast

WORKSPACE = 80 * 2**20      # bytes of dz at once; with d hidden in float32, a piece of it and cuBLAS's own 32 MiB: 256 MiB at N 8192, D 4096
GROUP = 8                   # row blocks that run side by side, so that the tiles of weight they share stay in the L2 cache
# (rows, vocabulary, channels) of a tile, warps, stages. 128 x 256 float32 sums fill half of an SM's registers: more would spill.
BLOCKS = {"sm_90": (128, 256, 64, 8, 4), "gfx942": (128, 128, 64, 8, 2), "cpu": (16, 32, 32, 1, 1)}
OTHER, FLOAT32 = (128, 128, 64, 8, 4), (64, 64, 32, 8, 2)


@triton.jit
def logits_tile(x_ptr, w_ptr, rows, cols, N, V, scale, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """scale * x[rows] w[cols]^T in float32. Past the end the last row or column is read again: a mask would cost in this loop."""
    d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * D + d[None, :]
    w_ptrs = w_ptr + tl.minimum(cols, V - 1).to(tl.int64)[None, :] * D + d[:, None]
    z = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for i in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            x, w = tl.load(x_ptrs + i), tl.load(w_ptrs + i)
        else:
            x, w = tl.load(x_ptrs + i, mask=d[None, :] < D - i, other=0.0), tl.load(w_ptrs + i, mask=d[:, None] < D - i, other=0.0)
        z = tl.dot(x, w, z, input_precision="ieee")            # no TF32 for float32
    return z * scale


@triton.jit
def statistics_kernel(x_ptr, w_ptr, target_ptr, out_ptr, N, V, scale, tiles, D: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr):
    """m, s, t and z_y of a block of rows over `tiles` tiles of the vocabulary -> out (4, splits, N)."""
    block, split, splits = tl.program_id(2) * GROUP + tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if block * BLOCK_N >= N:
        return
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(target_ptr + rows, mask=rows < N, other=-1).to(tl.int32)
    m = tl.full((BLOCK_N,), -1e30, tl.float32)                 # finite: -inf less -inf is no number
    s, t, chosen = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for first in range(split * tiles * BLOCK_V, tl.minimum((split + 1) * tiles * BLOCK_V, V), BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)
        z = logits_tile(x_ptr, w_ptr, rows, cols, N, V, scale, D, BLOCK_D)                    # (BLOCK_N, BLOCK_V)
        chosen += tl.sum(tl.where(cols[None, :] == y[:, None], z, 0.0), 1)
        z = tl.where(cols[None, :] < V, z, -1e30)
        new = tl.maximum(m, tl.max(z, 1))
        z -= new[:, None]
        p, shrink = tl.exp2(z), tl.exp2(m - new)
        t = (t + s * (m - new)) * shrink + tl.sum(p * z, 1)
        s = s * shrink + tl.sum(p, 1)
        m = new
    out_ptrs, size, valid = out_ptr + split * N + rows, splits * N, rows < N
    tl.store(out_ptrs, m, mask=valid)
    tl.store(out_ptrs + size, s, mask=valid)
    tl.store(out_ptrs + 2 * size, t, mask=valid)
    tl.store(out_ptrs + 3 * size, chosen, mask=valid)


@triton.jit
def dlogits_kernel(x_ptr, w_ptr, target_ptr, lse_ptr, a_ptr, e_ptr, g_ptr, out_ptr, N, V, stride, scale, D: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr):
    """A tile of out[:, :V] = p (a - e log2 p) + g onehot(target), where w is the slab of V rows and targets count from its first."""
    block = tl.program_id(2) * GROUP + tl.program_id(0)
    if block * BLOCK_N >= N:
        return
    rows, cols = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = logits_tile(x_ptr, w_ptr, rows, cols, N, V, scale, D, BLOCK_D)
    valid = rows < N
    y = tl.load(target_ptr + rows, mask=valid, other=-1).to(tl.int32)[:, None]
    a, e = tl.load(a_ptr + rows, mask=valid, other=0.0)[:, None], tl.load(e_ptr + rows, mask=valid, other=0.0)[:, None]
    logp = z - tl.load(lse_ptr + rows, mask=valid, other=0.0)[:, None]
    dz = tl.exp2(logp) * (a - e * logp) + tl.where(cols[None, :] == y, tl.load(g_ptr + rows, mask=valid, other=0.0)[:, None], 0.0)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(out_ptrs, dz.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (cols[None, :] < V))


def launch_options(hidden):
    """-> (rows of a tile, columns of a tile, keywords of a launch)"""
    name, _ = chip(hidden.device)
    n, v, d, warps, stages = FLOAT32 if hidden.dtype == torch.float32 and name != "cpu" else BLOCKS.get(name, OTHER)
    return n, v, dict(D=hidden.shape[1], BLOCK_N=n, BLOCK_V=v, BLOCK_D=d, GROUP=GROUP, num_warps=warps, num_stages=stages)


def statistics(hidden, weight, targets, temperature):
    """-> logprobs, entropy, lse, (N,) float32 each"""
    N, V, (n, v, options) = len(hidden), len(weight), launch_options(hidden)
    splits = min(triton.cdiv(V, v), max(8, 8 * chip(hidden.device)[1] // max(1, triton.cdiv(N, n))))    # 8 programs an SM, one by one
    out = torch.empty(4, splits, N, dtype=torch.float32, device=hidden.device)
    tiles, grid = triton.cdiv(triton.cdiv(V, v), splits), (GROUP, splits, triton.cdiv(N, n * GROUP))
    statistics_kernel[grid](hidden, weight, targets, out, N, V, 1 / (temperature * math.log(2)), tiles, **options)
    m, s, t, chosen = out                                      # (splits, N) each
    top = m.amax(0)
    t, s = ((t + s * (m - top)) * torch.exp2(m - top)).sum(0), (s * torch.exp2(m - top)).sum(0)
    return tuple(x * math.log(2) for x in (chosen.sum(0) - top - s.log2(), s.log2() - t / s, top + s.log2()))


def gradients(hidden, weight, targets, lse, a, e, g, temperature, wanted):
    """d hidden (float32) and d weight, None where not wanted, for dz = p (a - e log p) + g onehot(targets)."""
    N, V, (n, v, options) = len(hidden), len(weight), launch_options(hidden)
    slab = max(1, WORKSPACE // (max(1, N) * v * hidden.element_size())) * v
    scale, lse = 1 / (temperature * math.log(2)), lse / math.log(2)
    a, e, g = a / temperature, e * math.log(2) / temperature, g / temperature
    dz = hidden.new_empty(N, min(slab, V))
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    for first in range(0, V, slab):
        w = weight[first:first + slab]
        grid = GROUP, triton.cdiv(len(w), v), triton.cdiv(N, n * GROUP)
        dlogits_kernel[grid](hidden, w, targets - first, lse, a, e, g, dz, N, len(w), dz.stride(0), scale, **options)
        if wanted[0]:
            add_product(grad_hidden, dz[:, :len(w)], w)
        if wanted[1]:
            torch.mm(dz[:, :len(w)].T, hidden, out=grad_weight[first:first + slab])
    return grad_hidden, grad_weight


def add_product(total, a, b):
    """total += a b in float32, whatever the type of a and b."""
    if a.is_cuda and a.dtype != torch.float32:
        for rows, part in zip(total.split(1024), a.split(1024)):                              # some versions' addmm takes no float32 `total` here
            rows += torch.mm(part, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))     # PyTorch has no out_dtype on CPUs


class TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, statistics, gradients):
        with without_autocast(hidden):
            logprobs, entropy, lse = statistics(hidden, weight, targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature, ctx.gradients = temperature, gradients
        return logprobs, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, g, e, l):
        """Rows whose upstream gradients are zero are left out. To count them, the host waits for the GPU: it is soon ahead again."""
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        N, rows = len(hidden), ((g != 0) | (e != 0) | (l != 0)).nonzero()[:, 0]
        if len(rows) < N:
            hidden, targets, entropy, lse, g, e, l = (x[rows] for x in (hidden, targets, entropy, lse, g, e, l))
        with without_autocast(hidden):
            found = ctx.gradients(hidden, weight, targets, lse, l - g - e * entropy, e, g, ctx.temperature, ctx.needs_input_grad)
        grad_hidden, grad_weight = (None if x is None else x.to(weight.dtype) for x in found)
        if grad_hidden is not None and len(rows) < N:
            grad_hidden = hidden.new_zeros(N, hidden.shape[1]).index_copy_(0, rows, grad_hidden)
        return grad_hidden, grad_weight, None, None, None, None


def token_logprobs(hidden, weight, targets, temperature=1.0, ways=None):
    """hidden (N, D), weight (V, D), targets (N,) int64 -> logprobs, entropy and log-sum-exp of softmax(hidden weight^T / temperature).

    (N,) float32 each, differentiable in hidden and weight. Rows with a negative target cost nothing and give 0.
    A target of V or more is a RuntimeError. ways: (statistics, gradients); by default kernels on a GPU, twins elsewhere.
    """
    ways = ways or ((statistics, gradients) if use_triton(hidden) else TWINS)
    hidden, weight = (x.to(product_type(hidden)) for x in (hidden, weight))
    torch._assert_async((targets < len(weight)).all(), "a target is not in the vocabulary")   # async: the host need not wait for it
    asked = (targets >= 0).nonzero()[:, 0]
    if len(asked) == len(targets):
        return TokenLogprobs.apply(hidden.contiguous(), weight.contiguous(), targets.contiguous(), float(temperature), *ways)
    found = TokenLogprobs.apply(hidden[asked], weight.contiguous(), targets[asked], float(temperature), *ways)
    return tuple(x.new_zeros(len(targets)).index_copy(0, asked, x) for x in found)


# ---------------------------------------------------------------------------------------------------------------------
# The twins: the same sums over pieces of the logits that stay in a CPU's cache, in float32 (or float64 for float64)

PIECE = 256, 4096           # rows and vocabulary of a piece, 4 MB of float32; a smaller vocabulary gets more rows


def token_logprobs_reference(hidden, weight, targets, temperature=1.0):
    """`token_logprobs` in plain torch."""
    return token_logprobs(hidden, weight, targets, temperature, TWINS)


def statistics_reference(hidden, weight, targets, temperature):
    """See `statistics`."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    result = hidden.new_empty(3, len(hidden), dtype=exact)
    rows, cols = pieces(len(hidden), len(weight))
    for r in rows:
        x = hidden[r].to(exact) / temperature
        m, s, t, chosen = x.new_full((len(x), 1), -1e30), *x.new_zeros(3, len(x), 1)
        for c in cols:
            z = x @ weight[c].to(exact).T                                                     # a piece
            at, inside = place(targets[r], c)
            chosen += z.gather(1, at) * inside
            new = torch.maximum(m, z.amax(1, keepdim=True))
            p, shrink = torch.exp(z.sub_(new)), torch.exp(m - new)
            s, t, m = s * shrink + p.sum(1, keepdim=True), (t + s * (m - new)) * shrink + p.mul_(z).sum(1, keepdim=True), new
        result[:, r] = torch.cat([chosen - m - s.log(), s.log() - t / s, m + s.log()], 1).T
    return tuple(result)


def gradients_reference(hidden, weight, targets, lse, a, e, g, temperature, wanted):
    """See `gradients`."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    grad_hidden, grad_weight = (torch.zeros_like(x, dtype=exact) if want else None for x, want in zip((hidden, weight), wanted))
    rows, cols = pieces(len(hidden), len(weight))
    for r in rows:
        x, asked = hidden[r].to(exact) / temperature, bool(e[r].any())
        for c in cols:
            w = weight[c].to(exact)
            logp = torch.addmm(-lse[r, None], x, w.T)                                         # a piece
            dz = logp.exp().mul_(logp.mul_(-e[r, None]).add_(a[r, None])) if asked else logp.exp_().mul_(a[r, None])
            at, inside = place(targets[r], c)
            dz.scatter_add_(1, at, g[r, None] * inside)
            if wanted[0]:
                grad_hidden[r].addmm_(dz, w, alpha=1 / temperature)
            if wanted[1]:
                grad_weight[c].addmm_(dz.T, x)
    return grad_hidden, grad_weight


def pieces(N, V):
    """-> row slices, vocabulary slices"""
    cols = min(V, PIECE[1])
    rows = PIECE[0] * PIECE[1] // cols
    return [slice(i, min(i + rows, N)) for i in range(0, N, rows)], [slice(i, min(i + cols, V)) for i in range(0, V, cols)]


def place(targets, cols):
    """The column of each target among `cols`, and whether it is there; (rows, 1) each."""
    at = targets[:, None] - cols.start
    return at.clamp(0, cols.stop - cols.start - 1), (at >= 0) & (targets[:, None] < cols.stop)


TWINS = statistics_reference, gradients_reference
