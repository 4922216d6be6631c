"""Llama and Llama-3.2-Vision ("mllama") from scratch: layers and forward. To chat: llama/generate.py.

A text-only Llama is the same model without cross-attention layers and vision encoder. This file follows Llama
3 (arXiv 2407.21783, sections 3.2 and 7) and, where that leaves doubt, Hugging Face transformers 5, with which
tests compare it. In two points transformers departs from Meta's code; there, this file follows Meta. No
distributed code here. In shapes: B rows, T tokens, H query heads, K key heads, G = H / K, D channels (of a
head, or of a whole hidden state), V vocabulary, N images, P patches of a tile, S vision tokens of an image.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from kernels import product_type
from kernels.attention import Visible, attention
from kernels.logprob import token_logprobs
from kernels.visible import branch_starts
from llama.config import Config
from llama.folders import load_weights, save_model

# ----------------------------------------------------------------------------------------------------------
# What comes out, and what the layers share


@dataclass
class Output:
    """The result of `Llama.forward`; None for what was not asked for."""
    hidden: torch.Tensor                    # (B, T, D) after the final norm
    logits: torch.Tensor | None = None      # (B, T, V) for "all", (B, V) for "last"
    logprobs: torch.Tensor | None = None    # (B, T) float32, 0 where no target was asked
    entropy: torch.Tensor | None = None     # (B, T) float32, nats


@dataclass
class Step:
    """State that all layers of one forward pass share."""
    cos: torch.Tensor                       # (B or 1, T, 1, D)
    sin: torch.Tensor
    cache: object = None                    # a llama.cache.KVCache, or None
    write_at: torch.Tensor | None = None    # (B * T * 2 * K,) where a layer, as (-1, D), gets new k and v
    length: int = 0                         # cached positions to attend to
    fresh: bool = True                      # none is cached: the new tokens attend to one another alone
    sees_text: Visible = None               # what the new tokens see of the text
    image_rows: object = None               # that have an image: (N,); slice(None) for all, None for no row
    image_features: torch.Tensor | None = None                 # (N, S, D) projected, only with new images
    sees_image: Visible = field(default_factory=Visible)       # what the new tokens see of their row's image
    after_image: torch.Tensor | None = None                    # (N, T, 1) 0 for tokens before it, else 1
    qkv: list | None = None                 # joined weights, see `Llama.join_weights`


# ----------------------------------------------------------------------------------------------------------
# Text layers


def rope_frequencies(config):
    """Return the radians per position of each channel pair, (D / 2,) float32.

    The rule llama3 divides slow ones by `factor`, keeps fast ones, and blends in between (transformers,
    modeling_rope_utils.py).
    """
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = config.rope_theta ** -(channels / config.head_dim)
    if config.rope_scaling is None:
        return frequencies
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)     # in that context
    keep = ((turns - low) / (high - low)).clamp(0, 1)          # 1: fast, kept; 0: slow, divided by factor
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rotate(x, cos, sin):
    """Apply RoPE to x (B, T, H, D): x cos + rotate_half(x) sin. `Llama.rope` has negated the first half of
    `sin`, so that swapping the halves, a roll, is enough for rotate_half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Linear(nn.Module):
    """Multiply without a bias. Called directly: nn.Module's hooks take longer than a small matrix product."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def __call__(self, x):
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """Divide by the root of the mean square. Called directly, as `Linear`.

    Without gradients, a CPU computes float32 in half of the operations. Where `size` is a power of two this
    gives the bits of F.rms_norm, so that log-probs in a rollout equal those in training; else it differs by
    rounding.
    """

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.shape, self.eps = nn.Parameter(torch.ones(size)), (size,), eps
        self.eps_tensor = torch.tensor(eps, device="cpu")

    def __call__(self, x):
        if torch.is_grad_enabled() or not x.is_cpu or x.dtype != torch.float32:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        squares = torch.linalg.vecdot(x, x)[..., None]
        mean = torch.add(self.eps_tensor, squares, alpha=1 / self.shape[0])            # eps + the mean square
        return (x * mean.rsqrt_()).mul_(self.weight)


class Attention(nn.Module):
    """Attend to the text, with RoPE; or (`cross`) to an image, with normed queries and keys."""

    def __init__(self, config, index, cross):
        super().__init__()
        self.index, self.cross, self.head_dim = index, cross, config.head_dim      # index: place in the cache
        self.key_heads = config.num_key_value_heads
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(q_size, config.hidden_size)
        if cross:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def heads(self, x):
        return x.view(*x.shape[:2], -1, self.head_dim)

    def __call__(self, x, step):
        if self.cross:
            q, (k, v) = self.q_norm(self.heads(self.q_proj(x))), self.image_kv(step)        # q (B, T, H, D)
            return self.o_proj(attention(q, k, v, step.sees_image).flatten(2))
        if step.qkv is None:
            q, k, v = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
            q, k = rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin)
        else:
            qkv, K = self.heads(F.linear(x, step.qkv[self.index])), self.key_heads     # (B, T, H + 2 K, D)
            qk, v = rotate(qkv[:, :, :-K], step.cos, step.sin), qkv[:, :, -K:]
            q, k = qk[:, :, :-K], qk[:, :, -K:]
        k, v = self.text_kv(k, v, step)
        return self.o_proj(attention(q, k, v, step.sees_text).flatten(2))

    def text_kv(self, k, v, step):
        """Put new keys and values (B, T, K, D) into the cache. Return those to attend to, (B, K, length, D)
        each."""
        if step.cache is not None:
            cached = step.cache.kv[self.index]                 # (B, 2, K, capacity, D)
            new = torch.stack([k, v], 2).detach().view(-1, self.head_dim).to(cached.dtype)
            cached.view(-1, self.head_dim).index_copy_(0, step.write_at, new)
            if not step.fresh:
                return cached[:, :, :, :step.length].unbind(1)
        return k.transpose(1, 2), v.transpose(1, 2)

    def image_kv(self, step):
        """Project the images' keys and values and put those of real tiles into the cache, or read them there.
        Return them, (N, K, S, D) each."""
        if step.image_features is None:
            return step.cache.cross[self.index][step.image_rows].unbind(1)
        k = self.k_norm(self.heads(self.k_proj(step.image_features))).transpose(1, 2)
        v = self.heads(self.v_proj(step.image_features)).transpose(1, 2)
        if step.cache is not None:
            kept = step.cache.cross[self.index]                # (B, 2, K, S of real tiles, D)
            kept[step.image_rows] = torch.stack([k, v], 1)[:, :, :, :kept.shape[3]].detach().to(kept.dtype)
        return k, v


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x):
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
    """Attend to the image, through gates.

    Rows without one pass unchanged, and so do tokens before <|image|>, as in Meta's code, with which the
    weights were trained. (transformers lets these attend, and skips their MLP alone: its issue 39379.)
    """

    def __init__(self, config, index):
        super().__init__()
        self.cross_attn = Attention(config, index, cross=True)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, step):
        if step.image_rows is None:
            return x
        if isinstance(step.image_rows, slice):
            return self.add_image(x, step)
        return x.index_copy(0, step.image_rows, self.add_image(x[step.image_rows], step))

    def add_image(self, x, step):                              # x (N, T, D)
        after = 1 if step.after_image is None else step.after_image
        x = x + after * self.cross_attn_attn_gate.tanh() * self.cross_attn(self.input_layernorm(x), step)
        return x + after * self.cross_attn_mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(x))


# ----------------------------------------------------------------------------------------------------------
# Vision encoder


class VisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, size = config.attention_heads, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(size, size) for _ in range(4))

    def forward(self, x, visible):
        projected = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in projected)                    # (N, S, H, D)
        return self.o_proj(attention(q, k.transpose(1, 2), v.transpose(1, 2), visible).flatten(2))


class VisionLayer(nn.Module):
    def __init__(self, config, gated):
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.self_attn = VisionAttention(config)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(size, inner), "fc2": nn.Linear(inner, size)})
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
    """Add a gated vector per (aspect ratio, tile)."""

    def __init__(self, config):
        super().__init__()
        ratios = len(config.supported_aspect_ratios) + 1       # ids begin at 1
        self.embedding = nn.Embedding(ratios, config.max_num_tiles * config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, aspect_ratio_ids):                    # x (N, tiles, P, D)
        return x + self.gate.tanh() * self.embedding(aspect_ratio_ids).view(*x.shape[:2], 1, -1)


class PositionEmbedding(nn.Module):
    """Add a vector per patch of a tile and, gated against it, one per (aspect ratio, tile, patch)."""

    def __init__(self, config):
        super().__init__()
        ratios = len(config.supported_aspect_ratios) + 1
        self.embedding = nn.Parameter(torch.zeros(config.num_patches, config.hidden_size))
        self.tile_embedding = nn.Embedding(ratios, config.max_num_tiles * self.embedding.numel())
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, aspect_ratio_ids):                    # x (N, tiles, P, D)
        gate = self.gate.tanh()
        return x + (1 - gate) * self.embedding + gate * self.tile_embedding(aspect_ratio_ids).view(x.shape)


class VisionModel(nn.Module):
    """Turn image tiles into features of every patch: local layers, then gated global ones.

    The inputs of some local layers are kept, and come beside the last layer's output.
    """

    def __init__(self, config):
        super().__init__()
        self.config, size, patch = config, config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, size, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(size))
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.layernorm_pre, self.layernorm_post = nn.LayerNorm(size), nn.LayerNorm(size)
        layers = lambda n, gated: nn.ModuleDict(
            {"layers": nn.ModuleList(VisionLayer(config, gated) for _ in range(n))})
        self.transformer = layers(config.num_hidden_layers, False)
        self.global_transformer = layers(config.num_global_layers, True)

    def forward(self, images):
        """Encode Images -> (N, tiles * P, output_size): P patches per tile, the class token first."""
        N, tiles = images.aspect_ratio_mask.shape
        ids, P = images.aspect_ratio_ids, self.config.num_patches
        x = torch.cat(images.pixel_values).to(self.class_embedding)            # (N * tiles, 3, size, size)
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        x = self.pre_tile_positional_embedding(x.unflatten(0, (N, tiles)), ids)
        x = torch.cat([self.class_embedding.expand(N, tiles, 1, -1), x], 2)                 # (N, tiles, P, D)
        x = self.layernorm_pre(self.gated_positional_embedding(x, ids))
        x = F.pad(x, (0, 0, 0, -P % 8))
        visible = patches_seen(images.aspect_ratio_mask, P, x.shape[2])
        x, kept = x.flatten(1, 2), []                                                       # (N, S, D)
        for index, layer in enumerate([*self.transformer.layers, None]):
            if index in self.config.intermediate_layers_indices:
                kept.append(x)              # the input of layer i, as Meta does (transformers 5: its output)
            x = x if layer is None else layer(x, visible)
        x = self.layernorm_post(x).unflatten(1, (tiles, -1))
        x = self.post_tile_positional_embedding(x, ids).flatten(1, 2)
        for layer in self.global_transformer.layers:
            x = layer(x, visible)
        # the kept layers side by side, channel by channel
        features = torch.cat([x, torch.stack(kept, -1).flatten(-2)], -1)
        return features.unflatten(1, (tiles, -1))[:, :, :P].flatten(1, 2)


def patches_seen(tile_mask, patches, padded):
    """Say which patches see one another: (N, tiles), patches per tile without and with padding -> Visible.

    Padding sees real patches and is seen by them, but does not see padding: the weights were trained so.
    """
    real = tile_mask.bool()[:, :, None] & (torch.arange(padded, device=tile_mask.device) < patches)
    real = real.flatten(1)                                                                  # (N, S)
    return Visible(key_mask=real, see_all=real)


# ----------------------------------------------------------------------------------------------------------
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
        """Draw weights as transformers does: norms 1, biases and gates 0, but global vision layers' gates and
        all else normal(0, std)."""
        generator = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        for name, weight in self.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.fill_(1.0)
            elif name.endswith(("bias", "_gate", "embedding.gate")):
                weight.zero_()
            else:
                weight.normal_(0, std, generator=generator)

    def forward(self, input_ids, *, lengths=None, images=None, trees=None, cache=None, targets=None,
                temperature=1.0, logits=None, qkv=None, at=None):
        """Pass right-padded tokens through -> Output. All of it happens in here, so that FSDP's hooks see it.

        input_ids (B, T) int64; lengths (B,): real tokens per row, default T. images: llama.images.Images of
        the rows with an <|image|> token; the others have none (else ValueError). trees: where rows hold
        several conversations that begin alike, see llama/batches.py. cache: row b's tokens follow the
        cache.lengths[b] that it holds, and are added; an image comes with the first ones, and is kept.
        targets (B, T): the token after each input, -100 where not asked -> logprobs and entropy of
        softmax(logits / temperature). logits: "all", "last" (of each row's last real token) or None. qkv:
        what `join_weights` returned, with a cache only. at (B,): where one token per row goes in the cache,
        in place of cache.lengths, which stay. Then shapes are fixed and no value is read on the host.
        """
        x = self.embed_tokens(input_ids)
        step = self.locate_tokens(x, cache, lengths, trees, at)
        step.qkv = qkv
        if images is not None:
            self.encode_images(step, input_ids, images.to(x.device), x)
        elif cache is not None and cache.image_rows is not None:           # new tokens see what it remembers
            step.image_rows = cache.image_rows
            if cache.cross_mask is not None:
                step.sees_image = Visible(key_mask=cache.cross_mask[step.image_rows])
        for layer in self.layers:
            x = layer(x, step)
        output = Output(self.norm(x))
        if logits == "all":
            output.logits = self.lm_head(output.hidden)
        elif logits == "last" and lengths is None:
            output.logits = self.lm_head(output.hidden[:, -1])
        elif logits == "last":
            rows = torch.arange(len(x), device=x.device)
            output.logits = self.lm_head(output.hidden[rows, lengths.to(x.device) - 1])
        if targets is not None:
            hidden = output.hidden.flatten(0, 1)
            scores = token_logprobs(hidden, self.lm_head.weight, targets.flatten(), temperature)
            output.logprobs, output.entropy = (score.view_as(targets) for score in scores[:2])
        return output

    @property
    def vision_frozen(self):
        """Tell whether no weight of the vision encoder learns, so that its output for an image stays."""
        if self.config.vision is None:
            return False
        return not any(weight.requires_grad for weight in self.vision_model.parameters())

    def locate_tokens(self, x, cache, lengths, trees=None, at=None):
        """Begin a Step: positions of new tokens, their places in the cache (which grows), what they see."""
        B, T, _ = x.shape
        lengths_here = None if lengths is None else lengths.to(x.device)
        if cache is None:
            positions = torch.arange(T)[None]                  # (1 or B, T)
            if trees is not None:                              # a branch counts on from the end of its stem
                stems, begins = torch.tensor([[stem] for stem, _ in trees]), branch_starts(trees, T)[0]
                positions = positions - begins + begins.minimum(stems)
            sees = Visible(causal=True, lengths=lengths_here, trees=trees)
            return Step(*self.rope(T, x)[:, positions.to(x.device)], sees_text=sees)
        if at is None:
            begin, held = cache.lengths.to(x.device), cache.lengths.tolist()
        else:                                                  # the host does not know them: none, or all
            begin, held = at, [0, cache.kv[0].shape[3] - T]
        fresh, longest = max(held) == 0, max(held) + T
        cache.reserve(longest)
        K, capacity = cache.kv[0].shape[2:4]                   # (B, 2, K, capacity, D)
        positions = begin[:, None] + torch.arange(T, device=x.device)                       # (B, T)
        # where each row, k or v, and head begins in a layer's cache, seen as (-1, D)
        blocks = torch.arange(0, B * 2 * K * capacity, capacity, device=x.device).view(B, 1, 2, K)
        write_at = blocks + positions[:, :, None, None]        # (B, T, 2, K)
        if at is None:
            cache.lengths += T if lengths is None else lengths.cpu()
        sees = Visible(causal=True, lengths=lengths_here, starts=None if fresh else positions[:, 0])
        if T == 1 and min(held) == max(held):                  # each sees all keys, so there is no mask
            sees = Visible()
        return Step(*self.rope(longest, x)[:, positions], cache, write_at.flatten(), longest, fresh, sees)

    def join_weights(self):
        """Join the weights of q, k and v, for one product in place of three as long as they stay -> one
        ((H + 2 K) * D, inputs) per self-attention layer; None if an adapter is beside one of them."""
        attentions = [layer.self_attn for layer in self.layers if isinstance(layer, SelfLayer)]
        parts = [(attn.q_proj, attn.k_proj, attn.v_proj) for attn in attentions]
        if not all(isinstance(part, Linear) for part in sum(parts, ())):
            return None
        kind = product_type(self.embed_tokens.weight)
        return [torch.cat([part.weight for part in three]).to(kind) for three in parts]

    def rope(self, length, x):
        """Return cos and sin (2, at least `length` positions, 1, D) of x's kind; see `rotate`."""
        table = self.rope_table
        if table is None or table.shape[1] < length or table.device != x.device or table.dtype != x.dtype:
            with torch.inference_mode(False):                  # made in a rollout perhaps, used in training
                size = max(256, 2 ** (length - 1).bit_length())
                positions = torch.arange(size, dtype=torch.float32)
                angles = positions[:, None, None] * rope_frequencies(self.config)
                cos, sin = angles.cos(), angles.sin()
                table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
                self.rope_table = table = table.to(x.device, x.dtype)
        return table

    def encode_images(self, step, input_ids, images, x):
        """Encode images for cross-attention. Tokens from <|image|> on see the real tiles. x gives type and
        device."""
        if self.config.vision is None:
            raise ValueError("this model has no vision encoder, so it takes no images")
        if step.cache is not None and not step.fresh:
            raise ValueError("images must come with the first tokens of a conversation")
        here = input_ids == self.config.image_token_id                                      # (B, T)
        tokens, count = here.sum(1), torch.bincount(images.rows, minlength=len(here))
        if not torch.equal(tokens, count) or int(count.max()) > 1:
            raise ValueError("a conversation has one image and one <|image|> token, or none: "
                             f"found images {count.tolist()}, tokens {tokens.tolist()}")
        step.image_rows = slice(None) if len(images.rows) == len(here) else images.rows
        # (N, S, F); llama/frozen.py may hold them on the host
        features = self.vision_model(images).to(x.device)
        step.image_features = self.multi_modal_projector(features)             # (N, S, D)
        step.after_image = here[images.rows].cumsum(1)[:, :, None].to(x.dtype)              # (N, T, 1)
        real = images.aspect_ratio_mask.bool().repeat_interleave(self.config.vision.num_patches, 1)  # (N, S)
        if not real.all():
            step.sees_image = Visible(key_mask=real)           # an image has a real tile, so no row is empty
        if step.cache is not None:
            step.cache.reserve_images(len(self.config.cross_attention_layers), images.rows, real)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=None):
        """Load a Hugging Face folder; dtype None keeps the file's. Errors: see `load_weights`."""
        with torch.device("meta"):
            model = cls(Config.from_pretrained(folder))
        load_weights(model, folder, device, dtype)
        return model

    save_pretrained = save_model
