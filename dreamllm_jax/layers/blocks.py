"""Building blocks of U-Nets and autoencoders.

Every module is the counterpart of the diffusers class of the same name and names its parameters alike. Images are
NHWC. Norms' statistics and the softmax are float32 whatever `dtype` is.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dreamllm_jax.layers import linear
from dreamllm_jax.layers.attention import attend_packed
from dreamllm_jax.layers.flops import Tally, convolution, dense
from dreamllm_jax.layers.linear import spread
from dreamllm_jax.layers.lora import LORA_A, LORA_B, LoraConfig, adapt, chosen, initial_a
from dreamllm_jax.layers.weights import weight
from dreamllm_jax.parallel.mesh import constrain

_kernel = nn.initializers.lecun_normal()
EXACT_CONV = weight(_kernel, None, None, "tower_in", "tower_out", exact=True)
EXACT_DENSE = weight(_kernel, "tower_in", "tower_out", exact=True)
_ONES = weight(nn.initializers.ones, "tower_norm")
_ZEROS = weight(nn.initializers.zeros, "tower_norm")


class Conv(linear.Conv):
    """A convolution, 3x3 and zero padded by one unless told otherwise, with logical axes on its weights."""

    kernel_size: int | Sequence[int] = (3, 3)
    padding: nn.linear.PaddingLike = 1
    kernel_init: nn.initializers.Initializer = weight(_kernel, None, None, "tower_in", "tower_out")
    bias_init: nn.initializers.Initializer = _ZEROS


class Dense(linear.Dense):
    """A linear layer with logical axes on its weights, perhaps adapted."""

    kernel_init: nn.initializers.Initializer = weight(_kernel, "tower_in", "tower_out")
    bias_init: nn.initializers.Initializer = _ZEROS
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[..., I] -> f[..., features]."""
        y = super().__call__(x)
        return y if self.lora is None else y + adapt(x.astype(self.dtype), *self.adapter(x), self.lora.scale)

    def adapter(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both of its products, f[I,R] and f[R,features], in the type of the computation."""
        inputs, rank = x.shape[-1], self.lora.rank
        a = self.param(LORA_A, weight(initial_a, "tower_in", "lora"), (inputs, rank))
        b = self.param(LORA_B, weight(nn.initializers.zeros, "lora", "tower_out"), (rank, self.features))
        return a.astype(self.dtype), b.astype(self.dtype)


def moments(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Mean and variance over axes, in float32.

    E[x²] - E[x]² reads the data once, but cancels: it is off by some 2^-24 (1 + mean²/variance) of the variance. Next
    to what rounding to bfloat16 has already cost that is nothing; float32 data are read twice.
    """
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axes, keepdims=True)
    if x.dtype == jnp.bfloat16:
        return mean, jnp.maximum(jnp.mean(jnp.square(wide), axes, keepdims=True) - jnp.square(mean), 0.0)
    return mean, jnp.mean(jnp.square(wide - mean), axes, keepdims=True)


class _Norm(nn.Module):
    """What the norms have in common: a scale and a bias for each channel, named as in Flax."""

    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    def affine(self, x: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
        scale = self.param("scale", _ONES, x.shape[-1:])
        bias = self.param("bias", _ZEROS, x.shape[-1:])
        y = (x - mean) * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias
        return y.astype(self.dtype)


class GroupNorm(_Norm):
    """Group normalisation over the channels and both spatial axes.

    Statistics are taken channel by channel, where the data lie, and then put together.
    """

    num_groups: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N,...,c] -> f[N,...,c]."""
        mean, variance = moments(x, tuple(range(1, x.ndim - 1)))
        grouped = (*mean.shape[:-1], self.num_groups, -1)
        means = mean.reshape(grouped)
        common = jnp.mean(means, -1, keepdims=True)
        spread = jnp.mean(variance.reshape(grouped) + jnp.square(means - common), -1, keepdims=True)
        mean, variance = (jnp.broadcast_to(y, means.shape).reshape(mean.shape) for y in (common, spread))
        return self.affine(x, mean, variance)


class LayerNorm(_Norm):
    """Layer normalisation over the last axis."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[...,c] -> f[...,c]."""
        return self.affine(x, *moments(x, (-1,)))


class RMSNorm(_Norm):
    """Root mean square normalisation over the last axis, with a bias (diffusers' `RMSNorm(bias=True)`)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[...,c] -> f[...,c]."""
        wide = x.astype(jnp.float32)
        return self.affine(wide, jnp.zeros((), jnp.float32), jnp.mean(jnp.square(wide), -1, keepdims=True))


def shard_images(x: jax.Array) -> jax.Array:
    """Lays the batch of images out over the mesh: the first axis is `images`, nothing else is split."""
    return constrain(x, ("images",) + (None,) * (x.ndim - 1))


class ResnetBlock2D(nn.Module):
    """norm, silu, conv, + time embedding, norm, silu, conv, + shortcut; a 1x1 convolution where the width changes."""

    out_channels: int
    norm_num_groups: int
    norm_eps: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
        """f[N,h,w,c], f[N,T] -> f[N,h,w,out_channels]."""
        norm = {"num_groups": self.norm_num_groups, "epsilon": self.norm_eps, "dtype": self.dtype}
        h = nn.silu(GroupNorm(**norm, name="norm1")(x))
        h = Conv(self.out_channels, dtype=self.dtype, name="conv1")(h)
        if temb is not None:
            # In float32, for its gradient is a sum over all pixels.
            temb = Dense(self.out_channels, kernel_init=EXACT_DENSE, name="time_emb_proj")(nn.silu(temb))
            h += spread(temb[:, None, None], h.shape, self.dtype)
        h = nn.silu(GroupNorm(**norm, name="norm2")(h))
        h = Conv(self.out_channels, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.out_channels:
            x = Conv(self.out_channels, kernel_size=(1, 1), padding=0, dtype=self.dtype, name="conv_shortcut")(x)
        return shard_images(x + h)


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or to a context.

    With `norm_num_groups` (the autoencoder) the input is group-normalised first and the projections have biases.
    """

    heads: int
    norm_num_groups: int | None = None
    norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """f[N,T,c], f[N,S,C] -> f[N,T,c]."""
        width = x.shape[-1]
        if self.norm_num_groups is not None:
            x = GroupNorm(self.norm_eps, self.dtype, self.norm_num_groups, name="group_norm")(x)
        context = x if context is None else context

        def project(name: str, inputs: jax.Array, use_bias: bool = self.norm_num_groups is not None) -> jax.Array:
            lora = chosen(self.lora, name)
            return Dense(width, use_bias=use_bias, dtype=self.dtype, lora=lora, name=name)(inputs)

        q, k, v = project("to_q", x), project("to_k", context), project("to_v", context)
        return project("to_out_0", attend_packed(q, (k,), (v,), self.heads), use_bias=True)


class Downsample2D(nn.Module):
    """Halves height and width by a strided convolution; `padding` as in `nn.Conv`."""

    padding: nn.linear.PaddingLike = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Conv(x.shape[-1], strides=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class DoublingConv(nn.Module):
    """Doubles height and width (nearest neighbour), crops to `size`, then convolves, with the parameters of a `Conv`.

    Of three neighbouring taps two fall on the same pixel of the small image, so the output's even and odd rows and
    columns are four 2x2 convolutions of it: 4/9 of the work, and the enlarged image never exists. Where it is cropped,
    the taps beyond its edge differ, and it is made after all.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int], own: jax.Array | None = None) -> jax.Array:
        """f[N,h,w,c] -> f[N,*size,features].

        Args:
          own: f[2,2,c,features], a shortcut from each pixel to the four that come of it, where nothing is cropped.
        """
        n, height, width, channels = x.shape
        kernel = self.param("kernel", EXACT_CONV, (3, 3, channels, self.features)).astype(jnp.float32)
        bias = spread(self.param("bias", Conv.bias_init, (self.features,)), (n, *size, self.features), self.dtype)

        def convolve(x: jax.Array, weights: jax.Array, padding: tuple[tuple[int, int], ...]) -> jax.Array:
            layout, weights = ("NHWC", "HWIO", "NHWC"), weights.astype(self.dtype)
            return jax.lax.conv_general_dilated(x, weights, (1, 1), padding, dimension_numbers=layout)

        if size != (2 * height, 2 * width):
            x = x.repeat(2, axis=1).repeat(2, axis=2)[:, : size[0], : size[1]]
            return convolve(x, kernel, ((1, 1), (1, 1))) + bias

        def merge(taps: jax.Array, axis: int, odd: int) -> jax.Array:
            first, second, third = jnp.split(taps, 3, axis)
            return jnp.concatenate([first + second, third] if odd else [first, second + third], axis)

        def phase(row: int, column: int) -> jax.Array:
            taps = merge(merge(kernel, 0, row), 1, column)
            if own is not None:
                taps = taps.at[1 - row, 1 - column].add(own[row, column])
            return convolve(x, taps, ((1 - row, row), (1 - column, column)))

        rows = [jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)]
        return jnp.stack(rows, axis=2).reshape(n, *size, self.features) + bias


class Upsample2D(nn.Module):
    """Doubles height and width (nearest neighbour), crops to `size` (h, w) if given, then convolves."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        size = size or (2 * x.shape[1], 2 * x.shape[2])
        return DoublingConv(x.shape[-1], self.dtype, name="conv")(x.astype(self.dtype), size)


def count_resnet(
    tally: Tally,
    path: str,
    images: int,
    size: tuple[int, int],
    inputs: int,
    outputs: int,
    time: tuple[int, bool] | None = None,
) -> None:
    """Adds the FLOPs of a `ResnetBlock2D`; `time` is the width of the time embedding, and whether it is live."""
    live = tally.live
    tally.product(f"{path}/conv1/kernel", convolution(images, size, inputs, outputs))
    if time:
        tally.product(f"{path}/time_emb_proj/kernel", dense(images, time[0], outputs), live=time[1])
    tally.product(f"{path}/conv2/kernel", convolution(images, size, outputs, outputs))
    if inputs != outputs:
        tally.product(f"{path}/conv_shortcut/kernel", dense(images * math.prod(size), inputs, outputs), live=live)


def count_self_attention(
    tally: Tally,
    path: str,
    images: int,
    tokens: int,
    width: int,
    heads: int,
    lora: LoraConfig | None = None,
    again: bool = False,
) -> None:
    """Adds the FLOPs of an `Attention` of a sequence to itself; `again` as of `Tally.attention`."""
    live, shape = tally.live, (images * tokens, width, width)
    for name in ("to_q", "to_k", "to_v"):
        tally.linear(f"{path}/{name}", *shape, lora, live=live)
    tally.attention(images, tokens, tokens, width, tally.live, heads=heads, again=again)
    tally.linear(f"{path}/to_out_0", *shape, lora)
