"""The plan's estimates against what real runs on the CPU take, as PyTorch's profiler saw the allocator give
and take it."""

import copy
import gc
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

import model as network
import ppo
import sft
from distributed import shard
from harness import tiny
from harness.environments import make_env
from harness.load import choose_what_learns
from harness.settings import Args, apply_preset
from kernels.attention import attention_reference
from kernels.logprob import PIECE
from llama.batches import collate
from llama.cache import KVCache
from llama.config import Config
from llama.frozen import remember
from llama.generate import generate
from llama.processor import Processor
from model import Llama
from rollout import rollout
from study import plan
from variants import algorithm

BATCH = 3


@pytest.fixture(scope="module")
def medium():
    """Make a model large enough for tensors to outweigh the allocator's odds and ends."""
    config = copy.deepcopy(tiny.CONFIG)
    config["text_config"] |= {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3,
                              "cross_attention_layers": [1]}
    config["vision_config"] |= {"vision_output_dim": 384, "hidden_size": 128, "num_hidden_layers": 2}
    return Llama(Config.from_dict(config))


@pytest.fixture(scope="module")
def processor():
    return Processor.from_pretrained(tiny.FOUNDATIONS / "gp-vl")


@pytest.fixture(params=["gp-l", "gp-vl"])
def task(request):
    return request.param


@pytest.fixture
def twins(monkeypatch):
    """Plan what a CPU runs: log-probs in pieces, plain attention and norms."""
    monkeypatch.setattr("kernels.logits.WORKSPACE", 3 * 4 * PIECE[1])
    monkeypatch.setattr(plan, "STAND_INS", plan.STAND_INS[:1])


def settings(task, algo, **more):
    return apply_preset(Args(task=task, algo=algo, preset="tiny", **more), 256)


def real_bytes(run, attention=SDPBackend.MATH):
    """Return (most, what is left) that CPU tensors took while `run` ran, beyond what was there before."""
    gc.collect()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile, sdpa_kernel(attention):
        kept = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    del kept
    return most, live


def played(args, model, processor, max_new_tokens, features=None):
    with remember(model, features):
        episodes = rollout(model, processor, make_env(args), range(BATCH), temperature=1.0,
                           max_new_tokens=max_new_tokens)
    return [c for episode in episodes for c in episode.conversations]


def planned(config, args, targets):
    """Return the bytes that a micro-batch with these targets (B, T) takes by the plan."""
    batch = plan.blank_batch(config, *targets.shape, int((targets >= 0).sum()) // BATCH, args.image)
    return sum(plan.measure_update(plan.make_module(config, args, torch.float32), batch).values())


@pytest.mark.parametrize("task, tune, rank", [
    ("gp-l", "all", 0), ("gp-l", "all", 8), ("gp-vl", "all", 0), ("gp-vl", "no-vision", 0)])
def test_ppo_micro_batch(medium, processor, twins, task, tune, rank):
    """What the forward pass keeps and the backward pass needs, where gradients are there from the micro-batch
    before."""
    args = settings(task, "ppo", attempts=2, tune=tune, lora_rank=rank)
    features = {} if tune == "no-vision" else None
    conversations, policy = played(args, medium, processor, 12, features), copy.deepcopy(medium)
    choose_what_learns(policy, args)
    module = ppo.ActorCritic(policy, args.critic)
    batch = collate(processor, [[c] for c in conversations])

    def learn():
        with remember(module, features):
            ppo.batch_loss(module, conversations, batch, args, *algorithm(args),
                           ppo.count(conversations))[0].backward()

    learn()
    most, left = real_bytes(learn)
    peak = planned(medium.config, args, batch.targets)
    assert most == pytest.approx(peak, rel=0.1) and left < 0.01 * peak


def test_sft_steps(medium, processor, twins, task):
    """Two whole steps: gradients, the optimizer's state and what its step takes are part of it."""
    args, model = settings(task, "sft"), copy.deepcopy(medium)
    examples = sft.make_batch(processor, [(make_env(args)(), 1.0)], range(BATCH), 0)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    learn = lambda: sft.update(model, processor, examples, args, step=lambda loss: optimizer.step() or 0.0)
    most, left = real_bytes(lambda: [learn(), learn()])
    learnt = plan.slices([p for p in model.parameters() if p.grad is not None], 1)
    peak = planned(medium.config, args, collate(processor, [[e] for e in examples]).targets)
    kept = 3 * learnt                          # gradients and two moments
    assert [left, most] == pytest.approx([kept, kept + max(peak, learnt)], rel=0.1)


def twin_attention(q, k, v, visible):
    """Compute the twin on PyTorch's fused kernels: flash attention, or with a mask the memory-efficient one,
    which takes it in the queries' type."""
    def sdpa(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
        if attn_mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
        bias = attn_mask.to(q.device, q.dtype).expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, q.requires_grad)[0]

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", sdpa):
        return attention_reference(q, k, v, visible)


def test_rollout(medium, processor, task, monkeypatch):
    """Two turns in lockstep, with their caches and images. Planned is what this machine runs: the twins, with
    their dense masks."""
    monkeypatch.setattr(plan, "STAND_INS", [*plan.STAND_INS, (network, "attention", twin_attention)])
    conversations = played(settings(task, "ppo", attempts=1), medium, processor, 1)
    images, lengths = processor.images([c.image for c in conversations]), []

    def play():
        cache, ids = None, [c.ids[:c.sampled.index(True)] for c in conversations]
        for forced in (0, 299):
            ids = [row + [7] * forced for row in ids]
            lengths.extend([forced + 1 if cache else max(map(len, ids)), 8])
            drawn, cache = generate(medium, ids, cache=cache, images=None if cache else images,
                                    max_new_tokens=8, stop_ids=[])
            ids = [row + sample.ids for row, sample in zip(ids, drawn)]
        return cache

    with torch.inference_mode():       # flash attention where it can, like CUDA's kernels
        most, left = real_bytes(play, [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    module = plan.make_module(medium.config, settings(task, "sft"), torch.float32)
    *caches, beside = plan.measure_rollout(module, BATCH, lengths, images is not None).values()
    assert [left, most] == pytest.approx([sum(caches), sum(caches) + beside], rel=0.1)


def test_shards_are_those_of_fsdp(medium):
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    model = copy.deepcopy(medium)
    expected = [plan.slices([p], 8) for p in model.parameters()]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (8,)))
        assert [p.to_local().nbytes for p in model.parameters()] == expected
    finally:
        dist.destroy_process_group()


def test_bytes_are_of_what_lives():
    with plan.Bytes() as memory:
        x = torch.empty(1000, 10, device="meta", requires_grad=True)
        y = x.exp().sin()                       # each keeps what it took or gave: exp's result, once
        assert memory.live == 3 * 40_000
        asked = torch.arange(1000, device="meta") % 2 == 0
        assert y[asked].shape == (500, 10)      # values that decide a shape are known
        del y
        assert memory.live == 40_000 + asked.nbytes and memory.peak >= 3 * 40_000


def test_what_saves_memory_saves_it(medium, monkeypatch):
    module = plan.make_module(medium.config, settings("gp-vl", "ppo"))
    batch = plan.blank_batch(medium.config, 4, 256, 40, True)
    kept = lambda: plan.measure_update(module, batch)["activations"]
    fused = kept()
    with monkeypatch.context() as patch:
        patch.setattr(plan, "STAND_INS", plan.STAND_INS[:1])
        assert fused < 0.8 * kept()
    shard.checkpoint_activations(module)
    assert kept() < 0.5 * fused


def test_a_growing_cache_takes_one_layer_beside(medium):
    with plan.Bytes() as memory:
        cache = KVCache(medium.config, 4, "meta")
        cache.reserve(512)
        small, memory.peak = sum(layer.nbytes for layer in cache.kv), 0
        others = memory.live - small
        cache.reserve(1024)
        assert memory.live == others + 2 * small and memory.peak == memory.live + small // len(cache.kv)


def test_the_paper_fits_as_it_stands(task):
    """11B on 8 GPUs of 80 GB in the paper's settings: at most 65 GB a rank, without a flag."""
    args = apply_preset(Args(task=task, algo="ppo"), 4096)
    _, phases = plan.memory(plan.LLAMA_11B, args, 8)
    assert max(sum(phase.values()) for phase in phases.values()) < 65e9


@pytest.mark.parametrize("flags, gpus", [
    ({"lora_rank": 16}, 1), ({"lora_rank": 16}, 8), ({"shard": "off"}, 8)])
def test_whole_weights_count_whole_and_frozen_layers_half(flags, gpus):
    """With LoRA all but embedding, norms and adapters is frozen, and in bfloat16: 2 bytes of 4."""
    args = apply_preset(Args(task="gp-l", algo="sft", **flags), 4096)
    _, phases = plan.memory(plan.LLAMA_11B, args, gpus)
    assert phases["update"]["weights"] == pytest.approx(4.3e10 * (0.53 if args.lora_rank else 1), rel=0.01)


def test_own_answers_are_as_long_as_episodes():
    sizes = []
    for data in ("expert", "own"):
        args = apply_preset(Args(task="gp-l", algo="sft", sft_data=data, eval_hands=0), 4096)
        sizes.append(plan.sizes_of(plan.LLAMA_11B, args, 8, True))
    expert, own = sizes
    assert expert.rollout_rows == 1 < own.rollout_rows and expert.length < own.length


def test_the_built_in_model_has_the_released_sizes():
    module = plan.make_module(plan.LLAMA_11B, settings("gp-vl", "sft"))
    assert sum(p.numel() for p in module.parameters()) == 10_670_220_835        # as transformers counts


@pytest.mark.parametrize("memory, words", [
    ("80", ["fits", "self KV cache", "backward pass"]),
    ("0.03", ["does NOT fit", "--rollout-batch"])])
def test_what_is_printed(memory, words, capsys):
    plan.main(f"--gpus 2 --gpu-memory {memory} --task gp-vl --hands 16 --eval-hands 8".split())
    said = capsys.readouterr().out
    assert all(word in said for word in words), said
