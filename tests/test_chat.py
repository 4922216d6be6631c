"""Folders that we save, in transformers' hands: it renders, sees, answers and stops as we do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import envs
import train
from distributed.checkpoint import Checkpoints
from llama.config import Config
from llama.generate import generate
from llama.processor import CHATML, LLAMA3, Processor
from model import Llama
from test_model import make_processor

TINY = Path(train.__file__).parent / "docs/tiny"
PICTURE = Image.new("RGB", (90, 40), "red")
QUESTION = [{"role": "user", "content": "Hello (3+4)*2"}]
CHATS = [
    QUESTION, [{"role": "user", "content": ""}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "\n\nHi  é \n"}],
    [*QUESTION, {"role": "assistant", "content": "14\n"}, {"role": "user", "content": " 3"}],
    [{"role": "user", "content": [{"type": "text", "text": part} for part in ("You are", " at a corner")]}]]
LOOK = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What?"}]
SHOWN = [{"role": "system", "content": "Look."}, {"role": "user", "content": LOOK}]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers, the reference, is not installed")


def processor_of(kind):
    """A tokenizer of bytes: "base" has the generation_config.json of a model that was not trained to chat."""
    specials = CHATML if kind == "chatml" else [*LLAMA3, "<|end_of_text|>"]
    old = {"eos_token_id": 260, "max_length": 99} if kind == "base" else None
    return make_processor(specials, generation_config=old)


@pytest.fixture(params=["llama3", "base", "chatml", "gp", "virl"])
def saved(request, tmp_path):
    if request.param in ("gp", "virl"):
        return TINY / request.param
    processor_of(request.param).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def gp(tmp_path):
    """A copy of the tiny model's folder, without its weights."""
    return Path(shutil.copytree(TINY / "gp", tmp_path / "gp", ignore=lambda *_: ["model.safetensors"]))


# --------------------------------------------------------------------------------- ours, read by transformers

def test_transformers_renders_as_we_do(transformers, saved):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(saved), Processor.from_pretrained(saved)
    assert theirs.eos_token_id == ours.end_id and theirs.pad_token_id == ours.pad_id
    assert theirs.bos_token == (None if ours.chatml else LLAMA3[0])
    for messages in CHATS:
        for reply in (True, False):
            ids = theirs.apply_chat_template(messages, add_generation_prompt=reply, return_dict=False)
            assert ids == ours.render(messages, reply=reply).ids


@pytest.mark.parametrize("game", ["gp", "virl", "small"])
def test_transformers_sees_as_we_do(transformers, small, game):
    folder = small[0] if game == "small" else TINY / game
    theirs, ours = transformers.AutoProcessor.from_pretrained(folder), Processor.from_pretrained(folder)
    found = theirs.apply_chat_template(SHOWN, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       return_tensors="pt")
    rendered = ours.render(SHOWN)
    images = ours.images(rendered.images)
    assert type(theirs).__name__ == "MllamaProcessor" and found["input_ids"][0].tolist() == rendered.ids
    assert rendered.ids.count(ours.image_token_id) == 1
    assert (found["pixel_values"][0, 0] - images.pixel_values[0]).abs().max() < 1e-6
    for name in ("aspect_ratio_ids", "aspect_ratio_mask"):
        assert torch.equal(found[name][:, 0], getattr(images, name))


@pytest.mark.parametrize("kind", ["llama3", "base", "chatml"])
def test_a_pipeline_chats_and_stops(transformers, tmp_path, kind):
    """At the end token, the third that a random model answers once two rows of its head are swapped."""
    processor = processor_of(kind)
    model = Llama(Config.from_dict(dict(
        model_type="llama", vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, eos_token_id=7)))
    model.init_weights(seed=3, std=0.3)
    prompt, end = processor.render(QUESTION).ids, processor.end_id
    answer = generate(model, [prompt], max_new_tokens=3, temperature=0, stop_ids=[])[0][0].ids
    assert len(set(answer)) == 3 and end not in answer
    rows = model.lm_head.weight.data
    rows[[answer[2], end]] = rows[[end, answer[2]]]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    chat = transformers.pipeline("text-generation", model=str(tmp_path))
    said = chat(QUESTION, max_new_tokens=9, do_sample=False)[0]["generated_text"][-1]
    assert said == {"role": "assistant", "content": processor.decode(answer[:2])}
    ids = torch.tensor([prompt])
    ids = chat.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert ids[0, len(prompt):].tolist() == [*answer[:2], end]


def test_the_tiny_model_answers_alike(transformers):
    """A hand of cards in words, from its folder as it stands."""
    model = Llama.from_pretrained(TINY / "gp", dtype=torch.float32)
    processor, messages = Processor.from_pretrained(TINY / "gp"), envs.GeneralPoints().reset(3)[0].messages
    options = dict(max_new_tokens=80, temperature=0, stop_ids=processor.stop_ids)
    ours = generate(model, [processor.render(messages).ids], **options)[0][0]
    chat = transformers.pipeline("text-generation", model=str(TINY / "gp"), dtype=torch.float32)
    theirs = chat(messages, max_new_tokens=80, do_sample=False)[0]["generated_text"][-1]["content"]
    assert theirs == processor.decode(ours.ids) and "formula" in theirs and ours.ended


# ----------------------------------------------------------------------------------------- theirs, read by us

def test_a_folder_of_transformers_5(transformers, tmp_path):
    """It nests the image processor in processor_config.json, and writes no preprocessor_config.json."""
    a, b = tmp_path / "a", tmp_path / "b"
    transformers.AutoProcessor.from_pretrained(TINY / "gp").save_pretrained(a)
    transformers.AutoModelForImageTextToText.from_pretrained(TINY / "gp").save_pretrained(a)
    assert not (a / "preprocessor_config.json").exists()
    model, first = Llama.from_pretrained(a), Processor.from_pretrained(TINY / "gp")
    again = Processor.from_pretrained(a, model.config, images=True)
    assert again.image_config == first.image_config and again.render(SHOWN) == first.render(SHOWN)
    assert (again.stop_ids, again.pad_id) == (first.stop_ids, first.pad_id)
    again.save_pretrained(b)
    for name in ("processor_config.json", "chat_template.jinja"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert transformers.AutoProcessor.from_pretrained(b).image_processor.size["height"] == 56


def test_where_both_files_prepare_images_the_nested_one_counts(gp):
    """As in transformers."""
    values = json.loads((gp / "preprocessor_config.json").read_text()) | {"resample": 3, "crop_size": None}
    (gp / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert Processor.from_pretrained(gp).image_config["resample"] == 3


KEPT = {
    "chat_template.jinja": "{{ 'kept' }}\r\n".encode(), "chat_template.json": b'{"chat_template": "x"}\n',
    "special_tokens_map.json": b'{"eos_token":"<|end_of_text|>"}', "added_tokens.json": b"{}\n",
    "vocab.json": b"{ }", "merges.txt": b"#version: 0.2\n", "tokenizer.model": b"\x80\x81\0",
    "processor_config.json": b'{"processor_class":  "MllamaProcessor"}',
    "additional_chat_templates/tool_use.jinja": "ü".encode()}


@pytest.mark.parametrize("name", KEPT)
def test_files_that_pass_through(gp, tmp_path, name):
    """To the byte, through a save and a checkpoint. Beside a template of theirs none of ours appears."""
    (gp / "chat_template.jinja").unlink()
    (gp / name).parent.mkdir(exist_ok=True)
    (gp / name).write_bytes(KEPT[name])
    Processor.from_pretrained(gp).save_pretrained(tmp_path / "b")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    write_rest = Processor.from_pretrained(tmp_path / "b").save_pretrained
    checkpoints.save(1, {"x": torch.ones(2)}, {}, write_rest)
    checkpoints.finish()
    checkpoints.verify(checkpoints.newest())
    for folder in (tmp_path / "b", checkpoints.newest()):
        assert (folder / name).read_bytes() == KEPT[name]
        ours = "template" not in name
        assert (folder / "chat_template.jinja").exists() == (ours or name == "chat_template.jinja")


@pytest.mark.parametrize("template", ["{{ 'mine' }}", [{"name": "default", "template": "x"}]])
def test_what_tokenizer_config_says_is_kept(gp, tmp_path, template):
    (gp / "chat_template.jinja").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "chat_template": template, "eos_token": "<|end_of_text|>"}
    (gp / "tokenizer_config.json").write_text(json.dumps(config))
    Processor.from_pretrained(gp).save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b/tokenizer_config.json").read_text()).items() >= config.items()
    assert not (tmp_path / "b/chat_template.jinja").exists()


# ------------------------------------------------------------------------------- a caller's state in the file

STATES = [
    lambda t: t.enable_truncation(3),
    lambda t: t.enable_truncation(3, stride=1, strategy="only_first", direction="left"),
    lambda t: t.enable_padding(length=64),
    lambda t: t.enable_padding(direction="left", pad_to_multiple_of=8, pad_token="<|eot_id|>"),
    lambda t: (t.enable_truncation(2), t.enable_padding(length=5)),
    lambda t: setattr(t.model, "dropout", 0.9),
    lambda t: setattr(t, "post_processor", TemplateProcessing("<|eot_id|> $A", None, [("<|eot_id|>", 4)]))]


@pytest.mark.parametrize("change", STATES)
def test_what_a_caller_left_in_the_tokenizer(gp, tmp_path, change):
    expected = Processor.from_pretrained(gp).render(CHATS[2]).ids
    tokenizer = Tokenizer.from_file(str(gp / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(gp / "tokenizer.json"))
    processor = Processor.from_pretrained(gp)
    assert processor.render(CHATS[2]).ids == expected
    processor.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b/tokenizer.json").read_text())
    assert saved["truncation"] is saved["padding"] is saved["model"]["dropout"] is None
    assert Processor.from_pretrained(tmp_path / "b").render(CHATS[2]).ids == expected


def test_truncation_that_transformers_stored(transformers, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(TINY / "gp")
    theirs("many words", truncation=True, max_length=3, padding="max_length")
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]["max_length"] == 3
    expected = Processor.from_pretrained(TINY / "gp").render(CHATS[2])
    assert Processor.from_pretrained(tmp_path).render(CHATS[2]) == expected


def test_layout_tokens_are_special_whatever_the_file_says(gp):
    """Else a user's text could end its own turn."""
    text = (gp / "tokenizer.json").read_text()
    (gp / "tokenizer.json").write_text(text.replace('"special": true', '"special": false'))
    processor, layout = Processor.from_pretrained(gp), [*LLAMA3, "<|image|>"]
    ids = processor.encode("".join(layout))
    assert not {processor.tokenizer.token_to_id(token) for token in layout} & set(ids)


# --------------------------------------------------------------------------------------------- where it stops

STOPS = [           # generation_config.json, if any; eos_token_id in text_config and on top; stop ids, pad id
    (None, None, None, [4], 5), ({"eos_token_id": 1}, None, None, [1, 4], 5),
    ({"eos_token_id": [1, 2]}, None, None, [1, 2, 4], 5), ({"eos_token_id": []}, 3, None, [3, 4], 5),
    ({}, [1, 3], None, [1, 3, 4], 5), ({"eos_token_id": 0}, 4, [2], [0, 2, 4], 5),
    ({"eos_token_id": None, "pad_token_id": 0}, None, 1, [1, 4], 0)]


@pytest.mark.parametrize("generation, text, top, stops, pad", STOPS)
def test_stop_tokens_of_all_files_and_the_one_trained_on(gp, tmp_path, generation, text, top, stops, pad):
    config = json.loads((gp / "config.json").read_text())
    config["eos_token_id"], config["text_config"]["eos_token_id"] = top, text
    (gp / "config.json").write_text(json.dumps(config))
    (gp / "generation_config.json").unlink()
    if generation is not None:
        (gp / "generation_config.json").write_text(json.dumps(generation | {"temperature": 0.6}))
    processor = Processor.from_pretrained(gp)
    assert (processor.stop_ids, processor.pad_id) == (stops, pad)
    processor.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b/generation_config.json").read_text())
    assert saved["eos_token_id"] == stops and saved["pad_token_id"] == pad
    assert saved.get("temperature") == (None if generation is None else 0.6)
