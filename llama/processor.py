"""Turn messages into ids and image tensors, and ids into text; read and write the files of a tokenizer."""
import json
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch
from tokenizers import Tokenizer

from llama import images as pictures
from llama.checks import OBJECT, TOKEN, TOKENS, check, wrong
from llama.folders import read_file, read_json, write_files
from llama.images import Images, best_canvas, tile_image

LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ["<|im_start|>", "<|im_end|>"]
IMAGE, PAD = "<|image|>", "<|finetune_right_pad_id|>"
GENERATION = {"bos_token_id": TOKEN, "eos_token_id": TOKENS, "pad_token_id": TOKEN}

# Files of a tokenizer that pass through to the byte: transformers knows what they say.
KEPT = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "added_tokens.json",
        "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model", "processor_config.json")

# What `Processor.render` does, for a folder that has no template of its own.
TEMPLATE = Template("""{{- '$begin' }}
{%- for message in messages %}
    {{- '$role' + message['role'] + '$content' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- '<|image|>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '$end' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '${role}assistant$content' }}
{%- endif %}
""")
LLAMA3_TEMPLATE = TEMPLATE.substitute(
    begin=LLAMA3[0], role=LLAMA3[1], content=LLAMA3[2] + r"\n\n", end=LLAMA3[3])
CHATML_TEMPLATE = TEMPLATE.substitute(begin="", role=CHATML[0], content=r"\n", end=CHATML[1] + r"\n")


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
        tokenizer.no_truncation()                              # a caller's state, which tokenizer.json keeps
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):          # so is this: merges at random
            tokenizer.model.dropout = None
        layout = [token for token in (*LLAMA3, *CHATML, IMAGE) if tokenizer.token_to_id(token) is not None]
        tokenizer.add_special_tokens(layout)                   # where the file forgot to call them special
        tokenizer.encode_special_tokens = True                 # as the text that they are spelled with
        self.special_ids = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.tokenizer, self.kept, self.image_config = tokenizer, kept or {}, None
        self.generation_config, self.tokenizer_config = generation_config or {}, tokenizer_config or {}
        if image_config is not None:
            said = {name: value for name, value in image_config.items() if value is not None}
            self.image_config = pictures.DEFAULTS | said

        self.chatml = CHATML[0] in layout
        for token in CHATML if self.chatml else LLAMA3:
            if token not in layout:
                raise ValueError(f"tokenizer.json: token {token} is absent: "
                                 "expected the special tokens of Llama 3 or ChatML")
        self.end_id = tokenizer.token_to_id(CHATML[1] if self.chatml else LLAMA3[3])
        self.image_token_id = tokenizer.token_to_id(IMAGE)
        self.stop_ids = sorted({self.end_id, *as_list(self.generation_config.get("eos_token_id"))})
        pads = self.generation_config.get("pad_token_id"), tokenizer.token_to_id(PAD), self.end_id
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
        names = [str(path.relative_to(folder)) for pattern in KEPT for path in sorted(folder.glob(pattern))]
        kept = {name: read_file(folder, name) for name in names}
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
        """Write what from_pretrained reads, all or nothing, so that transformers chats alike and stops."""
        name = self.tokenizer.id_to_token
        tokens = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if "special_tokens_map.json" not in self.kept:         # else they are there
            tokens |= {} if self.chatml else {"bos_token": LLAMA3[0]}
            tokens |= {"eos_token": name(self.end_id), "pad_token": name(self.pad_id)}
        stops = {"eos_token_id": self.stop_ids, "pad_token_id": self.pad_id}
        configs = {"tokenizer_config.json": tokens | self.tokenizer_config,
                   "generation_config.json": self.generation_config | stops}
        if self.image_config is not None:
            configs["preprocessor_config.json"] = self.image_config
        files = self.kept | {file: json.dumps(values, indent=2) for file, values in configs.items()}
        if not any("chat_template" in said for said in (*self.kept, *self.tokenizer_config)):
            files["chat_template.jinja"] = CHATML_TEMPLATE if self.chatml else LLAMA3_TEMPLATE
        write_files(folder, files | {"tokenizer.json": self.tokenizer.to_str(pretty=True)})

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
        newline = self.encode("\n") if self.chatml else []     # after <|im_end|>, never sampled

        def add(ids, sampled=False):
            out.ids += ids
            out.sampled += [sampled and i != self.image_token_id for i in ids]     # the head lacks that row

        if not first:
            add(([] if ended else [self.end_id]) + newline)
        elif not self.chatml:
            add([self.tokenizer.token_to_id(LLAMA3[0])])
        for message in messages:
            sampled = message.get("train", message["role"] == "assistant")
            ids, text = self.header(message["role"])
            if sampled or message["role"] == "assistant":      # apart, as before an answer that is drawn
                ids, text = ids + self.encode(text), ""
            add(ids)
            add(self.content(text, message["content"], out.images) + [self.end_id], sampled)
            add(newline)
        if reply:
            ids, text = self.header("assistant")
            add(ids + self.encode(text))
        if len(out.images) > 1:
            raise ValueError(f"a conversation can have at most one image, this one has {len(out.images)}")
        return out

    def header(self, role):
        """Return the ids that open a message, and the text between them and its content."""
        if self.chatml:
            return [self.tokenizer.token_to_id(CHATML[0])], role + "\n"
        start, end = (self.tokenizer.token_to_id(token) for token in LLAMA3[1:3])
        return [start, *self.encode(role), end], "\n\n"

    def content(self, text, content, images):
        """Return the ids of `text` and a message's content, and append its images to `images`."""
        ids = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                text += part["text"]
            elif part["type"] != "image":
                raise ValueError(f"message part of type {part['type']!r}: expected 'text' or 'image'")
            elif self.image_config is None or self.image_token_id is None:
                raise ValueError(NO_IMAGES)
            else:
                ids += [*self.encode(text), self.image_token_id]
                text = ""
                images.append(part["image"])
        return ids + self.encode(text)

    def decode(self, ids):
        """Turn ids into text, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def position_of(self, ids, text):
        """Return the index of the id with the first character of `text` in the decoded ids; -1 if absent."""
        start = self.decode(ids).find(text)
        ends_after = lambda i: len(self.decode(ids[:i + 1])) > start
        return -1 if start < 0 else bisect_left(range(len(ids)), True, key=ends_after)

    def images(self, images, features=None):
        """Put one image per batch row together: a picture, what `cut` made of one, or None -> Images, or None
        if there is none. features: of each row's image, where they are known already."""
        rows = [i for i, image in enumerate(images) if image is not None]
        if not rows:
            return None
        cut = [self.cut(images[i]) for i in rows]
        ids, mask = (torch.cat([getattr(image, name) for image in cut])
                     for name in ("aspect_ratio_ids", "aspect_ratio_mask"))
        pixels, known = [image.pixel_values[0] for image in cut], None
        if features:
            pixels, known = None, torch.stack([features[i] for i in rows])
        return Images(pixels, ids, mask, torch.tensor(rows), known)

    def cut(self, image):
        """Cut a PIL image into tiles -> Images of this one, which all batches that it is in can share."""
        if isinstance(image, Images):
            return image
        if self.image_config is None:
            raise ValueError(NO_IMAGES)
        size, max_tiles = self.image_config["size"]["height"], self.image_config["max_image_tiles"]
        ratio, (rows, columns) = best_canvas(image.width, image.height, size, max_tiles)
        real = (torch.arange(max_tiles) < rows * columns).long()
        pixels = torch.from_numpy(tile_image(image, self.image_config))
        return Images([pixels], torch.tensor([ratio]), real[None], torch.zeros(1, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------------------
# What the files say

NO_IMAGES = ("preprocessor_config.json: this checkpoint takes no images: expected that file, or an "
             "image_processor in processor_config.json, and <|image|> in tokenizer.json")


def as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def read_images(folder):
    """Read how images are prepared; None if no file says it. transformers 5 nests it in
    processor_config.json, where it looks first."""
    file, where = folder / "processor_config.json", "image_processor."
    nested = read_json(folder, file.name, optional=True) or {}
    check(file, {"image_processor": OBJECT}, nested)
    values = nested.get("image_processor")
    if values is None:
        file, where = folder / "preprocessor_config.json", ""
        values = read_json(folder, file.name, optional=True)
    check(file, pictures.RULES, values or {}, where)
    return values


def read_generation(folder):
    """Read generation_config.json, with the stop tokens of config.json, and its padding if there is none."""
    found = read_json(folder, "generation_config.json", optional=True) or {}
    hf = read_json(folder, "config.json", optional=True) or {}
    check(folder / "generation_config.json", GENERATION, found)
    check(folder / "config.json", {"text_config": OBJECT} | GENERATION, hf)
    text = hf.get("text_config") or {}
    check(folder / "config.json", GENERATION, text, "text_config.")
    stops = [stop for values in (found, text, hf) for stop in as_list(values.get("eos_token_id"))]
    pads = [values["pad_token_id"] for values in (found, text, hf) if values.get("pad_token_id") is not None]
    return found | {"eos_token_id": stops, "pad_token_id": pads[0] if pads else None}


def check_fit(processor, config, images=False):
    """Refuse a processor that gives what a model of this Config cannot take. images: it must take them."""
    vocabulary, vision = processor.tokenizer.get_vocab(), config.vision
    layout = CHATML if processor.chatml else LLAMA3
    made = [token for token, i in vocabulary.items() if token in layout or i not in processor.special_ids]
    last = max(made, key=vocabulary.get)
    pad, image, picture = processor.pad_id, processor.image_token_id, processor.image_config or {}
    if images and vision and (image is None or not picture):
        raise ValueError(NO_IMAGES)
    size, tiles = picture.get("size"), picture.get("max_image_tiles")

    def demand(file, name, value, holds, expected):
        if not holds:
            raise wrong(file, name, value, expected + " of config.json")

    demand("tokenizer.json", f"token {last}", vocabulary[last], vocabulary[last] < config.vocab_size,
           f"an id below vocab_size = {config.vocab_size}")
    demand("generation_config.json", "pad_token_id", pad, pad < config.embedding_rows,
           f"a row of the embedding, of which there are {config.embedding_rows} by vocab_size")
    if vision:
        demand("tokenizer.json", f"token {IMAGE}", image, image in (None, config.image_token_id),
               f"image_token_index = {config.image_token_id}")
        demand("preprocessor_config.json", "size", size, not size or size["height"] == vision.image_size,
               f"image_size = {vision.image_size}")
        demand("preprocessor_config.json", "max_image_tiles", tiles, tiles in (None, vision.max_num_tiles),
               f"max_num_tiles = {vision.max_num_tiles}")
