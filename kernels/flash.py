"""Attention for training and prompts (FlashAttention-2, arXiv 2307.08691).

Forward. A program keeps M queries on the chip and walks along the keys, N at a time. Of the softmax it
knows only the largest score so far, m, and the sum l of exp(s - m). When a tile raises m to m', the
sums so far shrink by exp(m - m'):

    l   <- l   exp(m - m') + rowsum exp(S - m')
    acc <- acc exp(m - m') + exp(S - m') V               at the end  O = acc / l,  lse = m + log l

Only O and lse are written. The backward pass computes any tile of P again from S and lse, without the walk:

    S = scale Q K^T        P = exp(S - lse)         O = P V          4 T S D FLOPs per head; half if causal
    dV = P^T dO            dP = dO V^T              dS = P * (dP - delta)
    dQ = scale dS K        dK = scale dS^T Q        delta = rowsum(dP * P) = rowsum(dO * O)

delta: a softmax does not change when one number is added to all scores of a row. So only the difference
between dP and its mean under P counts. That mean, delta, is a row of dO times the same row of O. dQ sums over
keys, dK and dV over queries and over the G query heads that share a key head. One kernel would need atomic
sums for dQ (or for dK and dV), in another order each run. Two kernels compute S and dP twice, 7 products
instead of 5, and give the same bits in every run.

In the kernels, t are places of queries, n of keys. The chip has exp2, so `scale` has a factor log2(e), and
lse is kept in the units of q k: P = exp2((q k - lse) scale). A matrix product whose sums start from -lse
gives q k - lse at once; likewise dP - delta. So no registers are needed to subtract lse and delta later.
Queries, outputs and their gradients are contiguous (B, T, H, D). Keys and values may be views of a cache or
of a projection.
"""
import torch

from kernels import constexpr, tl, triton
from kernels.tiles import dot, read, tiles, write
from kernels.visible import hide, keys_of, own_keys, queries_of


@triton.jit
def walk(q, k, v, k_s, S, masks, row, t, own, first, full, end, gap, scale, D, N):
    """Let queries q (M, D) meet keys first .. end, but for a gap -> (log-sum-exp in the units of q k, mean of
    v)."""
    top = tl.full([q.shape[0]], -1e30, tl.float32)             # finite: -inf less -inf would be NaN
    total = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros(q.shape, tl.float32)
    for step in range(first, end - gap[1], N):
        n0 = tl.where(step < gap[0], step, step + gap[1])
        n = n0 + tl.arange(0, N)
        s = dot(q, tl.trans(read(k, n, k_s, S, D)))
        if n0 >= full:
            s = hide(s, t[:, None], n[None, :], own[:, None], masks, row)
        higher = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        values = read(v, n, k_s, S, D)
        acc = dot(p.to(values.dtype), values, acc * shrink[:, None])
        top = higher
    return (top + tl.log2(total)) / scale, tl.where((total > 0)[:, None], acc / total[:, None], 0.0)


@triton.jit
def block_of_queries(T, strides, G, D, M):
    """Find the queries of a program -> head h of H, row b, places t from t0 on, and where q and k begin.

    The long rows of a triangle come first, so that no straggler ends the launch.
    """
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    h, b, H = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    return h, H, b, t0, t0 + tl.arange(0, M), (b * T * H + h) * D, b * strides[0] + h // G * strides[1]


@triton.jit
def forward_kernel(q, k, v, out, lse, masks, strides, T, T_pad, S, scale,
                   G: constexpr, D: constexpr, M: constexpr, N: constexpr):
    """Compute M queries of a head."""
    h, H, b, t0, t, here, keys_here = block_of_queries(T, strides, G, D, M)
    row, length, own, full, end, gap = keys_of(masks, b, t0, t, T, S, N)
    queries = read(q + here, t, H * D, length, D)
    logsum, mean = walk(queries, k + keys_here, v + keys_here, strides[2], S, masks, row, t, own,
                        0, full, end, gap, scale, D, N)
    write(out + here, t, H * D, t < T, tl.where((t < length)[:, None], mean, 0.0), D)
    seeing = (t < length) & (logsum > float("-inf"))
    logsum = tl.where(seeing, logsum, float("inf"))            # for the others P is exp2(-inf) = 0
    tl.store(lse + (b * H + h) * T_pad + t, logsum)


@triton.jit
def dq_kernel(q, k, v, out, lse, grad, delta, dq, masks, strides, T, T_pad, S, scale,
              G: constexpr, D: constexpr, M: constexpr, N: constexpr):
    """Compute dQ of M queries of a head, and delta for dkdv_kernel."""
    h, H, b, t0, t, here, keys_here = block_of_queries(T, strides, G, D, M)
    row, length, own, full, end, gap = keys_of(masks, b, t0, t, T, S, N)
    queries = read(q + here, t, H * D, length, D)
    do = read(grad + here, t, H * D, length, D)
    o = read(out + here, t, H * D, length, D)
    dots, at = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1), (b * H + h) * T_pad
    tl.store(delta + at + t, dots)
    logsum = tl.load(lse + at + t)
    acc = tl.zeros(queries.shape, tl.float32)
    for step in range(0, end - gap[1], N):
        n0 = tl.where(step < gap[0], step, step + gap[1])
        n = n0 + tl.arange(0, N)
        keys = read(k + keys_here, n, strides[2], S, D)
        zeros = tl.zeros([M, N], tl.float32)
        s = dot(queries, tl.trans(keys), zeros - logsum[:, None])
        if n0 >= full:
            s = hide(s, t[:, None], n[None, :], own[:, None], masks, row)
        values = read(v + keys_here, n, strides[2], S, D)
        dp = dot(do, tl.trans(values), zeros - dots[:, None])
        acc = dot((tl.exp2(s * scale) * dp).to(keys.dtype), keys, acc)
    # times log 2: scale itself, without log2(e)
    write(dq + here, t, H * D, t < T, acc * (scale * 0.6931471805599453), D)


@triton.jit
def dkdv_kernel(q, k, v, lse, grad, delta, dk, dv, masks, strides, T, T_pad, S, scale,
                G: constexpr, D: constexpr, M: constexpr, N: constexpr):
    """Compute dK and dV of N keys. Scores stand transposed, (keys, queries).

    One loop over the queries of all G heads takes fewer registers than two.
    """
    n0, j, b, K = tl.program_id(0) * N, tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    n, here, H = n0 + tl.arange(0, N), b * strides[0] + j * strides[1], K * G
    row, length, first, full, end = queries_of(masks, b, n0, n, S, M, N)
    keys = read(k + here, n, strides[2], S, D)
    values = read(v + here, n, strides[2], S, D)
    dk_acc = tl.zeros(keys.shape, tl.float32)
    dv_acc = tl.zeros(keys.shape, tl.float32)
    q += b * T * H * D
    grad += b * T * H * D
    lse += b * H * T_pad
    delta += b * H * T_pad
    h, t0 = j * G, first
    for _ in range(0, G * tl.cdiv(tl.maximum(end - first, 0), M)):
        t = t0 + tl.arange(0, M)
        queries = read(q + h * D, t, H * D, length, D)
        logsum = tl.load(lse + h * T_pad + t)
        zeros = tl.zeros([N, M], tl.float32)
        s = dot(keys, tl.trans(queries), zeros - logsum[None, :])
        if t0 < full:
            s = hide(s, t[None, :], n[:, None], own_keys(masks, b, t, length, T)[None, :], masks, row)
        p = tl.exp2(s * scale)
        do = read(grad + h * D, t, H * D, length, D)
        dots = tl.load(delta + h * T_pad + t)
        dp = dot(values, tl.trans(do), zeros - dots[None, :])
        dv_acc = dot(p.to(do.dtype), do, dv_acc)
        dk_acc = dot((p * dp).to(queries.dtype), queries, dk_acc)
        t0 += M
        h = tl.where(t0 < end, h, h + 1)
        t0 = tl.where(t0 < end, t0, first)
    write(dk + (b * S * K + j) * D, n, K * D, n < S, dk_acc * (scale * 0.6931471805599453), D)
    write(dv + (b * S * K + j) * D, n, K * D, n < S, dv_acc, D)


class Flash(torch.autograd.Function):
    """Compute attention for q (B, T, H, D), contiguous, and k and v (B, K, S, D), of the same strides.

    -> (B, T, H, D). masks: see `kernel_masks`. scale: times log2(e).
    """

    @staticmethod
    def forward(ctx, q, k, v, masks, scale):
        (B, T, H, _), (K, S), tile = q.shape, k.shape[1:3], tiles(q, "forward")
        T_pad = triton.cdiv(T, 128) * 128      # whole tiles of lse and delta: a mask would take registers
        out, lse = torch.empty_like(q), q.new_empty(B, H, T_pad, dtype=torch.float32)
        ctx.rest = masks, k.stride()[:3], T, T_pad, S, scale, H // K
        forward_kernel[triton.cdiv(T, tile["M"]), H, B](q, k, v, out, lse, *ctx.rest, **tile)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        (B, T, H, D), (K, S), grad = q.shape, k.shape[1:3], grad.contiguous()
        dq, delta = torch.empty_like(q), torch.empty_like(lse)
        dk, dv = k.new_empty(2, B, S, K, D).transpose(2, 3)    # tokens outside heads, as projections want it
        tile = tiles(q, "dq")
        dq_kernel[triton.cdiv(T, tile["M"]), H, B](q, k, v, out, lse, grad, delta, dq, *ctx.rest, **tile)
        tile = tiles(q, "dkdv")
        dkdv_kernel[triton.cdiv(S, tile["N"]), K, B](q, k, v, lse, grad, delta, dk, dv, *ctx.rest, **tile)
        return dq, dk, dv, None, None
