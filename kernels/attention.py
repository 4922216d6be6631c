"""Attention that never holds its matrix of scores, and knows its masks by a few numbers a row.

The textbook writes B x H x T x S scores to memory, and reads and writes them some five times: at 4096 tokens, 32 heads and bfloat16
one gigabyte a row and layer. Here a program keeps a block of queries on the chip, walks along the keys and remembers only the running
maximum and sum of the softmax (FlashAttention-2, arXiv 2307.08691): 4 bytes are stored per query and head, its log-sum-exp.
A dense mask would be B x T x S. Ours are `starts`, `lengths`, `key_mask` and `see_all`: the loop over keys ends where they hide the
rest, and only blocks that they cut through compare positions.

    S = scale Q K^T        P = exp(S - lse)         O = P V                              4 T S D FLOPs a head; half if causal
    dV = P^T dO            dP = dO V^T              dS = P * (dP - delta)                where delta = rowsum(dP * P) = rowsum(dO * O)
    dQ = scale dS K        dK = scale dS^T Q                                             P is computed again, tile by tile

dQ sums over keys, dK and dV over queries and over the G query heads that share a key head. One kernel would have to add one of the
two atomically, in another order each run. Two kernels compute S and dP twice, 7 products instead of 5, and give the same bits again.
In shapes: B rows, T queries, S keys, H query heads, K key heads, G = H / K, D channels. The chip has exp2, so `scale` in the kernels
holds log2(e), and lse is in the units of q k: exp2((q k - lse) scale) is P, and a product that starts from -lse ends at the bracket.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import chip, product_type, tl, triton, use_triton

# Tiles for heads up to 64, 80 or 128 channels: (queries, keys, warps, stages) of the forward, dQ, and dK and dV kernel; then
# (keys, warps, stages) of decoding. Those in half precision fit the registers and the shared memory of their chip, as
# tests/test_attention.py proves. The queries of the third divide those of the others and 128: so far lse and delta are written.
TILES = {
    "sm_90": {64: ((128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3), (128, 4, 3)),
              80: ((128, 128, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2), (64, 4, 3)),          # masks take registers, too: Triton 3.6 would spill
              128: ((128, 128, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2), (64, 4, 3))},
    "sm_80": {64: ((128, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2), (64, 4, 3)),
              128: ((128, 64, 8, 2), (64, 32, 4, 2), (64, 64, 8, 2), (64, 4, 3))},
    "64 KiB": {64: ((128, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 1), (64, 4, 2)),              # gfx942, sm_86, sm_89, sm_120
               128: ((128, 32, 4, 2), (64, 32, 4, 1), (32, 64, 4, 1), (32, 4, 2))},
    "float32": {64: ((32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 1), (32, 4, 2)),              # no tensor cores: exact, and slow
                128: ((64, 16, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 4, 1))},
    "cpu": {128: ((32, 16, 1, 1), (32, 16, 1, 1), (16, 32, 1, 1), (16, 1, 1))},                # interpreted: many blocks in small tests
}
TILES["sm_100"] = TILES["sm_90"]


def tiles(q, kernel):
    """What a launch of `kernel` (0 forward, 1 dQ, 2 dK and dV, 3 decoding) needs to know about its tiles."""
    D, name = q.shape[-1], chip(q.device)[0]
    name = name if name == "cpu" else "float32" if q.dtype == torch.float32 else name if name in TILES else "64 KiB"
    *sizes, warps, stages = next(table for widest, table in TILES[name].items() if D <= widest)[kernel]
    return dict(D=D, WIDTH=max(16, triton.next_power_of_2(D)), num_warps=warps, num_stages=stages) | dict(zip(("N", "M"), sizes[::-1]))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. t are places of queries, n of keys; M and N how many of them are in a tile; q_b, q_t, q_h and so on are strides


@triton.jit
def read(x, rows, stride, inside, D: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) of x, zeros where not inside and beyond D channels."""
    d = tl.arange(0, WIDTH)
    return tl.load(x + rows[:, None] * stride + d, mask=inside[:, None] & (d < D), other=0.0)


@triton.jit
def write(x, rows, stride, inside, tile, D: tl.constexpr, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)
    tl.store(x + rows[:, None] * stride + d, tile.to(x.dtype.element_ty), mask=inside[:, None] & (d < D))


@triton.jit
def row_of(b, starts, lengths, T):
    """Of row b: the position of its first query, how many queries it has."""
    start, length = 0, T
    if starts is not None:
        start = tl.load(starts + b).to(tl.int32)
    if lengths is not None:
        length = tl.minimum(T, tl.load(lengths + b).to(tl.int32))
    return start, length


@triton.jit
def keys_of(t0, b, start, length, see_all, spans, T, S, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Of M queries from t0: which see all keys, does one; the keys before `full` need no mask, those from `end` on nobody sees."""
    t = t0 + tl.arange(0, M)
    free, one, full, end = t < 0, 0, S, S
    if spans is not None:
        if see_all is not None:
            free = tl.load(see_all + b * T + t, mask=t < length, other=0) != 0
        one = tl.max(free.to(tl.int32), 0)
        every = tl.min((free | (t >= length)).to(tl.int32), 0) > 0
        full = tl.where(every, S, tl.load(spans + b * 3))
        end = tl.where(one > 0, S, tl.load(spans + b * 3 + 1))
    if CAUSAL:
        full = tl.minimum(full, start + t0 + 1)
        end = tl.minimum(end, start + tl.minimum(t0 + M, length))
    end = tl.where(t0 < length, end, 0)
    return free, one, tl.minimum(full, end) // N * N, end


@triton.jit
def hide(s, t, n, start, free, key_mask, S, CAUSAL: tl.constexpr):
    """Scores s, one side of them queries t, the other keys n; -inf where a query does not see a key."""
    visible = n < S
    if key_mask is not None:
        visible = visible & (free | (tl.load(key_mask + n, mask=n < S, other=0) != 0))
    if CAUSAL:
        visible = visible & (n - start <= t)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def walk(q, k, v, k_s, v_s, key_mask, t, start, free, one, first, full, end, S, scale, D: tl.constexpr, WIDTH: tl.constexpr,
         CAUSAL: tl.constexpr, PICK: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Queries q meet keys first .. end -> (log-sum-exp in the units of q k, mean of v). PICK: do not even read keys that no one sees."""
    top = tl.full([M], -1e30, tl.float32)                      # finite: -inf less -inf would be NaN
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, WIDTH], tl.float32)
    for n0 in range(first, end, N):
        n = n0 + tl.arange(0, N)
        needed = n < S
        if PICK and key_mask is not None:
            needed = needed & (tl.load(key_mask + n, mask=needed, other=0).to(tl.int32) + one > 0)
        s = tl.dot(q, tl.trans(read(k, n, k_s, needed, D, WIDTH)), input_precision="ieee")
        if n0 >= full:
            s = hide(s, t[:, None], n[None, :], start, free[:, None], key_mask, S, CAUSAL)
        higher = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        values = read(v, n, v_s, needed, D, WIDTH)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return (top + tl.log2(total)) / scale, tl.where((total > 0)[:, None], acc / total[:, None], 0.0)


@triton.jit
def forward_kernel(q, k, v, out, lse, starts, lengths, key_mask, see_all, spans, q_b, q_t, q_h, k_b, k_h, k_s, v_b, v_h, v_s, T, S, scale,
                   G: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * M       # the long rows of a triangle first, so that no straggler ends the launch
    h, b, H = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    t = t0 + tl.arange(0, M)
    start, length = row_of(b, starts, lengths, T)
    free, one, full, end = keys_of(t0, b, start, length, see_all, spans, T, S, CAUSAL, M, N)
    if key_mask is not None:
        key_mask += b * S
    queries = read(q + b * q_b + h * q_h, t, q_t, t < length, D, WIDTH)
    logsum, mean = walk(queries, k + b * k_b + h // G * k_h, v + b * v_b + h // G * v_h, k_s, v_s, key_mask, t, start, free, one,
                        0, full, end, S, scale, D, WIDTH, CAUSAL, False, M, N)
    write(out + (b * T * H + h) * D, t, H * D, t < T, tl.where((t < length)[:, None], mean, 0.0), D, WIDTH)
    seeing = (t < length) & (logsum > float("-inf"))
    tl.store(lse + (b * H + h) * (tl.cdiv(T, 128) * 128) + t, tl.where(seeing, logsum, float("inf")))    # inf makes P zero


@triton.jit
def dq_kernel(q, k, v, out, lse, grad, delta, dq, starts, lengths, key_mask, see_all, spans, q_b, q_t, q_h, k_b, k_h, k_s, v_b, v_h, v_s,
              g_b, g_t, g_h, T, S, scale,
              G: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Also writes delta, for dkdv_kernel. Products start from -lse and -delta, which saves the registers to subtract them later."""
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    h, b, H = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    t = t0 + tl.arange(0, M)
    start, length = row_of(b, starts, lengths, T)
    free, one, full, end = keys_of(t0, b, start, length, see_all, spans, T, S, CAUSAL, M, N)
    if key_mask is not None:
        key_mask += b * S
    k += b * k_b + h // G * k_h
    v += b * v_b + h // G * v_h
    queries = read(q + b * q_b + h * q_h, t, q_t, t < length, D, WIDTH)
    do = read(grad + b * g_b + h * g_h, t, g_t, t < length, D, WIDTH)
    o = read(out + (b * T * H + h) * D, t, H * D, t < length, D, WIDTH)
    dots = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    row = (b * H + h) * (tl.cdiv(T, 128) * 128)                # lse and delta are padded, so that whole tiles of them can be read
    tl.store(delta + row + t, dots)
    logsum = tl.load(lse + row + t)
    acc = tl.zeros([M, WIDTH], tl.float32)
    for n0 in range(0, end, N):
        n = n0 + tl.arange(0, N)
        keys = read(k, n, k_s, n < S, D, WIDTH)
        s = tl.dot(queries, tl.trans(keys), tl.zeros([M, N], tl.float32) - logsum[:, None], input_precision="ieee")
        if n0 >= full:
            s = hide(s, t[:, None], n[None, :], start, free[:, None], key_mask, S, CAUSAL)
        dp = tl.dot(do, tl.trans(read(v, n, v_s, n < S, D, WIDTH)), tl.zeros([M, N], tl.float32) - dots[:, None], input_precision="ieee")
        acc = tl.dot((tl.exp2(s * scale) * dp).to(keys.dtype), keys, acc, input_precision="ieee")
    write(dq + (b * T * H + h) * D, t, H * D, t < T, acc * (scale * 0.6931471805599453), D, WIDTH)


@triton.jit
def dkdv_kernel(q, k, v, lse, grad, delta, dk, dv, starts, lengths, key_mask, see_all, spans, q_b, q_t, q_h, k_b, k_h, k_s, v_b, v_h, v_s,
                g_b, g_t, g_h, T, S, scale,
                G: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Scores stand transposed, (keys, queries). One loop over the queries of all G heads takes fewer registers than one in another."""
    n0, j, b, K = tl.program_id(0) * N, tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    n = n0 + tl.arange(0, N)
    start, length = row_of(b, starts, lengths, T)
    first, full, end = 0, 0, length                            # queries before `first` see none of our keys, those from `full` on all
    if CAUSAL:
        first = tl.maximum(n0 - start, 0) // M * M
        full = n0 + N - 1 - start
    if key_mask is not None:
        key_mask += b * S
        if see_all is not None:
            see_all += b * T
        opened = tl.load(key_mask + n, mask=n < S, other=0).to(tl.int32)
        end = tl.where(tl.sum(opened, 0) > 0, end, tl.minimum(end, tl.load(spans + b * 3 + 2)))
        full = tl.where(tl.sum(opened, 0) >= tl.minimum(N, S - n0), full, end)
    keys = read(k + b * k_b + j * k_h, n, k_s, n < S, D, WIDTH)
    values = read(v + b * v_b + j * v_h, n, v_s, n < S, D, WIDTH)
    dk_acc = tl.zeros([N, WIDTH], tl.float32)
    dv_acc = tl.zeros([N, WIDTH], tl.float32)
    h, t0 = j * G, first
    for _ in range(0, G * tl.cdiv(tl.maximum(end - first, 0), M)):
        t = t0 + tl.arange(0, M)
        row = (b * K * G + h) * (tl.cdiv(T, 128) * 128)
        queries = read(q + b * q_b + h * q_h, t, q_t, t < length, D, WIDTH)
        logsum = tl.load(lse + row + t)
        s = tl.dot(keys, tl.trans(queries), tl.zeros([N, M], tl.float32) - logsum[None, :], input_precision="ieee")
        if t0 < full:
            free = t < 0
            if see_all is not None:
                free = tl.load(see_all + t, mask=t < length, other=0) != 0
            s = hide(s, t[None, :], n[:, None], start, free[None, :], key_mask, S, CAUSAL)
        p = tl.exp2(s * scale)
        do = read(grad + b * g_b + h * g_h, t, g_t, t < length, D, WIDTH)
        dots = tl.load(delta + row + t)
        dp = tl.dot(values, tl.trans(do), tl.zeros([N, M], tl.float32) - dots[None, :], input_precision="ieee")
        ds = (p * dp).to(queries.dtype)
        dv_acc = tl.dot(p.to(do.dtype), do, dv_acc, input_precision="ieee")
        dk_acc = tl.dot(ds, queries, dk_acc, input_precision="ieee")
        t0 += M
        h = tl.where(t0 < end, h, h + 1)
        t0 = tl.where(t0 < end, t0, first)
    write(dk + (b * S * K + j) * D, n, K * D, n < S, dk_acc * (scale * 0.6931471805599453), D, WIDTH)
    write(dv + (b * S * K + j) * D, n, K * D, n < S, dv_acc, D, WIDTH)


@triton.jit
def decode_kernel(q, k, v, part, lse, starts, lengths, key_mask, see_all, q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s, S, chunk, scale,
                  G: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """One query a head and `chunk` keys. The G query heads of a key head are the rows of one tile, so that keys are read once."""
    split, j, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    splits, K = tl.num_programs(0), tl.num_programs(1)
    g = tl.arange(0, M)
    start, length = row_of(b, starts, lengths, 1)
    last = tl.minimum(S, (split + 1) * chunk)
    if CAUSAL:
        last = tl.minimum(last, start + 1)
    last = tl.where(length > 0, last, 0)
    one = 0
    if key_mask is not None:
        key_mask += b * S
        if see_all is not None:
            one = tl.load(see_all + b).to(tl.int32)
    queries = read(q + b * q_b + j * G * q_h, g, q_h, g < G, D, WIDTH)
    logsum, mean = walk(queries, k + b * k_b + j * k_h, v + b * v_b + j * v_h, k_s, v_s, key_mask, g, 0, g * 0 + one > 0, one,
                        split * chunk, 0, last, last, scale, D, WIDTH, False, True, M, N)
    row = ((b * K + j) * G + g) * splits + split
    tl.store(lse + row, logsum, mask=g < G)
    write(part, row, D, g < G, mean, D, WIDTH)


@triton.jit
def combine_kernel(part, lse, out, splits, scale, SPLITS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """The mean of the parts of one head, weighted by the softmax of their log-sum-exps."""
    head, i = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    logsum = tl.load(lse + head * splits + i, mask=i < splits, other=float("-inf"))
    weight = tl.exp2((logsum - tl.maximum(tl.max(logsum, 0), -1e30)) * scale)
    total = tl.sum(weight, 0)
    parts = read(part + head * splits * D, i, D, i < splits, D, WIDTH)
    mean = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    d = tl.arange(0, WIDTH)
    tl.store(out + head * D + d, mean.to(out.dtype.element_ty), mask=d < D)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def flat(mask):
    """Booleans as bytes a kernel can index by row and column."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def find_spans(key_mask, see_all):
    """(B, 3) int32: how many keys the mask opens from the first on; where its last open key ends; where the last query that sees all."""
    def ends(mask):
        return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)

    leading = key_mask.cumprod(1).sum(1)
    return torch.stack([leading, ends(key_mask), torch.zeros_like(leading) if see_all is None else ends(see_all)], 1).int()


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, starts, lengths, key_mask, see_all, scale):
        B, T, H, D = q.shape
        K, S = k.shape[1:3]
        out, lse = q.new_empty(B, T, H, D), q.new_empty(B, H, triton.cdiv(T, 128) * 128, dtype=torch.float32)
        spans = None if key_mask is None else find_spans(key_mask, see_all)
        masks = starts, lengths, flat(key_mask), flat(see_all), spans
        tile = tiles(q, 0)
        forward_kernel[triton.cdiv(T, tile["M"]), H, B](q, k, v, out, lse, *masks, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], T, S,
                                                        scale, G=H // K, CAUSAL=causal, **tile)
        ctx.save_for_backward(q, k, v, out, lse, *masks)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, *masks = ctx.saved_tensors
        B, T, H, D = q.shape
        K, S = k.shape[1:3]
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        dq, delta = torch.empty_like(out), torch.empty_like(lse)
        dk, dv = k.new_empty(2, B, S, K, D).transpose(2, 3)    # tokens outside heads, as the projections want it
        rest = *masks, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], T, S, ctx.scale, H // K, ctx.causal
        tile = tiles(q, 1)
        dq_kernel[triton.cdiv(T, tile["M"]), H, B](q, k, v, out, lse, grad, delta, dq, *rest, **tile)
        tile = tiles(q, 2)
        dkdv_kernel[triton.cdiv(S, tile["N"]), K, B](q, k, v, lse, grad, delta, dk, dv, *rest, **tile)
        return dq, dk, dv, None, None, None, None, None, None


def decode(q, k, v, causal, starts, lengths, key_mask, see_all, scale):
    """One query a row: too few programs to fill a GPU, so the keys are split among more of them."""
    B, _, H, D = q.shape
    K, S = k.shape[1:3]
    tile = tiles(q, 3)
    splits = min(64, triton.cdiv(S, 2 * tile["N"]), max(1, 8 * chip(q.device)[1] // (B * K)))      # shapes only: no wait for the GPU
    chunk = triton.cdiv(triton.cdiv(S, splits), tile["N"]) * tile["N"]
    out, lse = q.new_empty(B, 1, H, D), q.new_empty(B, H, splits, dtype=torch.float32)
    part = out if splits == 1 else q.new_empty(B, H, splits, D, dtype=torch.float32)
    decode_kernel[splits, K, B](q, k, v, part, lse, starts, lengths, flat(key_mask), flat(see_all), q.stride(0), q.stride(2),
                                *k.stride()[:3], *v.stride()[:3], S, chunk, scale, G=H // K, CAUSAL=causal,
                                M=max(16, triton.next_power_of_2(H // K)), **tile)      # tensor cores want 16 rows
    if splits > 1:
        combine_kernel[B * H,](part, lse, out, splits, scale, SPLITS=triton.next_power_of_2(splits), D=D, WIDTH=tile["WIDTH"])
    return out


@dataclass
class Visible:
    """What query t of row b sees of the keys, in a few numbers a row.

    causal: it stands at position starts[b] + t (starts (B,), default 0) and sees no key after that.
    lengths (B,): it is padding from lengths[b] on: it gives zeros, has no gradient and costs nothing.
    key_mask (B, S) and see_all (B, T), bool: it sees key s if see_all[b, t] or key_mask[b, s].
    A query that sees nothing gives zeros and has no gradient. One object serves all layers: the twin keeps its dense mask in it.
    """
    causal: bool = False
    starts: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    see_all: torch.Tensor | None = None
    dense: tuple = None


EVERYTHING = Visible()


def attention(q, k, v, visible=EVERYTHING, scale=None):
    """softmax(scale q k^T) v for q (B, T, H, D), k and v (B, K, S, D), whose last strides are 1 -> (B, T, H, D).

    Heads h G .. h G + G - 1 share key head h. D is at most 128; scale > 0, by default 1 / sqrt(D).
    """
    B, T, H, D = q.shape
    if D > 128 or H % k.shape[1] or k.shape != v.shape or k.shape[::3] != (B, D):
        raise ValueError(f"heads are at most 128 wide and shared evenly; found q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}")
    if q.numel() == 0 or k.numel() == 0:
        return q * (k.sum() + v.sum())                         # zeros (or nothing), through which gradients can flow
    if not use_triton(q):
        return attention_reference(q, k, v, visible, scale)
    q, k, v = (x.to(product_type(q)) for x in (q, k, v))        # autocast knows PyTorch's own products only
    causal, key_mask = visible.causal, visible.key_mask
    starts, lengths = (None if x is None else x.contiguous() for x in (visible.starts if causal else None, visible.lengths))
    see_all = None if key_mask is None else visible.see_all
    base2 = (D**-0.5 if scale is None else scale) / math.log(2)
    if T == 1 and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return decode(q, k, v, causal, starts, lengths, key_mask, see_all, base2)
    return Attention.apply(q, k, v, causal, starts, lengths, key_mask, see_all, base2)


# ---------------------------------------------------------------------------------------------------------------------
# The twin


def attention_reference(q, k, v, visible=EVERYTHING, scale=None):
    """The same in plain torch. Keys are never repeated: the G heads that share one are folded into the query length."""
    B, T, H, D = q.shape
    K, S = k.shape[1:3]
    if visible.causal and visible.starts is None and visible.key_mask is None:        # needs the true query length, and no mask
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=S > 1, scale=scale, enable_gqa=H != K).transpose(1, 2)
    else:
        mask = dense_mask(visible, q, S, H // K)
        q = q.view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, H // K * T, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out = out.view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
    if visible.lengths is None:
        return out
    return out.masked_fill((torch.arange(T, device=q.device) >= visible.lengths[:, None])[:, :, None, None], 0)


def dense_mask(visible, q, S, groups):
    """What is added to the scores, (B, 1, groups * T or 1, S), None if all is seen; made once for all layers of a forward pass."""
    if visible.dense is None:
        T, mask = q.shape[1], visible.key_mask
        mask = None if mask is None else mask[:, None]                                        # (B, T or 1, S), True: seen
        if mask is not None and visible.see_all is not None:
            mask = mask | visible.see_all[:, :, None]
        if visible.causal:
            position = torch.arange(T, device=q.device)[None]                                 # (1 or B, T)
            position = position if visible.starts is None else position + visible.starts[:, None]
            if T > 1 or (position < S - 1).any():              # a last query each, after all keys, sees them all
                within = torch.arange(S, device=q.device) <= position[:, :, None]
                mask = within if mask is None else mask & within
        if mask is not None:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
            mask = mask.repeat(1, groups if mask.shape[1] > 1 else 1, 1)[:, None]
        visible.dense = mask,
    return visible.dense[0]
