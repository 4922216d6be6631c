"""Describe who sees whom in a few numbers per row, instead of masks.

A dense mask has B x T x S entries: 34 MB for 8 conversations of 2048 tokens, and an attention that goes by it
computes all scores, of which it hides half and more. The masks of this model follow from a description,
`Visible`. Per row, a kernel gets five numbers and, for masked images, one byte per key and one per query.
They tell where its loop over keys (or queries) begins and ends, and in which of its tiles all pairs of a
query and a key see each other, so that their places need not be compared:

    keys     0 .......... full .......... end .......... S
               all are seen    some are       none is
                              so compare     so leave out

    queries  0 ....... first .......... full .......... end
               no query    some see       all see   padding
              sees them   so compare

The twin makes an ordinary mask of it.
"""
import math
from dataclasses import dataclass

import torch

from kernels import tl, triton

FAR = 2**30    # the start of rows that are not causal: every key lies before it


@dataclass
class Visible:
    """Describe what query t of row b sees of the keys.

    causal: it stands at position starts[b] + t (starts (B,), default 0) and sees no key after that.
    lengths (B,): it is padding from lengths[b] on: it gives zeros, has no gradient and costs nothing.
    key_mask (B, S) and see_all (B, T), bool: it sees key s if see_all[b, t] or key_mask[b, s].
    trees: per row (stem, [branch, ...]), numbers of tokens, with causal and without starts. The first `stem`
        tokens are what the branches have in common, as answers have their prompt; the branches follow one
        after the other, and each sees the stem and itself.

    A query that sees nothing gives zeros and has no gradient. One object serves all layers of one forward
    pass: the first makes `table` (for kernels) or `dense` (for twins), the others find it.
    """
    causal: bool = False
    starts: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    see_all: torch.Tensor | None = None
    trees: list | None = None
    table: tuple = None
    dense: torch.Tensor | None = None


def branch_starts(trees, T):
    """Return where in its row the branch of each token begins, 0 for the stem, (B, T) int64; and where it
    ends.

    A stem ends with its row: that far it is seen.
    """
    rows = []
    for stem, branches in trees:
        sizes = torch.tensor([stem, *branches, T - stem - sum(branches)])
        ends = sizes.cumsum(0)
        starts = ends - sizes
        ends[0], starts[-1], ends[-1] = ends[-2], 0, 0         # of the stem; of padding
        rows.append(torch.stack([starts, ends]).repeat_interleave(sizes, 1))
    return torch.stack(rows, 1)


# ------------------------------------------------------------------------------------------------------------
# For the kernels


def kernel_masks(visible, q, S):
    """Return a table (B, 5) int32; key_mask and see_all as bytes, None if no key is masked; and
    `branch_starts` as int32, None if there are no trees. A row of the table:

        0 start       position of the first query; FAR if not causal
        1 length      queries that are no padding
        2 opened      keys from the first on that all queries may see; with trees, tokens of the stem
        3 end         one past the last key that the key mask opens
        4 free_end    one past the last query that sees all keys
    """
    if visible.table is None:
        (B, T), mask, free, branches = q.shape[:2], visible.key_mask, visible.see_all, (None, None)
        start = FAR if not visible.causal else 0 if visible.starts is None else visible.starts
        length = T if visible.lengths is None else visible.lengths.clamp(max=T)
        opened, end, free_end = S, S, 0
        if visible.trees is not None:
            opened = torch.tensor([stem for stem, _ in visible.trees])
            branches = (x.to(q.device, torch.int32) for x in branch_starts(visible.trees, T))
        if mask is not None:
            free = mask.new_zeros(B, T) if free is None else free
            opened, end, free_end = mask.cumprod(1).sum(1), last_end(mask), last_end(free)
            mask, free = (x.contiguous().view(torch.uint8) for x in (mask, free))
        table = torch.empty(B, 5, dtype=torch.int32, device=q.device)
        for column, numbers in enumerate((start, length, opened, end, free_end)):
            table[:, column] = numbers
        visible.table = table, mask, free, *branches
    return visible.table


def last_end(flags):
    """Return (B,): one more than the last place of each row that is set; 0 if none is."""
    return (flags * torch.arange(1, flags.shape[1] + 1, device=flags.device)).amax(1)


@triton.jit
def sight_of(masks, b, t, length, T):
    """Load, per query t of row b, what `hide` tests keys against.

    A bool: does it see all keys? With trees an int: where its branch begins. There are never both.
    """
    _, _, see_all, begins, _ = masks
    sight = t < 0                                              # none sees all keys
    if see_all is not None:
        sight = tl.load(see_all + b * T + t, mask=t < length, other=0) != 0
    if begins is not None:
        sight = tl.load(begins + b * T + t, mask=t < length, other=T)
    return sight


@triton.jit
def keys_of(masks, b, t0, t, T, S, N):
    """Find the keys of queries t (from t0 on) of row b, in tiles of N.

    -> (start, b, S, stem) for `hide`; length; `sight_of`; full and end, as drawn above; gap, (its first key,
    how many): whole tiles between the stem and these queries' branches, which none of them sees.
    """
    table, _, see_all, begins, _ = masks
    table += b * 5
    start, length, full, end, stem, gap = tl.load(table), tl.load(table + 1), S, S, S, 0
    sight = sight_of(masks, b, t, length, T)
    if begins is not None:
        full, stem = tl.load(table + 2), tl.load(table + 2)
        gap = tl.maximum(tl.min(sight, 0) // N - tl.cdiv(stem, N), 0) * N
    if see_all is not None:
        # does each query see all keys? Does one?
        full = tl.where(tl.min((sight | (t >= length)).to(tl.int32), 0) > 0, S, tl.load(table + 2))
        end = tl.where(tl.max(sight.to(tl.int32), 0) > 0, S, tl.load(table + 3))
    end = tl.minimum(end, start + tl.minimum(t0 + t.shape[0], length))
    end = tl.where(t0 < length, end, 0)
    full = tl.minimum(tl.minimum(full, start + t0 + 1), end) // N * N
    return (start, b, S, stem), length, sight, full, end, (tl.cdiv(stem, N) * N, gap)


@triton.jit
def queries_of(masks, b, n0, n, S, M, N):
    """Find the queries of N keys n (from n0 on) of row b, in tiles of M.

    -> (start, b, S, stem) for `hide`; length; first, full and end, as drawn above.
    """
    table, key_mask, _, _, ends = masks
    table += b * 5
    start, length, stem = tl.load(table), tl.load(table + 1), S
    first, full, end = tl.maximum(n0 - start, 0) // M * M, n0 + N - 1 - start, length
    if key_mask is not None:
        opened = tl.sum(tl.load(key_mask + b * S + n, mask=n < S, other=0).to(tl.int32), 0)
        end = tl.where(opened > 0, end, tl.minimum(end, tl.load(table + 4)))
        full = tl.where(opened >= tl.minimum(N, S - n0), full, end)
    if ends is not None:
        stem = tl.load(table + 2)
        end = tl.max(tl.load(ends + b * S + n, mask=n < S, other=0), 0)
        full = tl.where(n0 + N <= stem, full, end)
    return (start, b, S, stem), length, first, full, end


@triton.jit
def hide(s, t, n, sight, masks, row):
    """Set scores s (queries t along one axis, keys n along the other) to -inf where a query does not see a
    key."""
    _, key_mask, _, begins, _ = masks
    start, b, S, stem = row
    visible = (n < S) & (n - start <= t)
    if key_mask is not None:
        visible = visible & (sight | (tl.load(key_mask + b * S + n, mask=n < S, other=0) != 0))
    if begins is not None:
        visible = visible & ((n < stem) | (n >= sight))
    return tl.where(visible, s, float("-inf"))


# ------------------------------------------------------------------------------------------------------------
# For the twin


def dense_mask(visible, q, S, groups):
    """Return what is added to the scores, (1 or B, 1, groups * T or 1, S)."""
    if visible.dense is None:
        seen = torch.ones(1, 1, S, dtype=torch.bool, device=q.device)          # (1 or B, 1 or T, S)
        if visible.key_mask is not None:
            seen = visible.key_mask[:, None]
        if visible.see_all is not None:
            seen = seen | visible.see_all[:, :, None]
        if visible.causal:
            position = torch.arange(q.shape[1], device=q.device)               # (T,) or (B, T)
            if visible.starts is not None:
                position = position + visible.starts[:, None]
            seen = seen & (torch.arange(S, device=q.device) <= position[..., None])
        added = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -math.inf)
        visible.dense = added.repeat(1, groups if added.shape[1] > 1 else 1, 1)[:, None]
    return visible.dense
