"""Broken folders: one line, which begins with the file's path, says what is wrong. Nothing else is raised."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distributed import shard
from llama.config import Config
from llama.processor import Processor
from model import Llama
from tables import rows

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}


@pytest.fixture
def folder(small, tmp_path):
    """The small model: hidden 32, 4 heads, 2 key heads, layer 1 of 3 looks at the image, tiles of 56 x 56."""
    return Path(shutil.copytree(small[0], tmp_path / "model"))


def read(folder):
    """Read what train.py reads for an image task."""
    model = Llama.from_pretrained(folder)
    return model, Processor.from_pretrained(folder, model.config, images=True)


def edit(path, name, value):
    """Set a.b.c of a JSON file; the value ... takes it out."""
    content = json.loads(path.read_text(encoding="utf-8"))
    *inner, last = name.split(".")
    target = content
    for key in inner:
        target = target[key]
    target[last] = value
    if value is ...:
        del target[last]
    path.write_text(json.dumps(content), encoding="utf-8")


def refused(folder, load=read):
    """Return the words of the error, but for the folder."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(folder)
    said = str(error.value)
    assert error.type in (ValueError, FileNotFoundError) and "\n" not in said and len(said) < 400
    assert said.startswith(str(folder))
    return said.removeprefix(str(folder)).removeprefix("/")


# ------------------------------------------------------------------------------------------------------------
# Values of JSON files

@pytest.mark.parametrize("file, name, values", rows("""
config.json | text_config.rope_scaling.rope_type | "yarn", "linear"
config.json | text_config.hidden_act     | "gelu", 1
config.json | model_type                 | "qwen2", 5, ["llama"], ""
config.json | quantization_config        | {"quant_method": "gptq"}, "fp8"
preprocessor_config.json | size | 56, [56, 56], {}, {"height": 56, "width": 28}, {"shortest_edge": 56}
preprocessor_config.json | max_image_tiles | 0, "4", 3
"""))
def test_values_that_are_refused(folder, file, name, values):
    original = (folder / file).read_text(encoding="utf-8")
    edit(folder / "config.json", "text_config.rope_scaling", ROPE)
    for value in json.loads(f"[{values}]"):
        edit(folder / file, name, value)
        assert refused(folder).startswith(f"{file}: {name.split('.')[-1]} = {value!r:.80}: expected one of ")
        (folder / file).write_text(original, encoding="utf-8")
        edit(folder / "config.json", "text_config.rope_scaling", ROPE)


def test_the_settings_of_a_run_are_no_model(folder):
    (folder / "config.json").write_text('{"task": "gp-l"}', encoding="utf-8")
    assert refused(folder).startswith("config.json: model_type = '': expected one of ['llama', 'mllama']")


@pytest.mark.parametrize("name, value, words", rows("""
text_config.hidden_size | null | TypeError: unsupported operand type(s) for //
text_config.num_attention_heads | "4" | TypeError: unsupported operand type(s) for //
text_config.num_hidden_layers | null | TypeError: Config.__init__() missing 1 required positional argument
text_config | null | AttributeError:
"""))
def test_sizes_that_are_missing_or_no_numbers(folder, name, value, words):
    edit(folder / "config.json", name, json.loads(value))
    assert refused(folder).startswith(f"config.json: {words}")


@pytest.mark.parametrize("name, value, blamed", rows("""
text_config.num_attention_heads | 6 | model.safetensors: tensor
text_config.num_hidden_layers | 1 | model.safetensors: tensor
vision_config.patch_size | 28 | model.safetensors: tensor vision_model
image_token_index | 1025 | tokenizer.json: token <|image|> = 1024: expected one of [1025]"""))
def test_values_that_do_not_go_together(folder, name, value, blamed):
    edit(folder / "config.json", name, json.loads(value))
    assert refused(folder).startswith(blamed)


@pytest.mark.parametrize("key", ["text_config.rope_scaling", "text_config.rope_parameters"])
def test_llama3_rope(folder, key):
    edit(folder / "config.json", key, ROPE)
    assert Config.from_pretrained(folder).rope_scaling == ROPE


def test_what_may_be_left_out_or_changed(folder):
    for name in ("text_config.head_dim", "vision_config.vision_output_dim",
                 "vision_config.supported_aspect_ratios", "text_config.eos_token_id"):
        edit(folder / "config.json", name, ...)
        read(folder)
    edit(folder / "config.json", "text_config.eos_token_id", [3, 4])
    read(folder)
    edit(folder / "config.json", "text_config.intermediate_size", 50)
    assert "expected (50, 32)" in refused(folder) or "expected (32, 50)" in refused(folder)


# ------------------------------------------------------------------------------------------------------------
# Weights

NORM = "language_model.model.norm.weight"
FILE = "model.safetensors"


def tensors(change):
    """Change the dict of tensors."""
    def damage(folder):
        content = load_file(folder / FILE)
        change(content)
        save_file(content, folder / FILE)
    return damage


def swap(tensor, words, name=NORM):
    return tensors(lambda content: content.update({name: tensor})), words


def rename(*names):
    """Give the file of tensors other names."""
    def damage(folder):
        for name in names:
            shutil.copy(folder / FILE, folder / name)
        (folder / FILE).unlink()
    return damage


def put(content, words):
    return lambda folder: (folder / FILE).write_bytes(content), words


@pytest.mark.parametrize("damage, words", [
    swap(torch.ones(32), "norm.weight is unexpected, or a second one", "model.language_model.norm.weight"),
    swap(torch.ones(1), f"{FILE}: tensor surplus is unexpected", "surplus"),
    swap(torch.ones(32, 1), f"{FILE}: tensor {NORM} has shape (32, 1), expected (32,)"),
    swap(torch.ones(0), f"{FILE}: tensor {NORM} has shape (0,), expected (32,)"),
    (tensors(lambda content: content.pop(NORM)), f"{FILE}: tensor {NORM} is missing (1 in all)"),
    put(b"", "not a whole safetensors file"), put(b"\xff" * 64, "not a whole safetensors file"),
    put(b"\x02" + b"\0" * 7 + b"{}", "is missing ("), (rename(), "expected model.safetensors, or shards"),
    (rename("a.safetensors"), "expected model.safetensors, or shards"),
    (rename("model-1.safetensors", "model-2.safetensors"), "is unexpected, or a second one"),
    (lambda folder: shutil.rmtree(folder), "config.json: not found; expected a Hugging Face folder")])
def test_weights(folder, model, damage, words):
    """Read into a new model, and into one that is there."""
    damage(folder)
    assert words in refused(folder)
    if folder.exists():
        assert words in refused(folder, lambda folder: shard.read_slices(model, folder))


def test_nothing_is_allocated_for_weights_that_are_not_there(folder, monkeypatch):
    """Sizes of a terabyte: the headers of the files tell first."""
    sizes = dict(num_attention_heads=1024, num_key_value_heads=1024, head_dim=64, hidden_size=2**16,
                 intermediate_size=2**18)
    for name, value in sizes.items():
        edit(folder / "config.json", f"text_config.{name}", value)
    monkeypatch.setattr(Llama, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    assert "65536)" in refused(folder)


# ------------------------------------------------------------------------------------------------------------
# The tokenizer, and what is around it

G, I, NESTED = "generation_config.json", "preprocessor_config.json", "processor_config.json"
CONTENTS = [(name, content, f"{name}: {words}") for name in (G, I, NESTED, "tokenizer_config.json")
            for content, words in (("[]", "expected a JSON object"), ("null", "expected a JSON object"),
                                   ("{", "not valid JSON"), ("\ufeff{}", "not valid JSON"),
                                   ("[" * 10**5, "not valid JSON"))]


@pytest.mark.parametrize("name, content, words", CONTENTS + rows("""
tokenizer.json | {} | tokenizer.json: not a tokenizer
tokenizer.json | [1 | tokenizer.json: not a tokenizer
tokenizer.json |  | tokenizer.json: not a tokenizer
tokenizer.json | {"version": "1.0"} | tokenizer.json: not a tokenizer
preprocessor_config.json | {} | preprocessor_config.json: size = {'height': 224, 'width': 224}: expected
processor_config.json | {"image_processor": {"size": 5}} | preprocessor_config.json: size = 5: expected one of
"""), ids=lambda cell: cell[:60])
def test_contents_of_files(folder, name, content, words):
    (folder / name).write_text(content, encoding="utf-8")
    assert refused(folder).startswith(words)


@pytest.mark.parametrize("name, old, new, words", rows("""
tokenizer.json | "merges" | "mergers" | tokenizer.json: not a tokenizer
tokenizer.json | "<|eot_id|>" | "<|end|>" | tokenizer.json: token <|eot_id|> is absent
tokenizer.json | "<|begin_of_text|>" | "<s>" | tokenizer.json: token <|begin_of_text|> is absent
tokenizer.json | "<|end_of_text|>" | "<|im_start|>" | tokenizer.json: token <|im_end|> is absent
tokenizer.json | "<|image|>" | "<|picture|>" | preprocessor_config.json: this checkpoint takes no images
"""))
def test_words_of_files(folder, name, old, new, words):
    text = (folder / name).read_text(encoding="utf-8")
    assert old in text
    (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    assert refused(folder).startswith(words)


def add(folder, special):
    """Add a token to tokenizer.json, beyond those of the model."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    late = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append(late | {"id": 1025, "content": "late", "special": special})
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def test_what_is_needed_for_a_task(folder):
    """Do without images in a text task, and without the embeddings of special tokens that nobody makes."""
    (folder / I).unlink()
    (folder / NESTED).write_text('{"image_processor": null}', encoding="utf-8")
    add(folder, special=True)
    assert Processor.from_pretrained(folder, Config.from_pretrained(folder)).image_config is None
    assert refused(folder).startswith(f"{I}: this checkpoint takes no images")


def test_a_token_beyond_the_model(folder):
    add(folder, special=False)
    assert refused(folder).startswith("tokenizer.json: token late = 1025: expected one of range(0, 1024)")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", G, "tokenizer_config.json", I])
def test_files_of_other_kinds(folder, name):
    """No text; a folder."""
    (folder / name).write_bytes(b"\x80\x81")
    assert refused(folder).startswith(name)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert refused(folder).startswith(name)
