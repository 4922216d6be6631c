"""Attention of one query per row, as in decoding: it reads the cache once, at the speed of memory.

A key and its value are 4 D bytes in bfloat16, and each of the G heads that share them does 4 D FLOPs with
them: G FLOPs per byte, 4 in Llama 3, where an H200 could do 206. So read each byte once, and keep the whole
chip busy with it. The G query heads of a key head are the rows of one tile. At 64 rows, 2048 keys, 8 key
heads and D 128 a layer reads 0.5 GB. If each query head read for itself, that would be 2.1 GB (and if keys
were repeated for the heads, the copies would have to be written first). A program per row and key head, B x K
of them, is too few to fill a chip when B is small, so several programs share the keys of a row. Each gives
the mean of its values and the log-sum-exp of its scores, and a second kernel weights the means:

    out = sum_i w_i out_i / sum_i w_i,    w_i = exp(lse_i - max lse)

There is no backward pass: training on a single query uses flash.py.
"""
import torch

from kernels import chip, constexpr, tl, triton
from kernels.flash import walk
from kernels.tiles import channels, read, tiles, write
from kernels.visible import keys_of


@triton.jit
def decode_kernel(q, k, v, part, lse, masks, strides, S, chunk, scale,
                  G: constexpr, D: constexpr, M: constexpr, N: constexpr):
    """Let one query in each of the G heads of key head j meet `chunk` keys."""
    split, j, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    splits, K = tl.num_programs(0), tl.num_programs(1)
    g, t, here = tl.arange(0, M), tl.zeros([M], tl.int32), b * strides[0] + j * strides[1]
    row, _, sight, full, end, gap = keys_of(masks, b, 0, t, 1, S, N)
    queries = read(q + (b * K + j) * G * D, g, D, G, D)
    first, end = split * chunk, tl.minimum(end, (split + 1) * chunk)
    logsum, mean = walk(queries, k + here, v + here, strides[2], S, masks, row, t, sight,
                        first, full, end, gap, scale, D, N)
    part_row = ((b * K + j) * G + g) * splits + split
    tl.store(lse + part_row, logsum, mask=g < G)
    write(part, part_row, D, g < G, mean, D)


@triton.jit
def combine_kernel(part, lse, out, splits, scale, SPLITS: constexpr, D: constexpr):
    """Write the weighted mean of the parts of one head."""
    head, i = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    logsum = tl.load(lse + head * splits + i, mask=i < splits, other=float("-inf"))
    weight = tl.exp2((logsum - tl.maximum(tl.max(logsum, 0), -1e30)) * scale)
    total = tl.sum(weight, 0)
    parts = read(part + head * splits * D, i, D, splits, D)
    mean = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    d = channels(D)
    tl.store(out + head * D + d, mean.to(out.dtype.element_ty), mask=d < D)


def decode(q, k, v, masks, scale):
    """Compute what `Flash` does, for q (B, 1, H, D)."""
    B, _, H, D = q.shape
    K, S = k.shape[1:3]
    tile = tiles(q, "decode")
    N = tile["N"]
    # Enough programs for the chip, two tiles of keys each. Known from shapes: the host need not wait for
    # the GPU.
    splits = min(64, triton.cdiv(S, 2 * N), max(1, 8 * chip(q.device)[1] // (B * K)))
    chunk = triton.cdiv(triton.cdiv(S, splits), N) * N
    out, lse = torch.empty_like(q), q.new_empty(B, H, splits, dtype=torch.float32)
    part = out if splits == 1 else q.new_empty(B, H, splits, D, dtype=torch.float32)
    heads = max(16, triton.next_power_of_2(H // K))            # tensor cores want 16 rows
    decode_kernel[splits, K, B](q, k, v, part, lse, masks, k.stride()[:3], S, chunk, scale,
                                G=H // K, M=heads, **tile)
    if splits > 1:
        combine_kernel[B * H,](part, lse, out, splits, scale, triton.next_power_of_2(splits), D)
    return out
