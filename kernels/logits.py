"""Logits that exist only as tiles: the two kernels of logprob.py, whose docstring has the maths.

Both compute the same tile of logits, `hidden @ weight^T`, on the chip, and differ in what they make of it.

statistics_kernel. A program owns a block of rows and walks over the tiles of one part of the vocabulary, with
m, s and t of its rows in registers. In the end it writes these and the target's logit, 4 numbers per row and
part. For each part of the vocabulary 8 blocks of rows start together, so that the tiles of weight that they
share stay in the L2 cache. Then weight, 1 GB in Llama 3, need not come from memory again for each block.

dlogits_kernel. A program writes one tile of dz, in the type of hidden. `gradients` calls it for one slab of
the vocabulary at a time, as many columns as WORKSPACE holds. Two ordinary matrix products use that dz before
the next slab's replaces it. d weight of a slab is then complete, and d hidden adds up in float32 in a fixed
order: no atomics, so the same bits again.

Logits are in units of log 2 here, since exp2 is what the hardware has: a factor of 1 / (temperature log 2)
does it all.
"""
import math

import torch

from kernels import chip, constexpr, tl, triton
from kernels.tiles import dot, tiles

WORKSPACE = 80 * 2**20         # bytes of dz at once; at N 8192 and D 4096 it makes 256 MiB
                               # with d hidden in float32, a piece of it and cuBLAS's own 32 MiB
GROUP = 8                      # row blocks that run side by side
LN2 = math.log(2)


@triton.jit
def logits_tile(x_ptr, w_ptr, rows, cols, N, V, scale, D, BLOCK_D):
    """Compute scale * x[rows] w[cols]^T in float32.

    Past the end the last row or column is read again: a mask would cost in this loop.
    """
    d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * D + d[None, :]
    w_ptrs = w_ptr + tl.minimum(cols, V - 1).to(tl.int64)[None, :] * D + d[:, None]
    z = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for i in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            x, w = tl.load(x_ptrs + i), tl.load(w_ptrs + i)
        else:
            x = tl.load(x_ptrs + i, mask=d[None, :] < D - i, other=0.0)
            w = tl.load(w_ptrs + i, mask=d[:, None] < D - i, other=0.0)
        z = dot(x, w, z)
    return z * scale


@triton.jit
def statistics_kernel(x_ptr, w_ptr, target_ptr, out_ptr, N, V, scale, tiles, D: constexpr,
                      BLOCK_N: constexpr, BLOCK_V: constexpr, BLOCK_D: constexpr,
                      GROUP: constexpr):
    """Write m, s, t and z_y of a block of rows over `tiles` tiles of the vocabulary to out (4, splits, N)."""
    block, split, splits = tl.program_id(2) * GROUP + tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if block * BLOCK_N >= N:
        return
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(target_ptr + rows, mask=rows < N, other=-1).to(tl.int32)
    m = tl.full((BLOCK_N,), -1e30, tl.float32)                 # finite: -inf less -inf is no number
    s = tl.zeros((BLOCK_N,), tl.float32)
    t, chosen = s, s
    for first in range(split * tiles * BLOCK_V, tl.minimum((split + 1) * tiles * BLOCK_V, V), BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)
        z = logits_tile(x_ptr, w_ptr, rows, cols, N, V, scale, D, BLOCK_D)     # (BLOCK_N, BLOCK_V)
        chosen += tl.sum(tl.where(cols[None, :] == y[:, None], z, 0.0), 1)
        z = tl.where(cols[None, :] < V, z, -1e30)
        new = tl.maximum(m, tl.max(z, 1))
        z -= new[:, None]
        p, shrink = tl.exp2(z), tl.exp2(m - new)
        t = (t + s * (m - new)) * shrink + tl.sum(p * z, 1)
        s = s * shrink + tl.sum(p, 1)
        m = new
    out_ptrs, size = out_ptr + split * N + rows, splits * N
    for i in tl.static_range(4):
        tl.store(out_ptrs + i * size, (m, s, t, chosen)[i], mask=rows < N)


@triton.jit
def column(x_ptr, rows, N):
    """Read a number per row."""
    return tl.load(x_ptr + rows, mask=rows < N, other=0.0)[:, None]


@triton.jit
def dlogits_kernel(x_ptr, w_ptr, target_ptr, lse_ptr, a_ptr, e_ptr, g_ptr, out_ptr, N, V, stride, scale,
                   D: constexpr, BLOCK_N: constexpr, BLOCK_V: constexpr, BLOCK_D: constexpr,
                   GROUP: constexpr):
    """Write a tile of out[:, :V] = p (a - e log2 p) + g onehot(target).

    w is a slab of V rows of the vocabulary, and targets count from its first.
    """
    block = tl.program_id(2) * GROUP + tl.program_id(0)
    if block * BLOCK_N >= N:
        return
    rows, cols = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = logits_tile(x_ptr, w_ptr, rows, cols, N, V, scale, D, BLOCK_D)
    y = tl.load(target_ptr + rows, mask=rows < N, other=-1).to(tl.int32)[:, None]
    a, e = column(a_ptr, rows, N), column(e_ptr, rows, N)
    logp = z - column(lse_ptr, rows, N)
    dz = tl.exp2(logp) * (a - e * logp)
    g = column(g_ptr, rows, N)
    dz += tl.where(cols[None, :] == y, g, 0.0)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(out_ptrs, dz.to(out_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (cols[None, :] < V))


def statistics(hidden, weight, targets, temperature):
    """Return logprobs, entropy and lse, (N,) float32 each."""
    N, V, tile = len(hidden), len(weight), tiles(hidden, "logits")
    blocks, columns = triton.cdiv(N, tile["BLOCK_N"]), triton.cdiv(V, tile["BLOCK_V"])
    programs = 8 * chip(hidden.device)[1]                      # 8 per SM, one by one
    splits = min(columns, max(8, programs // max(1, blocks)))
    out = torch.empty(4, splits, N, dtype=torch.float32, device=hidden.device)
    statistics_kernel[GROUP, splits, triton.cdiv(blocks, GROUP)](
        hidden, weight, targets, out, N, V, 1 / (temperature * LN2), triton.cdiv(columns, splits),
        GROUP=GROUP, **tile)
    m, s, t, chosen = out                                      # (splits, N) each
    top = m.amax(0)
    shrink = torch.exp2(m - top)
    t, s = ((t + s * (m - top)) * shrink).sum(0), (s * shrink).sum(0)
    return tuple(x * LN2 for x in (chosen.sum(0) - top - s.log2(), s.log2() - t / s, top + s.log2()))


def gradients(hidden, weight, targets, lse, a, e, g, temperature, wanted):
    """Return d hidden (float32) and d weight for dz = p (a - e log p) + g onehot(targets).

    None in place of one that is not wanted.
    """
    N, V, tile = len(hidden), len(weight), tiles(hidden, "logits")
    n, v = tile["BLOCK_N"], tile["BLOCK_V"]
    slab = max(1, WORKSPACE // (max(1, N) * v * hidden.element_size())) * v
    scale, lse = 1 / (temperature * LN2), lse / LN2
    a, e, g = a / temperature, e * LN2 / temperature, g / temperature
    dz = hidden.new_empty(N, min(slab, V))
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    for first in range(0, V, slab):
        w = weight[first:first + slab]
        grid = GROUP, triton.cdiv(len(w), v), triton.cdiv(N, n * GROUP)
        dlogits_kernel[grid](hidden, w, targets - first, lse, a, e, g, dz, N, len(w), dz.stride(0), scale,
                             GROUP=GROUP, **tile)
        part = dz[:, :len(w)]
        if wanted[0]:
            add_product(grad_hidden, part, w)
        if wanted[1]:
            torch.mm(part.T, hidden, out=grad_weight[first:first + slab])
    return grad_hidden, grad_weight


def add_product(total, a, b):
    """Add a b to total in float32, whatever the type of a and b."""
    if a.is_cuda and a.dtype != torch.float32:     # some versions' addmm takes no float32 `total` here
        for rows, part in zip(total.split(1024), a.split(1024)):
            rows += torch.mm(part, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))     # PyTorch has no out_dtype on CPUs
