"""Attention kernels and their twin, against dense float64 and compiled for three chips.

The kernels run on a GPU, elsewhere in Triton's interpreter: see conftest.py.
"""

import os
from functools import partial
from unittest import mock

import aot
import pytest
import torch
import torch.nn.functional as F

from benchmarks import rivals
from kernels import attention as A
from kernels import decode
from kernels.visible import Visible, dense_mask
from tables import cases, raises, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# numpy warns of queries that see nothing
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")


@pytest.fixture
def backend(request, monkeypatch):
    """Choose kernels or twins for one test."""
    monkeypatch.setenv("KERNELS", request.param)
    return request.param


def both(test):
    """Let a test run with the kernels and with their twins."""
    return pytest.mark.usefixtures("backend")(cases("backend", ["triton", "torch"], indirect=True)(test))


def problem(B, T, S, H, K, D, dtype=torch.float32):
    """Draw q, k, v as a model has them (keys' heads outside tokens, as views), and an upstream gradient."""
    g = torch.Generator(DEVICE).manual_seed(0)
    q, k, v, grad = (torch.randn(B, *size, D, generator=g, device=DEVICE).to(dtype)
                     for size in ((T, H), (S, K), (S, K), (T, H)))
    return [x.requires_grad_() for x in (q, k.transpose(1, 2), v.transpose(1, 2))], grad


# Who sees whom, in all forms that the model knows and more: what of `masks` a Visible gets.
KINDS = {"all": "", "causal": "causal", "ragged": "causal lengths", "cached": "causal starts some_lengths",
         "cross": "prefix", "vision": "prefix third", "holes": "half few", "nothing": "closed",
         "both": "causal half few", "everything": "causal starts some_lengths half few"}


def masks(kind, B, T, S):
    """Return the arguments of Visible for a kind. Rows differ; some see nothing."""
    g = torch.Generator().manual_seed(0)
    key_mask = lambda flags: {"key_mask": flags.to(DEVICE)}
    see_all = lambda flags: {"see_all": flags.to(DEVICE)}
    draw = lambda name, low, high: {name: torch.randint(low, high, (B,), generator=g).to(DEVICE)}
    forms = {"causal": {"causal": True},
             "lengths": draw("lengths", 0, T + 1),
             "some_lengths": draw("lengths", 1, T + 1),
             "starts": draw("starts", 0, max(1, S - T + 1)),
             "prefix": key_mask(torch.arange(S) < torch.randint(0, S + 1, (B, 1), generator=g)),
             "half": key_mask(torch.rand(B, S, generator=g) < 0.5),
             "closed": key_mask(torch.zeros(B, S, dtype=torch.bool)),
             "third": see_all((torch.arange(T) < T // 3).expand(B, T)),
             "few": see_all(torch.rand(B, T, generator=g) < 0.3)}
    return {name: x for word in KINDS[kind].split() for name, x in forms[word].items()}


def dense(inputs, grad, mask=None, **seen):
    """Compute the benchmark's naive form in float64, every score at once -> [out, dq, dk, dv]."""
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    (B, T), S = q.shape[:2], k.shape[2]
    if mask is None:
        b, t, s = (torch.arange(n, device=DEVICE) for n in (B, T, S))
        mask = rivals.sees(seen, b[:, None, None], t[:, None], s).expand(B, T, S)
    real = mask.any(2, keepdim=True)           # queries that see nothing: they are to give zeros
    out = rivals.naive_attention(q, k, v, (mask | ~real)[:, None]) * real[..., None]
    return [x.detach() for x in (out, *torch.autograd.grad(out, (q, k, v), grad.double()))]


def run(inputs, grad, **seen):
    out = A.attention(*inputs, Visible(**seen))
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def assert_near(found, expected):
    """Allow for rounding: float32 sums of some hundred terms of size 1; float16 p, dS and results, 2^-11."""
    for x, y in zip(found, expected, strict=True):
        bound = {torch.float32: 2e-6, torch.float16: 2e-3}[x.dtype]
        assert x.shape == y.shape
        off = (x.double() - y).abs()
        assert (off <= bound * max(1.0, float(y.abs().max()))).all(), off.max()


def assert_equal(found, expected):
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------------------------- numbers


@both
@cases("case", [
    *(f"{kind} {sizes}" for kind in KINDS for sizes in ("2 7 7 2 1 32", "3 37 53 4 2 16")),
    *(f"causal 1 19 35 2 2 {D}" for D in (1, 5, 32, 64, 80, 128)),
    "causal 2 33 33 4 2 64 half", "vision 2 33 33 4 2 64 half",
    "cached 1 21 30 4 2 16", "causal 1 1 1 1 1 16", "causal 2 1 40 4 2 16", "causal 1 40 1 2 1 16"])
def test_against_float64(case):
    """Try all kinds, odd sizes B T S H K D, widths of heads, float16, and a single query or key.

    Queries that see nothing, and keys that nobody sees, get zeros exactly: padding has no influence.
    """
    kind, *sizes = case.removesuffix(" half").split()
    sizes, dtype = [*map(int, sizes)], torch.float16 if case.endswith("half") else torch.float32
    inputs, grad = problem(*sizes, dtype)
    seen = masks(kind, *sizes[:3])
    found, expected = run(inputs, grad, **seen), dense(inputs, grad, **seen)
    assert_near(found, expected)
    assert {x.dtype for x in found} == {dtype}
    out, *_, dv = expected
    for x, own in zip(found, (out, out, dv, dv)):              # dq as out, dk as dv
        assert not x[own == 0].any()


@both
def test_large_scores():
    """Scores of hundreds: a softmax without its maximum would overflow."""
    inputs, grad = problem(1, 20, 20, 2, 1, 16)
    with torch.no_grad():
        inputs[0] *= 240
    for x, y in zip(run(inputs, grad, causal=True), dense(inputs, grad, causal=True)):
        assert (x.double() - y).abs().max() <= 2e-4 * y.abs().max()     # scores of 500 are off by some 2e-5


@both
@cases("kind", ["ragged", "holes", "nothing"])
def test_every_element_is_written(kind, poison):
    """Find the same bits again in memory that held NaN."""
    inputs, grad = problem(2, 37, 45, 4, 2, 20)
    seen = masks(kind, 2, 37, 45)
    expected = run(inputs, grad, **seen)
    poison()
    assert_equal(run(inputs, grad, **seen), expected)


@both
def test_any_strides():
    inputs, grad = problem(2, 9, 14, 4, 2, 16)
    # rows of 32 of which 16 count
    wide = [torch.cat([x.detach()] * 2, -1)[..., :16].requires_grad_() for x in inputs]
    seen = masks("everything", 2, 9, 14)
    apart = {name: x if name == "causal" else torch.stack([x, x], -1)[..., 0] for name, x in seen.items()}
    assert_equal(run(wide, grad.expand(2, 9, 4, 16), **apart), run(inputs, grad, **seen))


def test_the_twin_passes_gradcheck():
    inputs = [x.detach().double().requires_grad_() for x in problem(2, 3, 4, 2, 1, 4)[0]]
    for kind in ("cached", "vision"):
        seen = masks(kind, 2, 3, 4)
        assert torch.autograd.gradcheck(lambda *x: A.attention_reference(*x, Visible(**seen)), inputs)


# --------------------------------------------------------------------------------------------------- decoding


@both
@cases("kind", ["all", "cached", "cross", "nothing"])
@cases("sizes", ["1 200 4 2 16", "3 37 6 2 32", "2 90 2 2 80"])
def test_one_query_a_row(kind, sizes):
    B, S, *heads = map(int, sizes.split())
    inputs, grad = problem(B, 1, S, *heads)
    seen = masks(kind, B, 1, S)
    with torch.no_grad():
        found = A.attention(*inputs, Visible(**seen))
    assert_near([found], dense(inputs, grad, **seen)[:1])


def test_decoding_splits_the_keys(monkeypatch):
    monkeypatch.setenv("KERNELS", "triton")
    inputs, grad = problem(1, 1, 200, 2, 1, 16)
    combine = mock.Mock(wraps=decode.combine_kernel[2,])       # for two heads
    monkeypatch.setattr(decode, "combine_kernel", {(2,): combine})
    monkeypatch.setattr(decode, "chip", lambda device: ("cpu", 4))
    with torch.no_grad():
        found = A.attention(*inputs)
    assert combine.call_args.args[3] > 1
    assert_near([found], dense(inputs, grad)[:1])


# ----------------------------------------------------------------------------------------------------- trees


@both
@cases("case", ["4 2 16 100 | 5 3 9 1 | 0 7 4 | 40 20 1 33", "2 2 32 80 | 17 16 31 16", "4 1 16 5 | 3 2",
                "4 2 16 40 | 2 1 | 0 33"])
def test_a_branch_sees_its_stem_and_itself(case):
    """Against float64, by a mask of all pairs: H K D T, then per row the stem and its branches."""
    (H, K, D, T), *shapes = [list(map(int, part.split())) for part in case.split("|")]
    inputs, grad = problem(len(shapes), T, T, H, K, D)
    mask = torch.zeros(len(shapes), T, T, dtype=torch.bool, device=DEVICE)
    for seen, shape in zip(mask, shapes):
        branch = torch.tensor([i for i, n in enumerate(shape) for _ in range(n)])           # 0: the stem
        n = len(branch)
        seen[:n, :n] = ((branch == 0) | (branch == branch[:, None])).tril()
    lengths = torch.tensor([sum(shape) for shape in shapes], device=DEVICE)
    found = run(inputs, grad, causal=True, lengths=lengths, trees=[(stem, rest) for stem, *rest in shapes])
    assert_near(found, dense(inputs, grad, mask=mask))


# --------------------------------------------------------------------------------------------------- the rest


@both
def test_one_object_serves_all_layers(backend):
    """The first makes the twin's mask or the kernels' table for all. Another pass has another object."""
    inputs, grad = problem(2, 5, 9, 2, 1, 16)
    visible = Visible(causal=True, starts=torch.tensor([1, 4], device=DEVICE))
    first = A.attention(*inputs, visible)
    assert torch.equal(first, A.attention(*inputs, visible))
    assert (visible.dense is not None, visible.table is not None) == (backend == "torch", backend == "triton")


@cases("sizes", ["3 4 4 16", "2 4 4 256", "2 4 3 16"])       # heads uneven, heads too wide, fewer values
def test_wrong_shapes_are_refused(sizes):
    *counts, D = map(int, sizes.split())
    raises("heads are at most 128", A.attention, *(torch.zeros(1, 2, n, D) for n in counts))


# ------------------------------------------------------------------------------------------ compiled for GPUs


LAUNCHES = """
    text   |  4 2048 2048 32  8 128 | bfloat16 | causal lengths
    trees  |  1 4096 4096 32  8 128 | bfloat16 | causal lengths trees
    trees  |  1 4096 4096 32  8  64 | bfloat16 | causal lengths trees
    trees  |  1 1024 1024  8  8 128 | float32  | causal lengths trees
    narrow |  4 2048 2048 32  8  64 | bfloat16 | causal
    cross  |  4 2047 6404 32  8 128 | bfloat16 | key_mask
    vision |  4 6432 6432 16 16  80 | bfloat16 | key_mask see_all
    exact  |  4 2048 2048  8  8  32 | float32  | causal
    exact  |  4 2048 2048  8  8  64 | float32  | causal
    exact  |  4 2048 2048  8  8  80 | float32  | causal
    exact  |  4 2048 2048  8  8 128 | float32  | causal
    cached | 64    1 2048  8  8 128 | float32  |
    cached | 64  128 2050 32  8 128 | bfloat16 | causal starts lengths
    cached | 64    1 2050 32  8 128 | bfloat16 | causal starts
    cached |  1    1 2050 32  8 128 | bfloat16 | causal starts
    cached | 64    1 6404 32  8 128 | bfloat16 | key_mask
"""


def launches():
    """Launch all kernels at sizes B T S H K D of the 11B model, with the 1B model's heads, and in float32."""
    os.environ["KERNELS"] = "triton"                    # in a child of this process, see aot.compile_all
    empty = partial(torch.empty, device="meta", dtype=torch.int64)
    for name, sizes, dtype, words in rows(LAUNCHES):
        B, T, S, H, K, D = map(int, sizes.split())
        given = {"causal": True, "starts": empty(B), "lengths": empty(B),
                 "key_mask": empty(B, S, dtype=torch.bool), "see_all": empty(B, T, dtype=torch.bool),
                 "trees": [(T // 2, [T // 4, T // 4])] * B}
        visible = Visible(**{word: given[word] for word in words.split()})
        draw = partial(empty, dtype=getattr(torch, dtype), requires_grad=name != "cached")
        q, kv = draw(B, T, H, D), draw(2, B, S, K, D).transpose(2, 3)
        if name == "cached":                            # a view of a larger cache
            kv = draw(2, B, K, 2 * S, D)[:, :, :, :S]
        out = A.attention(q, *kv, visible)
        if out.requires_grad:
            out.sum().backward()


@cases("chip", aot.CHIPS)
def test_compiled(chip):
    """Decoding has 16 rows per tile, fewer than HGMMA's 64: it takes the time of reading the cache."""
    found = aot.compile_all("test_attention", "launches", chip)
    names = {"forward_kernel", "dq_kernel", "dkdv_kernel", "decode_kernel", "combine_kernel"}
    assert {result["name"] for result in found} == names
    for result in found:
        aot.check(result | ({"matrix": False} if result["name"] == "decode_kernel" else {}))


# --------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@cases("dtype", [torch.bfloat16, torch.float16], ids=str)
@cases("kind", KINDS)
@cases("D", [64, 80, 128])
def test_no_worse_than_pytorch(dtype, kind, D):
    """The error against float64 is at the level of SDPA's own in the same type."""
    inputs, grad = problem(2, 300, 517, 8, 2, D, dtype)
    seen = masks(kind, 2, 300, 517)
    expected = dense(inputs, grad, **seen)
    mask = dense_mask(Visible(**seen), inputs[0].detach(), 517, 1)
    theirs = inputs[0].transpose(1, 2), *(x.repeat_interleave(4, 1) for x in inputs[1:])
    out = F.scaled_dot_product_attention(*theirs, attn_mask=mask).nan_to_num().transpose(1, 2)
    largest = expected[0].abs().max()
    level = (out.double() - expected[0]).abs().max() + torch.finfo(dtype).eps * largest
    for x, y in zip(run(inputs, grad, **seen), expected):
        assert (x.double() - y).abs().max() <= 2 * level * max(1, float(y.abs().max() / largest))


@pytest.mark.gpu
def test_decoding_is_the_last_row_of_the_whole():
    (q, k, v), _ = problem(4, 1, 3000, 32, 8, 128, torch.bfloat16)
    starts = torch.tensor([2999, 1500, 17, 0], device=DEVICE)
    whole = A.attention(q.expand(4, 2, 32, 128), k, v, Visible(causal=True, starts=starts - 1))[:, 1:]
    with torch.no_grad():
        assert (A.attention(q, k, v, Visible(causal=True, starts=starts)) - whole).abs().max() <= 2**-7
