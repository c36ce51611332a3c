"""The causal decoder that language models of today are settings of, over embeddings.

LLaMA (arXiv 2302.13971, 2307.09288, 2407.21783) and what grew out of it: pre-norm layers of rotary attention with
grouped queries and a gated feed-forward. A family (`llama.py`) says what its public `config.json` means in these
settings.

It takes embeddings rather than tokens, because images and dream queries are spliced in between, and gives hidden states
rather than logits, because the loss computes those in pieces.

Legend: B rows, T tokens of this call, S keys, E width, H query heads, K key heads, D head dimension, V vocabulary,
N layers.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dreamllm_jax.data.positions import AXES
from dreamllm_jax.layers.attention import attend, attend_after
from dreamllm_jax.layers.flops import Tally, dense
from dreamllm_jax.layers.linear import Embedding
from dreamllm_jax.layers.lora import LoraConfig, chosen
from dreamllm_jax.layers.norms import rms_norm
from dreamllm_jax.layers.product import Linear
from dreamllm_jax.layers.remat import keep, rematerialised
from dreamllm_jax.layers.rope import RopeScaling, apply_rope, rope_frequencies
from dreamllm_jax.layers.weights import LAYERS, normal, weight
from dreamllm_jax.parallel.mesh import constrain
from dreamllm_jax.towers.language_models import decoder_flops
from dreamllm_jax.towers.language_models.cache import KVCache

Array = jax.Array


ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What a layer of a pattern has of its own.

    Attributes:
      window: tokens that a token sees, itself and those before it; 0 for all.
      rope_theta: the base of its rotations; None for the model's.
    """

    window: int = 0
    rope_theta: float | None = None

    def __post_init__(self):
        if self.window < 0:
            raise ValueError(f"window must not be negative, got {self.window}")
        if self.rope_theta is not None and not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be positive, got {self.rope_theta}")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of the model; names and defaults as in transformers' `LlamaConfig`, where it has them.

    Attributes:
      num_key_value_heads: None for as many as query heads.
      head_dim: None for hidden_size / num_attention_heads.
      attention_bias: of the projections to queries, keys and values.
      attention_out_bias: of the projection from the heads; None for as those.
      qk_norm: normalise each head's queries and keys before they are rotated (Qwen3).
      norm_unit_offset: norms multiply by 1 + scale (Gemma).
      embedding_scale: what embeddings are multiplied by (Gemma: the root of the width).
      mrope_section: how many of a head's pairs are turned by each of the three axes that positions then have (time,
        row, column; M-RoPE, arXiv 2409.12191); empty for positions of one axis.
      pattern: the kinds of the layers, repeated until there are `num_hidden_layers`.
      lora: low-rank adapters of the layers' products, None for none.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_unit_offset: bool = False
    embedding_scale: float = 1.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    mrope_section: tuple[int, ...] = ()
    pattern: tuple[LayerKind, ...] = (LayerKind(),)
    lora: LoraConfig | None = None

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:  # nor NaN
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported: choose from {', '.join(ACTIVATIONS)}")
        if not self.pattern or self.num_hidden_layers % len(self.pattern):
            raise ValueError(
                f"pattern has {len(self.pattern)} kinds of layers, of which num_hidden_layers={self.num_hidden_layers} "
                "is no multiple"
            )
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range must not be negative, got {self.initializer_range}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: set head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2 or self.head_dim < 2:
            raise ValueError(f"head_dim {self.head_dim} is odd or not positive: rotary embedding turns pairs")
        section = self.mrope_section
        if section and (len(section) != AXES or min(section) < 0 or sum(section) != self.head_dim // 2):
            raise ValueError(
                f"mrope_section must be {AXES} numbers that add up to half of head_dim {self.head_dim}, got {section}"
            )

    @property
    def width(self) -> int:
        """Of embeddings and hidden states (E)."""
        return self.hidden_size

    @property
    def position_axes(self) -> int:
        """Of a token's position: 1, or 3 (`data.positions`)."""
        return AXES if self.mrope_section else 1

    @property
    def divided(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """Mesh axes, and the setting that they must divide: arrays would silently be repeated."""
        return (
            (("tensor",), "num_attention_heads"),
            (("tensor",), "intermediate_size"),
            (("fsdp", "sequence"), "hidden_size"),
        )

    def make(self, dtype: Any, remat: str = "full") -> "Decoder":
        """The module; see there."""
        return Decoder(self, dtype=dtype, remat=remat)

    def cache(self, rows: int, length: int, dtype: Any = jnp.float32) -> "KVCache":
        """An empty cache for so many rows of at most `length` tokens; what exceeds it would be dropped."""
        return KVCache.create(self.num_hidden_layers, self.num_key_value_heads, self.head_dim, rows, length, dtype)

    @property
    def max_length(self) -> int:
        """Tokens of the longest document that it can read: what it was made for, stretched as `rope_scaling` says.

        "linear" and "dynamic" scaling stretch `max_position_embeddings`; with "llama3" that is the stretched length.
        """
        if self.rope_scaling is None:
            return self.max_position_embeddings
        return self.rope_scaling.stretched(self.max_position_embeddings)

    def rope_frequencies(self, length: int | Array, theta: float | None = None) -> np.ndarray | Array:
        """Radians per position in rows of this length, see `rope.rope_frequencies`."""
        theta = self.rope_theta if theta is None else theta
        return rope_frequencies(self.head_dim, theta, self.rope_scaling, length, self.max_position_embeddings)

    def flops(self, tally: Tally, rows: int, length: int, remat: str, reached: bool) -> None:
        """Adds the layers for so many rows; `reached` says whether a gradient comes from above."""
        decoder_flops.count(self, tally, rows, length, remat, reached)

    def head_flops(self, tally: Tally, tokens: int) -> None:
        """Adds the product with the vocabulary."""
        path = "embed_tokens/embedding" if self.tie_word_embeddings else "lm_head/kernel"
        tally.product(path, dense(tokens, self.hidden_size, self.vocab_size))


@struct.dataclass
class _Context:
    """What the layers share: segments, and what the rows have read before.

    `rotations` has cosines and sines f32[B, T, D / 2], one for each kind of layer.
    """

    rotations: tuple[tuple[Array, Array], ...]
    segment_ids: Array
    cache: KVCache | None = None


class RMSNorm(nn.Module):
    """`rms_norm` and its scale."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        init = weight(nn.initializers.zeros if config.norm_unit_offset else nn.initializers.ones, "norm")
        scale = self.param("scale", init, (x.shape[-1],))
        return rms_norm(x, scale, config.rms_norm_eps, config.norm_unit_offset)


class LayerNorm(RMSNorm):
    """The norm before a part of a layer."""

    def __call__(self, x: Array) -> Array:
        # Fused into the products that follow, the norm would be computed for each, and its gradient slow them down.
        return jax.lax.optimization_barrier(super().__call__(x))


class _Part(nn.Module):
    """What the layers' parts share: configuration, types, and the linear layer."""

    config: DecoderConfig
    dtype: Any

    def linear(
        self, inputs: tuple[int, ...], features: tuple[int, ...], name: str, axes: tuple[str, str], bias: bool
    ) -> Linear:
        std, adapters = self.config.initializer_range, chosen(self.config.lora, name)
        return Linear(inputs, features, bias, axes, std, self.dtype, adapters, name=name)


class Attention(_Part):
    """Rotary self-attention with grouped queries; with a cache it gives its keys and values f[B, T, K, D] too.

    Attributes:
      kind: its place in the pattern.
    """

    kind: int

    @nn.compact
    def __call__(self, x: Array, layer: Array, context: _Context) -> tuple[Array, tuple[Array, Array] | None]:
        config, window = self.config, self.config.pattern[self.kind].window
        width, bias = (config.hidden_size,), config.attention_bias
        cos, sin = context.rotations[self.kind]
        q_heads = config.num_attention_heads, config.head_dim
        kv_heads = config.num_key_value_heads, config.head_dim
        q = self.linear(width, q_heads, "q_proj", ("embed", "heads"), bias)(x)
        k = self.linear(width, kv_heads, "k_proj", ("embed", "kv_heads"), bias)(x)
        v = self.linear(width, kv_heads, "v_proj", ("embed", "kv_heads"), bias)(x)
        if config.qk_norm:
            q, k = RMSNorm(config, name="q_norm")(q), RMSNorm(config, name="k_norm")(k)
        q, k = jax.lax.optimization_barrier((q, k))  # so that the products write the layout that attention reads
        q = constrain(q, ("rows", "tokens", "act_heads", None))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        segments, cache = context.segment_ids, context.cache
        if cache is None:
            q, k, v = (keep(x, "attention") for x in (q, k, v))
            out, new = attend(q, k, v, q_segments=segments, k_segments=segments, causal=True, window=window), None
        else:
            before, new = (*cache.layer(layer, q.dtype), cache.segment_ids), (k, v)
            out = attend_after(q, k, v, segments, *before, index=cache.index(x.shape[1]), window=window)
        out = constrain(out, ("rows", "tokens", "act_heads", None))
        out_bias = bias if config.attention_out_bias is None else config.attention_out_bias
        return self.linear(q_heads, width, "o_proj", ("heads", "embed"), out_bias)(out), new


class MLP(_Part):
    """A gated linear unit (arXiv 2002.05202)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        width, inner_width = (config.hidden_size,), (config.intermediate_size,)
        gate = self.linear(width, inner_width, "gate_proj", ("embed", "mlp"), config.mlp_bias)(x)
        up = self.linear(width, inner_width, "up_proj", ("embed", "mlp"), config.mlp_bias)(x)
        gate, up = keep(gate, "gate"), keep(up, "up")
        up = jax.lax.optimization_barrier(up)  # fused into the products, what follows would slow them down
        inner = jax.lax.optimization_barrier(ACTIVATIONS[config.hidden_act](gate) * up)
        inner = constrain(inner, ("rows", "tokens", "act_mlp"))
        return self.linear(inner_width, width, "down_proj", ("mlp", "embed"), config.mlp_bias)(inner)


class Block(_Part):
    """One layer, as the body of a scan over hidden states f[B, T, E]; gives what `Attention` does for the cache."""

    kind: int = 0

    @nn.compact
    def __call__(self, x: Array, layer: Array, context: _Context) -> tuple[Array, tuple[Array, Array] | None]:
        config, residual = self.config, ("rows", "tokens", "act_embed")
        normed = LayerNorm(config, name="input_layernorm")(x)
        attended, new = Attention(config, self.dtype, self.kind, name="self_attn")(normed, layer, context)
        x = keep(constrain(x + attended, residual), "attention")
        normed = LayerNorm(config, name="post_attention_layernorm")(x)
        return constrain(x + MLP(config, self.dtype, name="mlp")(normed), residual), new


class Pattern(_Part):
    """The layers of one repeat of the pattern, as the body of a scan; each can be computed again by itself."""

    remat: str

    @nn.compact
    def __call__(self, x: Array, first: Array, context: _Context) -> tuple[Array, tuple[Array, Array] | None]:
        kinds, new = len(self.config.pattern), []
        for kind in range(kinds):
            block = rematerialised(Block, self.remat)
            name = f"{kind}_of_{kinds}"  # from which `interop.names` knows the layer
            x, one = block(self.config, self.dtype, kind, name=name)(x, first + kind, context)
            new.append(one)
        return x, None if context.cache is None else jax.tree.map(lambda *x: jnp.stack(x), *new)


class Head(nn.Module):
    """The output matrix, held apart from its product so that the loss can take it in pieces."""

    config: DecoderConfig

    def setup(self):
        shape = (self.config.hidden_size, self.config.vocab_size)
        self.kernel = self.param("kernel", weight(normal(self.config.initializer_range), "embed", "vocab"), shape)


class Decoder(nn.Module):
    """The decoder; parameters are named as in transformers' `LlamaForCausalLM`, layers stacked: those of one kind.

    Attributes:
      config: the model's shape.
      dtype: type of the computation; norms' statistics, rotations and softmax are float32 in any case.
      remat: what a layer keeps for the backward pass (see `remat`).
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "full"

    def setup(self):
        config = self.config
        init = weight(normal(config.initializer_range), "vocab", "embed")
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, init, self.dtype)
        alike = len(config.pattern) == 1
        stack = nn.scan(
            rematerialised(Block, self.remat) if alike else Pattern,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.num_hidden_layers // len(config.pattern),
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )
        self.layers = stack(config, self.dtype, *(() if alike else (self.remat,)))
        self.norm = LayerNorm(config)
        if not config.tie_word_embeddings:
            self.lm_head = Head(config)

    def embed(self, tokens: Array) -> Array:
        """i32[B, T] token ids -> f[B, T, E] embeddings."""
        x = self.embed_tokens(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return constrain(x, ("rows", "tokens", "act_embed"))

    def __call__(
        self, embeddings: Array, positions: Array, segment_ids: Array, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        """Runs the decoder.

        With a cache, each row's tokens continue what that row has read: they are written at its own next entries and
        see the entries of their segment up to themselves. A row's tokens stand first and its padding (segment 0)
        after them, so what a row gives does not depend on the rows beside it.

        Args:
          embeddings: f[B, T, E].
          positions: i32[B, T] position of each token in its document, for the rotary embedding, or i32[B, T, 3] on the
            axes of `mrope_section`.
          segment_ids: i32[B, T] document of each token, 0 for padding.
          cache: what the rows have read before.

        Returns:
          f[B, T, E] hidden states after the final norm (meaningless on padding), and the cache with this call's tokens.
        """
        config = self.config
        length = embeddings.shape[1]
        if cache is not None:
            length = (cache.length + jnp.sum(segment_ids != 0, axis=1))[:, None]
        if positions.ndim == 3:  # each frequency by its own axis
            positions = positions[..., np.repeat(np.arange(AXES), config.mrope_section)]
        else:
            positions = positions[..., None]
        turns = {}  # by base, for kinds of layers may share it
        for theta in dict.fromkeys(kind.rope_theta for kind in config.pattern):
            angles = positions.astype(jnp.float32) * config.rope_frequencies(length, theta)
            turns[theta] = jnp.cos(angles), jnp.sin(angles)
        context = _Context(tuple(turns[kind.rope_theta] for kind in config.pattern), segment_ids, cache)
        first = jnp.arange(0, config.num_hidden_layers, len(config.pattern))
        hidden, new = self.layers(embeddings.astype(self.dtype), first, context)
        if cache is not None:
            k, v = (x.reshape(-1, *x.shape[-4:]) for x in new)  # those of a pattern's kinds one after the other
            cache = cache.extended(k, v, segment_ids)
        return self.norm(hidden), cache

    def head_kernel(self) -> Array:
        """f[E, V] output matrix: of its own, or the embedding transposed."""
        return self.embed_tokens.embedding.T if self.config.tie_word_embeddings else self.lm_head.kernel

    def logits(self, hidden: Array) -> Array:
        """f[B, T, E] hidden states -> f32[B, T, V]."""
        kernel = self.head_kernel().astype(self.dtype)
        return jnp.einsum("bte,ev->btv", hidden.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
