"""LLaMA (arXiv 2302.13971, 2307.09288, 2407.21783): the causal language model, over embeddings.

It takes embeddings rather than tokens, because images and dream queries are spliced in between, and gives hidden states
rather than logits, because the loss computes those in pieces.

Legend: B rows, T tokens of this call, S keys, E width, H query heads, K key heads, D head dimension, V vocabulary,
N layers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dreamllm_jax.layers.attention import attend
from dreamllm_jax.layers.linear import Embedding, spread
from dreamllm_jax.layers.lora import LORA_A, LORA_B, LoraConfig, adapt, initial_a
from dreamllm_jax.layers.remat import keep, rematerialised
from dreamllm_jax.layers.rope import RopeScaling, apply_rope, rope_frequencies
from dreamllm_jax.layers.weights import LAYERS, normal, weight
from dreamllm_jax.parallel.collectives import gather_weight
from dreamllm_jax.parallel.mesh import constrain

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of the model; names and defaults as in transformers' `LlamaConfig`.

    `lora` gives the layers' products low-rank adapters, None none.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
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

    @property
    def max_length(self) -> int:
        """Tokens of the longest document that it can read: what it was made for, stretched as `rope_scaling` says.

        "linear" and "dynamic" scaling stretch `max_position_embeddings`; with "llama3" that is the stretched length.
        """
        if self.rope_scaling is None:
            return self.max_position_embeddings
        return self.rope_scaling.stretched(self.max_position_embeddings)

    def rope_frequencies(self, length: int | Array) -> np.ndarray | Array:
        """Radians per position in rows of this length, see `rope.rope_frequencies`."""
        return rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling, length, self.max_position_embeddings)


# Settings of a config.json that would change the function computed here: name -> the one value that is supported.
_SUPPORTED = {"hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False}
_MODEL_TYPES = ("llama", "dreamllm", "mistral")


def llama_config_from_hf(config: Mapping[str, Any]) -> LlamaConfig:
    """Reads a Hugging Face config.json, of transformers 5 (`rope_parameters`) or before (`rope_theta`, `rope_scaling`).

    Raises:
      ValueError: naming a setting that is not supported.
    """
    if config.get("model_type", "llama") not in _MODEL_TYPES:
        raise ValueError(f"model_type {config['model_type']!r} is not supported: expected one of {_MODEL_TYPES}")
    for name, value in _SUPPORTED.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(f"{name} = {config[name]!r} is not supported: only {value!r} is")
    window = config.get("sliding_window")
    if window is not None and window < config.get("max_position_embeddings", LlamaConfig.max_position_embeddings):
        raise ValueError(f"sliding_window = {window} is not supported, as it is less than max_position_embeddings")
    before, now = (config.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    if before and now and before.get("rope_type", before.get("type")) != now.get("rope_type"):
        raise ValueError(f"rope_scaling {before} and rope_parameters {now} are of different types: leave one out")
    rope = {**before, **now}
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (1.0, None):
        raise ValueError("partial_rotary_factor is not supported: the whole head is rotated")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if rope_type != "default":
        names = [field.name for field in dataclasses.fields(RopeScaling)[1:]]
        scaling = RopeScaling(rope_type, **{"factor": None, **{name: rope[name] for name in names if name in rope}})
    names = {field.name for field in dataclasses.fields(LlamaConfig)} - {"rope_scaling", "rope_theta", "lora"}
    values = {name: config[name] for name in names if config.get(name) is not None}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    return LlamaConfig(rope_theta=LlamaConfig.rope_theta if theta is None else theta, rope_scaling=scaling, **values)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root mean square normalisation (arXiv 1910.07467), its statistics in float32.

    Args:
      x: f[..., E].
      scale: f[E].
      eps: added to the mean square.

    Returns:
      f[..., E] in the type of `x`.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * spread(scale, x.shape, x.dtype)


@struct.dataclass
class KVCache:
    """Keys and values of what each row has read; rows fill at their own pace, without gaps.

    Attributes:
      k: f[N, B, S, K, D] rotated keys.
      v: f[N, B, S, K, D] values.
      segment_ids: i32[B, S] segment of each entry, 0 where empty.
      length: i32[B] filled entries of each row.
    """

    k: Array
    v: Array
    segment_ids: Array
    length: Array

    @classmethod
    def create(cls, config: LlamaConfig, batch: int, length: int, dtype: Any = jnp.float32) -> "KVCache":
        """An empty cache for `batch` rows of at most `length` tokens; what exceeds it would be dropped."""
        shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
        axes = ("layers", "rows", None, "kv_heads", None)
        return cls(
            k=constrain(jnp.zeros(shape, dtype), axes),
            v=constrain(jnp.zeros(shape, dtype), axes),
            segment_ids=jnp.zeros((batch, length), jnp.int32),
            length=jnp.zeros((batch,), jnp.int32),
        )


@struct.dataclass
class _Context:
    """What every layer shares: rotations f32[B, T, D / 2], segments, and where this call's tokens go in the cache."""

    cos: Array
    sin: Array
    segment_ids: Array
    k_segment_ids: Array | None = None
    q_index: Array | None = None
    slots: Array | None = None


class RMSNorm(nn.Module):
    """`rms_norm` and its scale."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = weight(nn.initializers.ones, "norm")
        normed = rms_norm(x, self.param("scale", init, (x.shape[-1],)), self.eps)
        # Fused into the products that follow, the norm would be computed for each, and its gradient slow them down.
        return jax.lax.optimization_barrier(normed)


class Linear(nn.Module):
    """A product with a kernel that is stored as a matrix and gathered where it is used.

    Inputs and outputs may have several axes, heads and their dimension: on TPU, reshaping the kernel instead of them
    spares copies of activations.
    """

    inputs: tuple[int, ...]
    features: tuple[int, ...]
    use_bias: bool
    axes: tuple[str, str]
    std: float
    dtype: Any
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = math.prod(self.inputs), math.prod(self.features)
        kernel = self.param("kernel", weight(normal(self.std), *self.axes), shape)
        kernel = kernel.astype(self.dtype)
        if x.size >= kernel.size:  # of a few tokens, as while generating, the products travel instead
            kernel = gather_weight(kernel, self.axes)
        kernel = kernel.reshape(*self.inputs, *self.features)
        out = jnp.tensordot(x, kernel, axes=len(self.inputs))
        if self.use_bias:
            zeros = weight(nn.initializers.zeros, self.axes[1])
            bias = self.param("bias", zeros, shape[1:])
            out = out + spread(bias.reshape(self.features), out.shape, self.dtype)
        if self.lora is not None:
            a, b = self._adapter(*shape)
            out = out + adapt(x, a, b, self.lora.scale, axes=len(self.inputs))
        return out

    def _adapter(self, width_in: int, width_out: int) -> tuple[Array, Array]:
        rank, (axis_in, axis_out) = self.lora.rank, self.axes
        first = weight(initial_a, axis_in, "lora")
        zeros = weight(nn.initializers.zeros, "lora", axis_out)
        a = self.param(LORA_A, first, (width_in, rank)).astype(self.dtype)
        b = self.param(LORA_B, zeros, (rank, width_out)).astype(self.dtype)
        a, b = gather_weight(a, (axis_in, "lora")), gather_weight(b, ("lora", axis_out))
        return a.reshape(*self.inputs, rank), b.reshape(rank, *self.features)


class _Part(nn.Module):
    """What the layers' parts share: configuration, types, and the linear layer."""

    config: LlamaConfig
    dtype: Any

    def linear(
        self, inputs: tuple[int, ...], features: tuple[int, ...], name: str, axes: tuple[str, str], bias: bool
    ) -> Linear:
        std, adapters = self.config.initializer_range, self.config.lora
        adapters = adapters if adapters is not None and name in adapters.targets else None
        return Linear(inputs, features, bias, axes, std, self.dtype, adapters, name=name)


class Attention(_Part):
    """Rotary self-attention with grouped queries; the cache is the whole stack's, of which it fills layer `layer`."""

    @nn.compact
    def __call__(self, x: Array, cache: tuple[Array, Array] | None, layer: Array, context: _Context):
        config = self.config
        width, bias = (config.hidden_size,), config.attention_bias
        q_heads = config.num_attention_heads, config.head_dim
        kv_heads = config.num_key_value_heads, config.head_dim
        q = self.linear(width, q_heads, "q_proj", ("embed", "heads"), bias)(x)
        k = self.linear(width, kv_heads, "k_proj", ("embed", "kv_heads"), bias)(x)
        v = self.linear(width, kv_heads, "v_proj", ("embed", "kv_heads"), bias)(x)
        q, k = jax.lax.optimization_barrier((q, k))  # so that the products write the layout that attention reads
        q = constrain(q, ("rows", "tokens", "act_heads", None))
        q, k = apply_rope(q, context.cos, context.sin), apply_rope(k, context.cos, context.sin)
        if cache is None:
            q, k, v = (keep(x, "attention") for x in (q, k, v))
            out = attend(q, k, v, q_segments=context.segment_ids, k_segments=context.segment_ids, causal=True)
        else:
            rows = jnp.arange(x.shape[0])[:, None]
            cache = tuple(
                stack.at[layer, rows, context.slots].set(new.astype(stack.dtype), mode="drop")
                for stack, new in zip(cache, (k, v), strict=True)
            )
            out = attend(
                q,
                *(stack[layer].astype(q.dtype) for stack in cache),
                q_segments=context.segment_ids,
                k_segments=context.k_segment_ids,
                q_index=context.q_index,
                causal=True,
            )
        out = constrain(out, ("rows", "tokens", "act_heads", None))
        return self.linear(q_heads, width, "o_proj", ("heads", "embed"), bias)(out), cache


class MLP(_Part):
    """SwiGLU (arXiv 2002.05202)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        width, inner_width = (config.hidden_size,), (config.intermediate_size,)
        gate = self.linear(width, inner_width, "gate_proj", ("embed", "mlp"), config.mlp_bias)(x)
        up = self.linear(width, inner_width, "up_proj", ("embed", "mlp"), config.mlp_bias)(x)
        gate, up = keep(gate, "gate"), keep(up, "up")
        up = jax.lax.optimization_barrier(up)  # fused into the products, what follows would slow them down
        inner = jax.lax.optimization_barrier(nn.silu(gate) * up)
        inner = constrain(inner, ("rows", "tokens", "act_mlp"))
        return self.linear(inner_width, width, "down_proj", ("mlp", "embed"), config.mlp_bias)(inner)


class Block(_Part):
    """One layer, as the body of a scan: the carry is (hidden f[B, T, E], the cache's k and v or None)."""

    @nn.compact
    def __call__(self, carry, layer: Array, context: _Context):
        (x, cache), config = carry, self.config
        residual = ("rows", "tokens", "act_embed")
        normed = RMSNorm(config.rms_norm_eps, name="input_layernorm")(x)
        attended, cache = Attention(config, self.dtype, name="self_attn")(normed, cache, layer, context)
        x = keep(constrain(x + attended, residual), "attention")
        normed = RMSNorm(config.rms_norm_eps, name="post_attention_layernorm")(x)
        x = constrain(x + MLP(config, self.dtype, name="mlp")(normed), residual)
        return (x, cache), None


class Head(nn.Module):
    """The output matrix, held apart from its product so that the loss can take it in pieces."""

    config: LlamaConfig

    def setup(self):
        shape = (self.config.hidden_size, self.config.vocab_size)
        self.kernel = self.param("kernel", weight(normal(self.config.initializer_range), "embed", "vocab"), shape)


class Llama(nn.Module):
    """The decoder; parameters are named as in transformers' `LlamaForCausalLM`, layers stacked.

    Attributes:
      config: the model's shape.
      dtype: type of the computation; norms' statistics, rotations and softmax are float32 in any case.
      remat: what a layer keeps for the backward pass (see `remat`).
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: str = "full"

    def setup(self):
        config = self.config
        init = weight(normal(config.initializer_range), "vocab", "embed")
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, init, self.dtype)
        self.layers = nn.scan(
            rematerialised(Block, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )(config, self.dtype)
        self.norm = RMSNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Head(config)

    def embed(self, tokens: Array) -> Array:
        """i32[B, T] token ids -> f[B, T, E] embeddings."""
        return constrain(self.embed_tokens(tokens), ("rows", "tokens", "act_embed"))

    def __call__(
        self, embeddings: Array, positions: Array, segment_ids: Array, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        """Runs the decoder.

        With a cache, each row's tokens continue what that row has read: they are written at its own next entries and
        see the entries of their segment up to themselves. A row's tokens stand first and its padding (segment 0)
        after them, so what a row gives does not depend on the rows beside it.

        Args:
          embeddings: f[B, T, E].
          positions: i32[B, T] position of each token in its document, for the rotary embedding.
          segment_ids: i32[B, T] document of each token, 0 for padding.
          cache: what the rows have read before.

        Returns:
          f[B, T, E] hidden states after the final norm (meaningless on padding), and the cache with this call's tokens.
        """
        config = self.config
        length = embeddings.shape[1]
        if cache is not None:
            valid = segment_ids != 0
            filled = cache.length + valid.sum(axis=1, dtype=jnp.int32)
            length = filled[:, None]
        angles = positions[..., None].astype(jnp.float32) * config.rope_frequencies(length)
        context = _Context(jnp.cos(angles), jnp.sin(angles), segment_ids)
        if cache is not None:
            index = cache.length[:, None] + jnp.arange(segment_ids.shape[1])
            slots = jnp.where(valid, index, cache.segment_ids.shape[1])  # past the end: padding is dropped, not written
            rows = jnp.arange(segment_ids.shape[0])[:, None]
            k_segment_ids = cache.segment_ids.at[rows, slots].set(segment_ids, mode="drop")
            context = context.replace(k_segment_ids=k_segment_ids, q_index=index, slots=slots)
        carry = (embeddings.astype(self.dtype), None if cache is None else (cache.k, cache.v))
        (hidden, stacks), _ = self.layers(carry, jnp.arange(config.num_hidden_layers), context)
        if cache is not None:
            k, v = stacks
            cache = KVCache(k=k, v=v, segment_ids=k_segment_ids, length=filled)
        return self.norm(hidden), cache

    def head_kernel(self) -> Array:
        """f[E, V] output matrix: of its own, or the embedding transposed."""
        return self.embed_tokens.embedding.T if self.config.tie_word_embeddings else self.lm_head.kernel

    def logits(self, hidden: Array) -> Array:
        """f[B, T, E] hidden states -> f32[B, T, V]."""
        kernel = self.head_kernel().astype(self.dtype)
        return jnp.einsum("bte,ev->btv", hidden.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
