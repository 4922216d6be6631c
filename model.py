"""Llama and Llama-3.2-Vision ("mllama") from scratch: layers, KV cache, generation.

    python -c "import model; m = model.Llama.from_pretrained('FOLDER'); p = model.Processor.from_pretrained('FOLDER'); \
        ids = p.render([{'role': 'user', 'content': 'Hello'}]).ids; \
        print(p.decode(model.generate(m, [ids], max_new_tokens=50, stop_ids=p.stop_ids)[0][0].ids))"

A text-only Llama is the same model without cross-attention layers and vision encoder. The architecture:
Llama 3 (arXiv 2407.21783, sections 3.2 and 7); in doubt, what Hugging Face transformers 5 computes, to which
the tests hold this file, but for two points in which it leaves Meta's code. No distributed code here.
In shapes: B rows, T tokens, H query heads, K key heads, G = H / K, D channels, V vocabulary, N images,
S vision tokens of an image.
"""
import json
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kernels import product_type
from kernels.attention import Visible, attention
from kernels.logprob import token_logprobs
from llama.config import Config, VisionConfig, tile_layouts
from llama.folders import (INDEX, find_tensors, from_any_layout, read_json, read_weights, split_shards,
                           to_released, write_files)
from llama.images import Images
from llama.processor import CHATML, LLAMA3, Processor, Rendered

__all__ = ["CHATML", "LLAMA3", "Batch", "Config", "Images", "KVCache", "Llama", "Processor", "Rendered",
           "Sample", "VisionConfig", "alone", "bucket", "collate", "draw", "from_any_layout", "generate",
           "read_json", "split_shards", "tile_layouts", "to_released"]

# ---------------------------------------------------------------------------------------------------------------------
# What goes in, what comes out, what is remembered


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
    """Look at the image, through gates. Rows without one pass unchanged, and so do tokens before <|image|>,
    as in Meta's code, with which the weights were trained. (transformers lets these look, and skips their MLP
    alone: its issue 39379.)"""

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
        self.embed_tokens = nn.Embedding(config.embedding_rows, config.hidden_size)
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
        """Encode images. Tokens from <|image|> on see its real tiles; `look` leaves those before it alone."""
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
            step.image = Visible(key_mask=real)                # an image has a real tile, so no row is empty
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

        FileNotFoundError for what is absent; ValueError, on one line, for another architecture, sizes out of
        range, broken files, and tensors that are missing, unexpected, misshaped, not floats, or hold NaN.
        """
        config = Config.from_pretrained(folder)
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: weight.shape for name, weight in model.named_parameters()}     # a tied one once
        state = read_weights(find_tensors(folder, shapes, config), str(device), dtype)
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["embed_tokens.weight"]
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
            files[INDEX] = json.dumps(index, indent=2)
        write_files(folder, files, replaces="model*.safetensors*")


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
    """(rows, steps) numbers in [0, 1), row i from seeds[i]. All 64 bits of a seed count: of torch's
    generators, that of the CPU reads 32."""
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


def parts(places, order, n):
    """Deal n minibatches: indices of one's own items in each. places: where each stands among the items of all
    ranks; order: all of these places, in the order in which they are dealt. So ranks share the minibatches of
    one process."""
    own = {place: i for i, place in enumerate(places)}
    return [[own[place] for place in order[k::n] if place in own] for k in range(n)]


def alone(batches, spare):
    """Each batch with weight 1. Of several ranks, those with fewer batches add `spare` with weight 0: distributed.shard.pace."""
    return [(batch, 1.0) for batch in batches]
