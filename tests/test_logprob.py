"""Log-prob kernels and their twins, against dense float64 and compiled for three chips.

The kernels run on a GPU, elsewhere in Triton's interpreter: see conftest.py.
"""
import math
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import aot
import pytest
import torch

import kernels
from benchmarks.kernels import peak_memory
from kernels import logits, logprob, tiles
from tables import cases, raises
from test_attention import DEVICE, assert_equal, backend, both  # noqa: F401, both needs it


def problem(N, D, V, dtype=torch.float32):
    """Draw hidden, weight (both want gradients), targets, upstream gradients (3, N) of which some are 0."""
    random = dict(generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    hidden, weight = (torch.randn(n, D, **random).to(dtype).requires_grad_() for n in (N, V))
    upstream = torch.randn(3, N, **random) * (torch.rand(3, N, **random) < 0.7)
    return hidden, weight, torch.randint(0, V, (N,), **random), upstream


def run(hidden, weight, targets, upstream, temperature=1.0):
    """Return [logprobs, entropy, lse, d hidden, d weight]."""
    found = logprob.token_logprobs(hidden, weight, targets, temperature)
    gradients = torch.autograd.grad(found, (hidden, weight), tuple(upstream.to(found[0].dtype)))
    return [x.detach() for x in (*found, *gradients)]


def rows_of(problem, rows):
    """Return the problem of some rows alone."""
    hidden, weight, targets, upstream = problem
    return hidden[rows].detach().requires_grad_(), weight, targets[rows], upstream[:, rows]


def dense(hidden, weight, targets, upstream, temperature=1.0):
    """Return what `run` gives, from all logits at once in float64, and bounds for honest float32 sums.

    A logit of D products is off by at most delta = D 2^-24 sum |h w|. log p and lse move by no more than
    twice that, the entropy by sum p |log p + H| 2 delta, dz by 4 delta size, where size = p (|a| + |e log p|
    + |e|) + |g| adds what might cancel and, for e, how fast e log p moves. dz and the results are rounded to
    the type (unit) once each; float16 loses below 2^-25. Sums of n terms add n 2^-24.
    """
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    g, e, l = upstream.double()
    logp, lse = (f(h @ w.T / temperature, -1) for f in (torch.log_softmax, torch.logsumexp))
    entropy = -(logp.exp() * logp).sum(-1)
    found = logp.gather(1, targets[:, None])[:, 0], entropy, lse
    found = [x.detach() for x in (*found, *torch.autograd.grad(found, (h, w), (g, e, l)))]
    h, w, logp, (N, V) = h.detach().abs(), w.detach().abs(), logp.detach(), logp.shape
    eps, unit = 2**-24, torch.finfo(hidden.dtype).eps / 2
    tiny = 2**-25 if hidden.dtype == torch.float16 else 0
    delta = (h.shape[1] + 4) * eps * float((h @ w.T).max()) / temperature + eps * V
    size = logp.exp() * ((l - g - e * found[1]).abs()[:, None] + e[:, None].abs() * (logp.abs() + 1))
    size.scatter_add_(1, targets[:, None], g.abs()[:, None])
    share = 2 * unit + 4 * delta + eps * (N + V)
    gradients = [(share * a @ b + tiny * b.sum(0) + tiny) / temperature + tiny
                 for a, b in ((size, w), (size.T, h))]
    return found, [2 * delta, 2 * delta * (2 + math.log(V)), 2 * delta, *gradients]


def assert_within(found, expected, bounds):
    for x, y, bound in zip(found, expected, bounds):
        assert (~((x - y).abs() <= bound)).sum() == 0, ((x - y).abs() / bound).max()    # a NaN is not within


SIZES = """1 1 1 1.0, 1 7 3 0.5, 16 32 32 1.0, 17 33 270 1.0, 37 40 131 0.3, 300 5 65 2.0, 2 96 1000 1.0"""
SIZES_ON_A_GPU = """1 64 1000 1.0, 300 512 5003 0.7, 1000 33 777 1.0"""


@both
@cases("dtype, sizes", [
    *((dtype, sizes) for dtype in (torch.float32, torch.float16) for sizes in SIZES.split(", ")),
    *(pytest.param(torch.bfloat16, sizes, marks=pytest.mark.gpu) for sizes in SIZES_ON_A_GPU.split(", "))],
    ids=str)
def test_against_float64(dtype, sizes):
    """Try sizes N D V and temperatures that fill no tile."""
    *sizes, temperature = sizes.split()
    numbers = problem(*map(int, sizes), dtype)
    found = run(*numbers, float(temperature))
    assert [x.dtype for x in found] == 3 * [torch.float32] + 2 * [dtype]
    assert_within(found, *dense(*numbers, float(temperature)))


@both
@cases("asked", range(3), ids=["logprobs", "entropy", "lse"])
def test_each_output_has_its_own_gradient(asked):
    """Give the others no gradient at all."""
    hidden, weight, targets, upstream = problem(20, 12, 70)
    upstream[torch.arange(3) != asked] = 0
    output = logprob.token_logprobs(hidden, weight, targets, 0.7)[asked]
    found = torch.autograd.grad(output, (hidden, weight), upstream[asked])
    expected, bounds = dense(hidden, weight, targets, upstream, 0.7)
    assert_within(found, expected[3:], bounds[3:])


@both
def test_frozen_parts_get_no_gradient():
    hidden, weight, targets, upstream = problem(20, 12, 70)
    full = run(hidden, weight, targets, upstream)
    for i, frozen in enumerate((weight, hidden)):
        frozen.requires_grad_(False)
        logprobs = logprob.token_logprobs(hidden, weight, targets)
        assert_equal(torch.autograd.grad(logprobs, (hidden, weight)[i], tuple(upstream)), full[3 + i:4 + i])
        frozen.requires_grad_()


def test_twins_pass_gradcheck(monkeypatch):
    monkeypatch.setenv("KERNELS", "torch")
    hidden, weight, targets, _ = problem(6, 5, 11, torch.float64)
    targets[2] = -100
    twin = lambda h, w: logprob.token_logprobs(h, w, targets, 0.8)
    assert torch.autograd.gradcheck(twin, (hidden, weight))


@both
def test_small_slabs_and_pieces_change_nothing(monkeypatch):
    numbers = problem(37, 9, 300)
    monkeypatch.setattr(logits, "WORKSPACE", 37 * 4 * 96)                       # slabs of 96: 4 of them
    monkeypatch.setattr(logprob, "PIECE", (5, 7))
    assert_within(run(*numbers), *dense(*numbers))


@both
def test_every_element_is_written(poison):
    """Find the same bits again in memory that held NaN."""
    numbers = problem(37, 33, 270)
    expected = run(*numbers)
    poison()
    assert_equal(run(*numbers), expected)


@both
@cases("kept", [[], [3], list(range(1, 40, 2))], ids=len)
def test_rows_with_negative_targets_cost_nothing(kept, monkeypatch):
    """Leave out rows with no upstream gradient, too, in the backward pass."""
    hidden, weight, targets, upstream = numbers = problem(40, 16, 50)
    few = run(*rows_of(numbers, kept))
    dropped = [i for i in range(40) if i not in kept]
    with torch.no_grad():
        hidden[dropped] = math.nan                                                      # nobody looks at them
    targets[dropped] = torch.tensor([-100, -1] * 20, device=DEVICE)[:len(dropped)]
    seen = []
    for name in ("KERNELS", "TWINS"):
        monkeypatch.setattr(logprob, name, [
            lambda h, *rest, way=way: seen.append(len(h)) or way(h, *rest) for way in getattr(logprob, name)])
    found = run(*numbers)
    assert seen == [len(kept), int((upstream[:, kept] != 0).any(0).sum())]
    assert_equal([*(x[kept] for x in found[:4]), found[4]], few)
    assert not any(x[dropped].any() for x in found[:4])


@both
def test_any_strides():
    """Take inputs with gaps; the gradient of a sum has stride 0."""
    *numbers, upstream = problem(20, 12, 70)
    strided = [torch.stack([x.detach(), x.detach() * 0], -1)[..., 0].requires_grad_(x.requires_grad)
               for x in numbers]
    outputs = logprob.token_logprobs(*strided)
    found = *outputs, *torch.autograd.grad(sum(x.sum() for x in outputs), strided[:2])
    assert_within(found, *dense(*numbers, torch.ones_like(upstream)))


@both
@pytest.mark.skipif(DEVICE == "cuda", reason="an assertion on the device ends the process")
def test_targets_beyond_the_vocabulary_are_refused():
    hidden, weight, targets, upstream = problem(4, 3, 5)
    targets[1] = 5
    raises("not in the vocabulary", run, hidden, weight, targets, upstream, error=RuntimeError)


@both
def test_sharp_distributions_keep_their_entropy():
    numbers = [[1.0]], [[100.0]] + 40 * [[80.0]], [0]
    entropy = logprob.token_logprobs(*(torch.tensor(x, device=DEVICE) for x in numbers))[1]
    rest = 40 * math.exp(-20)   # 8e-8, so that log(1 + rest), a 20th of the entropy, is lost to float32
    assert abs(float(entropy) / (math.log1p(rest) + 20 * rest / (1 + rest)) - 1) < 0.06


# ----------------------------------------------------------------------------------------------------- memory


def test_workspace_at_full_size(monkeypatch):
    calls = MagicMock()
    monkeypatch.setattr(logits, "dlogits_kernel", calls)
    monkeypatch.setattr(tiles, "chip", lambda device: ("sm_90", 132))
    slab_launches()
    written = [call.args[7] for call in calls.__getitem__.return_value.call_args_list]
    assert len({id(x) for x in written}) == 1 and len(written) == 26
    # dz, d hidden in float32, a piece more, cuBLAS's own
    assert written[0].nbytes + (8192 + 1024) * 4096 * 4 + 32 * 2**20 <= 256 * 2**20


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels have a test of their own")
def test_memory_of_the_twins():
    """Take at most 20 % of the plain way, which holds at least the logits and their gradient."""
    N, D, V = 2048, 64, 128256
    numbers = problem(N, D, V)
    taken = peak_memory(lambda: run(*numbers))
    if taken is None:
        pytest.skip("memory is read from Linux's /proc")
    assert taken <= 0.2 * (2 * 4 * N * V) / 2**20


# ------------------------------------------------------------------------------------------ compiled for GPUs


def slab_launches(dtype=torch.bfloat16):
    hidden, weight = (torch.empty(n, 4096, dtype=dtype, device="meta") for n in (8192, 128256))
    numbers = hidden, weight, torch.empty(8192, dtype=torch.int64, device="meta")
    logits.gradients(*numbers, *torch.empty(4, 8192, device="meta"), 1.0, (True, True))
    return numbers


def launches():
    """Launch all kernels at the sizes of the 11B model, in half precision and float32."""
    for dtype in (torch.bfloat16, torch.float32):
        logits.statistics(*slab_launches(dtype), 1.0)


def greedy_launches():
    """Launch with two warps, which have too few registers for 128 x 128 sums."""
    tiles.ROWS.insert(0, ["sm_80", "inf", "", "", "", "", "128 128 32 2 2"])
    slab_launches()


@cases("chip", aot.CHIPS)
def test_compiled(chip):
    found = aot.compile_all("test_logprob", "launches", chip)
    assert {result["name"] for result in found} == {"statistics_kernel", "dlogits_kernel"}
    for result in found:
        aot.check(result)


def test_spills_would_be_seen():
    result, = aot.compile_all("test_logprob", "greedy_launches", "sm_80")
    assert result["spills"] > 64


# -------------------------------------------------------------------------------------------------- which way


@cases("wanted, expected", [(None, DEVICE == "cuda"), ("torch", False), ("triton", True)])
def test_which_way(monkeypatch, wanted, expected):
    monkeypatch.delenv("KERNELS", raising=False)
    if wanted:
        monkeypatch.setenv("KERNELS", wanted)
    assert kernels.use_triton(torch.zeros(1, device=DEVICE)) == expected
    monkeypatch.setenv("KERNELS", "fast")
    raises("fast", kernels.use_triton, torch.zeros(1, device=DEVICE))


def test_without_triton_the_twins_run_and_say_so_once():
    script = """if True:
        import os, sys, warnings
        sys.modules["triton"] = None
        import torch, model
        from kernels import logprob, use_triton
        os.environ["KERNELS"] = "triton"                       # as a GPU would
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert not use_triton(torch.zeros(1)) and not use_triton(torch.zeros(1))
            logprob.token_logprobs(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, -100]))
        assert ["triton is not installed" in str(w.message) for w in caught] == [True]"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_full_size():
    """Workspace, determinism, and a sample of rows against float64, at the size of the 11B model."""
    numbers = problem(8192, 4096, 128256, torch.bfloat16)
    with torch.no_grad():
        numbers[1].mul_(0.02)
    run(*rows_of(numbers, slice(128)))                         # compiled, cuBLAS's workspace there
    found = []
    assert peak_memory(lambda: found.append(run(*numbers)) or found[0]) <= 256
    assert_equal(run(*numbers), found[0])
    rows = torch.arange(0, 8192, 128, device=DEVICE)
    expected, bounds = dense(*rows_of(numbers, rows))
    assert_within([x[rows] for x in found[0][:4]], expected[:4], bounds[:4])
