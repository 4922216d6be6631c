"""Read the sizes of a model: config.json, checked as a whole before anything is built of it."""
from dataclasses import dataclass, field, fields
from pathlib import Path

from harness.ranges import above, integer
from llama.checks import (OBJECT, SPECIAL, SWITCH, TOKEN, Rule, below, check, equal, list_of, multiple,
                          only)
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
        look at it. Measured (study/plan.py) are 2221 for 11B, or 199 if frozen.
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
        mllama = hf.get("model_type") == "mllama"
        check(file, TOP, hf, needed=["model_type", *["text_config", "vision_config"] * mllama])
        text, where = (hf["text_config"], "text_config.") if mllama else (hf, "")
        check(file, TEXT, text, where, needed=NEEDED)
        heads = text["num_attention_heads"]
        if mllama:
            token = hf.get("image_token_index")
            defaults = {"rope_theta": 500000.0, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38]}
            fixed = {"image_token_id": 128256 if token is None else token,
                     "vision": read_vision(hf["vision_config"], file, "vision_config."),
                     "tie_word_embeddings": False}             # the head has fewer rows than the embedding
        else:
            defaults = {"rope_theta": 10000.0}
            fixed = {"image_token_id": None, "vision": None, "cross_attention_layers": []}
        sizes = {"num_key_value_heads": heads, "head_dim": text["hidden_size"] // heads}
        values = defaults | sizes | given(cls, text) | read_rope(text, file, where) | fixed
        config = cls(**values)

        layers = config.num_hidden_layers
        check(file, {
            "num_attention_heads": multiple(config.num_key_value_heads, "num_key_value_heads"),
            "head_dim": integer(2, 128, step=2),
            "cross_attention_layers": Rule(
                f"different numbers below num_hidden_layers = {layers}, one at least, and not all of them",
                lambda v: not mllama or 0 < len(v) == len({*v}) < layers and max(v) < layers),
        }, values, where)
        if mllama or text.get("head_dim") is None:
            size = equal(heads * config.head_dim, "num_attention_heads * head_dim")
            check(file, {"hidden_size": size}, text, where)
        row = below(config.embedding_rows, "vocab_size + 8")
        check(file, {"image_token_index": row}, {"image_token_index": config.image_token_id})
        return config

    def to_dict(self):
        """Lay out config.json as in the released checkpoints, for `from_dict` and transformers."""
        text = dict(vars(self))
        vision, image, layers = map(text.pop, ("vision", "image_token_id", "cross_attention_layers"))
        if vision is None:
            return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **text}
        return {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama",
                "image_token_index": image, "text_config": text | {"cross_attention_layers": layers},
                "vision_config": vars(vision) | {"vision_output_dim": vision.output_size}}


def given(cls, values):
    """Pick the fields of a dataclass out of a file's values; null counts as absent."""
    return {k: v for k, v in values.items() if k in cls.__dataclass_fields__ and v is not None}


def read_rope(text, file, where):
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before it)."""
    key = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    rope, where = text.get(key) or {}, f"{where}{key}."
    kind, scaling = rope.get("rope_type") or rope.get("type") or "default", None
    check(file, ROPE, rope | {"rope_type": kind}, where)
    if kind == "llama3":
        check(file, LLAMA3_ROPE, rope, where, needed=LLAMA3_ROPE)
        check(file, {"high_freq_factor": above(rope["low_freq_factor"])}, rope, where)
        scaling = {"rope_type": kind, **{name: rope[name] for name in LLAMA3_ROPE}}
    return given(Config, {"rope_theta": rope.get("rope_theta")}) | {"rope_scaling": scaling}


def read_vision(values, file, where):
    """Read the sizes of mllama's image encoder."""
    check(file, VISION, values, where)
    vision = VisionConfig(**given(VisionConfig, values))
    heads, layers = vision.attention_heads, vision.num_hidden_layers
    check(file, {
        "hidden_size": Rule(f"a multiple of attention_heads = {heads}, at most 128 times as large",
                            lambda v: v in range(heads, 128 * heads + 1, heads)),
        "image_size": multiple(vision.patch_size, "patch_size"),
        "intermediate_layers_indices": Rule(           # transformers goes by their order, Meta does not
            f"ascending numbers up to num_hidden_layers = {layers}, one at least",
            lambda v: v and v == sorted({*v}) and v[-1] <= layers),
        "supported_aspect_ratios": Rule(
            f"all [rows, columns] of at most max_num_tiles = {vision.max_num_tiles} tiles, in order",
            lambda v: v == tile_layouts(vision.max_num_tiles)),
        "vision_output_dim": only(vision.output_size),
    }, values | vars(vision), where)
    return vision


# ------------------------------------------------------------------------------------------------------------
# What config.json may hold. Limits lie far beyond any Llama; they keep a broken file from filling memory.


def rules(cls, **others):
    """Make rules for the fields of a dataclass by their types, and for the others."""
    kinds = {int: integer(1, 2**20), bool: SWITCH, float: above(0), list: list_of(integer(0, 1000))}
    return {part.name: kinds[part.type] for part in fields(cls) if part.type in kinds} | others


NEEDED = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
TOP = SPECIAL | {"model_type": only("llama", "mllama"), "image_token_index": TOKEN,
                 "text_config": OBJECT, "vision_config": OBJECT,
                 "quantization_config": Rule("none: quantized weights are not supported", lambda v: False)}
TEXT = SPECIAL | rules(Config, rope_scaling=OBJECT, rope_parameters=OBJECT, hidden_act=only("silu"),
                       attention_bias=only(False), mlp_bias=only(False))
ROPE = {"rope_type": only("default", "llama3"), "rope_theta": above(0)}
LLAMA3_ROPE = dict.fromkeys(
    ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), above(0))
VISION = rules(VisionConfig, num_channels=only(3), max_num_tiles=integer(1, 64),
               supported_aspect_ratios=list_of(list_of(TOKEN)), hidden_act=only("gelu"))
