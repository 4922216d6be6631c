"""Attention for training and prompts (FlashAttention-2, arXiv 2307.08691).

Forward. A program keeps M queries on the chip and walks along the keys, N at a time. Of the softmax it
knows only the largest score so far, m, and the sum l of exp(s - m). When a tile raises m to m', the
sums so far shrink by exp(m - m'):

    l   <- l   exp(m - m') + rowsum exp(S - m')
    acc <- acc exp(m - m') + exp(S - m') V               at the end  O = acc / l,  lse = m + log l

Only O and lse are written. The backward pass computes any tile of P again from S and lse, without the walk:

    S = scale Q K^T        P = exp(S - lse)         O = P V          4 D FLOPs per score that is seen
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
from kernels.visible import hide, keys_of, queries_of, sight_of


@triton.jit
def walk(q, k_ptr, v_ptr, k_s, S, masks, row, t, sight, first, full, end, gap, scale, D, N):
    """Let queries q (M, D) meet keys first .. end, but for a gap -> (log-sum-exp in the units of q k, mean of
    v)."""
    # m in the units of scale q k; finite, as -inf less -inf would be NaN
    m = tl.full([q.shape[0]], -1e30, tl.float32)
    l = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros(q.shape, tl.float32)
    for place in range(first, end - gap[1], N):
        n0 = tl.where(place < gap[0], place, place + gap[1])   # jump over the gap
        n = n0 + tl.arange(0, N)
        s = dot(q, tl.trans(read(k_ptr, n, k_s, S, D)))
        if n0 >= full:
            s = hide(s, t[:, None], n[None, :], sight[:, None], masks, row)
        new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new[:, None])
        shrink = tl.exp2(m - new)
        l = l * shrink + tl.sum(p, 1)
        values = read(v_ptr, n, k_s, S, D)
        acc = dot(p.to(values.dtype), values, acc * shrink[:, None])
        m = new
    return (m + tl.log2(l)) / scale, tl.where((l > 0)[:, None], acc / l[:, None], 0.0)


@triton.jit
def block_of_queries(T, strides, G, D, M):
    """Find the queries of a program -> head h of H, row b, places t from t0 on, and where q and k begin.

    The long rows of a triangle come first, so that no straggler ends the launch.
    """
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    h, b, H = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    return h, H, b, t0, t0 + tl.arange(0, M), (b * T * H + h) * D, b * strides[0] + h // G * strides[1]


@triton.jit
def forward_kernel(q, k, v, out, lse_ptr, masks, strides, T, T_pad, S, scale,
                   G: constexpr, D: constexpr, M: constexpr, N: constexpr):
    """Compute M queries of a head."""
    h, H, b, t0, t, q_at, k_at = block_of_queries(T, strides, G, D, M)
    row, length, sight, full, end, gap = keys_of(masks, b, t0, t, T, S, N)
    queries = read(q + q_at, t, H * D, length, D)
    lse, mean = walk(queries, k + k_at, v + k_at, strides[2], S, masks, row, t, sight,
                        0, full, end, gap, scale, D, N)
    write(out + q_at, t, H * D, t < T, tl.where((t < length)[:, None], mean, 0.0), D)
    seeing = (t < length) & (lse > float("-inf"))
    lse = tl.where(seeing, lse, float("inf"))                  # for the others P is exp2(-inf) = 0
    tl.store(lse_ptr + (b * H + h) * T_pad + t, lse)


@triton.jit
def dq_kernel(q, k, v, out, lse_ptr, do_ptr, delta_ptr, dq, masks, strides, T, T_pad, S, scale,
              G: constexpr, D: constexpr, M: constexpr, N: constexpr):
    """Compute dQ of M queries of a head, and delta for dkdv_kernel."""
    h, H, b, t0, t, q_at, k_at = block_of_queries(T, strides, G, D, M)
    row, length, sight, full, end, gap = keys_of(masks, b, t0, t, T, S, N)
    queries = read(q + q_at, t, H * D, length, D)
    do = read(do_ptr + q_at, t, H * D, length, D)
    o = read(out + q_at, t, H * D, length, D)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    at = (b * H + h) * T_pad
    tl.store(delta_ptr + at + t, delta)
    lse = tl.load(lse_ptr + at + t)
    acc = tl.zeros(queries.shape, tl.float32)
    for place in range(0, end - gap[1], N):
        n0 = tl.where(place < gap[0], place, place + gap[1])
        n = n0 + tl.arange(0, N)
        keys = read(k + k_at, n, strides[2], S, D)
        zeros = tl.zeros([M, N], tl.float32)
        s = dot(queries, tl.trans(keys), zeros - lse[:, None])
        if n0 >= full:
            s = hide(s, t[:, None], n[None, :], sight[:, None], masks, row)
        values = read(v + k_at, n, strides[2], S, D)
        dp = dot(do, tl.trans(values), zeros - delta[:, None])
        acc = dot((tl.exp2(s * scale) * dp).to(keys.dtype), keys, acc)
    # times log 2: scale itself, without log2(e)
    write(dq + q_at, t, H * D, t < T, acc * (scale * 0.6931471805599453), D)


@triton.jit
def dkdv_kernel(q, k, v, lse_ptr, do_ptr, delta_ptr, dk, dv, masks, strides, T, T_pad, S, scale,
                G: constexpr, D: constexpr, M: constexpr, N: constexpr):
    """Compute dK and dV of N keys. Scores stand transposed, (keys, queries).

    One loop over the queries of all G heads takes fewer registers than two.
    """
    n0, j, b, K = tl.program_id(0) * N, tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    n, k_at, H = n0 + tl.arange(0, N), b * strides[0] + j * strides[1], K * G
    row, length, first, full, end = queries_of(masks, b, n0, n, S, M, N)
    keys = read(k + k_at, n, strides[2], S, D)
    values = read(v + k_at, n, strides[2], S, D)
    dk_acc = tl.zeros(keys.shape, tl.float32)
    dv_acc = tl.zeros(keys.shape, tl.float32)
    q += b * T * H * D
    do_ptr += b * T * H * D
    lse_ptr += b * H * T_pad
    delta_ptr += b * H * T_pad
    h, t0 = j * G, first
    for _ in range(0, G * tl.cdiv(tl.maximum(end - first, 0), M)):
        t = t0 + tl.arange(0, M)
        queries = read(q + h * D, t, H * D, length, D)
        lse = tl.load(lse_ptr + h * T_pad + t)
        zeros = tl.zeros([N, M], tl.float32)
        s = dot(keys, tl.trans(queries), zeros - lse[None, :])
        if t0 < full:
            s = hide(s, t[None, :], n[:, None], sight_of(masks, b, t, length, T)[None, :], masks, row)
        p = tl.exp2(s * scale)
        do = read(do_ptr + h * D, t, H * D, length, D)
        delta = tl.load(delta_ptr + h * T_pad + t)
        dp = dot(values, tl.trans(do), zeros - delta[None, :])
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
