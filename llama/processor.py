"""Turn messages into ids and image tensors, and ids into text; read and write the files of a tokenizer."""
import json
from bisect import bisect_left
from dataclasses import dataclass
from glob import glob
from itertools import groupby
from pathlib import Path

import torch
from tokenizers import Tokenizer

from llama import images as pictures
from llama.folders import check, read_file, read_json, write_file
from llama.images import Images

LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ["<|im_start|>", "<|im_end|>"]
IMAGE, PAD = "<|image|>", "<|finetune_right_pad_id|>"

# Files of a tokenizer that pass through to the byte: transformers knows what they say.
KEPT = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "added_tokens.json",
        "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model", "processor_config.json")

# The chat template for a folder without one, which does what `Processor.render` does: the words of Llama 3 or
# of ChatML, then TEMPLATE.
LLAMA3_WORDS = r"""{%- set begin, role = '<|begin_of_text|>', '<|start_header_id|>' %}
{%- set content, end = '<|end_header_id|>\n\n', '<|eot_id|>' %}
"""
CHATML_WORDS = r"""{%- set begin, role, content, end = '', '<|im_start|>', '\n', '<|im_end|>\n' %}
"""
TEMPLATE = """{{- begin }}
{%- for message in messages %}
    {{- role + message['role'] + content }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- '<|image|>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- end }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- role + 'assistant' + content }}
{%- endif %}
"""


@dataclass
class Rendered:
    """A rendered conversation."""
    ids: list
    sampled: list                           # per id: must the model produce it?
    images: list                            # PIL images, in order


class Processor:
    """Render chats, and prepare images.

    Llama 3: <|begin_of_text|>, then per message <|start_header_id|>role<|end_header_id|>, two newlines,
    content, <|eot_id|>. ChatML (tokenizers with <|im_start|>): <|im_start|>role, newline, content,
    <|im_end|>, newline. No system text is added. Content is plain text: nobody makes a special token by
    spelling it.
    """

    def __init__(self, tokenizer, image_config=None, generation_config=None, tokenizer_config=None,
                 kept=None):
        """Take a `tokenizers.Tokenizer`; the dicts of preprocessor_config.json (None: takes no images),
        generation_config.json and tokenizer_config.json; and {name: bytes} of the files that are KEPT."""
        tokenizer.no_truncation()                              # settings of whoever saved tokenizer.json
        tokenizer.no_padding()
        self.id_of, self.tokenizer, self.kept = tokenizer.token_to_id, tokenizer, kept or {}
        found = [token for token in (*LLAMA3, *CHATML, IMAGE) if self.id_of(token) is not None]
        tokenizer.add_special_tokens(found)                    # where the file forgot to call them special
        tokenizer.encode_special_tokens = True                 # "<|eot_id|>" in a text is encoded as text
        self.special_ids = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.image_config = None if image_config is None else pictures.DEFAULTS | image_config
        self.generation_config, self.tokenizer_config = generation_config or {}, tokenizer_config or {}

        self.chatml = CHATML[0] in found
        self.layout = CHATML if self.chatml else LLAMA3
        for token in self.layout:
            if token not in found:
                raise ValueError(f"tokenizer.json: token {token} is absent: "
                                 "expected the special tokens of Llama 3 or ChatML")
        self.end_id, self.image_token_id = self.id_of(self.layout[-1]), self.id_of(IMAGE)
        self.stop_ids = sorted({self.end_id, *as_list(self.generation_config.get("eos_token_id"))})
        pads = self.generation_config.get("pad_token_id"), self.id_of(PAD), self.end_id
        self.pad_id = next(pad for pad in pads if pad is not None)

    @classmethod
    def from_pretrained(cls, folder, config=None, images=False):
        """Read tokenizer.json and the files beside it. config: of the model that it must fit; images: it must
        take them. FileNotFoundError; ValueError on one line that names the file and what is wrong with it."""
        folder = Path(folder)
        text = read_file(folder, "tokenizer.json")
        try:
            tokenizer = Tokenizer.from_buffer(text)
        except Exception as error:                             # tokenizers raises nothing narrower
            raise ValueError(f"{folder / 'tokenizer.json'}: not a tokenizer ({error})") from None
        kept = {name: read_file(folder, name) for pattern in KEPT for name in glob(pattern, root_dir=folder)}
        tokens = read_json(folder, "tokenizer_config.json", optional=True)
        configs = read_images(folder), read_generation(folder), tokens
        try:
            processor = cls(tokenizer, *configs, kept)
            if config is not None:
                check_fit(processor, config, images)
        except ValueError as error:
            raise ValueError(f"{folder}/{error}") from None    # it begins with the file's name
        return processor

    def save_pretrained(self, folder):
        """Write the files of `from_pretrained`. transformers then chats alike, and stops."""
        tokens = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if "special_tokens_map.json" not in self.kept:         # else they are there
            tokens |= {"bos_token": None if self.chatml else LLAMA3[0], "eos_token": self.layout[-1],
                       "pad_token": self.tokenizer.id_to_token(self.pad_id)}
        stops = {"eos_token_id": self.stop_ids, "pad_token_id": self.pad_id}
        configs = {"tokenizer_config.json": tokens | self.tokenizer_config,
                   "generation_config.json": self.generation_config | stops,
                   "preprocessor_config.json": self.image_config}
        files = {file: json.dumps(values, indent=2) for file, values in configs.items() if values}
        if not any("chat_template" in said for said in (*self.kept, *self.tokenizer_config)):
            files["chat_template.jinja"] = (CHATML_WORDS if self.chatml else LLAMA3_WORDS) + TEMPLATE
        files["tokenizer.json"] = self.tokenizer.to_str(pretty=True)
        for name, content in (self.kept | files).items():
            write_file(folder, name, content)

    def encode(self, text):
        """Turn plain text into ids, none of them special."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not self.special_ids.isdisjoint(ids):
            raise ValueError("this tokenizer makes special tokens out of plain text")
        return ids

    def render(self, messages, *, first=True, reply=True, ended=True):
        """Turn messages ({"role", "content", optional "train"}) into a Rendered.

        content: text, or a list of {"type": "text", "text"} and {"type": "image", "image"}. `sampled` marks
        what the model must produce: an assistant's content and its end token, or what a message's "train"
        (a bool) says. reply: end with the header after which the model answers. first=False: go on after the
        model's own answer; ended=False: which was cut off, so that its end token is added, as a forced one.
        ValueError for more than one image or an unknown part.
        """
        out = Rendered([], [], [])
        newline = ["\n"] * self.chatml                         # after <|im_end|>, never sampled

        def add(pieces, sampled=False):                        # of ids and texts; adjacent texts are one
            for is_text, run in groupby(pieces, key=lambda piece: isinstance(piece, str)):
                ids = self.encode("".join(run)) if is_text else list(run)
                out.ids += ids
                out.sampled += [sampled and i != self.image_token_id for i in ids]      # which lm_head lacks

        begin = [self.id_of(LLAMA3[0])] * (not self.chatml)
        add(begin if first else [self.end_id] * (not ended) + newline)
        for message in messages:
            answer = message["role"] == "assistant"
            sampled, header = message.get("train", answer), self.header(message["role"])
            if sampled or answer:                              # encoded apart, as before an answer is drawn
                add(header)
                header = []
            add(header + self.content(message["content"], out.images) + [self.end_id], sampled)
            add(newline)
        if reply:
            add(self.header("assistant"))
        if len(out.images) > 1:
            raise ValueError(f"a conversation can have at most one image, this one has {len(out.images)}")
        return out

    def header(self, role):
        """Return the ids and texts that open a message."""
        if self.chatml:
            return [self.id_of(CHATML[0]), role + "\n"]
        return [self.id_of(LLAMA3[1]), role, self.id_of(LLAMA3[2]), "\n\n"]

    def content(self, content, images):
        """Return the texts of a message and ids of <|image|>, and append its images to `images`."""
        pieces = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                pieces.append(part["text"])
            elif part["type"] != "image":
                raise ValueError(f"message part of type {part['type']!r}: expected 'text' or 'image'")
            elif self.image_config is None or self.image_token_id is None:
                raise ValueError(NO_IMAGES)
            else:
                pieces.append(self.image_token_id)
                images.append(part["image"])
        return pieces

    def decode(self, ids):
        """Turn ids into text, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def position_of(self, ids, text):
        """Return the index of the id with the first character of `text` in the decoded ids; -1 if absent."""
        start = self.decode(ids).find(text)
        ends_after = lambda i: len(self.decode(ids[:i + 1])) > start
        return -1 if start < 0 else bisect_left(range(len(ids)), True, key=ends_after)

    def images(self, images):
        """Put one image per batch row together: a picture, what `cut` made of one, or None -> Images, or None
        if there is none."""
        rows = [i for i, image in enumerate(images) if image is not None]
        if not rows:
            return None
        cut = [self.cut(images[i]) for i in rows]
        return Images([image.pixel_values[0] for image in cut],
                      torch.cat([image.aspect_ratio_ids for image in cut]),
                      torch.cat([image.aspect_ratio_mask for image in cut]), torch.tensor(rows))

    def cut(self, image):
        """Cut a PIL image into tiles -> Images of this one, which all batches that it is in can share."""
        if self.image_config is None:
            raise ValueError(NO_IMAGES)
        return image if isinstance(image, Images) else pictures.cut(image, self.image_config)


# ------------------------------------------------------------------------------------------------------------
# What the files say

NO_IMAGES = ("preprocessor_config.json: this checkpoint takes no images: expected that file, or an "
             "image_processor in processor_config.json, and <|image|> in tokenizer.json")


def as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def read_images(folder):
    """Read how images are prepared; None if no file says it. transformers 5 nests it in
    processor_config.json, where it looks first."""
    nested, own = (read_json(folder, name, optional=True)
                   for name in ("processor_config.json", "preprocessor_config.json"))
    return (nested or {}).get("image_processor") or own


def read_generation(folder):
    """Read generation_config.json, with the stop tokens of config.json, and its padding if there is none."""
    generation, config = (read_json(folder, name, optional=True) or {}
                          for name in ("generation_config.json", "config.json"))
    sources = generation, config.get("text_config") or {}, config
    stops, pads = (sum([as_list(source.get(name)) for source in sources], [])
                   for name in ("eos_token_id", "pad_token_id"))
    return generation | {"eos_token_id": stops, "pad_token_id": next(iter(pads), None)}


def check_fit(processor, config, images=False):
    """Refuse a processor that gives what a model of this Config cannot take. images: it must take them."""
    vocabulary, vision, picture = processor.tokenizer.get_vocab(), config.vision, processor.image_config
    if images and vision and (processor.image_token_id is None or not picture):
        raise ValueError(NO_IMAGES)
    made = [token for token, i in vocabulary.items()
            if token in processor.layout or i not in processor.special_ids]
    tokens = {max(made, key=vocabulary.get): range(config.vocab_size)}
    if vision:
        tokens[IMAGE] = [config.image_token_id]
    check("tokenizer.json", vocabulary, tokens, "token ")
    if vision and picture:
        check("preprocessor_config.json", picture, {
            "size": [{"height": vision.image_size, "width": vision.image_size}],
            "max_image_tiles": [vision.max_num_tiles]})
