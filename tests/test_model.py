"""model.py against Hugging Face transformers (float32, random weights, every gate open) and against itself.

    python -m pytest tests/test_model.py -q          SMOLLM2=FOLDER adds a test on real weights (SmolLM2-135M-Instruct)
"""
import copy
import io
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kernels.attention import Visible
from llama import folders
from llama.cache import KVCache
from llama.config import Config, tile_layouts
from llama.frozen import remember
from llama.generate import draw_tokens, draw_uniform, generate, pad
from llama.images import Images, to_rgb
from llama.processor import CHATML, LLAMA3, Processor
from model import Llama, Step

IMAGE, VOCAB, TILE = 120, 120, 28
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
TEXT = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
            max_position_embeddings=1024, bos_token_id=100, eos_token_id=101, pad_token_id=102)
MLLAMA = dict(model_type="mllama", image_token_index=IMAGE,
              text_config=TEXT | dict(cross_attention_layers=[1, 3], rope_theta=10000.0, rope_scaling=LLAMA3_ROPE),
              vision_config=dict(hidden_size=24, num_hidden_layers=3, num_global_layers=2, attention_heads=2, intermediate_size=40,
                                 vision_output_dim=72, image_size=TILE, patch_size=14, intermediate_layers_indices=[1, 2]))


def randomise(module, seed=0):
    """Weights with which every part of the model matters: transformers (and we) start gates and biases at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            gate = p.numel() == 1
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if not gate else 0.2) + (0.8 if gate else 0))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return module.eval()


@pytest.fixture(scope="module")
def tiny():
    """A mllama made here, for tests that need no reference."""
    return randomise(Llama(Config.from_dict(MLLAMA)))


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers, the reference, is not installed")


@pytest.fixture(scope="module")
def mllama(transformers, tmp_path_factory):
    """(folder that transformers wrote, its model, ours)."""
    config = transformers.MllamaConfig(**{k: v for k, v in MLLAMA.items() if k != "model_type"})
    return reference(transformers.MllamaForConditionalGeneration(config), tmp_path_factory.mktemp("mllama"))


def reference(theirs, folder):
    randomise(theirs).save_pretrained(folder)
    return folder, as_trained(theirs), Llama.from_pretrained(folder)


def as_trained(theirs):
    """Undo two differences of transformers 5 from Meta's code, with which the weights were trained.

    It concatenates the *output* of vision layer i for each i of intermediate_layers_indices; Meta's code, and
    the first transformers versions with mllama, take its *input*, the output of layer i - 1. And it lets
    tokens before their image attend to it (issue 39379); Meta zeroes attention and MLP: they pass unchanged.
    """
    vision = getattr(theirs.model, "vision_model", None)
    if vision is not None:
        vision.intermediate_layers_indices = [i - 1 for i in vision.intermediate_layers_indices]
    for layer in theirs.modules():
        if type(layer).__name__ == "MllamaCrossAttentionDecoderLayer":
            layer.register_forward_hook(pass_unseen, with_kwargs=True)
    return theirs


def pass_unseen(layer, args, kwargs, output):
    sees = kwargs["full_text_row_masked_out_mask"][:, 0].bool()                # (B, T, 1)
    return torch.where(sees, output, args[0])


def random_ids(rows, length, seed=0, image_at=()):
    ids = torch.randint(0, 100, (rows, length), generator=torch.Generator().manual_seed(seed))
    for row, position in image_at:
        ids[row, position] = IMAGE
    return ids


def random_images(aspect_ratio_ids, rows=None, seed=0):
    """Images with these aspect ratio ids (1-based); padded tiles are zero, as in real batches."""
    layouts = tile_layouts(4)
    n = len(aspect_ratio_ids)
    tiles = torch.tensor([layouts[i - 1][0] * layouts[i - 1][1] for i in aspect_ratio_ids])
    mask = (torch.arange(4) < tiles[:, None]).long()
    pixels = torch.randn(n, 4, 3, TILE, TILE, generator=torch.Generator().manual_seed(seed)) * mask[:, :, None, None, None]
    return Images(pixels, torch.tensor(aspect_ratio_ids), mask, torch.arange(n) if rows is None else torch.tensor(rows))


def image_inputs(ids, images):
    """The reference's keyword arguments for a batch in which every row has an image."""
    sees = (ids == IMAGE).cumsum(1) > 0
    mask = (sees[:, :, None] & images.aspect_ratio_mask.bool()[:, None]).long()[:, :, None]
    return dict(pixel_values=images.pixel_values[:, None], aspect_ratio_ids=images.aspect_ratio_ids[:, None],
                aspect_ratio_mask=images.aspect_ratio_mask[:, None], cross_attention_mask=mask)


def their_logits(theirs, ids, images=None):
    with torch.no_grad():
        return theirs(ids, **(image_inputs(ids, images) if images else {})).logits


def our_logits(ours, ids, **kwargs):
    with torch.no_grad():
        return ours(ids, logits="all", **kwargs).logits


def one_image(images, i):
    return Images(images.pixel_values[i:i + 1], images.aspect_ratio_ids[i:i + 1], images.aspect_ratio_mask[i:i + 1], torch.tensor([0]))


def assert_close(a, b, limit=1e-4):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= limit


# ------------------------------------------------------------------------------------------------- parity of the forward pass


def test_reference_has_every_part_open(mllama):
    """So that parity means something: logits depend on image, tile count, tokens before the image, and spread well above 1e-4."""
    _, theirs, _ = mllama
    ids, images = random_ids(1, 9, image_at=[(0, 4)]), random_images([2])
    base = their_logits(theirs, ids, images)
    assert base.std() > 0.1
    changes = [random_images([2], seed=5), random_images([2]), random_images([2])]
    changes[1].aspect_ratio_ids = torch.tensor([5])
    changes[2].aspect_ratio_mask = torch.tensor([[1, 0, 0, 0]])
    for change in changes:
        assert (their_logits(theirs, ids, change) - base).abs().max() > 1e-3
    assert (their_logits(theirs, ids) - base)[:, 4].abs().max() > 1e-3


@pytest.mark.parametrize("at", [[1, 2], [3, 11], [7, 1], [10, 10]])
def test_tokens_before_their_image_are_as_without_one(mllama, at):
    """Row by row: what precedes <|image|> equals the text alone, and what follows does not."""
    _, theirs, ours = mllama
    ids, images = random_ids(3, 12, image_at=[(0, at[0]), (2, at[1])]), random_images([3, 6], rows=[0, 2])
    logits = our_logits(ours, ids, images=images)
    for row, place in ((0, at[0]), (1, 12), (2, at[1])):
        alone = our_logits(ours, ids[row:row + 1])[0]
        assert_close(logits[row, :place], alone[:place], 1e-5)
        assert place == 12 or (logits[row, place:] - alone[place:]).abs().amax(1).min() > 1e-3
    for i, row in enumerate((0, 2)):
        assert_close(logits[row:row + 1], their_logits(theirs, ids[row:row + 1], one_image(images, i)))


def test_a_cross_layer_by_hand(tiny):
    """In float64: x + tanh(gate) attention, then + tanh(gate) MLP, for the tokens that see an image."""
    layer = copy.deepcopy(tiny.layers[1]).double()
    random = torch.Generator().manual_seed(0)
    x, vision = (torch.randn(1, n, 32, dtype=torch.float64, generator=random) for n in (5, 20))
    real = torch.arange(20) < 15
    step = Step(None, None, vision=vision, has_images=True, image=Visible(key_mask=real[None]),
                after_image=torch.tensor([[[0.0], [0.0], [1.0], [1.0], [1.0]]], dtype=torch.float64))
    norm = lambda v, weight: v / (v.square().mean() + 1e-5).sqrt() * weight
    attn, mlp, expected = layer.cross_attn, layer.mlp, x[0].clone()
    for t in (2, 3, 4):
        q = attn.q_proj.weight @ norm(x[0, t], layer.input_layernorm.weight)
        heads = []
        for h in range(4):                                     # four query heads of 8 channels, two key heads
            own = slice(h // 2 * 8, h // 2 * 8 + 8)
            keys, values = (proj.weight[own] @ vision[0, real].T for proj in (attn.k_proj, attn.v_proj))
            keys = torch.stack([norm(key, attn.k_norm.weight) for key in keys.T])
            scores = keys @ norm(q[h * 8:h * 8 + 8], attn.q_norm.weight) / math.sqrt(8)
            heads.append(values @ (scores.exp() / scores.exp().sum()))
        y = expected[t] + layer.cross_attn_attn_gate.tanh() * (attn.o_proj.weight @ torch.cat(heads))
        z = norm(y, layer.post_attention_layernorm.weight)
        gate, up = mlp.gate_proj.weight @ z, mlp.up_proj.weight @ z
        fed = mlp.down_proj.weight @ (gate / (1 + (-gate).exp()) * up)
        expected[t] = y + layer.cross_attn_mlp_gate.tanh() * fed
    assert_close(layer(x, step).detach()[0], expected.detach(), 1e-12)


def test_mllama_text_only(mllama):
    _, theirs, ours = mllama
    ids = random_ids(3, 200)                               # past the original context of 64 that the llama3 rule scales
    assert_close(our_logits(ours, ids), their_logits(theirs, ids))


@pytest.mark.parametrize("ratios", [[1], [6], [4], [1, 2, 3, 4, 5, 6, 7, 8]], ids=["one tile", "four tiles", "wide", "all aspect ratios"])
def test_mllama_images(mllama, ratios):
    _, theirs, ours = mllama
    ids = random_ids(len(ratios), 12, image_at=[(i, i % 5) for i in range(len(ratios))])
    images = random_images(ratios)
    assert_close(our_logits(ours, ids, images=images), their_logits(theirs, ids, images))


def test_padded_batch_of_image_and_text_rows(mllama):
    """Each row of our batch against transformers run on that row alone, unpadded.

    In a mixed batch transformers lets text-only rows attend to a blank image through its cross-attention layers, so there a row's
    result depends on its neighbours; alone it skips those layers, and that is what we hold text rows to.
    """
    _, theirs, ours = mllama
    lengths = [14, 9, 11, 5, 12]
    ids = random_ids(5, 14, image_at=[(0, 3), (2, 0), (4, 6)])
    images = random_images([3, 6, 1], rows=[0, 2, 4])
    logits = our_logits(ours, ids, images=images, lengths=torch.tensor(lengths))
    for row, n in enumerate(lengths):
        image = one_image(images, [0, 2, 4].index(row)) if row in (0, 2, 4) else None
        assert_close(logits[row:row + 1, :n], their_logits(theirs, ids[row:row + 1, :n], image))


@pytest.mark.parametrize("tied, rope, head_dim", [(True, LLAMA3_ROPE | dict(rope_theta=500000.0), 8), (False, dict(rope_type="default", rope_theta=10000.0), 16)])
def test_llama(transformers, tmp_path, tied, rope, head_dim):
    config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=tied, rope_parameters=rope, head_dim=head_dim)
    folder, theirs, ours = reference(transformers.LlamaForCausalLM(config), tmp_path / "theirs")
    ids = random_ids(2, 150)
    expected = their_logits(theirs, ids)
    assert expected.std() > 0.1
    assert_close(our_logits(ours, ids), expected)
    assert (ours.lm_head.weight is ours.embed_tokens.weight) == tied
    ours.save_pretrained(tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_close(their_logits(again.eval(), ids), expected)


@pytest.mark.parametrize("shard", [5 * 10**9, 60_000], ids=["one file", "sharded"])
def test_transformers_reads_what_we_save(transformers, mllama, tmp_path, shard):
    _, theirs, ours = mllama
    ours.save_pretrained(tmp_path, max_shard_size=shard)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) == 1 if shard > 10**9 else (len(shards) > 3 and max(s.stat().st_size for s in shards) < 80_000)
    again, report = transformers.MllamaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    as_trained(again)
    ids, images = random_ids(2, 10, image_at=[(0, 1), (1, 2)]), random_images([6, 2])
    assert_close(their_logits(again.eval(), ids, images), their_logits(theirs, ids, images))
    assert_close(our_logits(Llama.from_pretrained(tmp_path), ids, images=images), their_logits(theirs, ids, images))
    ours.save_pretrained(tmp_path)                         # a later save in one file leaves no stale shard or index
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_both_tensor_layouts_load(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    released = load_file(tmp_path / "model.safetensors")
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in released and "language_model.lm_head.weight" in released
    newer = {}
    for name, tensor in released.items():
        name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head.", "lm_head.")
        newer["model." + name if name.startswith(("vision_model", "multi_modal")) else name] = tensor
    assert not set(newer) & set(released)
    save_file(newer, tmp_path / "model.safetensors")
    for name, tensor in Llama.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, tiny.state_dict()[name]), name


# ------------------------------------------------------------------------------------------------------- cache and generation


def test_cached_decoding_equals_full_forward(mllama):
    """Ragged prefill, ragged continuation, then single tokens, image and text rows mixed."""
    _, theirs, ours = mllama
    ids = random_ids(4, 20, image_at=[(0, 2), (1, 0), (3, 4)])
    images = random_images([1, 2, 5], rows=[0, 1, 3])
    full = our_logits(ours, ids, images=images)
    cache, ends = KVCache(ours.config, 4), [0] * 4
    for step, counts in enumerate([[5, 7, 6, 8], [3, 1, 4, 2], [1] * 4, [1] * 4, [2, 3, 1, 1]]):
        chunk = torch.full((4, max(counts)), 77)           # 77: padding that would show if anything attended to it
        for b, n in enumerate(counts):
            chunk[b, :n] = ids[b, ends[b]:ends[b] + n]
        logits = our_logits(ours, chunk, lengths=torch.tensor(counts), cache=cache, images=images if step == 0 else None)
        for b, n in enumerate(counts):
            assert_close(logits[b, :n], full[b, ends[b]:ends[b] + n])
            ends[b] += n
    assert cache.lengths.tolist() == ends
    assert_close(full[:1], their_logits(theirs, ids[:1], one_image(images, 0)))


def test_kernels_compute_the_same_model(tiny, monkeypatch):
    """With the Triton kernels (interpreted where there is no GPU) in place of their twins: log-probs, gradients, a ragged cache."""
    ids, images, lengths = random_ids(3, 10, image_at=[(0, 2), (2, 4)]), random_images([1, 2], rows=[0, 2]), torch.tensor([10, 4, 7])
    targets = torch.where(torch.arange(10) < lengths[:, None] - 1, ids.roll(-1, 1).clamp(max=99), -100)

    def everything():
        tiny.zero_grad()
        out = tiny(ids, lengths=lengths, images=images, targets=targets, temperature=0.7)
        (out.logprobs.sum() + out.entropy.sum()).backward()
        cache = KVCache(tiny.config, 3)
        cached = [our_logits(tiny, ids[:, :6], lengths=torch.tensor([6, 4, 5]), cache=cache, images=images)[[0, 1, 2], [5, 3, 4]]]
        cached += [our_logits(tiny, ids[:, t:t + n], cache=cache)[:, -1] for t, n in ((6, 1), (7, 2))]
        return [out.logprobs.detach(), out.entropy.detach(), *cached, *(p.grad for p in tiny.parameters())]
    results = {}
    for which in ("torch", "triton"):
        monkeypatch.setenv("KERNELS", which)
        results[which] = [x.clone() for x in everything()]
    tiny.zero_grad()
    for x, y in zip(*results.values(), strict=True):
        assert_close(x, y, 2e-5 * max(1.0, float(y.abs().max())))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_autocast_reaches_the_kernels_and_the_cache(tiny, kernels, monkeypatch):
    """As on a GPU, but to float16, which the interpreter can multiply: weights stay float32, products and what is remembered do not."""
    monkeypatch.setenv("KERNELS", kernels)
    ids, images = random_ids(2, 8, image_at=[(0, 2)]), random_images([1], rows=[0])
    expected = tiny(ids, images=images, targets=ids.clamp(max=99)).logprobs.detach()
    with torch.autocast("cpu", torch.float16):
        found = tiny(ids, images=images, targets=ids.clamp(max=99)).logprobs
        found.sum().backward()
        samples, cache = generate(tiny, ids.tolist(), images=images, max_new_tokens=3, temperature=0, stop_ids=[])
    assert_close(found.detach(), expected, 0.05)
    assert cache.kv[0].dtype == cache.cross.dtype == torch.float16 and all(len(sample.ids) == 3 for sample in samples)
    assert all(p.grad.dtype == torch.float32 for p in tiny.parameters() if p.grad is not None)
    tiny.zero_grad()


@pytest.mark.parametrize("with_image", [False, True])
def test_greedy_tokens_identical(mllama, with_image):
    _, theirs, ours = mllama
    ids = random_ids(2, 10, seed=3, image_at=[(0, 2), (1, 5)] if with_image else [])
    images = random_images([2, 6]) if with_image else None
    samples, _ = generate(ours, ids.tolist(), images=images, max_new_tokens=64, temperature=0, stop_ids=[])
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, min_new_tokens=64,
                               eos_token_id=None, pad_token_id=0, **(image_inputs(ids, images) if images else {}))
    assert [s.ids for s in samples] == expected[:, 10:].tolist()
    assert len(set(samples[0].ids)) > 3                    # not a loop on one token


def feeding(model):
    """Records how many (rows, tokens) each forward is given, padding included."""
    fed = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: fed.append(tuple(args[0].shape)), with_kwargs=True)
    return fed, handle


CONVERSATIONS = [[5, IMAGE, 7, 8, 9, 10, 11], [1, 2, 3], [4, 5, 6, IMAGE, 2], [9, 8, 7, 6, 5, 4, 3, 2]]


def start(model, rows=range(4), **kwargs):
    """Sample answers to CONVERSATIONS (two have an image) with one seed a row."""
    rows = list(rows)
    pool = {0: 0, 2: 1}
    images, chosen = random_images([2, 6]), [r for r in rows if r in pool]
    pick = torch.tensor([pool[r] for r in chosen], dtype=torch.long)
    images = Images(images.pixel_values[pick], images.aspect_ratio_ids[pick], images.aspect_ratio_mask[pick],
                    torch.tensor([rows.index(r) for r in chosen])) if chosen else None
    options = dict(max_new_tokens=12, stop_ids=range(0, 12), seeds=[100 + r for r in rows]) | kwargs
    return generate(model, [CONVERSATIONS[r] for r in rows], images=images, **options)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_a_row_does_not_depend_on_its_batch(tiny, temperature):
    together, _ = start(tiny, temperature=temperature)
    for row in range(4):
        alone = start(tiny, [row], temperature=temperature)[0][0]
        assert alone.ids == together[row].ids and alone.ended == together[row].ended
        assert np.abs(np.subtract(alone.logprobs, together[row].logprobs)).max() < 1e-4


def test_logits_of_a_row_alone_and_in_a_batch(tiny):
    ids, images = random_ids(6, 13, image_at=[(1, 2), (4, 0)]), random_images([8, 1], rows=[1, 4])
    together = our_logits(tiny, ids, images=images)
    for row in range(6):
        image = one_image(images, [1, 4].index(row)) if row in (1, 4) else None
        assert_close(our_logits(tiny, ids[row:row + 1], images=image), together[row:row + 1], 1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_logprob_drawn_is_logprob_scored(tiny, temperature):
    """Also: seeds matter, equal seeds repeat, and other log-probs (another temperature) would be noticed."""
    samples, _ = start(tiny, temperature=temperature)
    assert [s.ids for s in start(tiny, temperature=temperature)[0]] == [s.ids for s in samples]
    assert [s.ids for s in start(tiny, temperature=temperature, seeds=[1, 2, 3, 4])[0]] != [s.ids for s in samples]
    conversations = [c + s.ids for c, s in zip(CONVERSATIONS, samples)]
    ids, lengths = pad(conversations)
    targets = torch.full_like(ids, -100)
    for b, (c, s) in enumerate(zip(CONVERSATIONS, samples)):
        targets[b, len(c) - 1:len(c) - 1 + len(s.ids)] = torch.tensor(s.ids)
    for scale, same in ((temperature, True), (2.0, False)):
        out = tiny(ids, lengths=lengths, images=random_images([2, 6], rows=[0, 2]), targets=targets, temperature=scale)
        scored = torch.cat([out.logprobs[b][targets[b] >= 0] for b in range(4)])
        drawn = torch.tensor([p for s in samples for p in s.logprobs])
        assert ((scored - drawn).abs().max() < 1e-4) == same
    assert (out.logprobs[targets < 0] == 0).all() and (out.entropy[targets < 0] == 0).all()


def test_sampling_follows_the_distribution():
    """20000 draws by inverse CDF: frequencies within 4 standard errors; impossible tokens never."""
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0, -1.0, -math.inf]]).expand(20000, -1)
    tokens, logprobs = draw_tokens(logits, draw_uniform(None, 20000, 1)[:, 0], 0.8)
    p = (logits[0] / 0.8).softmax(0)
    frequency = torch.bincount(tokens, minlength=6) / 20000
    assert ((frequency - p).abs() <= 4 * (p * (1 - p) / 20000).sqrt()).all()
    assert_close(logprobs, p.log()[tokens], 1e-6)


def test_the_largest_random_number_draws_a_possible_token(monkeypatch):
    """u * total must not round to total: that would draw past the end, a token of probability 0."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 1.0))
    logits = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    logits[:, 50:] = -math.inf
    tokens, logprobs = draw_tokens(logits, draw_uniform(None, 500, 1)[:, 0], 1.0)
    assert (tokens < 50).all() and logprobs.isfinite().all()
    assert draw_tokens(logits, torch.zeros(500), 1.0)[0].tolist() == [0] * 500


def test_turns_continue_and_prefix_is_fed_once(tiny):
    """Three turns with rows dropping out: same samples as from scratch each turn, and every token is fed exactly once."""
    fed, handle = feeding(tiny)
    samples, cache = start(tiny, temperature=1.0)
    live, lists = [0, 1, 2, 3], [list(c) for c in CONVERSATIONS]
    longest = max(map(len, lists))
    assert fed[0] == (4, longest) and all(shape[1] == 1 for shape in fed[1:])
    for turn, stay in enumerate([[0, 2, 3], [2, 0]], start=1):
        for row, sample in zip(live, samples):
            assert cache.lengths[live.index(row)] == len(lists[row]) + len(sample.ids) - 1         # all but the last one drawn
            lists[row] += sample.ids + [30 + turn, 40 + turn, 50][:1 + row]
        held = {row: int(cache.lengths[live.index(row)]) for row in live}
        cache.keep([live.index(row) for row in stay])
        live = stay
        assert cache.lengths.tolist() == [held[row] for row in stay]
        fed.clear()
        seeds = [1000 * turn + row for row in live]
        samples, cache = generate(tiny, [lists[r] for r in live], cache=cache, max_new_tokens=9, stop_ids=range(0, 9), seeds=seeds)
        assert fed[0] == (len(live), max(len(lists[r]) - held[r] for r in live)) and all(shape[1] == 1 for shape in fed[1:])
        images = random_images([2, 6], rows=[0, 2])
        order = [r for r in live if r in (0, 2)]
        pick = torch.tensor([[0, 2].index(r) for r in order])
        fresh = Images(images.pixel_values[pick], images.aspect_ratio_ids[pick], images.aspect_ratio_mask[pick],
                       torch.tensor([live.index(r) for r in order]))
        scratch, _ = generate(tiny, [lists[r] for r in live], images=fresh, max_new_tokens=9, stop_ids=range(0, 9), seeds=seeds)
        assert [s.ids for s in scratch] == [s.ids for s in samples]
    handle.remove()


def test_a_cache_grows_around_what_it_holds(tiny):
    cache = KVCache(tiny.config, 2)
    tiny(random_ids(2, 70), cache=cache)
    before = [layer.clone() for layer in cache.kv]
    cache.reserve(300)
    for old, new in zip(before, cache.kv, strict=True):
        assert old[:, :, :, :70].abs().min() > 0 and torch.equal(new[:, :, :, :70], old[:, :, :, :70])
        assert new.shape[3] >= 300 and not new[:, :, :, 70:].any()


def test_samples_hand_out_states_and_features(tiny):
    """The state before an answer, and what the encoder made of the image, from which a later pass computes the same as from pixels."""
    samples, _ = start(tiny, keep_features=True)
    images = random_images([2, 6], rows=[0, 2])
    assert [s.features is None for s in samples] == [False, True, False, True]
    assert_close(torch.stack([samples[0].features, samples[2].features]), tiny.vision_model(images))
    known = Images(None, images.aspect_ratio_ids, images.aspect_ratio_mask, images.rows, torch.stack([samples[0].features, samples[2].features]))
    ids, lengths = pad(CONVERSATIONS)
    for given in (images, known):
        hidden = tiny(ids, lengths=lengths, images=given).hidden
        assert_close(hidden[range(4), lengths - 1], torch.stack([s.hidden for s in samples]))
    assert all(s.features is None for s in start(tiny)[0])


def test_finished_rows_cost_nothing(tiny):
    fed, handle = feeding(tiny)
    samples, _ = start(tiny)
    handle.remove()
    assert len({len(s.ids) for s in samples}) > 1          # rows do end at different times
    for step, (rows, width) in enumerate(fed[1:], start=1):
        assert (rows, width) == (sum(len(s.ids) > step for s in samples), 1)
    for s in samples:
        assert s.ended == (s.ids[-1] < 12) and (s.ended or len(s.ids) == 12) and len(s.logprobs) == len(s.ids)
        assert all(token >= 12 for token in s.ids[:-1])


def test_image_is_encoded_once(tiny):
    calls = []
    handle = tiny.vision_model.register_forward_hook(lambda *_: calls.append(1))
    samples, cache = start(tiny)
    generate(tiny, [c + s.ids + [50] for c, s in zip(CONVERSATIONS, samples)], cache=cache, max_new_tokens=3, stop_ids=[])
    handle.remove()
    assert len(calls) == 1


def test_image_and_token_must_match(tiny):
    images = random_images([1])
    for ids in ([[1, 2, 3]], [[IMAGE, 2, IMAGE]], [[IMAGE, 1, 1], [1, IMAGE, 1]]):
        with pytest.raises(ValueError, match="one image"):
            tiny(torch.tensor(ids), images=images)
    with pytest.raises(ValueError, match="one image"):
        tiny(torch.tensor([[IMAGE, 2, IMAGE]]), images=random_images([1, 1], rows=[0, 0]))
    cache = KVCache(tiny.config, 1)
    tiny(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="first tokens"):
        tiny(torch.tensor([[IMAGE, 2]]), cache=cache, images=images)
    with pytest.raises(ValueError, match="at least one token"):
        generate(tiny, [[1, 2]], cache=cache, max_new_tokens=1, stop_ids=[])


def test_rollout_then_training_in_one_process(tiny):
    """Nothing made while sampling (tables, caches) gets in autograd's way, and gradients reach every weight."""
    with torch.inference_mode():
        tiny(torch.tensor([[1, 2]]))
    ids, images = random_ids(2, 6, image_at=[(0, 1), (1, 2)]), random_images([3, 6])
    tiny.zero_grad()
    out = tiny(ids, images=images, targets=ids.roll(-1, 1) % 100)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert [n for n, p in tiny.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    tiny.zero_grad()


# ------------------------------------------------------------------------------------------------------------ log-probabilities


def test_log_probs_of_the_targets_asked_about(tiny):
    targets = torch.full((3, 8), -100)
    assert tiny(random_ids(3, 8), targets=targets).logprobs.tolist() == [[0.0] * 8] * 3
    targets[1, 2:4] = 5
    out = tiny(random_ids(3, 8), targets=targets)
    assert out.logits is None and out.hidden.shape == (3, 8, 32)
    full = our_logits(tiny, random_ids(3, 8)).log_softmax(-1)
    assert_close(out.logprobs[1, 2:4].detach(), full[1, 2:4, 5], 1e-5)
    assert_close(out.entropy[1, 2:4].detach(), -(full.exp() * full).sum(-1)[1, 2:4], 1e-5)


def test_last_logits_are_those_of_the_last_real_token(tiny):
    ids, lengths = random_ids(3, 8), torch.tensor([8, 3, 5])
    assert_close(tiny(ids, lengths=lengths, logits="last").logits, our_logits(tiny, ids)[torch.arange(3), lengths - 1], 1e-5)


# ---------------------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_built_on_meta_and_cast(folder, monkeypatch):
    built = []
    monkeypatch.setattr(Llama, "init_weights", lambda self: built.append(self))
    m = Llama.from_pretrained(folder, dtype=torch.bfloat16)
    assert not built and all(p.dtype == torch.bfloat16 and not p.is_meta for p in m.parameters())
    m.save_pretrained(folder)
    assert next(Llama.from_pretrained(folder).parameters()).dtype == torch.bfloat16              # None keeps the file's
    assert our_logits(m, random_ids(1, 4)).isfinite().all()


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("vision_model.class_embedding"), ["vision_model.class_embedding", "missing"]),
    (lambda t: t.pop("language_model.lm_head.weight"), ["language_model.lm_head.weight", "missing"]),
    (lambda t: t.update(surplus=torch.zeros(1)), ["surplus", "unexpected"]),
    (lambda t: t.update({"multi_modal_projector.bias": torch.zeros(31)}), ["multi_modal_projector.bias", "(31,)", "(32,)"]),
])
def test_wrong_tensors_are_named(folder, change, words):
    edit(folder, change)
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(folder)
    assert all(word in str(error.value) for word in [*words, "model.safetensors"]) and "\n" not in str(error.value)


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def set_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("damage, kind, words", [
    (lambda f: shutil.rmtree(f), FileNotFoundError, ["config.json"]),
    (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, ["model.safetensors"]),
    (lambda f: truncate(f / "model.safetensors"), ValueError, ["model.safetensors"]),
    (lambda f: (f / "config.json").write_text("{"), ValueError, ["config.json", "JSON"]),
    (lambda f: set_config(f, model_type="qwen2"), ValueError, ["llama", "mllama", "qwen2"]),
    (lambda f: set_config(f, text_config=MLLAMA["text_config"] | dict(hidden_act="gelu")), ValueError, ["hidden_act", "silu"]),
    (lambda f: set_config(f, text_config=MLLAMA["text_config"] | dict(rope_scaling=dict(rope_type="yarn"))), ValueError, ["yarn", "llama3"]),
    (lambda f: set_config(f, text_config=dict(vocab_size=5)), ValueError, ["config.json", "hidden_size"]),
    (lambda f: set_config(f, model_type="llama"), ValueError, ["config.json", "vocab_size"]),
    (lambda f: (f / "config.json").write_text("[]"), ValueError, ["config.json"]),
])
def test_unusable_folders(folder, damage, kind, words):
    damage(folder)
    with pytest.raises(kind) as error:
        Llama.from_pretrained(folder)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_llama_with_biases_is_refused():
    with pytest.raises(ValueError, match="attention_bias"):
        Config.from_dict(TEXT | dict(model_type="llama", attention_bias=True))


def test_missing_shard_is_named(tiny, tmp_path):
    tiny.save_pretrained(tmp_path, max_shard_size=60_000)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match="is missing"):
        Llama.from_pretrained(tmp_path)


def test_full_disk_leaves_nothing_half_written(tiny, folder, tmp_path, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    real, calls = folders.save_file, []

    def fails_on_second(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(folders, "save_file", fails_on_second)
    with pytest.raises(OSError, match="No space"):
        tiny.save_pretrained(folder, max_shard_size=60_000)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    calls.clear()
    with pytest.raises(OSError, match="No space"):
        tiny.save_pretrained(tmp_path / "new", max_shard_size=60_000)
    assert not (tmp_path / "new").exists()


def test_fresh_weights_are_seeded_and_sane():
    m = Llama(Config.from_dict(MLLAMA))
    first = {k: v.clone() for k, v in m.state_dict().items()}
    m.init_weights(seed=1)
    assert not torch.equal(first["lm_head.weight"], m.lm_head.weight)
    m.init_weights(seed=0)
    assert all(torch.equal(first[k], v) for k, v in m.state_dict().items())
    assert abs(first["layers.0.mlp.up_proj.weight"].std() - 0.02) < 0.002
    assert (first["norm.weight"] == 1).all() and first["layers.1.cross_attn_attn_gate"] == 0 and first["vision_model.gated_positional_embedding.gate"] == 0
    assert first["vision_model.global_transformer.layers.0.gate_attn"] != 0 and (first["multi_modal_projector.bias"] == 0).all()


# ------------------------------------------------------------------------------------------------------------------- processor


def make_processor(specials, **kwargs):
    """Byte-level tokenizer without merges, so that every string has ids: bytes first, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return Processor(tokenizer, **kwargs)


PREPROCESSOR = dict(size=dict(height=TILE, width=TILE), max_image_tiles=4, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3], resample=2)


@pytest.fixture
def llama3():
    return make_processor([*LLAMA3, "<|image|>", "<|end_of_text|>"], image_config=PREPROCESSOR, generation_config={"eos_token_id": [261, 259]})


@pytest.fixture
def chatml():
    return make_processor(CHATML)


def spell(processor, ids):
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


PICTURE = Image.new("RGB", (30, 30), "red")
DIALOGUE = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Hi é"}]},
            {"role": "assistant", "content": "wrong", "train": False}, {"role": "user", "content": "no"}, {"role": "assistant", "content": "right"}]


def test_llama3_rendering(llama3):
    out = llama3.render(DIALOGUE, reply=False)
    assert spell(llama3, out.ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>Hi é<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nwrong<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nno<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nright<|eot_id|>")
    assert spell(llama3, [i for i, s in zip(out.ids, out.sampled) if s]) == "right<|eot_id|>"
    assert out.images == [PICTURE] and len(out.sampled) == len(out.ids)
    assert llama3.stop_ids == [259, 261] and out.ids.count(llama3.image_token_id) == 1
    header = [257, *llama3.encode("assistant"), 258, *llama3.encode("\n\n")]
    assert llama3.render(DIALOGUE).ids == out.ids + header


def test_chatml_rendering(chatml):
    out = chatml.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}])
    assert spell(chatml, out.ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>assistant\n"
    assert spell(chatml, [i for i, s in zip(out.ids, out.sampled) if s]) == "Yes<|im_end|>"
    assert chatml.stop_ids == [chatml.end_id] and chatml.image_token_id is None
    with pytest.raises(ValueError, match="no images"):
        chatml.render(DIALOGUE)


@pytest.mark.parametrize("kind", ["llama3", "chatml"])
@pytest.mark.parametrize("ended", [True, False])
def test_turns_are_exact_prefixes(kind, ended, request):
    """Prompt + drawn ids + continuation is the rendering of the whole; a cut-off answer gets a forced end token."""
    processor = request.getfixturevalue(kind)
    user, verdict = {"role": "user", "content": "go"}, {"role": "user", "content": "no"}
    prompt = processor.render([user])
    drawn = processor.encode("answer") + [processor.end_id] * ended
    more = processor.render([verdict], first=False, ended=ended)
    whole = processor.render([user, {"role": "assistant", "content": "answer"}, verdict])
    assert prompt.ids + drawn + more.ids == whole.ids
    assert not any(prompt.sampled + more.sampled)
    assert sum(whole.sampled) == len(drawn) + (not ended)


def test_user_text_makes_no_special_tokens(llama3, chatml):
    for processor, words in ((llama3, LLAMA3 + ["<|image|>", "<|end_of_text|>"]), (chatml, CHATML)):
        text = "a".join(words)
        ids = processor.encode(text)
        assert not processor.special_ids & set(ids) and processor.decode(ids) == text
        clean, attack = (processor.render([{"role": "user", "content": c}]).ids for c in ("x", text))
        assert sum(i in processor.special_ids for i in clean) == sum(i in processor.special_ids for i in attack) > 0


def test_two_images_and_unknown_parts_are_refused(llama3):
    with pytest.raises(ValueError, match="at most one image"):
        llama3.render([DIALOGUE[0], DIALOGUE[0]])
    with pytest.raises(ValueError, match="video"):
        llama3.render([{"role": "user", "content": [{"type": "video"}]}])


def test_position_of(llama3):
    text = 'é {"formula": "1"}'
    ids = [llama3.end_id, *llama3.encode(text), llama3.end_id]         # é is two bytes, hence two tokens
    assert llama3.decode(ids[:llama3.position_of(ids, '"formula"')]) == "é {"
    assert llama3.position_of(ids, "é") == 1 and llama3.position_of(ids, "action") == -1 and llama3.position_of([], "a") == -1


def test_processor_round_trip(llama3, chatml, tmp_path):
    assert make_processor(CHATML, generation_config={"eos_token_id": 0, "pad_token_id": 0}).stop_ids[0] == 0
    assert make_processor(CHATML, generation_config={"pad_token_id": 0}).pad_id == 0
    llama3.save_pretrained(tmp_path / "a")
    again = Processor.from_pretrained(tmp_path / "a")
    assert again.render(DIALOGUE) == llama3.render(DIALOGUE) and again.image_config == llama3.image_config
    assert (again.stop_ids, again.pad_id) == (llama3.stop_ids, llama3.pad_id)
    chatml.save_pretrained(tmp_path / "b")
    assert Processor.from_pretrained(tmp_path / "b").image_config is None
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Processor.from_pretrained(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Processor.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="special tokens"):
        make_processor(["<s>"])


def noise(width, height, seed, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(2) if mode == "L" else pixels, mode)


def sizes():
    rng = np.random.default_rng(0)
    return [(1, 1), (1, 400), (900, 2), (TILE, TILE), (TILE * 2, TILE), (TILE, TILE * 2), (TILE * 4, TILE), (500, 500), (3, 200)] + \
        [tuple(int(v) for v in np.exp(rng.uniform(0, 6, 2)).astype(int) + 1) for _ in range(21)]


@pytest.fixture(scope="module")
def their_images(transformers):
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil    # needs no torchvision
    return MllamaImageProcessorPil(**PREPROCESSOR)


def test_image_tensors(llama3, their_images):
    """Over 30 sizes every aspect ratio occurs; ids and masks are equal, pixels within 1/255 of the range (1 before normalising)."""
    pictures = [noise(*size, seed=i) for i, size in enumerate(sizes())]
    ours = llama3.images([None, *pictures, None])
    theirs = their_images([[p] for p in pictures], return_tensors="pt")
    assert len(pictures) == 30 and ours.rows.tolist() == list(range(1, 31)) and all(p.dtype == torch.float32 for p in ours.pixel_values)
    assert torch.equal(ours.aspect_ratio_ids, theirs["aspect_ratio_ids"][:, 0]) and ours.aspect_ratio_ids.unique().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert torch.equal(ours.aspect_ratio_mask, theirs["aspect_ratio_mask"][:, 0])
    scale = torch.tensor(PREPROCESSOR["image_std"])[:, None, None]
    assert_close(torch.stack(ours.pixel_values) * scale, theirs["pixel_values"][:, 0] * scale, 1 / 255)
    assert llama3.images([None, None]) is None
    known = llama3.images([None, *pictures, None], [None, *torch.arange(30), None])
    assert known.pixel_values is None and known.features.tolist() == list(range(30))
    assert all(torch.equal(getattr(known, name), getattr(ours, name)) for name in ("aspect_ratio_ids", "aspect_ratio_mask", "rows"))


def test_a_picture_is_cut_once(llama3):
    """A batch takes what was cut already as it takes a picture, and shares its pixels."""
    pictures = [noise(30, 30, 0), noise(90, 40, 1)]
    cut = [llama3.cut(picture) for picture in pictures]
    batch, expected = llama3.images([cut[0], None, cut[1]]), llama3.images([pictures[0], None, pictures[1]])
    for name in ("aspect_ratio_ids", "aspect_ratio_mask", "rows"):
        assert torch.equal(getattr(batch, name), getattr(expected, name))
    assert all(map(torch.equal, batch.pixel_values, expected.pixel_values)) and batch.rows.tolist() == [0, 2]
    assert all(batch.pixel_values[i] is cut[i].pixel_values[0] and llama3.cut(cut[i]) is cut[i] for i in (0, 1))


def test_a_frozen_encoder_sees_each_image_once(tiny, llama3, monkeypatch):
    """Whatever batches it comes in, in any copy of the model: nothing else changes. Afterwards all is as before."""
    seen, features, forward = [], {}, type(tiny.vision_model).forward
    def count(encoder, images):
        seen.append(len(images.rows))
        return forward(encoder, images)

    monkeypatch.setattr(type(tiny.vision_model), "forward", count)
    cut = [llama3.cut(noise(*size, 0)) for size in ((30, 30), (90, 40), (28, 28))]
    ids = random_ids(4, 8, image_at=[(0, 1), (1, 2), (3, 0)])
    both = torch.nn.ModuleList([tiny, copy.deepcopy(tiny)])
    for rows in ([0, 1, None, 1], [1, 0, None, 0], [2, 1, None, 0]):
        images = llama3.images([None if row is None else cut[row] for row in rows])
        expected = our_logits(tiny, ids, images=images)
        seen.clear()
        with torch.inference_mode(), remember(both[0], features):
            assert torch.equal(both[0](ids, images=images, logits="all").logits, expected)
        assert seen == {0: [2], 1: [], 2: [1]}[rows[0]]
        with remember(both, features):
            assert torch.equal(our_logits(both[1], ids, images=images), expected)
        assert len(seen) == (rows[0] != 1) and all(x.device.type == "cpu" for x in features.values())
    with remember(tiny, None):
        our_logits(tiny, ids, images=images)
    our_logits(tiny, ids, images=images)
    assert seen == [1, 3, 3] and len(features) == 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "F"])
def test_odd_modes_as_transformers(llama3, their_images, mode):
    picture = noise(40, 60, 1, "RGBA").convert("L" if mode in "IF" else "RGB" if mode in ("CMYK", "P", "1") else "RGBA").convert(mode)
    for image in (picture, picture.resize((1, 1))):
        theirs = their_images([[image]], return_tensors="pt")["pixel_values"][0]
        assert_close(llama3.cut(image).pixel_values[0], theirs[0], 1 / 255)


def greys(image):
    rgb = np.asarray(to_rgb(image))
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0].ravel().tolist()


@pytest.mark.parametrize("mode, order", [("I;16", "<"), ("I;16L", "<"), ("I;16B", ">"), ("I;16N", "=")])
def test_16_bits_in_any_order(llama3, mode, order):
    """The high byte, which 8 bits widened by 256 or by 257 both give back."""
    values = np.array([0, 255, 256, 128 * 256, 128 * 257, 65535], order + "u2")
    assert greys(Image.frombytes(mode, (6, 1), values.tobytes())) == [0, 0, 1, 128, 128, 255]
    half = Image.frombytes(mode, (5, 5), np.full(25, 128 * 256, order + "u2").tobytes())
    same = Image.new("L", (5, 5), 128)
    assert torch.equal(llama3.cut(half).pixel_values[0], llama3.cut(same).pixel_values[0])


@pytest.mark.parametrize("kind, values, expected", [
    (np.int32, [0, 1, 254, 255], [0, 1, 254, 255]), (np.int32, [0, 255, 256, 65535], [0, 0, 1, 255]),
    (np.int32, [0, 50000, 100000], [0, 127, 255]), (np.int32, [0, 2**30, 2**31 - 1], [0, 127, 255]),
    (np.int32, [-5, 100], [0, 100]), (np.int32, [-2**31, -1], [0, 0]), (np.int32, [0, 0], [0, 0]),
    (np.float32, [0, 0.2, 0.5, 1], [0, 51, 128, 255]), (np.float32, [-1, 0.25], [0, 64]),
    (np.float32, [0, 0], [0, 0]),
    (np.float32, [0, 1, 127.4, 255], [0, 1, 127, 255]), (np.float32, [0, 257, 65535], [0, 1, 255]),
    (np.float32, [0, 1e6, 2e6], [0, 127, 255]), (np.float32, [-3, -2], [0, 0]), (np.float32, [3e38], [255])])
def test_32_bits_by_their_range(kind, values, expected):
    assert greys(Image.fromarray(np.array([values], kind))) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_float_that_is_no_number_is_refused(llama3, value):
    with pytest.raises(ValueError, match="mode F holds NaN"):
        llama3.images([Image.fromarray(np.array([[0.5, value]], np.float32))])


@pytest.mark.parametrize("kind", ["PNG", "PPM", "TIFF"])
def test_16_bit_files_stay_dark(kind):
    """Older Pillows open such a PNG as mode I, as all do with a PGM; what is dark is not taken for 8 bits."""
    file = io.BytesIO()
    values = np.array([[0, 100, 255]], np.int32 if kind == "PPM" else np.uint16)
    Image.fromarray(values).save(file, kind)
    assert greys(Image.open(file)) == [0, 0, 0]
    opened = Image.fromarray(values.astype(np.int32))
    opened.format = "PNG"
    assert opened.mode == "I" and greys(opened) == [0, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "P", "RGB", "L", "1", "I;16", "I"])
def test_transparency_turns_white(mode):
    """A dark pixel that is seen, beside one that is not."""
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "La":
        clear = clear.convert("LA")
    image = clear.convert(mode) if mode[-1] in "Aa" else Image.new(mode, (2, 1), 0)
    if mode[-1] not in "Aa":
        image.putpixel((1, 0), (0, 0, 1) if mode == "RGB" else 1)
        image.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0
    seen = np.asarray(to_rgb(image))[0]
    assert (seen[0] == 255).all() and (seen[1] <= 1).all() or mode == "1" and (seen == 255).all()


# ----------------------------------------------------------------------------------------------------------------- real weights


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="SMOLLM2 names no folder with SmolLM2-135M-Instruct")
def test_smollm2_greedy_text(transformers):
    folder = os.environ["SMOLLM2"]
    processor = Processor.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = Llama.from_pretrained(folder, dtype=torch.float32)
    questions = ["What is the capital of France?", "Name three uses of a hammer."]
    prompts = [processor.render([{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": q}]).ids for q in questions]
    samples, _ = generate(ours, prompts, max_new_tokens=48, temperature=0, stop_ids=processor.stop_ids)
    for prompt, sample in zip(prompts, samples):
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48, eos_token_id=processor.stop_ids)
        assert sample.ids == expected[0, len(prompt):].tolist()
        expected = their_logits(theirs, ids)
        assert_close(our_logits(ours, ids), expected, 1e-5 * expected.abs().max())         # logits reach 38 here, so 4e-4
    assert "Paris" in processor.decode(samples[0].ids)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": questions[0]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert processor.render(messages).ids == tokenizer(text, add_special_tokens=False).input_ids
