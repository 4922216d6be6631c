"""Broken folders: one line, which begins with the file's path, says what is wrong. Nothing else is raised."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distributed import shard
from llama.config import Config
from llama.processor import Processor
from model import Llama

NAN, INF = math.nan, math.inf
RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}


@pytest.fixture
def folder(small, tmp_path):
    """The small model: hidden 32, 4 heads, 2 key heads, layer 1 of 3 looks at the image, tiles of 56 x 56."""
    return Path(shutil.copytree(small[0], tmp_path / "model"))


@pytest.fixture
def bare(small, tmp_path):
    """Its config.json alone, which is looked at first."""
    shutil.copy(small[0] / "config.json", tmp_path)
    return tmp_path


def read(folder):
    """Read what train.py reads for an image task."""
    model = Llama.from_pretrained(folder)
    return model, Processor.from_pretrained(folder, model.config, images=True)


def edit(path, name, value):
    """Set a.b.c of a JSON file; the value ... takes it out."""
    content = json.loads(path.read_text())
    *inner, last = name.split(".")
    target = content
    for key in inner:
        target = target[key]
    target[last] = value
    if value is ...:
        del target[last]
    path.write_text(json.dumps(content))


def refused(folder, kinds=ValueError, load=read):
    """Return what is said, but for the folder."""
    with pytest.raises(kinds) as error:
        load(folder)
    said = str(error.value)
    assert error.type in (ValueError, FileNotFoundError) and "\n" not in said and len(said) < 400
    assert said.startswith(str(folder))
    return said.removeprefix(str(folder)).removeprefix("/")


def short(value):
    return repr(value) if len(repr(value)) <= 80 else repr(value)[:77]


# ------------------------------------------------------------------------------------------------ config.json

T, V = "text_config.", "vision_config."
NEEDED = [T + name for name in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")]
SIZES = NEEDED + [T + name for name in ("num_key_value_heads", "head_dim", "max_position_embeddings")]
SIZES += [V + name for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "attention_heads",
                                "image_size", "patch_size", "max_num_tiles")]
WRONG = dict.fromkeys(SIZES, (0, -4, "32", True, 1.5, [32], {}, 10**10)) | {
    T + "rms_norm_eps": (0, NAN, "1e-5", True, 2), T + "rope_theta": (0, -1.0, INF, NAN, "10000", [1]),
    T + "rope_scaling": ("llama3", [1], 5), T + "rope_parameters": (5, "x"),
    T + "tie_word_embeddings": ("yes", 0),
    T + "hidden_act": ("gelu", 1), T + "attention_bias": (True, 0), T + "mlp_bias": (1, "no"),
    T + "bos_token_id": ([1], "1", -1), T + "eos_token_id": ("2", [1, "2"], -1, True, {}, [[1]], 1.5),
    T + "pad_token_id": (1.0, [4], -1), T + "cross_attention_layers": (
        1, [3], [-1], [1, 1], [0, 1, 2], [], ["1"], [1.0], [True], {}, [10**30]),
    V + "num_global_layers": (-1, "1", 10**9), V + "num_channels": (1, 4, "3"), V + "norm_eps": (NAN, 0),
    V + "hidden_act": ("relu",), V + "vision_output_dim": (33, "32", 0), V + "image_size": (57,),
    V + "intermediate_layers_indices": ([], [2], [1, 1], [1, 0], "1", [-1], [0.5], list(range(1001))),
    V + "supported_aspect_ratios": (RATIOS[:-1], RATIOS[::-1], [1, 2], [[1, 1, 1]], "all", [[1, "1"]], []),
    "image_token_index": (-1, "1024", 1032, True), "text_config": ([], 1), "vision_config": ("big", []),
    "model_type": ("qwen2", 5, ["llama"]), "quantization_config": ({"quant_method": "gptq"}, "fp8")}
WRONG[T + "num_hidden_layers"] += (1001,)
WRONG[T + "vocab_size"] += (2**20 + 1,)
WRONG[T + "hidden_size"] += (34,)
WRONG[T + "head_dim"] += (129, 7, 16)

TOGETHER = [            # what is changed, and what is complained about
    (T + "num_attention_heads", 3, T + "hidden_size = 32: expected a multiple of num_attention_heads = 3"),
    (T + "num_key_value_heads", 8, T + "num_attention_heads = 4: expected a multiple of num_key_value_heads"),
    (T + "hidden_size", 64, T + "head_dim = 8: expected"),
    (T + "num_hidden_layers", 1, T + "cross_attention_layers = [1]: expected different numbers below"),
    (T + "cross_attention_layers", ..., T + "cross_attention_layers = [3, 8, 13, 18, 23, 28, 33, 38]: expected different"),
    (V + "attention_heads", 3, V + "hidden_size = 16: expected a multiple of attention_heads = 3"),
    (V + "hidden_size", 258, V + "hidden_size = 258: expected a multiple of attention_heads = 2"),
    (V + "patch_size", 15, V + "image_size = 56: expected a multiple of patch_size = 15"),
    (V + "max_num_tiles", 2, V + "supported_aspect_ratios = [[")]


@pytest.mark.parametrize("name", WRONG)
def test_values_of_config_json(bare, name):
    original = (bare / "config.json").read_text()
    for value in WRONG[name]:
        (bare / "config.json").write_text(original)
        edit(bare / "config.json", name, value)
        assert refused(bare).startswith(f"config.json: {name} = {short(value)}")


@pytest.mark.parametrize("name, value, blamed", TOGETHER)
def test_values_that_do_not_go_together(bare, name, value, blamed):
    edit(bare / "config.json", name, value)
    assert refused(bare).startswith("config.json: " + blamed)


@pytest.mark.parametrize("value", [..., None])
@pytest.mark.parametrize("name", [*NEEDED, "text_config", "vision_config", "model_type"])
def test_what_config_json_must_hold(bare, name, value):
    edit(bare / "config.json", name, value)
    assert refused(bare).startswith(f"config.json: {name} is missing: expected")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_rope(bare, key):
    for name in ROPE:
        wrong = ("yarn", 3, "linear") if name == "rope_type" else (0, -1, "8", True, NAN, [], INF)
        for value in wrong + ((1.0, 0.5) if name == "high_freq_factor" else ()):
            edit(bare / "config.json", T + key, ROPE | {name: value})
            assert refused(bare).startswith(f"config.json: {T}{key}.{name} = {short(value)}: expected")
        if name != "rope_type":
            edit(bare / "config.json", T + key, {k: v for k, v in ROPE.items() if k != name})
            assert refused(bare).startswith(f"config.json: {T}{key}.{name} is missing")
    edit(bare / "config.json", T + key, ROPE)
    assert Config.from_pretrained(bare).rope_scaling == ROPE


def test_what_may_be_left_out_or_changed(folder):
    for name, value in ((T + "head_dim", ...), (V + "vision_output_dim", ...), (T + "eos_token_id", None),
                        (V + "supported_aspect_ratios", ...), (T + "eos_token_id", [3, 4])):
        edit(folder / "config.json", name, value)
        read(folder)
    edit(folder / "config.json", T + "intermediate_size", 50)
    assert "expected (50, 32)" in refused(folder) or "expected (32, 50)" in refused(folder)


def test_any_value_anywhere_in_config_json(bare):
    """What the rules let through can be built. A text model's names have no prefix."""
    mllama = json.loads((bare / "config.json").read_text())
    llama = mllama["text_config"] | {"model_type": "llama", "rope_scaling": ROPE}
    values = (None, True, -1, 0, 1, 7, 1.5, NAN, "", "x\ny", [], [0], [[1]], {}, {"a": 1}, 10**9, 10**400)
    accepted = 0
    for base, path, value in [(b, p, v) for b in (mllama, llama) for p in paths(b) for v in values]:
        try:
            config = Config.from_dict(changed(base, path, value), "m/config.json")
        except ValueError as error:
            assert str(error).startswith("m/config.json: ") and "\n" not in str(error)
        else:
            with torch.device("meta"):
                Llama(config)
            accepted += 1
    assert accepted > 100


def paths(value):
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (key,)
        if isinstance(inner, (dict, list)):
            yield from ((key, *rest) for rest in paths(inner))


def changed(base, path, value):
    base = copy.deepcopy(base)
    target = base
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return base


# ---------------------------------------------------------------------------------------------------- weights

NORM = "language_model.model.norm.weight"
FILE = "model.safetensors"


def tensors(change):
    """Change the dict of tensors."""
    def damage(folder):
        content = load_file(folder / FILE)
        change(content)
        save_file(content, folder / FILE)
    return damage


def spoil(name, value):
    return tensors(lambda content: content[name].view(-1)[-1:].fill_(value))


def swap(name, tensor):
    return tensors(lambda content: content.update({name: tensor}))


def put(content):
    return lambda folder: (folder / FILE).write_bytes(content)


WEIGHTS = [
    (spoil(NORM, NAN), f"{FILE}: tensor {NORM} holds NaN or infinity"),
    (spoil("language_model.lm_head.weight", INF), f"{FILE}: tensor language_model.lm_head.weight holds NaN"),
    (spoil("vision_model.class_embedding", -INF), f"{FILE}: tensor vision_model.class_embedding holds NaN"),
    *[(swap(NORM, torch.ones(32).to(kind)), f"{FILE}: tensor {NORM} has type {said}, not one of F64, F32")
      for kind, said in ((torch.int32, "I32"), (torch.uint8, "U8"), (torch.bool, "BOOL"),
                         (torch.float8_e4m3fn, "F8_E4M3"))],
    (swap("model.language_model.norm.weight", torch.ones(32)), "a second one"),
    (swap(NORM, torch.ones(32, 1)), f"{FILE}: tensor {NORM} has shape (32, 1), expected (32,)"),
    (swap(NORM, torch.ones(0)), f"{FILE}: tensor {NORM} has shape (0,), expected (32,)"),
    (tensors(lambda content: content.clear()), "is missing (" ),
    (put(b""), "not a whole safetensors file"), (put(b"\xff" * 64), "not a whole safetensors file"),
    (put(b"\x02" + b"\0" * 7 + b"{}"), "is missing ("),
    (lambda folder: (folder / FILE).unlink(), "expected model.safetensors, or shards of it"),
    (lambda folder: (folder / FILE).rename(folder / "a.safetensors"), "or shards of it"),
    (lambda folder: shutil.copy(folder / FILE, folder / "model-2.safetensors") and
     (folder / FILE).rename(folder / "model-1.safetensors"), "is unexpected, or a second one")]


@pytest.mark.parametrize("damage, words", WEIGHTS)
def test_weights(folder, damage, words):
    damage(folder)
    assert words in refused(folder, (ValueError, FileNotFoundError))


@pytest.fixture
def one_rank(monkeypatch):
    """As if sharded, on one rank, where everything is its own."""
    monkeypatch.setattr(shard, "rows", lambda parameter: slice(0, len(parameter)))
    monkeypatch.setattr(torch.nn.Parameter, "to_local", lambda parameter: parameter.data, raising=False)


@pytest.mark.parametrize("damage, words", WEIGHTS)
def test_weights_that_are_read_in_slices(folder, model, damage, words, one_rank):
    damage(folder)
    load = lambda folder: shard.read_slices(model, folder)
    assert words in refused(folder, (ValueError, FileNotFoundError), load)


def test_what_one_rank_finds_all_raise(folder, model, one_rank, monkeypatch):
    shard.read_slices(model, folder)
    monkeypatch.setattr(shard, "gather", lambda mine: [*mine, "that of another rank"])
    with pytest.raises(ValueError, match="another rank"):
        shard.read_slices(model, folder)


def test_nothing_is_allocated_for_weights_that_are_not_there(folder, monkeypatch):
    """Sizes of a terabyte, within all ranges: the headers of the files tell first."""
    for name, value in (("num_attention_heads", 1024), ("num_key_value_heads", 1024), ("head_dim", 64),
                        ("hidden_size", 2**16), ("intermediate_size", 2**18)):
        edit(folder / "config.json", T + name, value)
    monkeypatch.setattr(Llama, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    with torch.device("meta"):
        big = Llama(Config.from_pretrained(folder))
    fill = lambda folder: shard.fill(big, folder, torch.device("cpu"))
    assert "65536)" in refused(folder, load=fill) and "65536)" in refused(folder)


# ----------------------------------------------------------------------- the tokenizer, and what is around it

def write(name, content):
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def setting(name, value, file="preprocessor_config.json"):
    return lambda folder: edit(folder / file, name, value)


def nested(image_processor):
    """As transformers 5 saves it, without the file that it no longer writes."""
    def damage(folder):
        remove("preprocessor_config.json")(folder)
        write("processor_config.json", json.dumps({"image_processor": image_processor}))(folder)
    return damage


def add(**token):
    """Add a token to tokenizer.json, beyond those of the model."""
    def damage(folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        content["added_tokens"].append(flags | {"id": 1025, "content": "late"} | token)
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return damage


def rename(old, new):
    def damage(folder):
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace(json.dumps(old), json.dumps(new)))
    return damage


def each(file, name, *values):
    return [(setting(name, value, file), f"{file}: {name} = {value!r}: expected") for value in values]


G, I = "generation_config.json", "preprocessor_config.json"
DEFAULT = f"{I}: size = 224: expected image_size = 56"
NO_IMAGES = f"{I}: this checkpoint takes no images"
PROCESSOR = [
    (remove("tokenizer.json"), "tokenizer.json: not found"),
    *[(write("tokenizer.json", content), "tokenizer.json: not a tokenizer") for content in (
        "{}", "[1", "", b"\xff\xfe", '{"version": "1.0"}')],
    (rename("merges", "mergers"), "tokenizer.json: not a tokenizer"),
    (rename("<|eot_id|>", "<|end|>"), "tokenizer.json: token <|eot_id|> is absent"),
    (rename("<|begin_of_text|>", "<s>"), "tokenizer.json: token <|begin_of_text|> is absent"),
    (rename("<|end_of_text|>", "<|im_start|>"), "tokenizer.json: token <|im_end|> is absent"),
    (add(), "tokenizer.json: token late = 1025: expected a number below vocab_size = 1024"),
    (setting("image_token_index", 1025, "config.json"), "tokenizer.json: token <|image|> = 1024: expected"),
    (rename("<|image|>", "<|picture|>"), NO_IMAGES), (remove(I), NO_IMAGES), (nested(None), NO_IMAGES),
    *each(G, "eos_token_id", "2", True, 1.5, [[1]], [None], {}, -1), *each(G, "bos_token_id", "0", [0]),
    *each(G, "pad_token_id", "2", [4], -1, 0.0, 1032, 10**9),
    *each(I, "size", 56, "56", [56, 56], {}, {"height": 56}, {"width": 56}, {"height": 56, "width": 28},
          {"height": 0, "width": 0}, {"height": 56.0, "width": 56.0}, {"height": True, "width": True},
          {"shortest_edge": 56}, {"height": 10**6, "width": 10**6}),
    (setting("size", {"height": 28, "width": 28}), f"{I}: size = 28: expected image_size = 56"),
    *each(I, "max_image_tiles", 0, -1, "4", 4.0, 3, 10**6, True),
    *each(I, "image_std", [0.5, 0, 0.5], [0.5], 0.5, [1, 1, -1], ["1", 1, 1], [NAN] * 3),
    *each(I, "image_mean", [0.5] * 4, 0.5, [None] * 3, [NAN] * 3, [INF] * 3),
    *each(I, "resample", "bilinear", 9, True), *each(I, "rescale_factor", 0, "1/255", NAN),
    *each(I, "do_resize", False, 1), *each(I, "do_pad", False), *each(I, "do_normalize", "no", 0),
    (setting("size", ...), DEFAULT), (write(I, "{}"), DEFAULT), (nested({}), DEFAULT),
    (nested(5), "processor_config.json: image_processor = 5: expected an object"),
    (nested({"size": 56}), "processor_config.json: image_processor.size = 56: expected"),
    *[(write(name, content), f"{name}: {words}") for name in (
        G, I, "tokenizer_config.json", "processor_config.json") for content, words in (
        ("[]", "expected a JSON object"), ("null", "expected a JSON object"), ("{", "not valid JSON"))]]


@pytest.mark.parametrize("damage, words", PROCESSOR)
def test_processors(folder, damage, words):
    damage(folder)
    assert refused(folder, (ValueError, FileNotFoundError)).startswith(words)


def test_what_a_text_task_does_not_need(folder):
    """Images that it does not show, and special tokens that nobody makes, may be wanting."""
    remove(I)(folder)
    add(special=True)(folder)
    assert Processor.from_pretrained(folder, Config.from_pretrained(folder)).image_config is None
    assert refused(folder).startswith(NO_IMAGES)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", G, "tokenizer_config.json", I])
def test_files_of_other_kinds(folder, name):
    """Too large to be read, though it takes no space; no text; a folder."""
    with open(folder / name, "wb") as file:
        file.truncate(2**40)
    assert refused(folder).startswith(f"{name}: 1099511627776 bytes")
    (folder / name).write_bytes(b"\x80\x81")
    assert refused(folder).startswith(name)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert refused(folder, (ValueError, FileNotFoundError)).startswith(name)
