"""Choose the sizes of tiles, chip by chip, and read, write and multiply them.

A program keeps tiles on the chip: the larger they are, the more often each byte is used once it is there.
Two things bound them.

Registers: an NVIDIA SM has 2^16 of 4 bytes, at most 255 per thread. What a thread needs beyond that is
spilled to memory, in the middle of the loop. With 8 warps (256 threads) a tile of 128 x 256 float32 sums
takes 128 of these 255; so do the two tiles of forward attention with 128 queries, 128 x 128 sums and 128 x
128 scores. Before Hopper the operands of a product take registers, too.

Shared memory holds the tiles that a loop reads, so many at a time as it has `stages`: while one is
multiplied, the next are being loaded. A block may have 227 KiB on sm_90, 163 on sm_80, 99 on sm_86, sm_89 and
sm_120, 64 on gfx942.

The tests compile all kernels for three chips, in half precision and in float32: next to nothing spills, all
fits, and on Hopper its own matrix instructions (HGMMA) do the products. For Hopper, sm_90, 44 choices of
tiles were timed on an H100. The one taken does not spill; among such choices it is the fastest, or nearly, in
causal, cross- and vision attention alike. For dK and dV, tiles of 64 x 64 with 4 warps and 2 stages are 3 to
9 % faster, but spill with every version of Triton.
"""
import torch

from kernels import chip, tl, triton

# Used is the first row that names the chip, allows so many channels and fills the kernel's column. float32 is
# a chip of its own: without tensor cores it is exact, and slow, and each thread holds whole rows of operands.
# "cpu" is the interpreter: small tests have many blocks. A column is headed by a kernel and by what a tile of
# it holds (M queries and N keys; rows, vocabulary and channels). Then come warps and stages. Each M divides
# the M before it, and 128: a kernel reads lse and delta only where they were written. "other": chips without
# a row of their own.
TILES = """
    chips        | up to | forward M N | dq M N     | dkdv M N   | decode N | logits BLOCK_N BLOCK_V BLOCK_D
    sm_90 sm_100 | 64    | 64 64 4 3   | 64 64 4 3  | 64 64 4 3  | 128 4 3  |
    sm_90 sm_100 | 128   | 128 64 8 3  | 128 64 8 3 | 64 128 8 3 | 64 4 3   |
    sm_90        | inf   |             |            |            |          | 128 256 64 8 4
    sm_80        | 64    | 128 64 4 3  | 64 64 4 2  | 32 64 4 2  | 64 4 3   |
    sm_80        | 128   | 128 64 8 2  | 64 32 4 2  | 64 64 8 2  | 64 4 3   |
    gfx942       | inf   |             |            |            |          | 128 128 64 8 2
    float32      | 64    | 32 32 4 2   | 32 32 8 1  | 32 32 8 1  | 32 4 2   |
    float32      | 128   | 64 16 8 1   | 16 16 8 1  | 16 16 8 1  | 32 4 1   |
    float32      | inf   |             |            |            |          | 64 64 32 8 2
    cpu          | inf   | 32 16 1 1   | 32 16 1 1  | 16 32 1 1  | 16 1 1   | 16 32 32 1 1
    other        | 64    | 128 64 4 2  | 64 64 4 1  | 64 64 4 1  | 64 4 2   |
    other        | 128   | 128 32 4 2  | 64 32 4 1  | 32 64 4 1  | 32 4 2   |
    other        | inf   |             |            |            |          | 128 128 64 8 4
"""
HEAD, *ROWS = [[cell.strip() for cell in line.split("|")] for line in TILES.strip().splitlines()]


def tiles(x, kernel):
    """Return the keywords of a kernel's launch that give channels, tile, warps and stages.

    kernel: a word of the table's head. x: queries (..., D), or hidden states (N, D).
    """
    D, name = x.shape[-1], chip(x.device)[0]
    if x.dtype == torch.float32 and name != "cpu":
        name = "float32"
    column, sizes = next((i, names.split()[1:]) for i, names in enumerate(HEAD) if kernel in names)
    numbers = next(row[column] for row in ROWS
                   if {name, "other"} & {*row[0].split()} and D <= float(row[1]) and row[column])
    return dict(zip([*sizes, "num_warps", "num_stages"], map(int, numbers.split())), D=D)


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
