"""Sample answers from a model, with a KV cache that goes on from turn to turn.

    from llama.generate import generate
    from llama.processor import Processor
    from model import Llama

    model, processor = Llama.from_pretrained(FOLDER), Processor.from_pretrained(FOLDER)
    ids = processor.render([{"role": "user", "content": "Hello"}]).ids
    samples, cache = generate(model, [ids], max_new_tokens=50, stop_ids=processor.stop_ids)
    print(processor.decode(samples[0].ids))
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from kernels import product_type
from llama.cache import KVCache


@dataclass
class Sample:
    """One answer."""
    ids: list                               # drawn ids, with the end token if it was drawn
    logprobs: list                          # of each, when it was drawn
    ended: bool = False                     # by a stop id, not by max_new_tokens
    hidden: torch.Tensor | None = None      # (D,) at the last token before them, normed: what a critic reads


@torch.inference_mode()
def generate(model, conversations, *, source=None, cache=None, images=None, max_new_tokens, temperature=1.0,
             stop_ids, seeds=None, graph=None):
    """Continue each conversation until a stop id or max_new_tokens (>= 1) -> (list of Sample, KVCache).

    conversations: all token ids so far. Row i of `cache` already holds the first cache.lengths[i] of them,
    and only the rest is fed. With the first call only: images, and source, the conversation that each answer
    continues: [0, 0, 1] for two answers to the first, which is read once, and one to the second (default: one
    answer to each). temperature 0 is greedy, with the log-probs of temperature 1. seeds: one per row, whose
    draws then depend on no other row (default: torch's generator). To go on: append sample.ids and the next
    forced tokens to each list, call cache.keep(rows that go on), then this again.

    graph (default: on a GPU): record a step as one CUDA graph and replay that, which halves its time: else
    the GPU waits for the host to launch a thousand kernels. Shapes must stay for that, so rows that have
    ended go on, unseen; as a step reads all weights for however few rows, they cost little.
    """
    weight, one_each, stop_ids = model.embed_tokens.weight, list(range(len(conversations))), set(stop_ids)
    graph = weight.is_cuda if graph is None else graph
    source = one_each if source is None else source
    if cache is None:
        cache = KVCache(model.config, len(one_each), weight.device, product_type(weight))
    ids, lengths = pad([c[n:] for c, n in zip(conversations, cache.lengths.tolist(), strict=True)])
    # room for the whole call, so that no step moves the cache: all tokens, and padding or what is drawn
    cache.reserve(int((cache.lengths + lengths).max()) + max(max_new_tokens, ids.shape[1]))
    uniform = draw_uniform(seeds, len(source), max_new_tokens).to(weight.device)

    out = model(ids.to(weight.device), lengths=lengths, images=images, cache=cache, logits="last")
    hidden, logits = out.hidden[one_each, lengths - 1], out.logits
    out = None                                                 # frees the rest
    if source != one_each:
        cache.keep(source)
        hidden, logits = hidden[source], logits[source]
    samples = [Sample([], [], hidden=state) for state in hidden]

    qkv = None if weight.is_cuda else model.join_weights()     # a GPU waits for bytes, not for products
    rows, running = np.arange(len(source)), cache              # rows[slot]: the row that computes there
    owners, drawn = [], []                                     # the row of each log-prob; a tensor per step

    def step(tokens, uniform, at=None):                        # with `running` as it is then
        logits = model(tokens[:, None], cache=running, logits="last", qkv=qkv, at=at).logits
        return draw_tokens(logits, uniform, temperature)

    tokens, logprobs = draw_tokens(logits, uniform[:, 0], temperature)
    if graph and max_new_tokens > 1:
        replay = record(step, tokens, uniform[:, 0], cache.lengths.to(weight.device))
    for t in range(1, max_new_tokens + 1):
        owners.extend(rows[:len(tokens)])
        drawn.append(logprobs)
        done = note_tokens([samples[row] for row in rows[:len(tokens)]], tokens, stop_ids)
        if len(done) == len(tokens) or t == max_new_tokens:
            break
        if graph:
            tokens, logprobs = replay(tokens, uniform[:, t], cache.lengths.to(weight.device))
            # a new tensor: a step that recorded the lengths by mistake reads old ones, and a test fails
            cache.lengths = cache.lengths + torch.tensor([not sample.ended for sample in samples])
            continue
        if done:                                               # finished rows go to the end, and cost no more
            n = len(tokens) - len(done)
            to, origin = swaps(done, n)
            cache.move(to, origin)
            tokens[to], uniform[to], rows[to] = tokens[origin], uniform[origin], rows[origin]
            tokens, uniform, running = tokens[:n], uniform[:n], cache.first(n)
        tokens, logprobs = step(tokens, uniform[:, t])

    for row, logprob in zip(owners, torch.cat(drawn).tolist()):                 # one wait for the device
        samples[row].logprobs.append(logprob)
    for sample in samples:
        del sample.logprobs[len(sample.ids):]                  # of draws after its end
    moved = np.flatnonzero(rows != np.arange(len(rows)))
    cache.move(rows[moved], moved)                             # every row back to its place
    return samples, cache


def note_tokens(samples, tokens, stop_ids):
    """Give each sample its token, unless it has ended and goes on for its shape alone. Return the slots of
    those that have."""
    for sample, token in zip(samples, tokens.tolist()):        # the one wait for the device per token
        if not sample.ended:
            sample.ids.append(token)
            sample.ended = token in stop_ids
    return [slot for slot, sample in enumerate(samples) if sample.ended]


def pad(rows):
    """Pad lists of ids with 0 on the right -> (B, T) int64 and lengths (B,)."""
    if not all(rows):
        raise ValueError("every conversation needs at least one token that the cache does not hold yet")
    padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return padded, torch.tensor([len(row) for row in rows])


def draw_uniform(seeds, rows, steps):
    """Draw (rows, steps) numbers in [0, 1), row i from seeds[i].

    NumPy's generators take all 64 bits of a seed; torch's on the CPU reads 32.
    """
    if seeds is None:
        uniform = torch.rand(rows, steps)
    else:
        streams = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
        uniform = torch.from_numpy(np.stack([stream.random(steps, dtype=np.float32) for stream in streams]))
    return uniform.clamp_(max=1 - 2**-22)                      # so that u * total < total after rounding


def draw_tokens(logits, uniform, temperature):
    """Draw by inverse CDF: logits (n, V), uniform (n,) -> tokens (n,) and their log-probs (n,) float32."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cdf = logprobs.exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def record(step, *inputs):
    """Return a function that computes step(*inputs), on a GPU by replaying one CUDA graph.

    All else that step reads (weights, cache) must keep its address, and it must not wait for the GPU.
    """
    if not inputs[0].is_cuda:
        return step
    static, graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
    step(*static)                                              # compiles and loads what it needs
    with torch.cuda.graph(graph):
        out = step(*static)

    def replay(*inputs):
        for tensor, now in zip(static, inputs):
            tensor.copy_(now)
        graph.replay()
        return [tensor.clone() for tensor in out]

    return replay


def swaps(done, n):
    """List the slots to exchange so that the n unfinished rows come first -> (to, source)."""
    front = [slot for slot in done if slot < n]
    back = sorted(set(range(n, n + len(done))) - set(done))
    return front + back, back + front
