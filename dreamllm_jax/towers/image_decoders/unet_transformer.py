"""The transformers of Stable Diffusion's U-Net (`unet.py`): over the positions of a feature map, each with attention to
itself and to the condition.

Every module is named as diffusers' class of the same name. Legend: N images, h,w,c height, width and channels of a
feature map, Q condition tokens, C condition width.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dreamllm_jax.layers.blocks import Attention, Conv, Dense, GroupNorm, LayerNorm, shard_images
from dreamllm_jax.layers.linear import spread
from dreamllm_jax.layers.lora import LoraConfig, adapt, chosen


@dataclasses.dataclass(frozen=True)
class UNetLora(LoraConfig):
    """Adapters of the transformers' products (`layers.lora`): of both attentions, and `proj` and `net_2` of the
    feed-forward."""

    products: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out_0", "proj", "net_2")
    targets: tuple[str, ...] = products


class _Halves(Dense):
    """A linear layer whose output comes in two halves: made apart, neither they nor their gradients are copied."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", self.bias_init, (self.features,))
        a, b = (None, None) if self.lora is None else self.adapter(x)

        def half(weights: jax.Array, offset: jax.Array, b: jax.Array | None) -> jax.Array:
            y = x @ weights
            y = y if b is None else y + adapt(x, a, b, self.lora.scale)
            return y + spread(offset, y.shape, y.dtype)

        halves = (None, None) if b is None else jnp.split(b, 2, axis=-1)
        return tuple(map(half, jnp.split(kernel, 2, axis=-1), jnp.split(bias, 2), halves))


class GEGLU(nn.Module):
    """A linear layer gated by the exact GELU of another (Shazeer 2002.05202)."""

    width: int
    dtype: jnp.dtype = jnp.float32
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lora = chosen(self.lora, "proj")
        values, gates = _Halves(2 * self.width, dtype=self.dtype, lora=lora, name="proj")(x)
        gates = gates.astype(jnp.float32)
        gates = 0.5 * gates * (1 + jax.lax.erf(gates * 0.5**0.5))  # half the work of erfc
        return (values * gates).astype(self.dtype)


class FeedForward(nn.Module):
    """GEGLU four times as wide, and back."""

    dtype: jnp.dtype = jnp.float32
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = GEGLU(4 * x.shape[-1], self.dtype, self.lora, name="net_0")(x)
        return Dense(x.shape[-1], dtype=self.dtype, lora=chosen(self.lora, "net_2"), name="net_2")(h)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the condition and a feed-forward, each after a norm and with a residual."""

    heads: int
    dtype: jnp.dtype = jnp.float32
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """f[N,h*w,c], f[N,Q,C] -> f[N,h*w,c]."""
        shared = {"dtype": self.dtype, "lora": self.lora}
        x += Attention(self.heads, **shared, name="attn1")(LayerNorm(dtype=self.dtype, name="norm1")(x))
        x += Attention(self.heads, **shared, name="attn2")(LayerNorm(dtype=self.dtype, name="norm2")(x), condition)
        return x + FeedForward(**shared, name="ff")(LayerNorm(dtype=self.dtype, name="norm3")(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the positions of a feature map, between two projections, with a residual."""

    heads: int
    layers: int
    norm_num_groups: int
    use_linear_projection: bool
    dtype: jnp.dtype = jnp.float32
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """f[N,h,w,c], f[N,Q,C] -> f[N,h,w,c]."""
        n, height, width, channels = x.shape

        def project(name: str, h: jax.Array) -> jax.Array:
            if self.use_linear_projection:
                return Dense(channels, dtype=self.dtype, name=name)(h)
            conv = Conv(channels, kernel_size=(1, 1), padding=0, dtype=self.dtype, name=name)
            return conv(h.reshape(x.shape)).reshape(h.shape)

        h = GroupNorm(num_groups=self.norm_num_groups, epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        # Only positions from here on: the projections change the layout on their way, where a reshape would be a copy.
        h = project("proj_in", h.reshape(n, height * width, channels))
        for i in range(self.layers):
            h = BasicTransformerBlock(self.heads, self.dtype, self.lora, name=f"transformer_blocks_{i}")(h, condition)
        return shard_images(x + project("proj_out", h).reshape(x.shape))
