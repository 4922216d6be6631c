"""Attention that never holds its matrix of scores.

    out = softmax(scale q k^T) v,    scale = 1 / sqrt(D)
    B rows, T queries, S keys, H query heads, K key heads, G = H / K query heads per key head, D channels

What it saves. At 4096 tokens a head has 2^24 scores, 34 MB in bfloat16; 32 heads a gigabyte, in every row and
layer. Textbook attention writes the scores, reads them for the softmax, writes the probabilities and reads
those: 134 MB for the head's 4 T S D = 8.6 GFLOPs, 64 FLOPs per byte. An H200 does 206 FLOPs while it moves
one byte (989 TFLOP/s in bfloat16 and 4.8 TB/s, by its data sheet), so it would spend two thirds of the time
waiting. Q, K, V and the output are 4 MB, 2048 FLOPs per byte: if the scores stay on the chip, tile by tile,
the matrix products limit the speed. For the backward pass the log-sum-exp is kept, 4 bytes per query and
head; with it, Q and K give every tile of probabilities again.

A causal mask hides half of the scores; padding and an image's empty tiles hide more. Hidden scores are not
computed, and a mask is a few numbers per row instead of B x T x S.

Three files do it on a GPU, and `attention` chooses among them:

    visible.py    who sees whom
    flash.py      training and prompts, forward and backward: limited by FLOPs
    decode.py     one query per row: limited by the bytes of the cache

The twin, for CPUs, is PyTorch's own fused attention with heads and masks prepared for it.
"""
import math

import torch
import torch.nn.functional as F

from kernels import product_type, use_triton
from kernels.decode import decode
from kernels.flash import Flash
from kernels.visible import Visible, dense_mask, kernel_masks


def attention(q, k, v, visible=None):
    """Compute softmax(q k^T / sqrt(D)) v for q (B, T, H, D), k and v (B, K, S, D) -> (B, T, H, D).

    visible: a `Visible`; None: all see all.
    Heads h G .. h G + G - 1 share key head h. D is at most 128, and the last stride of k and v is 1.
    """
    B, T, H, D = q.shape
    if D > 128 or H % k.shape[1] or k.shape != v.shape or k.shape[::3] != (B, D):
        shapes = [[*x.shape] for x in (q, k, v)]
        raise ValueError(f"heads are at most 128 wide and shared evenly; q, k and v are of shapes {shapes}")
    visible = visible or Visible()
    if not use_triton(q):
        return attention_reference(q, k, v, visible)
    q, k, v = (x.to(product_type(q)) for x in (q, k, v))       # autocast knows PyTorch's own products only
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()                  # kernels know one set of strides
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    kernel = Flash.apply if T > 1 or learns else decode
    return kernel(q.contiguous(), k, v, kernel_masks(visible, q, k.shape[2]), D**-0.5 / math.log(2))


def attention_reference(q, k, v, visible):
    """Compute the same in plain torch. Heads that share a key head are folded into T: no key is repeated."""
    B, T, H, D = q.shape
    K, S = k.shape[1:3]
    if visible.trees is not None:
        return attend_trees(q, k, v, visible)
    fused, masked = F.scaled_dot_product_attention, visible.key_mask is not None
    if visible.causal and visible.starts is None and not masked:
        # a triangle needs no mask, but heads must not be folded into its queries
        out = fused(q.transpose(1, 2), k, v, is_causal=S > 1, enable_gqa=H != K).transpose(1, 2)
    else:
        mask = dense_mask(visible, q, S, H // K) if visible.causal or masked else None
        q = q.transpose(1, 2).reshape(B, K, H // K * T, D)
        out = fused(q, k, v, attn_mask=mask)
        out = out.view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
    if visible.lengths is None:
        return out
    padding = torch.arange(T, device=q.device) >= visible.lengths[:, None]     # (B, T)
    return out.masked_fill(padding[:, :, None, None], 0)


def attend_trees(q, k, v, visible):
    """Compute the same for rows that are trees, branch by branch: nothing is computed that is hidden."""
    T, q, rows = q.shape[1], q.transpose(1, 2), []             # (B, H, T, D)
    if visible.dense is None:                                  # of the longest conversation
        longest = max(stem + max(branches) for stem, branches in visible.trees)
        visible.dense = q.new_full((longest, longest), -math.inf).triu(1)
    for row, (stem, branches) in enumerate(visible.trees):
        sizes, out = (stem, *branches, T - stem - sum(branches)), []           # the last are padding
        qs, ks, vs = (x[row:row + 1].split(sizes, 2) for x in (q, k, v))
        for i, t in enumerate(sizes[:-1]):                     # the stem sees itself, a branch the stem, too
            keys, values = (torch.cat([x[0], x[i]] if i else [x[0]], 2) for x in (ks, vs))
            if t:                                              # queries stand at the last t of s places
                s = keys.shape[2]
                out.append(F.scaled_dot_product_attention(
                    qs[i], keys, values, visible.dense[s - t:s, :s], enable_gqa=True))
        rows.append(torch.cat([*out, torch.zeros_like(qs[-1])], 2))
    return torch.cat(rows).transpose(1, 2)
