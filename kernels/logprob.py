"""Log-probability of a token, entropy and log-sum-exp, straight from hidden states: logits exist only as
tiles.

    z = hidden weight^T / temperature        lse = log sum_v exp z_v          p = exp(z - lse)
    logprob = z_y - lse                      entropy = lse - sum_v p_v z_v

What it saves. 8192 tokens of Llama 3 (V = 128256) have 2.1 GB of bf16 logits; the plain way also keeps their
float32 log-softmax and its gradient, 4.2 GB each. Here forward keeps three numbers per token. Backward
computes the logits again, one slab of the vocabulary after the other. So both passes together take 4 matrix
products of 2 N V D FLOPs (N tokens), one more than the plain way, 224 MiB of workspace (N 8192, D 4096), and
little other memory traffic.

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

Tile by tile dz is made and used up, all of it: small gradients are not left out, as some do for speed.

There are two implementations: on a GPU the kernels of logits.py, elsewhere the twins below, in plain torch.
Read those first.
"""
import torch
from torch.autograd.function import once_differentiable

from kernels import logits, product_type, use_triton, without_autocast


class TokenLogprobs(torch.autograd.Function):
    """Compute log-probs, entropy and log-sum-exp, and their gradients: by kernels on a GPU, else by twins."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        statistics, ctx.gradients = KERNELS if use_triton(hidden) else TWINS
        with without_autocast(hidden):
            logprobs, entropy, lse = statistics(hidden, weight, targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature = temperature
        return logprobs, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, g, e, l):
        """Leave out rows whose upstream gradients are zero.

        To count them, the host waits for the GPU: it is soon ahead again.
        """
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        N, rows = len(hidden), ((g != 0) | (e != 0) | (l != 0)).nonzero()[:, 0]
        a = l - g - e * entropy
        if len(rows) < N:
            hidden, targets, lse, a, e, g = (x[rows] for x in (hidden, targets, lse, a, e, g))
        with without_autocast(hidden):
            found = ctx.gradients(hidden, weight, targets, lse, a, e, g,
                                  ctx.temperature, ctx.needs_input_grad)
        grad_hidden, grad_weight = (None if x is None else x.to(weight.dtype) for x in found)
        if grad_hidden is not None and len(rows) < N:
            grad_hidden = hidden.new_zeros(N, hidden.shape[1]).index_copy_(0, rows, grad_hidden)
        return grad_hidden, grad_weight, None, None


def token_logprobs(hidden, weight, targets, temperature=1.0):
    """Return logprobs of targets, entropy and log-sum-exp of softmax(hidden weight^T / temperature).

    hidden (N, D), weight (V, D), targets (N,) int64 -> (N,) float32 each, differentiable in hidden and
    weight. Rows with a negative target cost nothing and give 0. A target of V or more is a RuntimeError.
    """
    hidden, weight = (x.to(product_type(hidden)) for x in (hidden, weight))
    in_vocabulary = (targets < len(weight)).all()
    torch._assert_async(in_vocabulary, "a target is not in the vocabulary")    # the host need not wait for it
    N, asked = len(targets), (targets >= 0).nonzero()[:, 0]
    if len(asked) < N:
        hidden, targets = hidden[asked], targets[asked]
    found = TokenLogprobs.apply(*(x.contiguous() for x in (hidden, weight, targets)), temperature)
    return found if len(asked) == N else tuple(x.new_zeros(N).index_copy(0, asked, x) for x in found)


# ------------------------------------------------------------------------------------------------------------
# The twins: the same from the logits of some rows at a time, in float32 (or float64 for float64)

# At least so many rows, and as many as have so many logits: 4 MB of float32, which stay in a CPU's cache.
PIECE = 256, 2**20


def pieces(hidden, weight, temperature):
    """Yield (rows, hidden[rows] / temperature, weight), the last two in the type of the result."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    height, weight = max(PIECE[0], PIECE[1] // len(weight)), weight.to(exact)
    for first in range(0, len(hidden), height):
        rows = slice(first, first + height)
        yield rows, hidden[rows].to(exact) / temperature, weight


def statistics_reference(hidden, weight, targets, temperature):
    """Return log-probs of the targets, entropy and log-sum-exp, (rows,) each."""
    result = hidden.new_empty(3, len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for rows, x, w in pieces(hidden, weight, temperature):
        z = x @ w.T
        chosen, m = z.gather(1, targets[rows, None]), z.amax(1, keepdim=True)
        z -= m
        p = z.exp()
        s = p.sum(1, keepdim=True)
        t = p.mul_(z).sum(1, keepdim=True)
        result[:, rows] = torch.cat([chosen - m - s.log(), s.log() - t / s, m + s.log()], 1).T
    return tuple(result)


def gradients_reference(hidden, weight, targets, lse, a, e, g, temperature, wanted):
    """Return d hidden and d weight, None where `wanted` is False. a, e and g are those of the opening."""
    grad_hidden, grad_weight = (
        torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if want else None
        for x, want in zip((hidden, weight), wanted))
    for rows, x, w in pieces(hidden, weight, temperature):
        logp = torch.addmm(-lse[rows, None], x, w.T)
        dz = logp.exp()                                        # p, then times (a - e log p)
        dz *= logp.mul_(-e[rows, None]).add_(a[rows, None])
        dz.scatter_add_(1, targets[rows, None], g[rows, None])
        if wanted[0]:
            grad_hidden[rows].addmm_(dz, w, alpha=1 / temperature)
        if wanted[1]:
            grad_weight.addmm_(dz.T, x)
    return grad_hidden, grad_weight


KERNELS, TWINS = (logits.statistics, logits.gradients), (statistics_reference, gradients_reference)
