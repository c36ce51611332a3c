"""Products that a tower's TPU kernels read as they are: heads with zeros after each, channels side by side in memory.

A kernel takes heads of whole or half registers; of other widths, such as 72 or 112, the weights are given the zeros, so
that activations are made with them. Parameters are stored without.

Legend: N images, T queries, S keys, H heads, D their width, E channels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from dreamllm_jax.layers import full_attention_tpu
from dreamllm_jax.layers.attention import attend
from dreamllm_jax.layers.linear import spread
from dreamllm_jax.layers.lora import LORA_A, LORA_B, LoraConfig, adapt, initial_a
from dreamllm_jax.layers.norms import rms_norm
from dreamllm_jax.layers.weights import weight
from dreamllm_jax.parallel.collectives import on_shards
from dreamllm_jax.parallel.mesh import platform

_KERNEL = nn.initializers.lecun_normal()
_ONES = weight(nn.initializers.ones, "tower_norm")
_ZEROS = weight(nn.initializers.zeros, "tower_norm")


class Spacing(NamedTuple):
    """So many heads of so many channels, each with zeros after them up to a width that a kernel takes."""

    count: int
    channels: int
    width: int


def spaced(x: jax.Array, axis: int, heads: Spacing | None) -> jax.Array:
    """Zeros after the channels of every head, along an axis of a weight."""
    if heads is None:
        return x
    x = jnp.moveaxis(x, axis, -1)
    split = x.reshape(*x.shape[:-1], heads.count, -1)
    split = jnp.pad(split, [(0, 0)] * (x.ndim) + [(0, heads.width - split.shape[-1])])
    # Behind a barrier, for a product of heads would be copied where one of plain channels is not.
    return jax.lax.optimization_barrier(jnp.moveaxis(split.reshape(*x.shape[:-1], -1), -1, axis))


def cross_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, heads: int) -> jax.Array:
    """Softmax attention to a caption. One of which no token counts is seen whole, as adding -10000 to all has it.

    Args:
      q: f[N,T,H*D].
      k, v: f[N,S,H*D].
      mask: bool[N,S], None for all.

    Returns:
      f[N,T,H*D] in the type of `q`.
    """
    segments = {}
    if mask is not None:
        seen = mask | ~mask.any(axis=-1, keepdims=True)
        segments = {"q_segments": jnp.ones(q.shape[:2], jnp.int32), "k_segments": seen.astype(jnp.int32)}
    split = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    return attend(*split, causal=False, **segments).reshape(q.shape)


def spaced_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, heads: Spacing, interpret: bool = False
) -> jax.Array:
    """The same by `full_attention`, of heads with zeros after each. A mask takes 10000 from the scores, as diffusers
    does: it is a further channel of queries and keys, or, of heads that have no room for one, the kernel's own."""
    scale = heads.channels**-0.5
    if heads.channels == heads.width:
        return full_attention_tpu.full_attention(q, k, v, heads.count, interpret, scale, mask)
    if mask is not None:
        lane = jnp.zeros((heads.count, heads.width), q.dtype).at[:, heads.channels].set(1).reshape(-1)
        away = jnp.where(mask, 0, -1e4 / scale).astype(k.dtype)
        q, k = q + lane, k + away[..., None] * lane
    return full_attention_tpu.full_attention(q, k, v, heads.count, interpret, scale)


def find_spacing(
    heads: tuple[int, int], queries: tuple[int, int], keys: int, dtype: Any, masked: bool = False
) -> Spacing | None:
    """How so many heads of so many channels of the attention of [N, T] queries to so many keys are spaced for its
    kernel; None if it does not take them, or there is no room for a mask."""
    count, dim = heads
    width = next((width for width in (64, 128) if width >= dim), None)
    if dtype != jnp.bfloat16 or width is None or (masked and dim == 128):
        return None
    q, k = (jax.ShapeDtypeStruct((queries[0], n, count * width), dtype) for n in (queries[1], keys))
    return Spacing(count, dim, width) if full_attention_tpu.supported(q, k, count) else None


def self_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Every token that is there sees all that are there; what is not there gives zeros.

    Args:
      q: f[N,T,H,D].
      k, v: f[N,T,K,D]; K divides H, and head h reads key head h // (H / K).
      mask: bool[N,T] of what is there, None for all.

    Returns:
      f[N,T,H,D] in the type of `q`.
    """
    (images, tokens, heads, dim), masked = q.shape, mask is not None
    spacing = find_spacing((heads, dim), (images, tokens), tokens, q.dtype, masked) if platform() == "tpu" else None
    if spacing is None:
        segments = mask.astype(jnp.int32) if masked else None
        return attend(q, k, v, q_segments=segments, k_segments=segments, causal=False)

    def flat(x: jax.Array) -> jax.Array:
        shape = (*x.shape[:3], heads // x.shape[2], dim)
        x = spread(x[:, :, :, None], shape, x.dtype).reshape(q.shape)
        return jnp.pad(x, [(0, 0)] * 3 + [(0, spacing.width - dim)]).reshape(images, tokens, -1)

    out = spaced_attention(flat(q), flat(k), flat(v), mask, spacing).reshape(images, tokens, heads, -1)[..., :dim]
    return jnp.where(mask[..., None, None], out, 0) if masked else out


def channels_together(x: jax.Array) -> jax.Array:
    """Lays the channels side by side in memory, as the kernels read them, and those of the gradient too. XLA would
    rather have positions there, of which there are multiples of a register's lanes, and copy at every kernel."""
    if platform() != "tpu":
        return x
    together = functools.partial(with_layout_constraint, layouts=Layout(tuple(range(x.ndim))))
    return on_shards(together, [("images", None, None)], x)  # by itself the partitioner would gather it


class Product(nn.Module):
    """A linear layer, perhaps adapted.

    Attributes:
      convolution: the kernel is stored as that of a 1x1 convolution.
      parts: the outputs come in so many equal parts: made apart, neither they nor their gradients are copied.
      bias_apart: the bias is not added, but given after the parts.
      before: what is multiplied, made of what is given.
      inputs, outputs: they are heads with zeros after each, of which the kernel knows nothing.
    """

    features: int
    use_bias: bool = True
    convolution: bool = False
    parts: int = 1
    bias_apart: bool = False
    before: Callable[..., jax.Array] = lambda x: x
    inputs: Spacing | None = None
    outputs: Spacing | None = None
    lora: LoraConfig | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, *given: jax.Array) -> list[jax.Array]:
        """f[...,i] -> f[...,features / parts] of every part."""
        width = jax.eval_shape(self.before, *given).shape[-1]
        width = width if self.inputs is None else self.inputs.count * self.inputs.channels
        shape, axes = (width, self.features), ("tower_in", "tower_out")
        if self.convolution:
            kernel = self.param("kernel", weight(_KERNEL, None, None, *axes), (1, 1, *shape))
        else:
            kernel = self.param("kernel", weight(_KERNEL, *axes), shape)
        adapters = []
        if self.lora is not None:
            a = self.param(LORA_A, weight(initial_a, "tower_in", "lora"), (shape[0], self.lora.rank))
            b = self.param(LORA_B, weight(nn.initializers.zeros, "lora", "tower_out"), (self.lora.rank, shape[1]))
            adapters = [a, b]

        def multiply(given: tuple[jax.Array, ...], kernel: jax.Array, adapters: list[jax.Array]) -> list[jax.Array]:
            x = self.before(*given)
            kernel = spaced(kernel.reshape(shape).astype(self.dtype), 0, self.inputs)
            outputs = [x @ part for part in self._parts(kernel)]
            if adapters:
                a, b = (x.astype(self.dtype) for x in adapters)
                a, parts = spaced(a, 0, self.inputs), self._parts(b)
                outputs = [y + adapt(x, a, part, self.lora.scale) for y, part in zip(outputs, parts, strict=True)]
            return outputs

        # What is made of the kernel, and before it, is made again: a scan would keep it for every layer.
        outputs = jax.checkpoint(multiply, prevent_cse=False)(given, kernel, adapters)
        outputs = list(map(channels_together, outputs))
        bias = self.param("bias", _ZEROS, shape[1:]) if self.use_bias else None
        if self.use_bias and not self.bias_apart:
            biases = self._parts(bias)
            outputs = [y + spread(bias, y.shape, y.dtype) for y, bias in zip(outputs, biases, strict=True)]
        return [*outputs, bias] if self.bias_apart else outputs

    def _parts(self, x: jax.Array) -> list[jax.Array]:
        return jnp.split(spaced(x, x.ndim - 1, self.outputs), self.parts, axis=-1)


class RMSNorm(nn.Module):
    """Root mean square normalisation of the last axis, with a scale; `heads` as of a product's outputs."""

    heads: Spacing | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, eps = x.shape[-1], 1e-5
        share = 1.0 if self.heads is None else self.heads.channels / self.heads.width  # of channels that are there
        scale = self.param("scale", _ONES, (round(width * share),))

        def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
            # The mean of squares over all channels is `share` times that over those that are there.
            return rms_norm(x, spaced(scale * share**0.5, 0, self.heads), eps * share)

        return jax.checkpoint(norm, prevent_cse=False)(x, scale)
