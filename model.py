"""Llama and Llama-3.2-Vision ("mllama") from scratch: layers, KV cache, generation, Hugging Face folders, chat and image processing.

    python -c "import model; m = model.Llama.from_pretrained('FOLDER'); p = model.Processor.from_pretrained('FOLDER'); \
        ids = p.render([{'role': 'user', 'content': 'Hello'}]).ids; \
        print(p.decode(model.generate(m, [ids], max_new_tokens=50, stop_ids=p.stop_ids)[0][0].ids))"

A text-only Llama is the same model without cross-attention layers and vision encoder. The architecture: Llama 3 (arXiv 2407.21783,
sections 3.2 and 7); in doubt, what Hugging Face transformers 5 computes, to which the tests hold this file. No distributed code here.
In shapes: B rows, T tokens, H query heads, K key heads, G = H / K, D channels, V vocabulary, N images, S vision tokens of an image.
"""
import contextlib
import json
import math
import os
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from kernels import product_type
from kernels.attention import Visible, attention
from kernels.logprob import token_logprobs

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


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

    def image_tokens(self, frozen):
        """What an image adds to a forward and backward pass, in text tokens of about the same memory. frozen: its encoder is not trained.

        A patch keeps as many numbers as a token does (11B: 16 a layer and channel) in the layers of the encoder, as far as it is
        trained; and keys and values in those that look at it. Measured (distributed/plan.py) are 2221 for 11B, or 199 if frozen.
        """
        vision = self.vision
        encoder = 0 if frozen else vision.hidden_size * (vision.num_hidden_layers + vision.num_global_layers)
        keys = self.num_key_value_heads * self.head_dim * len(self.cross_attention_layers)
        return vision.max_num_tiles * vision.num_patches * (encoder + keys) // (self.hidden_size * self.num_hidden_layers)

    @classmethod
    def from_dict(cls, hf):
        """A parsed config.json of model_type llama or mllama -> Config. ValueError for anything this file does not compute."""
        kind = hf.get("model_type")
        if kind not in ("llama", "mllama"):
            raise ValueError(f"config.json: expected model_type 'llama' or 'mllama', found {kind!r}")
        mllama = kind == "mllama"
        absent = [name for name in ("text_config", "vision_config") if mllama and name not in hf]
        text = {} if absent else dict(hf["text_config"] if mllama else hf)
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        absent += [name for name in needed if name not in text]
        if absent:
            raise ValueError(f"config.json: {absent[0]} is missing")
        require(text, hidden_act="silu", attention_bias=False, mlp_bias=False)
        rope = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta"), **(text.get("rope_scaling") or {})}
        heads = text["num_attention_heads"]
        text |= {"rope_theta": rope.get("rope_theta") or (500000.0 if mllama else 10000.0),
                 "rope_scaling": read_rope_scaling(rope),
                 "num_key_value_heads": text.get("num_key_value_heads") or heads,
                 "head_dim": (not mllama and text.get("head_dim")) or text["hidden_size"] // heads,
                 "cross_attention_layers": []}
        if mllama:
            require(hf["vision_config"], hidden_act="gelu")
            text |= {"tie_word_embeddings": False,     # impossible: the head has 8 rows fewer than the embedding table
                     "image_token_id": hf.get("image_token_index", 128256),
                     "cross_attention_layers": hf["text_config"].get("cross_attention_layers") or [3, 8, 13, 18, 23, 28, 33, 38],
                     "vision": VisionConfig(**known_fields(VisionConfig, hf["vision_config"]))}
        return cls(**known_fields(cls, text))

    def to_dict(self):
        """The config.json that `from_dict` and transformers read, laid out as in the released checkpoints."""
        text = {k: v for k, v in vars(self).items() if k not in ("vision", "image_token_id", "cross_attention_layers")}
        text |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        if self.vision is None:
            return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **text}
        text |= {"model_type": "mllama_text_model", "cross_attention_layers": self.cross_attention_layers}
        vision = {"model_type": "mllama_vision_model", "hidden_act": "gelu", "vision_output_dim": self.vision.output_size}
        return {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama", "image_token_index": self.image_token_id,
                "text_config": text, "vision_config": vision | vars(self.vision)}


def known_fields(cls, values):
    return {k: v for k, v in values.items() if k in cls.__dataclass_fields__ and v is not None}


def require(values, **only):
    for name, value in only.items():
        if values.get(name, value) != value:
            raise ValueError(f"config.json: {name} = {values[name]!r} is not supported, only {value!r}")


def read_rope_scaling(rope):
    """`rope_parameters` (transformers 5) or `rope_scaling` (before it) -> None or the llama3 rule."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"config.json: rope type {kind!r} is not supported, only 'default' and 'llama3'")
    numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {"rope_type": "llama3", **{k: rope[k] for k in numbers}}


# ---------------------------------------------------------------------------------------------------------------------
# What goes in, what comes out, what is remembered


@dataclass
class Images:
    """The images of a batch, at most one a row."""
    pixel_values: torch.Tensor | None       # (N, tiles, 3, size, size), normalised; None where their features are known
    aspect_ratio_ids: torch.Tensor          # (N,) 1-based place in supported_aspect_ratios
    aspect_ratio_mask: torch.Tensor         # (N, tiles) 1 for real tiles, which come first, 0 for padding
    rows: torch.Tensor                      # (N,) the batch row of each, ascending
    features: torch.Tensor | None = None    # (N, S, VisionConfig.output_size) what the vision encoder made of them, if known

    def to(self, device=None, dtype=None):
        move = lambda x, dtype=None: None if x is None else x.to(device, dtype)
        return Images(move(self.pixel_values, dtype), move(self.aspect_ratio_ids), move(self.aspect_ratio_mask), move(self.rows),
                      move(self.features))


@dataclass
class Output:
    """What `Llama.forward` was asked for; None for the rest."""
    hidden: torch.Tensor                    # (B, T, D) after the final norm
    logits: torch.Tensor | None = None      # (B, T, V) for "all", (B, V) for "last"
    logprobs: torch.Tensor | None = None    # (B, T) float32, 0 where no target was asked
    entropy: torch.Tensor | None = None     # (B, T) float32, nats
    features: torch.Tensor | None = None    # (N, S, F) of the images given, before the projector


class KVCache:
    """Keys and values of B conversations. A tensor a layer: growing then takes the memory of one layer beside, not of all.

    `lengths` (B,) lives on the host: nothing waits for the device to know how far a row has come.
    """

    def __init__(self, config, rows, device="cpu", dtype=torch.float32):
        self_layers = config.num_hidden_layers - len(config.cross_attention_layers)
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.has_image = torch.zeros(rows, dtype=torch.bool)
        shape = rows, 2, config.num_key_value_heads, 0, config.head_dim                       # (B, 2, K, capacity, D)
        self.kv = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(self_layers)]
        self.cross = None                   # (cross layers, B, 2, K, S, D) once an image came
        self.cross_mask = None              # (B, S) bool: vision tokens of real tiles; None when all are

    def reserve(self, capacity):
        """Make room for `capacity` tokens a row."""
        short = capacity - self.kv[0].shape[3]
        if short > 0:
            for i in range(len(self.kv)):
                self.kv[i] = F.pad(self.kv[i], (0, 0, 0, -(-short // 64) * 64))

    def move(self, to, source):
        """Row to[i] becomes what row source[i] was (lists). In place and layer by layer, so that little extra memory is needed."""
        to, source = torch.tensor(to, dtype=torch.int64), torch.tensor(source, dtype=torch.int64)
        used = int(self.lengths.max())
        for layer in self.kv:
            layer[to, :, :, :used] = layer[source, :, :, :used]
        cross = [] if self.cross is None else self.cross
        for tensor in (self.lengths, self.has_image, self.cross_mask, *cross):
            if tensor is not None:
                tensor[to] = tensor[source]

    def keep(self, rows):
        """Forget all conversations but `rows`, which become rows 0, 1, ... in that order."""
        self.move(list(range(len(rows))), list(rows))
        self.__dict__.update(self.first(len(rows)).__dict__)

    def first(self, n):
        """A cache of the first n rows that shares this one's memory."""
        view = KVCache.__new__(KVCache)
        view.lengths, view.has_image, view.kv = self.lengths[:n], self.has_image[:n], [layer[:n] for layer in self.kv]
        view.cross = None if self.cross is None else self.cross[:, :n]
        view.cross_mask = None if self.cross_mask is None else self.cross_mask[:n]
        return view


@dataclass
class Step:
    """What all layers of one forward share."""
    cos: torch.Tensor                       # (B or 1, T, 1, D)
    sin: torch.Tensor
    cache: KVCache | None = None
    write: torch.Tensor | None = None       # (B * T * 2 * K,) where the new keys and values go in a layer's flattened cache
    length: int = 0                         # cached positions to attend to
    fresh: bool = True                      # no cached positions: the new tokens attend to one another alone
    text: Visible = None                    # what the new tokens see of the text
    vision: torch.Tensor | None = None      # (N, S, D) projected image features, only when images are given
    features: torch.Tensor | None = None    # (N, S, F) the same before projection
    looks: bool = False                     # does any row have an image?
    rows: torch.Tensor | None = None        # (N,) the rows that have, when not all do
    image: Visible = field(default_factory=Visible)            # and of their row's image
    sees: torch.Tensor | None = None        # (N, T, 1) 0 for tokens before their image


# ---------------------------------------------------------------------------------------------------------------------
# Text layers


def rope_frequencies(config):
    """Radians per position of each channel pair, (D / 2,) float32. llama3 slows the slow ones (transformers, modeling_rope_utils.py)."""
    frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim)
    if config.rope_scaling is None:
        return frequencies
    scaling = config.rope_scaling
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)         # within the original context
    keep = (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
    keep = keep.clamp(0, 1)                                    # 1: fast, kept; 0: slow, divided by factor
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rotate(x, cos, sin):
    """RoPE of x (B, T, H, D). The first half of `sin` is negated (see Llama.rope), so that a roll does for "rotate half"."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Linear(nn.Module):
    """No bias, and called directly: nn.Module's machinery for hooks takes longer than a small matrix product."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def __call__(self, x):
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """Called directly, as `Linear`."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.shape, self.eps = nn.Parameter(torch.ones(size)), (size,), eps

    def __call__(self, x):
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Of the text to itself, with RoPE; or (`cross`) to an image, with normed queries and keys."""

    def __init__(self, config, index, cross):
        super().__init__()
        self.index, self.cross, self.head_dim = index, cross, config.head_dim        # index: place in the cache
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(q_size, config.hidden_size)
        if cross:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def heads(self, x):
        return x.view(*x.shape[:2], -1, self.head_dim)

    def forward(self, x, step):
        q = self.heads(self.q_proj(x))                         # (B, T, H, D)
        if self.cross:
            k, v = self.image_keys(step)
            return self.o_proj(attention(self.q_norm(q), k, v, step.image).flatten(2))
        k, v = self.text_keys(x, step)
        return self.o_proj(attention(rotate(q, step.cos, step.sin), k, v, step.text).flatten(2))

    def text_keys(self, x, step):
        """Keys and values to attend to, (B, K, length, D): the new ones; or, with a cache, which remembers them, all."""
        k = rotate(self.heads(self.k_proj(x)), step.cos, step.sin)                            # (B, T, K, D)
        v = self.heads(self.v_proj(x))
        if step.cache is not None:
            cached = step.cache.kv[self.index]                                                # (B, 2, K, capacity, D)
            cached.view(-1, self.head_dim).index_copy_(0, step.write, torch.stack([k, v], 2).detach().view(-1, self.head_dim).to(cached.dtype))
            if not step.fresh:
                return cached[:, :, :, :step.length].unbind(1)
        return k.transpose(1, 2), v.transpose(1, 2)

    def image_keys(self, step):
        """Keys and values of images, (N, K, S, D). The cache remembers those of the tiles that are real in some row."""
        rows = slice(None) if step.rows is None else step.rows
        if step.vision is None:
            return step.cache.cross[self.index][rows].unbind(1)
        k = self.k_norm(self.heads(self.k_proj(step.vision))).transpose(1, 2)
        v = self.heads(self.v_proj(step.vision)).transpose(1, 2)
        if step.cache is not None:
            kept = step.cache.cross[self.index]                                               # (B, 2, K, S of real tiles, D)
            kept[rows] = torch.stack([k, v], 1)[:, :, :, :kept.shape[3]].detach().to(kept.dtype)
        return k, v


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SelfLayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.self_attn = Attention(config, index, cross=False)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, step):
        x = x + self.self_attn(self.input_layernorm(x), step)
        return x + self.mlp(self.post_attention_layernorm(x))


class CrossLayer(nn.Module):
    """Look at the image, through gates. Rows without one pass unchanged, and so do tokens before their <|image|>, as in Meta's code,
    with which the weights were trained. (transformers lets those look and skips their MLP alone: its issue 39379.)"""

    def __init__(self, config, index):
        super().__init__()
        self.cross_attn = Attention(config, index, cross=True)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, step):
        if not step.looks:
            return x
        if step.rows is None:
            return self.look(x, step)
        return x.index_copy(0, step.rows, self.look(x[step.rows], step))

    def look(self, x, step):
        sees = 1 if step.sees is None else step.sees           # (N, T, 1)
        x = x + sees * self.cross_attn_attn_gate.tanh() * self.cross_attn(self.input_layernorm(x), step)
        return x + sees * self.cross_attn_mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(x))


# ---------------------------------------------------------------------------------------------------------------------
# Vision encoder


class VisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, x, visible):
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))         # (N, S, H, D)
        return self.o_proj(attention(q, k.transpose(1, 2), v.transpose(1, 2), visible).flatten(2))


class VisionLayer(nn.Module):
    def __init__(self, config, gated):
        super().__init__()
        size = config.hidden_size
        self.self_attn = VisionAttention(config)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(size, config.intermediate_size), "fc2": nn.Linear(config.intermediate_size, size)})
        self.input_layernorm = nn.LayerNorm(size, config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(size, config.norm_eps)
        self.gate_attn = nn.Parameter(torch.zeros(1)) if gated else None
        self.gate_ffn = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, x, visible):
        attended = self.self_attn(self.input_layernorm(x), visible)
        x = x + (attended if self.gate_attn is None else self.gate_attn.tanh() * attended)
        fed = self.mlp.fc2(F.gelu(self.mlp.fc1(self.post_attention_layernorm(x))))
        return x + (fed if self.gate_ffn is None else self.gate_ffn.tanh() * fed)


class TileEmbedding(nn.Module):
    """A gated vector per (aspect ratio, tile)."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(len(config.supported_aspect_ratios) + 1, config.max_num_tiles * config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, aspect_ratio_ids):                    # x (N, tiles, P, D)
        return x + self.gate.tanh() * self.embedding(aspect_ratio_ids).view(*x.shape[:2], 1, -1)


class PositionEmbedding(nn.Module):
    """A vector per patch of a tile and, gated against it, one per (aspect ratio, tile, patch)."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(config.num_patches, config.hidden_size))
        self.tile_embedding = nn.Embedding(len(config.supported_aspect_ratios) + 1, config.max_num_tiles * self.embedding.numel())
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, aspect_ratio_ids):                    # x (N, tiles, P, D)
        gate = self.gate.tanh()
        return x + (1 - gate) * self.embedding + gate * self.tile_embedding(aspect_ratio_ids).view(x.shape)


class VisionModel(nn.Module):
    """Image tiles -> features of every patch: local layers, then gated global ones; some local layers' outputs are kept beside the last."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.patch_embedding = nn.Conv2d(config.num_channels, size, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(size))
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.layernorm_pre, self.layernorm_post = nn.LayerNorm(size), nn.LayerNorm(size)
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(VisionLayer(config, False) for _ in range(config.num_hidden_layers))})
        self.global_transformer = nn.ModuleDict({"layers": nn.ModuleList(VisionLayer(config, True) for _ in range(config.num_global_layers))})

    def forward(self, images):
        """Images -> (N, tiles * P, output_size): P patches a tile, the class token first."""
        N, tiles = images.aspect_ratio_mask.shape
        ids, P = images.aspect_ratio_ids, self.config.num_patches
        x = self.patch_embedding(images.pixel_values.flatten(0, 1).to(self.class_embedding.dtype)).flatten(2).transpose(1, 2)
        x = self.pre_tile_positional_embedding(x.unflatten(0, (N, tiles)), ids)
        x = torch.cat([self.class_embedding.expand(N, tiles, 1, -1), x], 2)                   # (N, tiles, P, D)
        x = F.pad(self.layernorm_pre(self.gated_positional_embedding(x, ids)), (0, 0, 0, -P % 8))
        visible = patches_seen(images.aspect_ratio_mask, P, x.shape[2])
        x, kept = x.flatten(1, 2), []                                                         # (N, S, D)
        for index, layer in enumerate([*self.transformer.layers, None]):
            if index in self.config.intermediate_layers_indices:       # the input of layer i, as Meta trained the weights
                kept.append(x)                                         # (transformers 5 takes the output, one layer late)
            x = x if layer is None else layer(x, visible)
        x = self.layernorm_post(x).unflatten(1, (tiles, -1))
        x = self.post_tile_positional_embedding(x, ids).flatten(1, 2)
        for layer in self.global_transformer.layers:
            x = layer(x, visible)
        features = torch.cat([x, torch.stack(kept, -1).flatten(-2)], -1)                      # kept layers' channels interleave
        return features.unflatten(1, (tiles, -1))[:, :, :P].flatten(1, 2)


def patches_seen(tile_mask, patches, padded):
    """(N, tiles), patches of a tile with and without padding -> Visible. Only padding to padding is closed; so the released weights
    were trained."""
    real = tile_mask.bool()[:, :, None] & (torch.arange(padded, device=tile_mask.device) < patches)
    real = real.flatten(1)                                                                    # (N, S)
    return Visible(key_mask=real, see_all=real)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Llama(nn.Module):
    """Llama-3.2-Vision, or a text-only Llama where `config.vision` is None."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        spare = 8 if config.vision else 0                      # embedding rows for <|image|> and the like, which the head lacks
        self.embed_tokens = nn.Embedding(config.vocab_size + spare, config.hidden_size)
        self.layers = nn.ModuleList()
        counts = {SelfLayer: 0, CrossLayer: 0}                 # a layer's index within its part of the cache
        for index in range(config.num_hidden_layers):
            kind = CrossLayer if index in config.cross_attention_layers else SelfLayer
            self.layers.append(kind(config, counts[kind]))
            counts[kind] += 1
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        if config.vision:
            self.vision_model = VisionModel(config.vision)
            self.multi_modal_projector = nn.Linear(config.vision.output_size, config.hidden_size)
        self.rope_table = None                                 # (2, positions, 1, D), grown on demand
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed=0, std=0.02):
        """From-scratch weights as transformers draws them: normal(0, std), norms 1, biases and gates 0 (but global vision layers' gates normal)."""
        generator = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        for name, weight in self.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.fill_(1.0)
            elif name.endswith(("bias", "_gate", "embedding.gate")):
                weight.zero_()
            else:
                weight.normal_(0, std, generator=generator)

    def forward(self, input_ids, *, lengths=None, images=None, cache=None, targets=None, temperature=1.0, logits=None):
        """One pass over right-padded tokens -> Output. All of it happens in here, so that FSDP's hooks see it.

        input_ids (B, T) int64; lengths (B,) real tokens a row, default T. images: rows with one <|image|> token each; the others
        have none (else ValueError). cache: row b's tokens follow the cache.lengths[b] it holds, and are added; an image is given
        with the first ones and remembered. targets (B, T): the token after each input, -100 where not asked -> logprobs and
        entropy of softmax(logits / temperature). logits: "all", "last" (of each row's last real token) or None.
        """
        x = self.embed_tokens(input_ids)
        step = self.place(x, cache, lengths)
        if images is not None:
            self.show(step, input_ids, images.to(x.device), x.dtype)
        elif cache is not None and cache.has_image.any():
            self.remind(step, cache)
        for layer in self.layers:
            x = layer(x, step)
        output = Output(self.norm(x), features=step.features)
        if logits == "all":
            output.logits = self.lm_head(output.hidden)
        elif logits == "last":
            rows, last = torch.arange(len(x), device=x.device), None if lengths is None else lengths.to(x.device) - 1
            output.logits = self.lm_head(output.hidden[:, -1] if lengths is None else output.hidden[rows, last])
        if targets is not None:
            scores = token_logprobs(output.hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), temperature)
            output.logprobs, output.entropy = (score.view_as(targets) for score in scores[:2])
        return output

    @property
    def vision_frozen(self):
        """True if no weight of the vision encoder learns, so that its output for an image stays the same."""
        return self.config.vision is not None and not any(weight.requires_grad for weight in self.vision_model.parameters())

    def place(self, x, cache, lengths):
        """Positions of the new tokens, where they go in the cache (which is then longer) and what they attend to there."""
        B, T, _ = x.shape
        real = None if lengths is None else lengths.to(x.device)
        if cache is None:
            return Step(*self.rope(T, x)[:, None, :T], text=Visible(causal=True, lengths=real))
        ends = cache.lengths.tolist()
        fresh, longest = max(ends) == 0, max(ends) + T
        cache.reserve(longest)
        K, capacity = cache.kv[0].shape[2:4]                   # (B, 2, K, capacity, D)
        positions = cache.lengths.to(x.device)[:, None] + torch.arange(T, device=x.device)                        # (B, T)
        write = torch.arange(0, B * 2 * K * capacity, capacity, device=x.device).view(B, 1, 2, K) + positions[:, :, None, None]
        cache.lengths += T if lengths is None else lengths.cpu()
        text = Visible(causal=True, lengths=real, starts=None if fresh else positions[:, 0])
        return Step(*self.rope(longest, x)[:, positions], cache, write.flatten(), longest, fresh, text)

    def rope(self, length, x):
        """cos and sin tables (2, at least `length` positions, 1, D) of x's kind; see `rotate`."""
        table = self.rope_table
        if table is None or table.shape[1] < length or table.device != x.device or table.dtype != x.dtype:
            with torch.inference_mode(False):                  # made in a rollout perhaps, used in training too
                positions = torch.arange(max(256, 2 ** (length - 1).bit_length()), dtype=torch.float32)
                angles = positions[:, None, None] * rope_frequencies(self.config)
                cos, sin = angles.cos(), angles.sin()
                table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
                self.rope_table = table = table.to(x.device, x.dtype)
        return table

    def show(self, step, input_ids, images, dtype):
        """Encode images. Tokens from <|image|> on see its real tiles; what cross-attention gives those before it is dropped."""
        if self.config.vision is None:
            raise ValueError("this model has no vision encoder, so it takes no images")
        if step.cache is not None and not step.fresh:
            raise ValueError("images must come with the first tokens of a conversation")
        here = input_ids == self.config.image_token_id                                        # (B, T)
        count = torch.bincount(images.rows, minlength=len(here))
        if not torch.equal(here.sum(1), count) or int(count.max()) > 1:
            raise ValueError(f"a conversation has one image and one <|image|> token, or none: found images {count.tolist()}, "
                             f"tokens {here.sum(1).tolist()}")
        step.looks, step.rows = True, None if len(images.rows) == len(here) else images.rows
        step.features = self.vision_model(images) if images.features is None else images.features
        step.vision = self.multi_modal_projector(step.features)                               # (N, S, D)
        step.sees = here[images.rows].cumsum(1)[:, :, None].to(dtype)                         # (N, T, 1)
        real = images.aspect_ratio_mask.bool().repeat_interleave(self.config.vision.num_patches, 1)      # (N, S)
        if not real.all():
            step.image = Visible(key_mask=real)                # never empty: an image has a real tile, so no NaN is dropped
        if step.cache is not None:
            self.keep_images(step.cache, images.rows, real)

    def keep_images(self, cache, rows, real):
        """Room in the cache for the keys of the tiles that are real in some row, real (N, S)."""
        B, _, K, _, D = cache.kv[0].shape
        S = int(real.sum(1).max())
        cache.cross = cache.kv[0].new_zeros(len(self.config.cross_attention_layers), B, 2, K, S, D)
        cache.has_image[rows.cpu()] = True
        if not real[:, :S].all():
            cache.cross_mask = torch.zeros(B, S, dtype=torch.bool, device=real.device).index_copy_(0, rows, real[:, :S])

    def remind(self, step, cache):
        """New tokens see the images that the cache remembers."""
        step.looks, mask = True, cache.cross_mask              # (B, S)
        if not cache.has_image.all():
            step.rows = cache.has_image.nonzero()[:, 0].to(step.cos.device)
            mask = None if mask is None else mask[step.rows]
        step.image = Visible(key_mask=mask)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=None):
        """Read config.json and model.safetensors (or its shards); dtype None keeps the file's.

        FileNotFoundError for what is absent; ValueError for another architecture, broken files, and tensors that are missing,
        unexpected or misshaped.
        """
        config = Config.from_dict(read_json(folder, "config.json"))
        with torch.device("meta"):
            model = cls(config)
        state = read_weights(folder, {k: v.shape for k, v in model.state_dict().items()}, config, str(device), dtype)
        model.load_state_dict(state, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model

    def save_pretrained(self, folder, *, max_shard_size=5 * 10**9):
        """Write config.json and safetensors in the released layout, all or nothing."""
        tensors = {to_released(k, self.config): v for k, v in self.state_dict().items()
                   if not (k == "lm_head.weight" and self.config.tie_word_embeddings)}
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        files = {"config.json": json.dumps(self.config.to_dict() | {"torch_dtype": dtype}, indent=2)}
        shards = split_shards(tensors, max_shard_size)
        for i, names in enumerate(shards):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            files[file] = {k: tensors[k] for k in names}
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                     "weight_map": {k: file for file, part in files.items() if isinstance(part, dict) for k in part}}
            files["model.safetensors.index.json"] = json.dumps(index, indent=2)
        write_files(folder, files, replaces="model*.safetensors*")


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders

# (prefix in a file, prefix here), the first match counts: the released mllama layout, the newer one, and llama's
KEY_MAP = [("language_model.model.", ""), ("language_model.lm_head.", "lm_head."),
           ("model.language_model.", ""), ("model.vision_model.", "vision_model."), ("model.multi_modal_projector.", "multi_modal_projector."),
           ("model.", "")]


def from_any_layout(name):
    """A tensor's name in a file -> its name in `Llama`."""
    return next((ours + name[len(theirs):] for theirs, ours in KEY_MAP if name.startswith(theirs)), name)


def to_released(name, config):
    """A tensor's name in `Llama` -> its name in the released checkpoints."""
    if name.startswith(("vision_model.", "multi_modal_projector.")):
        return name
    return ("language_model." if config.vision else "") + ("" if name.startswith("lm_head.") else "model.") + name


def read_json(folder, name, optional=False):
    path = Path(folder) / name
    if not path.is_file():
        if optional:
            return {}
        raise FileNotFoundError(f"{path}: not found; expected a Hugging Face folder with {name}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return values


def weight_files(folder):
    """The safetensors files of a folder."""
    folder, index = Path(folder), "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / index).is_file():
        raise FileNotFoundError(f"{folder}: expected model.safetensors, or {index} and its shards")
    files = [folder / file for file in sorted(set(read_json(folder, index)["weight_map"].values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: not found, but {index} names it")
    return files


def read_weights(folder, shapes, config, device, dtype):
    """{our name: tensor}, exactly those in `shapes`."""
    state = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt", device=device) as tensors:
                for theirs in tensors.keys():
                    name = from_any_layout(theirs)
                    if name.endswith("rotary_emb.inv_freq"):
                        continue                               # in old checkpoints; follows from the config
                    found = tuple(tensors.get_slice(theirs).get_shape())
                    if name not in shapes:
                        raise ValueError(f"{file}: unexpected tensor {theirs}")
                    if found != shapes[name]:
                        raise ValueError(f"{file}: tensor {theirs} has shape {found}, expected {tuple(shapes[name])}")
                    state[name] = tensors.get_tensor(theirs).to(dtype)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    if config.tie_word_embeddings and "embed_tokens.weight" in state:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    missing = [to_released(name, config) for name in shapes if name not in state]
    if missing:
        raise ValueError(f"{file}: tensor {missing[0]} is missing" + (f" ({len(missing)} in all)" if len(missing) > 1 else ""))
    return state


def split_shards(tensors, limit):
    """Names in order, cut so that a shard has at most `limit` bytes (or a single tensor)."""
    shards, size = [], math.inf
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > limit:
            shards.append([])
            size = tensor.nbytes
        shards[-1].append(name)
    return shards


def write_files(folder, files, replaces=None):
    """Write {name: text or tensors}. All are written aside first, so that a failure leaves the folder as it was. Then drop older files
    that match `replaces`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, content in files.items():
            if isinstance(content, str):
                aside[name].write_text(content, encoding="utf-8")
            else:
                save_file({k: t.detach().cpu().contiguous() for k, t in content.items()}, aside[name], {"format": "pt"})
                aside[name].chmod(0o644)                       # safetensors makes it readable by its owner only
        for name, path in aside.items():
            os.replace(path, folder / name)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()                                     # only succeeds where nothing could be written
    for old in folder.glob(replaces) if replaces else ():
        if old.name not in files:
            old.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@dataclass
class Sample:
    """One answer."""
    ids: list                               # drawn ids, with the end token if it was drawn
    logprobs: list                          # of each, when it was drawn
    ended: bool = False                     # by a stop id, not by max_new_tokens
    hidden: torch.Tensor | None = None      # (D,) state at the last token before them, after the final norm: what a critic reads
    features: torch.Tensor | None = None    # (S, F) of the row's image, on the host; see `generate`


@torch.no_grad()
def generate(model, conversations, *, cache=None, images=None, max_new_tokens, temperature=1.0, stop_ids, seeds=None,
             keep_features=False):
    """Continue each conversation until a stop id or max_new_tokens (>= 1). -> (list of Sample, KVCache)

    conversations: the full token ids so far; row i of `cache` already holds the first cache.lengths[i] of them, only the rest is
    fed. images: with the first call only. temperature 0 is greedy (its log-probs are those of temperature 1). seeds: one a row;
    a row's draws depend on its own seed and not on the rows around it (default: torch's global generator). keep_features: hand out
    what the vision encoder made of the images, for a model whose encoder is frozen to be trained on (see Images.features).
    To go on: append sample.ids and the next forced tokens to each list, cache.keep(rows that go on), call again.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    weight, B, stop_ids = model.embed_tokens.weight, len(conversations), set(stop_ids)
    cache = KVCache(model.config, B, weight.device, product_type(weight)) if cache is None else cache
    ids, lengths = pad([c[n:] for c, n in zip(conversations, cache.lengths.tolist(), strict=True)])
    cache.reserve(int((cache.lengths + lengths).max()) + max(max_new_tokens, ids.shape[1]))
    uniform = draw_uniform(seeds, B, max_new_tokens).to(weight.device)
    out = model(ids.to(weight.device), lengths=lengths, images=images, cache=cache, logits="last")
    samples = [Sample([], [], hidden=hidden) for hidden in out.hidden[torch.arange(B), lengths - 1]]
    if keep_features and images is not None:
        for row, features in zip(images.rows.tolist(), out.features.cpu()):
            samples[row].features = features
    rows, drawn, view, logits, out = list(range(B)), [], cache, out.logits, None              # rows[slot]: whose it is
    for t in range(max_new_tokens):
        tokens, logprobs = draw(logits, uniform[:, t], temperature)
        drawn.append((rows[:len(tokens)], logprobs))
        done = []
        for slot, token in enumerate(tokens.tolist()):         # the one wait for the device in a step
            samples[rows[slot]].ids.append(token)
            if token in stop_ids:
                samples[rows[slot]].ended = True
                done.append(slot)
        if len(done) == len(tokens) or t == max_new_tokens - 1:
            break
        if done:                                               # finished rows go to the end and cost nothing from here on
            n = len(tokens) - len(done)
            to, source = swaps(done, n)
            cache.move(to, source)
            tokens[to], uniform[to] = tokens[source], uniform[source]
            for slot, row in zip(to, [rows[s] for s in source]):
                rows[slot] = row
            tokens, uniform, view = tokens[:n], uniform[:n], cache.first(n)
        logits = model(tokens[:, None], cache=view, logits="last").logits
    values = iter(torch.cat([logprobs for _, logprobs in drawn]).tolist())
    for slots, _ in drawn:
        for row in slots:
            samples[row].logprobs.append(next(values))
    moved = [slot for slot, row in enumerate(rows) if slot != row]
    cache.move([rows[slot] for slot in moved], moved)
    return samples, cache


def pad(rows):
    """Lists of ids -> (B, T) int64, padded on the right with 0, and lengths (B,)."""
    if not all(rows):
        raise ValueError("every conversation needs at least one token that the cache does not hold yet")
    width = max(map(len, rows))
    return torch.tensor([[*r, *[0] * (width - len(r))] for r in rows]), torch.tensor([len(r) for r in rows])


def draw_uniform(seeds, rows, steps):
    """(rows, steps) numbers in [0, 1), row i from seeds[i]. All 64 bits of a seed count: of torch's generators, that of
    the CPU reads 32."""
    if seeds is None:
        uniform = torch.rand(rows, steps)
    else:
        streams = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
        uniform = torch.from_numpy(np.stack([stream.random(steps, dtype=np.float32) for stream in streams]))
    return uniform.clamp_(max=1 - 2**-22)                      # so that u * total < total after rounding


def draw(logits, uniform, temperature):
    """logits (n, V), uniform (n,) -> tokens (n,) by inverse CDF, and their log-probs (n,) float32."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cdf = logprobs.exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def swaps(done, n):
    """Slots to exchange so that the n unfinished rows come first -> (to, source)."""
    finished = set(done)
    front = [slot for slot in done if slot < n]
    back = [slot for slot in range(n, n + len(done)) if slot not in finished]
    return front + back, back + front


# ---------------------------------------------------------------------------------------------------------------------
# Processor


@dataclass
class Rendered:
    """A rendered conversation."""
    ids: list
    sampled: list                           # per id: must the model produce it?
    images: list                            # PIL images, in order


IMAGE_DEFAULTS = {"image_processor_type": "MllamaImageProcessor", "do_convert_rgb": True, "do_resize": True, "do_pad": True,
                  "size": {"height": 224, "width": 224}, "max_image_tiles": 4, "resample": 2, "do_rescale": True,
                  "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ["<|im_start|>", "<|im_end|>"]


class Processor:
    """Messages -> token ids and image tensors; ids -> text.

    Llama 3: <|begin_of_text|>, then per message <|start_header_id|>role<|end_header_id|>, two newlines, content, <|eot_id|>.
    ChatML (tokenizers with <|im_start|>): <|im_start|>role, newline, content, <|im_end|>, newline.
    No system text is added. Content is encoded as plain text: nobody makes a special token by spelling it.
    """

    def __init__(self, tokenizer, image_config=None, generation_config=None, tokenizer_config=None):
        """A `tokenizers.Tokenizer` and the dicts of preprocessor_config.json (None: takes no images), generation_config.json and
        tokenizer_config.json."""
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True            # "encode them" as the text that they are spelled with
        self.special_ids = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.image_config = None if image_config is None else IMAGE_DEFAULTS | image_config
        self.generation_config, self.tokenizer_config = generation_config or {}, tokenizer_config or {}
        self.chatml = tokenizer.token_to_id("<|im_start|>") is not None
        for token in CHATML if self.chatml else LLAMA3:
            if tokenizer.token_to_id(token) is None:
                raise ValueError(f"tokenizer.json: expected the special tokens of Llama 3 or ChatML, but {token} is absent")
        self.end_id = tokenizer.token_to_id("<|im_end|>" if self.chatml else "<|eot_id|>")
        self.image_token_id = tokenizer.token_to_id("<|image|>")
        eos = self.generation_config.get("eos_token_id")       # an id, a list of them, or absent
        self.stop_ids = sorted({self.end_id, *(eos if isinstance(eos, list) else [] if eos is None else [eos])})
        pad_id = self.generation_config.get("pad_token_id")
        self.pad_id = self.end_id if pad_id is None else pad_id

    @classmethod
    def from_pretrained(cls, folder):
        """Read tokenizer.json and, where present, the three other files. FileNotFoundError, ValueError."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; expected a Hugging Face folder with tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:                             # tokenizers raises nothing narrower
            raise ValueError(f"{path}: not a tokenizer ({error})") from None
        files = ("preprocessor_config.json", "generation_config.json", "tokenizer_config.json")
        image_config, *others = (read_json(folder, file, optional=True) for file in files)
        return cls(tokenizer, image_config or None, *others)

    def save_pretrained(self, folder):
        """Write the files that from_pretrained reads, all or nothing."""
        files = {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"} | self.tokenizer_config,
                 "generation_config.json": {"eos_token_id": self.stop_ids, "pad_token_id": self.pad_id} | self.generation_config}
        if self.image_config is not None:
            files["preprocessor_config.json"] = self.image_config
        write_files(folder, {"tokenizer.json": self.tokenizer.to_str(pretty=True)} | {k: json.dumps(v, indent=2) for k, v in files.items()})

    def encode(self, text):
        """Plain text -> ids, none of them special."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not self.special_ids.isdisjoint(ids):
            raise ValueError("this tokenizer makes special tokens out of plain text")
        return ids

    def render(self, messages, *, first=True, reply=True, ended=True):
        """Messages ({"role", "content", optional "train"}) -> Rendered.

        content: text, or a list of {"type": "text", "text"} and {"type": "image", "image"}. `sampled` marks what the model must
        produce: an assistant's content and its end token, or what a message's "train" (a bool) says. reply: end with the header
        after which the model answers. first=False: go on after the model's own answer; ended=False: which was cut off, so that its
        end token is added, as a forced one. ValueError for more than one image or an unknown part.
        """
        out = Rendered([], [], [])
        newline = self.encode("\n") if self.chatml else []     # after <|im_end|>, never sampled

        def add(ids, sampled=False):
            out.ids += ids
            out.sampled += [sampled and i != self.image_token_id for i in ids]      # the head has no row for the image token

        if not first:
            add(([] if ended else [self.end_id]) + newline)
        elif not self.chatml:
            add([self.tokenizer.token_to_id("<|begin_of_text|>")])
        for message in messages:
            add(self.header(message["role"]))
            ids = self.content(message["content"], out.images) + [self.end_id]
            add(ids, sampled=message.get("train", message["role"] == "assistant"))
            add(newline)
        if reply:
            add(self.header("assistant"))
        if len(out.images) > 1:
            raise ValueError(f"a conversation can have at most one image, this one has {len(out.images)}")
        return out

    def header(self, role):
        """Encoded apart from the content, so that a header before a drawn answer and before a given one are the same."""
        if self.chatml:
            return [self.tokenizer.token_to_id("<|im_start|>"), *self.encode(role + "\n")]
        start, end = (self.tokenizer.token_to_id(token) for token in LLAMA3[1:3])
        return [start, *self.encode(role), end, *self.encode("\n\n")]

    def content(self, content, images):
        """A message's ids; its images are appended to `images`."""
        ids = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                ids += self.encode(part["text"])
            elif part["type"] != "image":
                raise ValueError(f"message part of type {part['type']!r}: expected 'text' or 'image'")
            elif self.image_config is None or self.image_token_id is None:
                raise ValueError("this checkpoint takes no images: it lacks preprocessor_config.json or the <|image|> token")
            else:
                ids.append(self.image_token_id)
                images.append(part["image"])
        return ids

    def decode(self, ids):
        """Text of the ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def position_of(self, ids, text):
        """Index of the id that holds the first character of `text` in the decoded ids; -1 if it is absent."""
        start = self.decode(ids).find(text)
        return -1 if start < 0 else bisect_left(range(len(ids)), True, key=lambda i: len(self.decode(ids[:i + 1])) > start)

    def images(self, images, features=None):
        """One PIL image or None per batch row -> Images, or None if there is none. features: of each row's image, known already."""
        rows = [i for i, image in enumerate(images) if image is not None]
        if not rows:
            return None
        if self.image_config is None:
            raise ValueError("this checkpoint takes no images: it lacks preprocessor_config.json")
        size, max_tiles = self.image_config["size"]["height"], self.image_config["max_image_tiles"]
        ids, layouts = zip(*(best_canvas(images[i].width, images[i].height, size, max_tiles) for i in rows))
        real = torch.tensor([math.prod(layout) for layout in layouts])
        return Images(None if features else torch.from_numpy(np.stack([tile_image(images[i], self.image_config) for i in rows])),
                      torch.tensor(ids), (torch.arange(max_tiles) < real[:, None]).long(), torch.tensor(rows),
                      torch.stack([features[i] for i in rows]) if features else None)


def tile_image(image, config):
    """PIL image -> tiles (max_tiles, 3, size, size) float32, black ones last; as transformers' mllama processor."""
    size, max_tiles = config["size"]["height"], config["max_image_tiles"]
    image = to_rgb(image)
    _, (rows, columns) = best_canvas(image.width, image.height, size, max_tiles)
    image = image.resize(fit(image.width, image.height, columns * size, rows * size, size), config["resample"])
    canvas = np.zeros((rows * size, columns * size, 3), np.float32)
    canvas[:image.height, :image.width] = np.asarray(image)
    if config["do_rescale"]:
        canvas *= np.float32(config["rescale_factor"])
    if config["do_normalize"]:
        canvas = (canvas - np.float32(config["image_mean"])) / np.float32(config["image_std"])
    tiles = np.zeros((max_tiles, 3, size, size), np.float32)
    tiles[:rows * columns] = canvas.reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size)
    return tiles


def to_rgb(image):
    """Any mode -> RGB. Transparency turns white; 16-bit grey is scaled, where Pillow would clip it."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def tile_layouts(max_tiles):
    """All (rows, columns) of at most max_tiles tiles; a layout's place in this list is its aspect ratio id, less 1."""
    return [[a, b] for a in range(1, max_tiles + 1) for b in range(1, max_tiles + 1) if a * b <= max_tiles]


def best_canvas(width, height, size, max_tiles):
    """Aspect ratio id and (rows, columns) of the canvas that enlarges the image least; if none does, that shrinks it least; of equals
    the smallest, then the first."""
    layouts = tile_layouts(max_tiles)
    scales = [min(a * size / height, b * size / width) for a, b in layouts]
    scale = min((s for s in scales if s >= 1), default=max(scales))
    best = min((i for i, s in enumerate(scales) if s == scale), key=lambda i: layouts[i][0] * layouts[i][1])
    return best + 1, layouts[best]


def fit(width, height, canvas_width, canvas_height, size):
    """(width, height) in pixels of the resized image: its aspect kept, within the canvas, enlarged at most to one tile."""
    target_width, target_height = min(max(width, size), canvas_width), min(max(height, size), canvas_height)
    scale_w, scale_h = target_width / width, target_height / height
    if scale_w < scale_h:
        return target_width, min(math.floor(height * scale_w) or 1, target_height)
    return min(math.floor(width * scale_h) or 1, target_width), target_height


# ---------------------------------------------------------------------------------------------------------------------
# Batches for training and scoring

@dataclass
class Batch:
    input_ids: torch.Tensor          # (B, T)
    lengths: torch.Tensor            # (B,)
    targets: torch.Tensor            # (B, T) the token after each position where it is asked for, else -100
    images: Images | None

    def to(self, device):
        return Batch(self.input_ids.to(device), self.lengths.to(device), self.targets.to(device),
                     self.images and self.images.to(device))


def collate(processor, ids, asked, images, features=None):
    """Conversations -> Batch. `asked[b][t]`: is the log-prob of token t wanted? The last token is a target only. images, features: see
    Processor.images."""
    width = max(len(row) for row in ids) - 1
    input_ids = torch.full((len(ids), width), processor.pad_id)
    targets = torch.full((len(ids), width), -100)
    for b, (row, wanted) in enumerate(zip(ids, asked)):
        input_ids[b, :len(row) - 1] = torch.tensor(row[:-1])
        following = torch.tensor(row[1:])
        targets[b, :len(row) - 1] = torch.where(torch.tensor(wanted[1:]), following, -100)
    lengths = torch.tensor([len(row) - 1 for row in ids])
    return Batch(input_ids, lengths, targets, processor.images(images, features))


def bucket(lengths, token_budget, extra=None):
    """Group rows alike in length so that rows x longest, and what each takes beside (`extra`, its image, in tokens), is at most
    token_budget (a row beyond it alone). Returns lists of indices."""
    groups, beside = [], [0] * len(lengths) if extra is None else extra
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[i] + sum(beside[j] for j in [*groups[-1], i]) <= token_budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def alone(batches, spare):
    """Each batch with weight 1. Of several ranks, those with fewer batches add `spare` with weight 0: distributed.shard.pace."""
    return [(batch, 1.0) for batch in batches]
