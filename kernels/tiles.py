"""Choose the sizes of tiles, chip by chip, and read, write and multiply them.

A program keeps tiles on the chip: the larger they are, the more often each byte is used once it is there.
Two things bound them.

Registers: an NVIDIA SM has 2^16 of 4 bytes, at most 255 per thread. The rest would be spilled to memory, in
the middle of the loop. With 8 warps (256 threads) a tile of 128 x 256 float32 sums takes 128 of these 255;
forward attention with 128 queries has sums of 128 x 128, scores of 128 x 128, and on chips before Hopper the
operands, too.

Shared memory holds what loops read, `stages` tiles of it, so that the next are under way while one is
multiplied. A block may have 227 KiB on sm_90, 163 on sm_80, 99 on sm_86, sm_89 and sm_120, 64 on gfx942.

The tests compile all kernels for three chips, in half precision and in float32: next to nothing spills, all
fits, and Hopper's HGMMA does the products. sm_90's tiles were chosen among 44 by their times on an H100: of
those that do not spill, the fastest or nearly so in causal, cross- and vision attention alike. For dK and dV
"64 64 4 2" is 3 to 9 % faster, but spills with every version of Triton.
"""
import torch

from kernels import chip, tl, triton

# Attention, for heads up to so many channels: queries, keys, warps, stages of the forward, the dQ, and the dK
# and dV kernel; then keys, warps, stages of decoding. Numbers of queries divide the one before and 128: so
# far lse and delta are written.
ATTENTION = {
    "sm_90": {64: "64 64 4 3, 64 64 4 3, 64 64 4 3, 128 4 3",
              128: "128 64 8 3, 128 64 8 3, 64 128 8 3, 64 4 3"},
    "sm_80": {64: "128 64 4 3, 64 64 4 2, 32 64 4 2, 64 4 3",
              128: "128 64 8 2, 64 32 4 2, 64 64 8 2, 64 4 3"},
    # No tensor cores: exact, and slow. Each thread holds whole rows of operands.
    "float32": {64: "32 32 4 2, 32 32 8 1, 32 32 8 1, 32 4 2",
                128: "64 16 8 1, 16 16 8 1, 16 16 8 1, 32 4 1"},
    # Interpreted: small tests have many blocks.
    "cpu": {128: "32 16 1 1, 32 16 1 1, 16 32 1 1, 16 1 1"},
    # gfx942 and chips that are not listed
    "other": {64: "128 64 4 2, 64 64 4 1, 64 64 4 1, 64 4 2",
              128: "128 32 4 2, 64 32 4 1, 32 64 4 1, 32 4 2"},
}
ATTENTION["sm_100"] = ATTENTION["sm_90"]

# Log-probs: rows, vocabulary, channels of a tile, warps, stages
LOGITS = {
    "sm_90": "128 256 64 8 4",
    "gfx942": "128 128 64 8 2",
    "float32": "64 64 32 8 2",
    "cpu": "16 32 32 1 1",
    "other": "128 128 64 8 4",
}


def table_of(tensor, tables):
    """Return the entry of a tensor's chip and type."""
    name = chip(tensor.device)[0]
    if tensor.dtype == torch.float32 and name != "cpu":
        name = "float32"
    return tables.get(name, tables["other"])


def tiles(q, kernel):
    """Return the keywords of a launch of "forward", "dq", "dkdv" or "decode" that describe its tiles."""
    D = q.shape[-1]
    fitting = next(sizes for widest, sizes in table_of(q, ATTENTION).items() if D <= widest)
    numbers = dict(zip(("forward", "dq", "dkdv", "decode"), fitting.split(",")))[kernel]
    *sizes, warps, stages = map(int, numbers.split())
    return dict(D=D, num_warps=warps, num_stages=stages) | dict(zip("NM", sizes[::-1]))


# ------------------------------------------------------------------------------------------------------------
# In kernels. Names in capitals are constants of the compiler.


@triton.jit
def channels(D):
    """Return the places of D channels in a tile, whose width is a power of two and at least 16."""
    return tl.arange(0, 16 if D <= 16 else triton.next_power_of_2(D))


@triton.jit
def read(x, rows, stride, end, D):
    """Read (rows, channels) of x, zeros from row `end` on and beyond D channels."""
    inside, d = rows < end, channels(D)
    return tl.load(x + rows[:, None] * stride + d, mask=inside[:, None] & (d < D), other=0.0)


@triton.jit
def write(x, rows, stride, inside, tile, D):
    """Write a tile where `read` reads, but for rows that are not inside."""
    d = channels(D)
    tl.store(x + rows[:, None] * stride + d, tile.to(x.dtype.element_ty), mask=inside[:, None] & (d < D))


@triton.jit
def dot(a, b, total=None):
    """Return a b, added to `total` if there is one. float32 stays exact: no TF32."""
    return tl.dot(a, b, total, input_precision="ieee")
