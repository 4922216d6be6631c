"""Folders that we save, in transformers' hands: it renders, sees, answers and stops as we do.

    python -m pytest tests/test_chat.py -q          SMOLLM2=FOLDER: also the weights of SmolLM2-135M-Instruct
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import envs
from distributed.checkpoint import Checkpoints
from llama.config import Config
from llama.generate import generate
from llama.processor import CHATML, LLAMA3, Processor
from model import Llama
from tables import rows
from test_folders import edit
from test_model import make_processor, transformers  # noqa: F401 (a fixture)

TINY = Path(envs.__file__).parent / "docs/tiny"
CHATS = json.loads("""[
    [{"role": "user", "content": "Hello (3+4)*2"}],
    [{"role": "user", "content": ""}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "\\n\\nHi  é \\n"}],
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "14\\n"},
     {"role": "user", "content": " 3"}],
    [{"role": "user", "content": [{"type": "text", "text": "You are"},
                                  {"type": "text", "text": " at a corner"}]}]]
""")
LOOK = [{"type": "image", "image": Image.new("RGB", (90, 40), "red")}, {"type": "text", "text": "What?"}]
SHOWN = [{"role": "system", "content": "Look."}, {"role": "user", "content": LOOK}]


def processor_of(kind):
    """Make a tokenizer of bytes. "base": with the generation_config.json of a model not trained to chat."""
    specials = CHATML if kind == "chatml" else [*LLAMA3, "<|end_of_text|>"]
    old = {"eos_token_id": 260, "max_length": 99} if kind == "base" else None
    return make_processor(specials, generation_config=old)


@pytest.fixture
def gp(tmp_path):
    """A copy of the tiny model's folder, without its weights."""
    return Path(shutil.copytree(TINY / "gp-vl", tmp_path / "gp", ignore=lambda *_: ["model.safetensors"]))


@pytest.fixture
def saved(gp, tmp_path):
    """A function that saves the processor of that folder once more -> the new folder."""
    def save():
        Processor.from_pretrained(gp).save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"
    return save


# ------------------------------------------------------------------------------------------------------------
# Ours, read by transformers


@pytest.mark.parametrize("kind", ["llama3", "base", "chatml", "gp-vl", "virl-vl"])
def test_transformers_renders_as_we_do(transformers, tmp_path, kind):
    folder = TINY / kind if kind in ("gp-vl", "virl-vl") else tmp_path
    if folder == tmp_path:
        processor_of(kind).save_pretrained(folder)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Processor.from_pretrained(folder)
    assert theirs.eos_token_id == ours.end_id and theirs.pad_token_id == ours.pad_id
    assert theirs.bos_token == (None if ours.chatml else LLAMA3[0])
    for messages in CHATS:
        for reply in (True, False):
            ids = theirs.apply_chat_template(messages, add_generation_prompt=reply, return_dict=False)
            assert ids == ours.render(messages, reply=reply).ids


@pytest.mark.parametrize("game", ["gp-vl", "virl-vl", "small"])
def test_transformers_sees_as_we_do(transformers, small, game):
    folder = small[0] if game == "small" else TINY / game
    theirs, ours = transformers.AutoProcessor.from_pretrained(folder), Processor.from_pretrained(folder)
    found = theirs.apply_chat_template(SHOWN, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       return_tensors="pt")
    rendered = ours.render(SHOWN)
    images = ours.images(rendered.images)
    assert type(theirs).__name__ == "MllamaProcessor" and found["input_ids"][0].tolist() == rendered.ids
    assert (found["pixel_values"][0, 0] - images.pixel_values[0]).abs().max() < 1e-6
    for name in ("aspect_ratio_ids", "aspect_ratio_mask"):
        assert torch.equal(found[name][:, 0], getattr(images, name))


@pytest.mark.parametrize("kind", ["llama3", "base", "chatml"])
def test_a_pipeline_chats_and_stops(transformers, tmp_path, kind):
    """Stop at the end token, the third that a random model answers once two rows of its head are swapped."""
    processor = processor_of(kind)
    model = Llama(Config(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, head_dim=8, eos_token_id=7))
    model.init_weights(seed=3, std=0.3)
    prompt, end = processor.render(CHATS[0]).ids, processor.end_id
    answer = generate(model, [prompt], max_new_tokens=3, temperature=0, stop_ids=[])[0][0].ids
    assert len(set(answer)) == 3 and end not in answer
    rows = model.lm_head.weight.data
    rows[[answer[2], end]] = rows[[end, answer[2]]]
    for part in (model, processor):
        part.save_pretrained(tmp_path)

    options = dict(max_new_tokens=9, do_sample=False)
    chat = transformers.pipeline("text-generation", model=str(tmp_path))
    said = chat(CHATS[0], **options)[0]["generated_text"][-1]
    assert said == {"role": "assistant", "content": processor.decode(answer[:2])}
    ids = torch.tensor([prompt])
    ids = chat.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert ids[0, len(prompt):].tolist() == [*answer[:2], end]


REAL = [(TINY / "gp-vl", envs.GeneralPoints().reset(3)[0].messages, "formula")]
if "SMOLLM2" in os.environ:
    REAL.append((os.environ["SMOLLM2"], [{"role": "system", "content": "You are a helpful assistant."}, {
        "role": "user", "content": "What is the capital of France?"}], "Paris"))


@pytest.mark.parametrize("folder, messages, word", REAL)
def test_real_weights_answer_alike(transformers, folder, messages, word):
    """A hand of cards in words, from its folder as it stands."""
    model, processor = Llama.from_pretrained(folder, dtype=torch.float32), Processor.from_pretrained(folder)
    prompt = processor.render(messages).ids
    ours = generate(model, [prompt], max_new_tokens=80, temperature=0, stop_ids=processor.stop_ids)[0][0]
    chat = transformers.pipeline("text-generation", model=str(folder), dtype=torch.float32)
    theirs = chat(messages, max_new_tokens=80, do_sample=False)[0]["generated_text"][-1]["content"]
    assert theirs == processor.decode(ours.ids) and word in theirs
    with torch.no_grad():
        expected = chat.model(torch.tensor([prompt])).logits
        found = model(torch.tensor([prompt]), logits="all").logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


# ------------------------------------------------------------------------------------------------------------
# Theirs, read by us


def test_a_folder_of_transformers_5(transformers, tmp_path):
    """It nests the image processor in processor_config.json, which counts where both files prepare images."""
    a, b, gp = tmp_path / "a", tmp_path / "b", TINY / "gp-vl"
    for kind in (transformers.AutoProcessor, transformers.AutoModelForImageTextToText):
        kind.from_pretrained(gp).save_pretrained(a)
    assert not (a / "preprocessor_config.json").exists()
    (a / "preprocessor_config.json").write_text('{"size": {"height": 28, "width": 28}}', encoding="utf-8")
    model, first = Llama.from_pretrained(a), Processor.from_pretrained(gp)
    again = Processor.from_pretrained(a, model.config, images=True)
    assert again.image_config == first.image_config and again.render(SHOWN) == first.render(SHOWN)
    assert (again.stop_ids, again.pad_id) == (first.stop_ids, first.pad_id)
    again.save_pretrained(b)
    for name in ("processor_config.json", "chat_template.jinja"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert transformers.AutoProcessor.from_pretrained(b).image_processor.size["height"] == 56


@pytest.mark.parametrize("name", """chat_template.jinja chat_template.json special_tokens_map.json merges.txt
    added_tokens.json vocab.json tokenizer.model additional_chat_templates/tool_use.jinja""".split())
def test_files_that_pass_through(gp, saved, tmp_path, name):
    """Keep them to the byte, in a save and a checkpoint. No template of ours appears beside one of theirs."""
    content = b"\x80\x81\0\r\n"
    (gp / "chat_template.jinja").unlink()
    (gp / name).parent.mkdir(exist_ok=True)
    (gp / name).write_bytes(content)
    folder, checkpoints = saved(), Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"x": torch.ones(2)}, {}, Processor.from_pretrained(folder).save_pretrained)
    checkpoints.finish()
    for folder in (folder, checkpoints.newest()):
        assert (folder / name).read_bytes() == content
        ours = "template" not in name
        assert (folder / "chat_template.jinja").exists() == (ours or name == "chat_template.jinja")


@pytest.mark.parametrize("template", ["{{ 'mine' }}", [{"name": "default", "template": "x"}]])
def test_what_tokenizer_config_says_is_kept(gp, saved, template):
    (gp / "chat_template.jinja").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "chat_template": template, "eos_token": "<|end_of_text|>"}
    (gp / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    found = json.loads((saved() / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert found.items() >= config.items() and not (saved() / "chat_template.jinja").exists()


@pytest.mark.parametrize("name, value", rows("""
truncation | {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
truncation | {"max_length": 3, "stride": 1, "strategy": "OnlyFirst", "direction": "Left"}
padding | {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, \
"pad_type_id": 0, "pad_token": "[PAD]"}
padding | {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 0, \
"pad_type_id": 0, "pad_token": "<|eot_id|>"}
post_processor | {"type": "TemplateProcessing", \
"single": [{"SpecialToken": {"id": "<|eot_id|>", "type_id": 0}}, \
{"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, \
{"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {"<|eot_id|>": {"id": "<|eot_id|>", "ids": [4], \
"tokens": ["<|eot_id|>"]}}}"""))
def test_what_a_caller_left_in_the_tokenizer(gp, saved, name, value):
    """tokenizer.json keeps it; transformers, for one, stores truncation and padding there."""
    expected = Processor.from_pretrained(gp).render(CHATS[2]).ids
    edit(gp / "tokenizer.json", name, json.loads(value))
    assert Processor.from_pretrained(gp).render(CHATS[2]).ids == expected
    found = json.loads((saved() / "tokenizer.json").read_text(encoding="utf-8"))
    assert found["truncation"] is found["padding"] is None
    assert Processor.from_pretrained(saved()).render(CHATS[2]).ids == expected


def test_layout_tokens_are_special_whatever_the_file_says(gp):
    """Else a user's text could end its own turn."""
    text = (gp / "tokenizer.json").read_text(encoding="utf-8")
    (gp / "tokenizer.json").write_text(text.replace('"special": true', '"special": false'), encoding="utf-8")
    processor, layout = Processor.from_pretrained(gp), [*LLAMA3, "<|image|>"]
    assert not {*map(processor.id_of, layout)} & {*processor.encode("".join(layout))}


@pytest.mark.parametrize("row", rows("""
null                                     | null  | null | [4]     | 5
{"eos_token_id": 1}                      | null  | null | [1,4]   | 5
{"eos_token_id": [1, 2]}                 | null  | null | [1,2,4] | 5
{"eos_token_id": []}                     | 3     | null | [3,4]   | 5
{}                                       | [1,3] | null | [1,3,4] | 5
{"eos_token_id": 0}                      | 4     | [2]  | [0,2,4] | 5
{"eos_token_id": null, "pad_token_id": 0} | null  | 1    | [1,4]   | 0"""))
def test_stop_tokens_of_all_files_and_the_one_trained_on(gp, saved, row):
    """A row: generation_config.json, if any; eos_token_id in text_config and on top; stop ids, pad id."""
    generation, text, top, stops, pad = map(json.loads, row)
    edit(gp / "config.json", "eos_token_id", top)
    edit(gp / "config.json", "text_config.eos_token_id", text)
    (gp / "generation_config.json").unlink()
    if generation is not None:
        content = json.dumps(generation | {"temperature": 0.6})
        (gp / "generation_config.json").write_text(content, encoding="utf-8")
    processor = Processor.from_pretrained(gp)
    assert (processor.stop_ids, processor.pad_id) == (stops, pad)
    found = json.loads((saved() / "generation_config.json").read_text(encoding="utf-8"))
    assert found["eos_token_id"] == stops and found["pad_token_id"] == pad
    assert found.get("temperature") == (None if generation is None else 0.6)
