"""Read the sizes of a model: config.json."""
from dataclasses import dataclass, field
from pathlib import Path

from llama.folders import check, read_json

LLAMA3_ROPE = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"


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
        file, found = Path(folder) / "config.json", read_json(folder, "config.json")
        try:
            return cls.from_dict(found, file)
        except (AttributeError, KeyError, TypeError) as error:     # a size is missing, or no number
            raise ValueError(f"{file}: {type(error).__name__}: {error}") from None

    @classmethod
    def from_dict(cls, hf, file="config.json"):
        """Turn a parsed config.json into a Config. ValueError, which names `file`, for that of a model which
        model.py does not know. Whether the sizes fit together, the tensors will tell."""
        kind = hf.get("model_type", "")
        check(file, {"model_type": kind}, {"model_type": ["llama", "mllama"]})
        check(file, hf, {"quantization_config": ["none"]})
        text = hf["text_config"] if kind == "mllama" else hf
        check(file, text, {"hidden_act": ["silu"]})
        heads = text["num_attention_heads"]
        sizes = {"num_key_value_heads": heads, "head_dim": text["hidden_size"] // heads}
        if kind == "mllama":
            defaults = {"rope_theta": 500000.0, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38]}
            fixed = {"image_token_id": hf.get("image_token_index") or 128256,
                     "vision": VisionConfig(**given(VisionConfig, hf["vision_config"])),
                     "tie_word_embeddings": False}             # the head has fewer rows than the embedding
        else:
            defaults = {"rope_theta": 10000.0}
            fixed = {"image_token_id": None, "vision": None, "cross_attention_layers": []}
        return cls(**defaults | sizes | given(cls, text) | read_rope(text, file) | fixed)

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


def read_rope(text, file):
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before it)."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    check(file, {"rope_type": kind}, {"rope_type": ["default", "llama3"]})
    scaling = {"rope_type": kind, **{name: rope[name] for name in LLAMA3_ROPE}} if kind == "llama3" else None
    return given(Config, {"rope_theta": rope.get("rope_theta")}) | {"rope_scaling": scaling}
