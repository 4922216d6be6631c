"""Log-probability of a token, entropy and log-sum-exp, straight from hidden states: logits exist only as
tiles.

    z = hidden weight^T / temperature        lse = log sum_v exp z_v          p = exp(z - lse)
    logprob = z_y - lse                      entropy = lse - sum_v p_v z_v

What it saves. 8192 tokens of Llama 3 (V = 128256) have 2.1 GB of bf16 logits; the plain way also keeps
their float32 log-softmax and its gradient, 4.2 GB each. Here forward keeps three numbers per token, and
backward computes the logits once more, one slab of the vocabulary after the other: 4 matrix products of 2 N
V D FLOPs instead of 3, 224 MiB of workspace (N 8192, D 4096), and little other memory traffic.

Forward walks over the tiles of the vocabulary. As flash attention does, it carries the largest logit m so
far and s = sum exp(z - m), and for the entropy t = sum (z - m) exp(z - m). When m grows to m', both follow:

    t <- (t + s (m - m')) exp(m - m')
    s <- s exp(m - m')                       at the end  lse = m + log s,  entropy = log s - t / s

So the entropy of a sharp distribution is exact, too, where lse - sum p z would be the small difference of
two large numbers.

Backward. With upstream gradients g, e, l of logprob, entropy and lse, and d entropy / dz = -p (log p +
entropy):

    dz = p (a - e log p) + g onehot(y),      a = l - g - e entropy
    d hidden = dz weight / temperature,      d weight = dz^T hidden / temperature

Tile by tile dz is made and used up. No part of it is dropped for being small.

Two ways do these sums: on a GPU the kernels of logits.py, elsewhere the twins below, which say the same in
plain torch. Read those first.
"""
import torch
from torch.autograd.function import once_differentiable

from kernels import logits, product_type, use_triton, without_autocast


class TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, statistics, gradients):
        with without_autocast(hidden):
            logprobs, entropy, lse = statistics(hidden, weight, targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature, ctx.gradients = temperature, gradients
        return logprobs, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, g, e, l):
        """Leave out rows whose upstream gradients are zero.

        To count them, the host waits for the GPU: it is soon ahead again.
        """
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        N, rows = len(hidden), ((g != 0) | (e != 0) | (l != 0)).nonzero()[:, 0]
        if len(rows) < N:
            hidden, targets, entropy, lse, g, e, l = (
                x[rows] for x in (hidden, targets, entropy, lse, g, e, l))
        with without_autocast(hidden):
            found = ctx.gradients(hidden, weight, targets, lse, l - g - e * entropy, e, g,
                                  ctx.temperature, ctx.needs_input_grad)
        grad_hidden, grad_weight = (None if x is None else x.to(weight.dtype) for x in found)
        if grad_hidden is not None and len(rows) < N:
            grad_hidden = hidden.new_zeros(N, hidden.shape[1]).index_copy_(0, rows, grad_hidden)
        return grad_hidden, grad_weight, None, None, None, None


def token_logprobs(hidden, weight, targets, temperature=1.0, ways=None):
    """Return logprobs of targets, entropy and log-sum-exp of softmax(hidden weight^T / temperature).

    hidden (N, D), weight (V, D), targets (N,) int64 -> (N,) float32 each, differentiable in hidden and
    weight. Rows with a negative target cost nothing and give 0. A target of V or more is a RuntimeError.
    ways: (statistics, gradients); by default kernels on a GPU, twins elsewhere.
    """
    ways = ways or (KERNELS if use_triton(hidden) else TWINS)
    hidden, weight = (x.to(product_type(hidden)) for x in (hidden, weight))
    in_vocabulary = (targets < len(weight)).all()
    torch._assert_async(in_vocabulary, "a target is not in the vocabulary")    # the host need not wait for it
    N, asked = len(targets), (targets >= 0).nonzero()[:, 0]
    if len(asked) < N:
        hidden, targets = hidden[asked], targets[asked]
    found = TokenLogprobs.apply(hidden.contiguous(), weight.contiguous(), targets.contiguous(),
                                float(temperature), *ways)
    return found if len(asked) == N else tuple(x.new_zeros(N).index_copy(0, asked, x) for x in found)


# ------------------------------------------------------------------------------------------------------------
# The twins: the same sums over pieces of the logits, in float32 (or float64 for float64)

# rows and vocabulary of a piece, 4 MB of float32, which stay in a CPU's cache; a smaller vocabulary gets
# more rows
PIECE = 256, 4096


def statistics_reference(hidden, weight, targets, temperature):
    """Compute what `statistics` does."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    result = hidden.new_empty(3, len(hidden), dtype=exact)
    rows, cols = pieces(len(hidden), len(weight))
    for r in rows:
        x = hidden[r].to(exact) / temperature
        m, s, t, chosen = x.new_full((len(x), 1), -1e30), *x.new_zeros(3, len(x), 1)
        for c in cols:
            z = x @ weight[c].to(exact).T                      # a piece
            at, inside = place(targets[r], c)
            chosen += z.gather(1, at) * inside
            new = torch.maximum(m, z.amax(1, keepdim=True))
            p, shrink = torch.exp(z.sub_(new)), torch.exp(m - new)
            t = (t + s * (m - new)) * shrink
            s = s * shrink + p.sum(1, keepdim=True)
            t += p.mul_(z).sum(1, keepdim=True)
            m = new
        result[:, r] = torch.cat([chosen - m - s.log(), s.log() - t / s, m + s.log()], 1).T
    return tuple(result)


def gradients_reference(hidden, weight, targets, lse, a, e, g, temperature, wanted):
    """Compute what `gradients` does."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    grad_hidden, grad_weight = (torch.zeros_like(x, dtype=exact) if want else None
                                for x, want in zip((hidden, weight), wanted))
    rows, cols = pieces(len(hidden), len(weight))
    for r in rows:
        x, asked = hidden[r].to(exact) / temperature, bool(e[r].any())
        for c in cols:
            w = weight[c].to(exact)
            logp = torch.addmm(-lse[r, None], x, w.T)          # a piece
            if asked:
                dz = logp.exp().mul_(logp.mul_(-e[r, None]).add_(a[r, None]))
            else:
                dz = logp.exp_().mul_(a[r, None])
            at, inside = place(targets[r], c)
            dz.scatter_add_(1, at, g[r, None] * inside)
            if wanted[0]:
                grad_hidden[r].addmm_(dz, w, alpha=1 / temperature)
            if wanted[1]:
                grad_weight[c].addmm_(dz.T, x)
    return grad_hidden, grad_weight


def pieces(N, V):
    """Return the slices of rows and those of the vocabulary."""
    cols = min(V, PIECE[1])
    rows = PIECE[0] * PIECE[1] // cols
    return [[slice(i, min(i + size, end)) for i in range(0, end, size)]
            for size, end in ((rows, N), (cols, V))]


def place(targets, cols):
    """Return the column of each target among `cols`, and whether it is there; (rows, 1) each."""
    at = targets[:, None] - cols.start
    return at.clamp(0, cols.stop - cols.start - 1), (at >= 0) & (targets[:, None] < cols.stop)


KERNELS, TWINS = (logits.statistics, logits.gradients), (statistics_reference, gradients_reference)


def token_logprobs_reference(hidden, weight, targets, temperature=1.0):
    """Compute `token_logprobs` in plain torch."""
    return token_logprobs(hidden, weight, targets, temperature, TWINS)
