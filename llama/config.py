"""The sizes of a model: config.json, checked as a whole before anything is built of it."""
from dataclasses import dataclass, field
from pathlib import Path

from llama.checks import OBJECT, SWITCH, TOKEN, TOKENS, Rule, check, number, only, several, whole, wrong
from llama.folders import read_json


def tile_layouts(max_tiles):
    """List all [rows, columns] of at most max_tiles tiles. Aspect ratio id 1 is the first of them."""
    counts = range(1, max_tiles + 1)
    return [[a, b] for a in counts for b in counts if a * b <= max_tiles]


@dataclass
class VisionConfig:
    """Sizes of the image encoder; names and defaults are those of `vision_config` in config.json."""
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32             # local layers
    num_global_layers: int = 8              # gated layers after them
    attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 448                   # pixels, one square tile
    patch_size: int = 14
    norm_eps: float = 1e-5
    max_num_tiles: int = 4
    intermediate_layers_indices: list = field(default_factory=lambda: [3, 7, 15, 23, 30])
    supported_aspect_ratios: list = field(default_factory=lambda: tile_layouts(4))

    @property
    def num_patches(self):                  # of one tile, with its class token
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def output_size(self):                  # final layer and intermediate ones, concatenated
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))


@dataclass
class Config:
    """Sizes of the text model (names as in config.json) and, for mllama, of the vision encoder."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None        # None, or the four numbers of the llama3 rule
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None
    cross_attention_layers: list = field(default_factory=list)
    image_token_id: int | None = None
    vision: VisionConfig | None = None

    @property
    def embedding_rows(self):               # <|image|> and the like have 8 rows more, which the head lacks
        return self.vocab_size + (8 if self.vision else 0)

    def image_tokens(self, frozen):
        """Estimate what an image adds to a forward and backward pass, in text tokens of as much memory.

        frozen: its encoder is not trained. A patch keeps as many numbers as a token does (11B: 16 per layer
        and channel) in the layers of the encoder, as far as it is trained; and keys and values in those that
        look at it. Measured (distributed/plan.py) are 2221 for 11B, or 199 if frozen.
        """
        vision = self.vision
        encoder = 0 if frozen else vision.hidden_size * (vision.num_hidden_layers + vision.num_global_layers)
        keys = self.num_key_value_heads * self.head_dim * len(self.cross_attention_layers)
        patches = vision.max_num_tiles * vision.num_patches
        return patches * (encoder + keys) // (self.hidden_size * self.num_hidden_layers)

    @classmethod
    def from_pretrained(cls, folder):
        """Read config.json of a folder. FileNotFoundError; ValueError on one line: file, name and value."""
        return cls.from_dict(read_json(folder, "config.json"), Path(folder) / "config.json")

    @classmethod
    def from_dict(cls, hf, file="config.json"):
        """Turn a parsed config.json of model_type llama or mllama into a Config. Errors name `file`."""
        check(file, TOP, hf, needed=["model_type"])
        mllama = hf["model_type"] == "mllama"
        if mllama:
            check(file, PARTS, hf, needed=PARTS)
        text, where = (hf["text_config"], "text_config.") if mllama else (hf, "")
        check(file, TEXT, text, where, needed=NEEDED)

        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        head_dim = None if mllama else text.get("head_dim")
        if head_dim is None and hidden % heads:
            raise wrong(file, where + "hidden_size", hidden, f"a multiple of num_attention_heads = {heads}")
        values = {"num_key_value_heads": heads} | given(cls, text) | read_rope(text, file, where, mllama)
        values["head_dim"] = head_dim or hidden // heads
        config = cls(**values | read_vision(hf, file) if mllama else values | {"cross_attention_layers": []})

        raw = {where + name: value for name, value in text.items()} | hf
        raw |= {"vision_config." + name: value for name, value in hf.get("vision_config", {}).items()}
        for name, holds, expected in TOGETHER:
            own = name.replace("text_config.", where)
            if (mllama or own != name) and not holds(config, raw.get(own)):
                raise wrong(file, own, raw.get(own), expected.format(c=config))
        return config

    def to_dict(self):
        """Lay out config.json as in the released checkpoints, for `from_dict` and transformers."""
        apart = "vision", "image_token_id", "cross_attention_layers"
        text = {name: value for name, value in vars(self).items() if name not in apart}
        text |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        if self.vision is None:
            return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **text}
        text |= {"model_type": "mllama_text_model", "cross_attention_layers": self.cross_attention_layers}
        vision = {"model_type": "mllama_vision_model", "hidden_act": "gelu",
                  "vision_output_dim": self.vision.output_size, **vars(self.vision)}
        return {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama",
                "image_token_index": self.image_token_id, "text_config": text, "vision_config": vision}


def given(cls, values):
    """Pick the fields of a dataclass out of a file's values; null counts as absent."""
    return {k: v for k, v in values.items() if k in cls.__dataclass_fields__ and v is not None}


def read_rope(text, file, where, mllama):
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before it)."""
    newer = text.get("rope_parameters")
    rope = newer or text.get("rope_scaling") or {}
    where += "rope_parameters." if newer else "rope_scaling."
    kind = rope.get("rope_type") or rope.get("type") or "default"
    check(file, ROPE, rope | {"rope_type": kind}, where)
    thetas = rope.get("rope_theta"), text.get("rope_theta"), 500000.0 if mllama else 10000.0
    found = {"rope_theta": next(theta for theta in thetas if theta is not None), "rope_scaling": None}
    if kind == "llama3":
        check(file, LLAMA3_ROPE, rope, where, needed=LLAMA3_ROPE)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if high <= low:
            raise wrong(file, where + "high_freq_factor", high, f"more than low_freq_factor = {low}")
        found["rope_scaling"] = {"rope_type": kind, **{name: rope[name] for name in LLAMA3_ROPE}}
    return found


def read_vision(hf, file):
    """Read what mllama has beside a Llama."""
    check(file, VISION, hf["vision_config"], "vision_config.")
    layers, token = hf["text_config"].get("cross_attention_layers"), hf.get("image_token_index")
    return {"cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38] if layers is None else layers,
            "image_token_id": 128256 if token is None else token,
            "tie_word_embeddings": False,                      # the head has fewer rows than the embedding
            "vision": VisionConfig(**given(VisionConfig, hf["vision_config"]))}


# ------------------------------------------------------------------------------------------------------------
# What config.json may hold. Limits lie far beyond any Llama; they keep a broken file from filling memory.

TOP = {"model_type": only("llama", "mllama"), "image_token_index": TOKEN,
       "bos_token_id": TOKEN, "eos_token_id": TOKENS, "pad_token_id": TOKEN,
       "quantization_config": Rule("none: quantized weights are not supported", lambda value: False)}
PARTS = {"text_config": OBJECT, "vision_config": OBJECT}
TEXT = {"vocab_size": whole(1, 2**20), "hidden_size": whole(1, 2**16), "intermediate_size": whole(1, 2**18),
        "num_hidden_layers": whole(1, 1000), "num_attention_heads": whole(1, 1024),
        "num_key_value_heads": whole(1, 1024), "head_dim": whole(2, 128),
        "rms_norm_eps": number(0, 1), "max_position_embeddings": whole(1, 2**31),
        "rope_theta": number(0), "rope_scaling": OBJECT, "rope_parameters": OBJECT,
        "cross_attention_layers": several(whole(0, 999)), "tie_word_embeddings": SWITCH,
        "hidden_act": only("silu"), "attention_bias": only(False), "mlp_bias": only(False),
        "bos_token_id": TOKEN, "eos_token_id": TOKENS, "pad_token_id": TOKEN}
NEEDED = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
ROPE = {"rope_type": only("default", "llama3"), "rope_theta": number(0)}
LLAMA3_ROPE = {"factor": number(0), "low_freq_factor": number(0), "high_freq_factor": number(0),
               "original_max_position_embeddings": whole(1, 2**31)}
VISION = {"hidden_size": whole(1, 2**16), "intermediate_size": whole(1, 2**18),
          "num_hidden_layers": whole(1, 1000), "num_global_layers": whole(0, 1000),
          "attention_heads": whole(1, 1024), "num_channels": only(3), "norm_eps": number(0, 1),
          "image_size": whole(1, 4096), "patch_size": whole(1, 4096), "max_num_tiles": whole(1, 64),
          "intermediate_layers_indices": several(whole(0, 1000)),
          "supported_aspect_ratios": several(several(whole(1, 64), 2)),
          "vision_output_dim": whole(1, 2**26), "hidden_act": only("gelu")}


def distinct(layers, end):
    """Are these different layers below `end`, one at least?"""
    return len(layers) > 0 and len(set(layers)) == len(layers) and max(layers) < end


# What must go together: name, does it hold (config, the file's value), what is expected.
# Only a Vision model has what is not in text_config.
TOGETHER = [
    ("text_config.num_attention_heads", lambda c, v: v % c.num_key_value_heads == 0,
     "a multiple of num_key_value_heads = {c.num_key_value_heads}"),
    ("text_config.head_dim", lambda c, v: c.head_dim in range(2, 129, 2) and v in (None, c.head_dim),
     "an even number from 2 to 128; for mllama it is hidden_size / num_attention_heads"),
    ("text_config.cross_attention_layers",
     lambda c, v: not c.vision or distinct(c.cross_attention_layers, c.num_hidden_layers) and
     len(c.cross_attention_layers) < c.num_hidden_layers,
     "different numbers below num_hidden_layers = {c.num_hidden_layers}, one at least, and not all of them"),
    ("image_token_index", lambda c, v: c.image_token_id < c.embedding_rows,
     "a row of the embedding, which has vocab_size + 8 = {c.embedding_rows}"),
    ("vision_config.hidden_size",
     lambda c, v: c.vision.hidden_size in [size * c.vision.attention_heads for size in range(1, 129)],
     "a multiple of attention_heads = {c.vision.attention_heads}, at most 128 times as large"),
    ("vision_config.image_size", lambda c, v: c.vision.image_size % c.vision.patch_size == 0,
     "a multiple of patch_size = {c.vision.patch_size}"),
    ("vision_config.intermediate_layers_indices",      # transformers goes by their order, Meta does not
     lambda c, v: distinct(layers := c.vision.intermediate_layers_indices, c.vision.num_hidden_layers + 1) and
     layers == sorted(layers),
     "ascending numbers up to num_hidden_layers = {c.vision.num_hidden_layers}, one at least"),
    ("vision_config.supported_aspect_ratios",
     lambda c, v: c.vision.supported_aspect_ratios == tile_layouts(c.vision.max_num_tiles),
     "all [rows, columns] of at most max_num_tiles = {c.vision.max_num_tiles} tiles, in order"),
    ("vision_config.vision_output_dim", lambda c, v: v in (None, c.vision.output_size),
     "{c.vision.output_size}, which follows from hidden_size and intermediate_layers_indices")]
