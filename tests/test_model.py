"""model.py against Hugging Face transformers (float32, random weights, every gate open) and against itself.

    python -m pytest tests/test_model.py -q
"""
import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.fx.experimental.proxy_tensor import make_fx

from llama import folders
from llama.cache import KVCache
from llama.config import Config, tile_layouts
from llama.frozen import remember
from llama.generate import draw_tokens, draw_uniform, generate, pad
from llama.images import Images, to_rgb
from llama.processor import CHATML, LLAMA3, Processor
from model import Llama
from tables import cases, raises

IMAGE, TILE = 120, 28
MLLAMA = json.loads("""{
    "model_type": "mllama", "image_token_index": 120,
    "text_config": {
        "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 1024,
        "bos_token_id": 100, "eos_token_id": 101, "pad_token_id": 102, "cross_attention_layers": [1, 3],
        "rope_theta": 10000.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}},
    "vision_config": {
        "hidden_size": 24, "num_hidden_layers": 3, "num_global_layers": 2, "attention_heads": 2,
        "intermediate_size": 40, "vision_output_dim": 72, "image_size": 28, "patch_size": 14,
        "intermediate_layers_indices": [1, 2]}}""")
TEXT = {name: value for name, value in MLLAMA["text_config"].items() if name != "cross_attention_layers"}


def randomise(module):
    """Draw weights with which every part matters: transformers (and we) start gates and biases at zero."""
    generator = torch.Generator().manual_seed(0)
    for name, p in sorted(module.named_parameters()):
        mean, std = (0.8, 0.2) if p.numel() == 1 else (float("norm" in name and name.endswith("weight")), 0.1)
        torch.nn.init.normal_(p, mean, std, generator)
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
    """A model of theirs, and ours from the folder that it was saved in."""
    config = transformers.MllamaConfig(**{k: v for k, v in MLLAMA.items() if k != "model_type"})
    return reference(transformers.MllamaForConditionalGeneration(config), tmp_path_factory.mktemp("mllama"))


def reference(theirs, folder):
    randomise(theirs).save_pretrained(folder)
    return as_trained(theirs), Llama.from_pretrained(folder)


def as_trained(theirs):
    """Undo two differences of transformers 5 from Meta's code, with which the weights were trained.

    It concatenates the *output* of vision layer i for each i of intermediate_layers_indices; Meta's code, and
    the first transformers versions with mllama, take its *input*, the output of layer i - 1. And it lets
    tokens before their image attend to it (issue 39379); Meta zeroes attention and MLP: they pass unchanged.
    """
    def pass_unseen(layer, args, kwargs, output):
        sees = kwargs["full_text_row_masked_out_mask"][:, 0].bool()            # (B, T, 1)
        return torch.where(sees, output, args[0])

    vision = getattr(theirs.model, "vision_model", None)
    if vision is not None:
        vision.intermediate_layers_indices = [i - 1 for i in vision.intermediate_layers_indices]
    for layer in theirs.modules():
        if type(layer).__name__ == "MllamaCrossAttentionDecoderLayer":
            layer.register_forward_hook(pass_unseen, with_kwargs=True)
    return theirs


def random_ids(rows, length, seed=0, image_at=()):
    ids = torch.randint(0, 100, (rows, length), generator=torch.Generator().manual_seed(seed))
    for row, position in image_at:
        ids[row, position] = IMAGE
    return ids


def random_images(aspect_ratio_ids, rows=None, seed=0):
    """Make images with these aspect ratio ids (1-based); padded tiles are zero, as in real batches."""
    n, ids = len(aspect_ratio_ids), torch.tensor(aspect_ratio_ids)
    mask = (torch.arange(4) < torch.tensor(tile_layouts(4)).prod(1)[ids - 1][:, None]).long()
    pixels = torch.randn(n, 4, 3, TILE, TILE, generator=torch.Generator().manual_seed(seed))
    return Images(list(pixels * mask[:, :, None, None, None]), ids, mask, torch.tensor(rows or range(n)))


def some(images, at, rows):
    """Return the images of these indices, for these rows."""
    pixels = [images.pixel_values[i] for i in at]
    return Images(pixels, images.aspect_ratio_ids[at], images.aspect_ratio_mask[at], torch.tensor(rows))


def image_inputs(ids, images):
    """Return the reference's keyword arguments for a batch in which every row has an image, or none has."""
    if images is None:
        return {}
    sees, ratios = (ids == IMAGE).cumsum(1) > 0, images.aspect_ratio_mask[:, None]
    return dict(pixel_values=torch.stack(images.pixel_values)[:, None], aspect_ratio_mask=ratios,
                aspect_ratio_ids=images.aspect_ratio_ids[:, None],
                cross_attention_mask=(sees[:, :, None] & ratios.bool()).long()[:, :, None])


@torch.no_grad()
def their_logits(theirs, ids, images=None):
    return theirs(ids, **image_inputs(ids, images)).logits


@torch.no_grad()
def our_logits(ours, ids, **kwargs):
    return ours(ids, logits="all", **kwargs).logits


def assert_close(a, b, limit=1e-4):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= limit


# ------------------------------------------------------------------------------------------------------------
# Parity of the forward pass


@cases("at", ["1 2", "3 11", "7 1", "10 10", "3 0"])
def test_rows_of_a_padded_batch(mllama, at):
    """Each equals transformers run on it alone, unpadded; before <|image|>, it equals the text alone.

    In a mixed batch transformers lets text-only rows attend to a blank image through its cross-attention
    layers, so there a row's result depends on its neighbours; alone it skips those layers.
    """
    theirs, ours = mllama
    lengths, places = [14, 9, 12, 5], dict(zip((0, 2), map(int, at.split())))
    ids, images = random_ids(4, 14, image_at=places.items()), random_images([3, 6], rows=[0, 2])
    logits = our_logits(ours, ids, images=images, lengths=torch.tensor(lengths))
    for row, n in enumerate(lengths):
        image = some(images, [list(places).index(row)], [0]) if row in places else None
        own, found, place = ids[row:row + 1, :n], logits[row:row + 1, :n], places.get(row, n)
        assert_close(found, their_logits(theirs, own, image))
        assert_close(found, our_logits(ours, own, images=image), 1e-5)
        difference = (found - our_logits(ours, own)).abs().amax((0, 2))
        assert (difference[:place] < 1e-5).all() and (difference[place:] > 1e-3).all()


@cases("ratios", [[1], [6], [4], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_mllama_images(mllama, ratios):
    """One tile, four, wide ones, all aspect ratios: pixels, ratio and number of tiles all matter.

    The text goes on past the 64 positions that llama3 rope scales.
    """
    theirs, ours = mllama
    ids = random_ids(len(ratios), 200, image_at=[(i, i % 5) for i in range(len(ratios))])
    images = random_images(ratios)
    expected, tiles = their_logits(theirs, ids, images), images.aspect_ratio_mask.sum(1, keepdim=True)
    assert expected.std() > 0.1
    assert_close(our_logits(ours, ids, images=images), expected)
    for name, value in (("pixel_values", random_images(ratios, seed=5).pixel_values),
                        ("aspect_ratio_ids", images.aspect_ratio_ids % 8 + 1),
                        ("aspect_ratio_mask", (torch.arange(4) <= tiles % 4).long())):
        changed = dataclasses.replace(images, **{name: value})
        assert (their_logits(theirs, ids, changed) - expected).abs().max() > 1e-3


@cases("tied, head_dim", [(True, 8), (False, 16)])
def test_llama(transformers, tmp_path, tied, head_dim):
    """With the rope of llama3 and with plain one: what they saved, we read; what we save, they read."""
    rope = TEXT["rope_scaling"] if tied else {"rope_type": "default"}
    values = TEXT | {"rope_scaling": None, "rope_parameters": rope | {"rope_theta": 5e5}}
    config = transformers.LlamaConfig(**values, tie_word_embeddings=tied, head_dim=head_dim)
    theirs, ours = reference(transformers.LlamaForCausalLM(config), tmp_path / "theirs")
    ids = random_ids(2, 150)
    expected = their_logits(theirs, ids)
    assert expected.std() > 0.1 and (ours.lm_head.weight is ours.embed_tokens.weight) == tied
    assert_close(our_logits(ours, ids), expected)
    ours.save_pretrained(tmp_path / "ours")
    assert_close(their_logits(again(transformers.AutoModelForCausalLM, tmp_path / "ours"), ids), expected)


def again(kind, folder):
    """Let transformers load a folder, which must have all weights and no others."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


def test_transformers_reads_what_we_save(transformers, mllama, tmp_path):
    theirs, ours = mllama
    ours.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    ids, images = random_ids(2, 10, image_at=[(0, 1), (1, 2)]), random_images([6, 2])
    loaded = as_trained(again(transformers.MllamaForConditionalGeneration, tmp_path))
    assert_close(their_logits(loaded, ids, images), their_logits(theirs, ids, images))
    loaded.save_pretrained(tmp_path / "theirs", max_shard_size=60_000)         # in many files
    for folder in (tmp_path, tmp_path / "theirs"):
        found = our_logits(Llama.from_pretrained(folder), ids, images=images)
        assert_close(found, their_logits(theirs, ids, images))
    assert len([*(tmp_path / "theirs").glob("*.safetensors")]) > 3


def test_both_tensor_layouts_load(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    released, newer = load_file(tmp_path / "model.safetensors"), {}
    for name, tensor in tiny.state_dict().items():
        prefix = "model." if name.startswith(("vision_model", "multi_modal")) else "model.language_model."
        newer["lm_head.weight" if name == "lm_head.weight" else prefix + name] = tensor
    assert not set(newer) & set(released) and "language_model.model.norm.weight" in released
    save_file(newer, tmp_path / "model.safetensors")
    for name, tensor in Llama.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, tiny.state_dict()[name]), name


# ------------------------------------------------------------------------------------------------------------
# Kernels, cache and generation


on_devices = cases("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@on_devices
@cases("kernels", ["torch", "triton"])
def test_autocast_reaches_the_kernels_and_the_cache(tiny, kernels, device, monkeypatch):
    """To float16, which the interpreter can multiply: weights stay float32."""
    monkeypatch.setenv("KERNELS", kernels)
    model, images = copy.deepcopy(tiny).to(device), random_images([1])
    ids = random_ids(2, 8, image_at=[(0, 2)]).to(device)
    expected = model(ids, images=images, targets=ids.clamp(max=99)).logprobs
    with torch.autocast(device, torch.float16):
        found = model(ids, images=images, targets=ids.clamp(max=99)).logprobs
        found.sum().backward()
        cache = generate(model, ids.tolist(), images=images, max_new_tokens=3, stop_ids=[])[1]
    assert_close(found, expected, 0.05)
    assert cache.kv[0].dtype == cache.cross[0].dtype == torch.float16
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


CONVERSATIONS = [[5, IMAGE, 7, 8, 9, 10, 11], [1, 2, 3], [4, 5, 6, IMAGE, 2], [9, 8, 7, 6, 5, 4, 3, 2]]
PICTURED = [0, 2]


def start(model, rows=range(4), conversations=CONVERSATIONS, cache=None, **kwargs):
    """Sample answers to some of the conversations (two have an image) with one seed per row."""
    have = [row for row in rows if row in PICTURED]
    at, places = ([list(all).index(row) for row in have] for all in (PICTURED, rows))
    images = some(random_images([2, 6]), at, places)
    options = dict(max_new_tokens=12, stop_ids=range(12), seeds=[100 + row for row in rows]) | kwargs
    return generate(model, [conversations[row] for row in rows], cache=cache,
                    images=images if have and cache is None else None, **options)


@pytest.fixture
def fed(tiny):
    """(rows, tokens) of each pass, padding included, and "images" when the encoder is called."""
    fed = []
    hooks = [tiny.register_forward_pre_hook(lambda module, args: fed.append(tuple(args[0].shape))),
             tiny.vision_model.register_forward_pre_hook(lambda *_: fed.append("images"))]
    yield fed
    for hook in hooks:
        hook.remove()


@on_devices
def test_kernels_compute_the_same_model(tiny, device, monkeypatch):
    """Triton's (interpreted where there is no GPU) as their twins, in a rollout and then in training.

    Nothing made while sampling gets in autograd's way, and gradients reach every weight.
    """
    (ids, lengths), images, results = pad(CONVERSATIONS), random_images([2, 6], rows=PICTURED), []
    targets = torch.where(torch.arange(8) < lengths[:, None] - 1, ids.roll(-1, 1).clamp(max=99), -100)
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("KERNELS", kernels)
        model = copy.deepcopy(tiny).to(device)
        with torch.inference_mode():
            samples, _ = start(model, max_new_tokens=4)
        batch = dict(lengths=lengths, images=images, targets=targets.to(device))
        out = model(ids.to(device), **batch, temperature=0.7)
        (out.logprobs.sum() + out.entropy.sum()).backward()
        drawn = [torch.tensor(s.logprobs) for s in samples]
        found = out.logprobs, out.entropy, *(p.grad for p in model.parameters())
        results.append([*drawn, *(x.cpu() for x in found)])
    for x, y in zip(*results, strict=True):
        assert_close(x, y, 2e-5 * y.abs().max().clamp(min=1))
        assert y.any()


@cases("temperature", [0, 0.7, 1.0])
def test_a_row_does_not_depend_on_its_batch(tiny, temperature):
    """Nor on its prompt's being read once for several, nor on steps of fixed shapes."""
    source = [2, 0, 1, 3, 0, 2]
    together, _ = start(tiny, temperature=temperature, source=source, seeds=range(6))
    for seed, (row, sample) in enumerate(zip(source, together)):
        alone = start(tiny, [row], temperature=temperature, seeds=[seed], graph=row < 2)[0][0]
        assert (alone.ids, alone.ended) == (sample.ids, sample.ended)
        assert alone.logprobs == pytest.approx(sample.logprobs, abs=1e-4)


@cases("temperature", [0.5, 1.0])
def test_logprob_drawn_is_logprob_scored(tiny, temperature):
    """Also: seeds matter, equal seeds repeat, and other log-probs (another temperature) would be noticed."""
    samples, same, other = (start(tiny, temperature=temperature, **seeds)[0]
                            for seeds in ({}, {}, {"seeds": [1, 2, 3, 4]}))
    assert [s.ids for s in same] == [s.ids for s in samples] != [s.ids for s in other]
    ids, lengths = pad([c + s.ids for c, s in zip(CONVERSATIONS, samples)])
    targets = torch.full_like(ids, -100)
    for row, c, s in zip(targets, CONVERSATIONS, samples):
        row[len(c) - 1:len(c) - 1 + len(s.ids)] = torch.tensor(s.ids)
    drawn = torch.tensor([p for s in samples for p in s.logprobs])
    for scale, same in ((temperature, True), (2.0, False)):
        images = random_images([2, 6], rows=PICTURED)
        out = tiny(ids, lengths=lengths, images=images, targets=targets, temperature=scale)
        assert ((out.logprobs[targets >= 0] - drawn).abs().max() < 1e-4) == same
        assert not out.logprobs[targets < 0].any() and not out.entropy[targets < 0].any()
    for c, s, hidden in zip(CONVERSATIONS, samples, out.hidden):
        assert_close(s.hidden, hidden[len(c) - 1])             # the state before an answer
        assert s.ended == (s.ids[-1] < 12) and (s.ended or len(s.ids) == 12) and min([12, *s.ids[:-1]]) == 12


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
    assert not draw_tokens(logits, torch.zeros(500), 1.0)[0].any()


@cases("graph", [False, True])
def test_turns_continue_and_prefix_is_fed_once(tiny, fed, graph, monkeypatch):
    """Three turns, with rows that drop out: the samples are as from scratch, and no token is fed again.

    graph: by a step that was recorded once a turn, without values: so nothing in it is read on the host.
    """
    monkeypatch.setattr("llama.generate.record", lambda step, *inputs: make_fx(
        step, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs))
    live, lists, held, cache = range(4), copy.deepcopy(CONVERSATIONS), [0] * 4, None
    for turn, stay in enumerate([[0, 2, 3], [2, 0], []]):
        seeds = [1000 * turn + row for row in live]
        scratch, _ = start(tiny, live, lists, seeds=seeds)
        fed.clear()
        samples, cache = start(tiny, live, lists, cache, seeds=seeds, graph=graph)
        assert fed.pop(0) == (len(live), max(len(lists[row]) - n for row, n in zip(live, held)))
        assert turn or fed.pop(0) == "images"
        # a row that has ended is not fed
        assert graph or sum(map(math.prod, fed)) == sum(len(s.ids) - 1 for s in samples)
        for row, a, b in zip(live, scratch, samples):
            assert a.ids == b.ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            lists[row] += b.ids
        assert cache.lengths.tolist() == [len(lists[row]) - 1 for row in live]     # all but the last drawn
        cache.keep([live.index(row) for row in stay])
        live, held = stay, cache.lengths.tolist()
        for row in live:
            lists[row] += [30, 40, 50][:1 + row]


def test_image_and_token_must_match(tiny):
    cache = KVCache(tiny.config, 1)
    for ids, rows in ([[[1, 2, 3]], [0]], [[[IMAGE, 2, IMAGE]], [0]], [[[IMAGE, 1], [1, IMAGE]], [0]],
                      [[[IMAGE, 2, IMAGE]], [0, 0]]):
        raises("one image", tiny, torch.tensor(ids), images=random_images([1] * len(rows), rows))
    tiny(torch.tensor([[1, 2]]), cache=cache)
    raises("first tokens", tiny, torch.tensor([[IMAGE, 2]]), cache=cache, images=random_images([1]))
    raises("at least one token", generate, tiny, [[1, 2]], cache=cache, max_new_tokens=1, stop_ids=[])


def test_a_frozen_encoder_sees_each_image_once(tiny, llama3):
    """Share features between batches and copies of the model: nothing else changes."""
    models, seen, features = torch.nn.ModuleList([copy.deepcopy(tiny), copy.deepcopy(tiny)]), [], {}
    for model in models:
        count = lambda layer, tiles: seen.append(len(tiles[0]) // 4)
        model.vision_model.patch_embedding.register_forward_pre_hook(count)
    cut = [llama3.cut(noise(*size, 0)) for size in ((30, 30), (90, 40), (28, 28))]
    ids = random_ids(3, 8, image_at=[(0, 1), (1, 2), (2, 0)])
    for rows, encoded in (([0, 1, 1], [2]), ([1, 0, 0], []), ([2, 1, 0], [1])):
        images = llama3.images([cut[row] for row in rows])
        expected = our_logits(tiny, ids, images=images)
        seen.clear()
        with torch.inference_mode(), remember(models[0], features):
            assert torch.equal(models[0](ids, images=images, logits="all").logits, expected)
        with remember(models, features):
            assert torch.equal(our_logits(models[1], ids, images=images), expected)
        assert seen == encoded
    our_logits(models[0], ids, images=images)              # nothing is remembered any more
    assert seen == [1, 3] and len(features) == 3


# ------------------------------------------------------------------------------------------------------------
# Log-probabilities, fresh weights, full disks


def test_what_is_asked_for_is_computed(tiny):
    ids, lengths, targets = random_ids(3, 8), torch.tensor([8, 3, 5]), torch.full((3, 8), -100)
    targets[1, 2:4] = 5
    out, logits = tiny(ids, targets=targets), our_logits(tiny, ids)
    full = logits.log_softmax(-1)[1, 2:4]
    assert out.logits is None
    assert_close(out.logprobs[1, 2:4], full[:, 5], 1e-5)
    assert_close(out.entropy[1, 2:4], -(full.exp() * full).sum(-1), 1e-5)
    assert_close(tiny(ids, lengths=lengths, logits="last").logits, logits[range(3), lengths - 1], 1e-5)


def test_built_on_meta_and_cast(tiny, tmp_path, monkeypatch):
    tiny.save_pretrained(tmp_path)
    monkeypatch.setattr(Llama, "init_weights", lambda self: pytest.fail("weights were drawn"))
    model = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {(p.dtype, p.is_meta) for p in model.parameters()} == {(torch.bfloat16, False)}
    model.save_pretrained(tmp_path)
    assert Llama.from_pretrained(tmp_path).norm.weight.dtype == torch.bfloat16     # None keeps the file's
    assert our_logits(model, random_ids(1, 4)).isfinite().all()


def test_a_full_disk_leaves_the_weights_that_were_there(tiny, tmp_path, monkeypatch):
    """Also those that are still read from the file."""
    def fails(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    tiny.save_pretrained(tmp_path)
    model = Llama.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(folders, "save_file", fails)
    raises("No space", tiny.save_pretrained, tmp_path, error=OSError)
    for found in (model, Llama.from_pretrained(tmp_path)):
        assert all(torch.equal(p, found.state_dict()[name]) for name, p in tiny.state_dict().items())


def test_fresh_weights_are_seeded_and_sane():
    model = Llama(Config.from_dict(MLLAMA))
    first = {name: weight.clone() for name, weight in model.state_dict().items()}
    for seed, same in ((1, False), (0, True)):
        model.init_weights(seed)
        assert all(torch.equal(first[name], weight) for name, weight in model.state_dict().items()) == same
    assert abs(first["layers.0.mlp.up_proj.weight"].std() - 0.02) < 0.002
    assert (first["norm.weight"] == 1).all()
    assert first["vision_model.global_transformer.layers.0.gate_attn"] != 0
    for name in ("layers.1.cross_attn_attn_gate", "vision_model.gated_positional_embedding.gate",
                 "multi_modal_projector.bias"):
        assert not first[name].any()


# ------------------------------------------------------------------------------------------------------------
# Processor


def make_processor(specials, **kwargs):
    """Make a byte-level tokenizer without merges: every string has ids. Bytes first, then special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return Processor(tokenizer, **kwargs)


PREPROCESSOR = json.loads("""{
    "size": {"height": 28, "width": 28}, "max_image_tiles": 4, "resample": 2,
    "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}""")


@pytest.fixture
def llama3():
    return make_processor([*LLAMA3, "<|image|>", "<|end_of_text|>"], image_config=PREPROCESSOR,
                          generation_config={"eos_token_id": [261, 259]})


@pytest.fixture
def chatml():
    return make_processor(CHATML)


PICTURE = Image.new("RGB", (30, 30), "red")
SHOWN = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Hi é"}]
DIALOGUE = [{"role": "user", "content": SHOWN},
            {"role": "assistant", "content": "wrong", "train": False},
            {"role": "user", "content": "no"}, {"role": "assistant", "content": "right"}]


LLAMA3_TEXT = """<|begin_of_text|><|start_header_id|>user<|end_header_id|>

<|image|>Hi é<|eot_id|><|start_header_id|>assistant<|end_header_id|>

wrong<|eot_id|><|start_header_id|>user<|end_header_id|>

no<|eot_id|><|start_header_id|>assistant<|end_header_id|>

right<|eot_id|>"""
CHATML_TEXT = """<|im_start|>user
no<|im_end|>
<|im_start|>assistant
right<|im_end|>
"""


def test_rendering(llama3, chatml):
    spell = lambda ids: processor.tokenizer.decode(ids, skip_special_tokens=False)
    for processor, messages, whole, header in (
            (llama3, DIALOGUE, LLAMA3_TEXT, "<|start_header_id|>assistant<|end_header_id|>\n\n"),
            (chatml, DIALOGUE[2:], CHATML_TEXT, "<|im_start|>assistant\n")):
        out, end = processor.render(messages, reply=False), spell([processor.end_id])
        assert spell(out.ids) == whole and spell(processor.render(messages).ids) == whole + header
        assert spell([i for i, s in zip(out.ids, out.sampled, strict=True) if s]) == "right" + end
    assert llama3.render(DIALOGUE).images == [PICTURE] and llama3.stop_ids == [259, 261]
    assert chatml.stop_ids == [chatml.end_id] and chatml.image_token_id is None
    for processor, messages, words in (
            (chatml, DIALOGUE, "no images"), (llama3, [DIALOGUE[0]] * 2, "at most one image"),
            (llama3, [{"role": "user", "content": [{"type": "video"}]}], "video")):
        raises(words, processor.render, messages)


@cases("ended", [True, False])
def test_turns_are_exact_prefixes(llama3, chatml, ended):
    """Prompt + drawn ids + continuation is the whole, rendered; a cut-off answer gets a forced end token."""
    user, verdict = {"role": "user", "content": "go"}, {"role": "user", "content": "no"}
    for processor in (llama3, chatml):
        prompt, more = processor.render([user]), processor.render([verdict], first=False, ended=ended)
        drawn = processor.encode("answer") + [processor.end_id] * ended
        whole = processor.render([user, {"role": "assistant", "content": "answer"}, verdict])
        assert prompt.ids + drawn + more.ids == whole.ids and not any(prompt.sampled + more.sampled)
        assert sum(whole.sampled) == len(drawn) + (not ended)


def test_user_text_makes_no_special_tokens(llama3, chatml):
    for processor, words in ((llama3, [*LLAMA3, "<|image|>", "<|end_of_text|>"]), (chatml, CHATML)):
        special, text = processor.special_ids, "a".join(words)
        ids = processor.encode(text)
        assert not special & set(ids) and processor.decode(ids) == text
        clean, attack = (processor.render([{"role": "user", "content": c}]).ids for c in ("x", text))
        assert sum(i in special for i in clean) == sum(i in special for i in attack) > 0


def test_position_of(llama3):
    ids = [llama3.end_id, *llama3.encode('é {"formula": "1"}'), llama3.end_id]    # é is two tokens
    assert llama3.decode(ids[:llama3.position_of(ids, '"formula"')]) == "é {"
    assert llama3.position_of(ids, "é") == 1
    assert llama3.position_of(ids, "action") == llama3.position_of([], "a") == -1


# ------------------------------------------------------------------------------------------------------------
# Images


def noise(width, height, seed, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


@pytest.fixture(scope="module")
def their_tiles(transformers):
    """Return what transformers makes of pictures, without torchvision."""
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    make = MllamaImageProcessorPil(**PREPROCESSOR)
    return lambda pictures: make([[p] for p in pictures], return_tensors="pt")


def test_image_tensors(llama3, their_tiles):
    """Over 30 sizes every aspect ratio occurs; pixels are within 1/255 of the range (1 before normalising).

    A batch takes what was cut already as it takes a picture, and shares its pixels.
    """
    sizes = itertools.product((1, 28, 30, 84, 112, 500), (1, 28, 56, 84, 900))
    pictures = [noise(*size, seed) for seed, size in enumerate(sizes)]
    cut = [llama3.cut(picture) for picture in pictures]
    ours, theirs = llama3.images([None, *pictures[:10], *cut[10:], None]), their_tiles(pictures)
    assert ours.rows.tolist() == [*range(1, 31)] and {*ours.aspect_ratio_ids.tolist()} == {*range(1, 9)}
    assert torch.equal(ours.aspect_ratio_ids, theirs["aspect_ratio_ids"][:, 0])
    assert torch.equal(ours.aspect_ratio_mask, theirs["aspect_ratio_mask"][:, 0])
    for pixels, one in zip(ours.pixel_values[10:], cut[10:], strict=True):
        assert pixels is one.pixel_values[0] and llama3.cut(one) is one
    scale = torch.tensor(PREPROCESSOR["image_std"])[:, None, None]
    assert_close(torch.stack(ours.pixel_values) * scale, theirs["pixel_values"][:, 0] * scale, 1 / 255)
    assert llama3.images([None, None]) is None


@cases("mode", "1 L LA P RGBA CMYK".split())
def test_odd_modes_as_transformers(llama3, their_tiles, mode):
    by_way_of = "RGB" if mode in ("CMYK", "P", "1") else "RGBA"
    picture = noise(40, 60, 1, "RGBA").convert(by_way_of).convert(mode)
    for image in (picture, picture.resize((1, 1))):
        assert_close(llama3.cut(image).pixel_values[0], their_tiles([image])["pixel_values"][0, 0], 1 / 255)


@cases("mode", "I;16 I;16B I F".split())
def test_more_than_8_bits_are_refused(mode):
    """Pillow would clip them."""
    raises(f"mode {mode}: expected 8 bits", to_rgb, Image.new(mode, (2, 1)))


@cases("mode", "RGBA RGBa LA P RGB L 1".split())
def test_transparency_turns_white(mode):
    """A dark pixel that is seen, beside one that is not."""
    if mode[-1] in "Aa":
        image = Image.fromarray(np.uint8([[[0, 0], [0, 255]]]), "LA").convert("RGBA").convert(mode)
    else:
        rgb = mode == "RGB"
        image = Image.new(mode, (2, 1), 0)
        image.putpixel((1, 0), (0, 0, 1) if rgb else 1)
        image.info["transparency"] = (0, 0, 0) if rgb else 0
    hidden, seen = np.asarray(to_rgb(image))[0]
    assert (hidden == 255).all() and (seen <= 1).all() or mode == "1" and (seen == 255).all()
