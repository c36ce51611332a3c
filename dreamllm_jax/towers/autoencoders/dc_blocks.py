"""The blocks of the deep compression autoencoder (`dc.py`), and how their FLOPs are counted.

Every module is the counterpart of the diffusers class of the same name and names its parameters alike; images are
NHWC. Legend: N images, h,w,c a feature map's height, width and channels.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dreamllm_jax.layers.blocks import EXACT_CONV, Conv, Dense, DoublingConv, RMSNorm, shard_images
from dreamllm_jax.layers.flops import Flops, Tally, convolution, dense
from dreamllm_jax.layers.linear import spread
from dreamllm_jax.layers.linear_attention import linear_attention_wide, same_head

EPS = 1e-5
ACTIVATIONS = {"silu": nn.silu, "swish": nn.silu, "relu": nn.relu}
_HIDDEN = 4  # width of a GLUMBConv's hidden layer, in widths of its input


def pixel_unshuffle(x: jax.Array) -> jax.Array:
    """2x2 pixels into channels, in torch's order: f[N,2h,2w,c] -> f[N,h,w,4c], channel 4i + 2 row + column."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(n, height // 2, width // 2, 4 * channels)


def pixel_shuffle(x: jax.Array) -> jax.Array:
    """The inverse of `pixel_unshuffle`."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height, width, channels // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(n, 2 * height, 2 * width, channels // 4)


def averaging(channels: int, features: int) -> jax.Array:
    """f32[2,2,channels,features]: a convolution of stride 2 with it averages the channels of `pixel_unshuffle`."""
    place = jnp.arange(4 * channels).reshape(channels, 2, 2).transpose(1, 2, 0)
    group = 4 * channels // features
    return (place[..., None] // group == jnp.arange(features)) / group


def repeating(channels: int, features: int) -> jax.Array:
    """f32[2,2,channels,features]: what `pixel_shuffle` of repeated channels takes from a pixel into its four."""
    place = jnp.arange(4 * features).reshape(features, 2, 2).transpose(1, 2, 0)
    source = place // (4 * features // channels)
    return (source[:, :, None] == jnp.arange(channels)[:, None]).astype(jnp.float32)


def average_channels(x: jax.Array, channels: int) -> jax.Array:
    """The mean of each of so many groups of neighbouring channels: f[...,g c] -> f[...,c], summed in float32."""
    groups = x.reshape(*x.shape[:-1], channels, -1)
    return jnp.mean(groups.astype(jnp.float32), -1).astype(x.dtype)


def sort_by_role(kernel: jax.Array, head_dim: int) -> jax.Array:
    """The channels of a kernel's last axis from heads of (q, k, v) to the q of all heads, their k, their v.

    The public class joins the outputs of to_q, to_k and to_v, and takes a head's q, k and v from three blocks that are
    neighbours among them. Sorting weights leaves activations alone.
    """
    *rest, channels = kernel.shape
    heads = kernel.reshape(*rest, channels // (3 * head_dim), 3, head_dim)
    return heads.swapaxes(-3, -2).reshape(kernel.shape)


class ResBlock(nn.Module):
    """conv, activation, conv, norm, + input."""

    act_fn: str = "silu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N,h,w,c] -> f[N,h,w,c]."""
        h = ACTIVATIONS[self.act_fn](Conv(x.shape[-1], dtype=self.dtype, name="conv1")(x))
        h = Conv(x.shape[-1], use_bias=False, dtype=self.dtype, name="conv2")(h)
        return shard_images(x + RMSNorm(EPS, self.dtype, name="norm")(h))


class _Kernel(nn.Module):
    """A kernel alone, under the name of the layer that has it in the public class."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        init = Dense.kernel_init if len(self.shape) == 2 else Conv.kernel_init
        return self.param("kernel", init, self.shape)


class SanaMultiscaleAttentionProjection(nn.Module):
    """What stands around a token, in q, k and v: a depthwise convolution, then a product within each head."""

    kernel_size: int
    head_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """q, k and v side by side, f[N,h,w,3c] -> three of f[N,h,w,c]."""
        channels, size, d = x.shape[-1], self.kernel_size, self.head_dim
        depthwise = sort_by_role(_Kernel((size, size, 1, channels), name="proj_in")(), d).astype(self.dtype)
        within = sort_by_role(_Kernel((1, 1, d, channels), name="proj_out")(), d).astype(self.dtype)
        x = jax.lax.conv_general_dilated(
            x,
            depthwise,
            (1, 1),
            ((size // 2, size // 2),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
        )
        # As in `linear_attention_wide`, the product of all channels with all.
        same = same_head(channels // 3, d)
        kernels = (jnp.where(same, jnp.tile(one, (channels // 3 // d, 1)), 0) for one in jnp.split(within[0, 0], 3, -1))
        return tuple(y @ kernel for y, kernel in zip(jnp.split(x, 3, axis=-1), kernels, strict=True))


class SanaMultiscaleLinearAttention(nn.Module):
    """Linear attention of all pixels to all, by heads of q, k, v and by heads of what each scale makes of them."""

    head_dim: int
    scales: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N,h,w,c] -> f[N,h,w,c]."""
        n, height, width, channels = x.shape
        kernels = [_Kernel((channels, channels), name=name)() for name in ("to_q", "to_k", "to_v")]
        qkv = x @ sort_by_role(jnp.concatenate(kernels, axis=-1), self.head_dim).astype(self.dtype)
        every = [jnp.split(qkv, 3, axis=-1)]
        for i, size in enumerate(self.scales):
            scale = SanaMultiscaleAttentionProjection(size, self.head_dim, self.dtype, name=f"to_qkv_multiscale_{i}")
            every.append(scale(qkv))
        to_out = _Kernel((len(every) * channels, channels), name="to_out")().astype(self.dtype)
        out = jnp.zeros((n, height * width, channels), jnp.float32)
        for roles, kernel in zip(every, jnp.split(to_out, len(every)), strict=True):
            tokens = (y.reshape(n, height * width, channels) for y in roles)
            heads = linear_attention_wide(*tokens, channels // self.head_dim)
            out += jnp.matmul(heads, kernel, preferred_element_type=jnp.float32)
        out = out.astype(self.dtype).reshape(x.shape)
        return x + RMSNorm(EPS, self.dtype, name="norm_out")(out)


class GLUMBConv(nn.Module):
    """A gated hidden layer that sees its neighbours: 1x1, silu, depthwise 3x3, gate by silu, 1x1, norm, + input.

    SANA's layer of this name (`sana_transformer.py`) is of positions in line, float32 inside, by a kernel for small
    images; this one is of feature maps of any size, by XLA's convolutions.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N,h,w,c] -> f[N,h,w,c]."""
        channels, hidden = x.shape[-1], 2 * _HIDDEN * x.shape[-1]
        point = {"kernel_size": (1, 1), "padding": 0, "dtype": self.dtype}
        h = nn.silu(Conv(hidden, **point, name="conv_inverted")(x))
        h = Conv(hidden, feature_group_count=hidden, dtype=self.dtype, name="conv_depth")(h)
        h, gate = jnp.split(h, 2, axis=-1)
        h = Conv(channels, use_bias=False, **point, name="conv_point")(h * nn.silu(gate))
        return x + RMSNorm(EPS, self.dtype, name="norm")(h)


class EfficientViTBlock(nn.Module):
    """Linear attention, then `GLUMBConv`."""

    head_dim: int
    scales: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N,h,w,c] -> f[N,h,w,c]."""
        x = SanaMultiscaleLinearAttention(self.head_dim, self.scales, self.dtype, name="attn")(x)
        return shard_images(GLUMBConv(self.dtype, name="conv_out")(x))


class _HalvingConv(nn.Module):
    """Halves height and width by a 3x3 convolution, with the parameters of a `Conv`, whose shortcut is in its kernel.

    The shortcut too is linear in 2x2 pixels: as one more term of the kernel it costs nothing, whereas on TPU shuffling
    pixels into channels takes as long as the convolution.
    """

    features: int
    shortcut: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        kernel = jnp.asarray(self.param("kernel", EXACT_CONV, (3, 3, channels, self.features)), jnp.float32)
        bias = self.param("bias", Conv.bias_init, (self.features,))
        if self.shortcut:
            kernel = kernel.at[1:, 1:].add(averaging(channels, self.features))
        layout = ("NHWC", "HWIO", "NHWC")
        padding = ((1, 0), (1, 0))  # at the bottom and the right nothing is read beyond the edge
        h = jax.lax.conv_general_dilated(x, kernel.astype(self.dtype), (2, 2), padding, dimension_numbers=layout)
        return h + spread(bias, h.shape, self.dtype)


class DCDownBlock2d(nn.Module):
    """Halves height and width by a convolution; the shortcut averages neighbours among 2x2 pixels' channels."""

    features: int
    kind: str
    shortcut: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N,2h,2w,c] -> f[N,h,w,features]."""
        if self.kind == "conv":
            return _HalvingConv(self.features, self.shortcut, self.dtype, name="conv")(x)
        h = pixel_unshuffle(Conv(self.features // 4, dtype=self.dtype, name="conv")(x))
        return h + average_channels(pixel_unshuffle(x), self.features) if self.shortcut else h


class DCUpBlock2d(nn.Module):
    """Doubles height and width by a convolution; the shortcut repeats channels and spreads them over 2x2 pixels, if
    there are not too many."""

    features: int
    kind: str
    shortcut: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N,h,w,c] -> f[N,2h,2w,features]."""
        height, width, channels = x.shape[1:]
        shortcut = self.shortcut and channels <= 4 * self.features
        if self.kind == "interpolate":
            own = repeating(channels, self.features) if shortcut else None
            return DoublingConv(self.features, self.dtype, name="conv")(x, (2 * height, 2 * width), own)
        h = pixel_shuffle(Conv(4 * self.features, dtype=self.dtype, name="conv")(x))
        return h + pixel_shuffle(jnp.repeat(x, 4 * self.features // channels, axis=-1)) if shortcut else h


def count_block(
    tally: Tally,
    kind: str,
    path: str,
    images: int,
    size: tuple[int, int],
    width: int,
    scales: tuple[int, ...],
    head_dim: int,
) -> None:
    """Adds the FLOPs of a `ResBlock` or an `EfficientViTBlock` (as `kind` says) of so many channels."""
    if kind == "ResBlock":
        for name in ("conv1", "conv2"):
            tally.product(f"{path}/{name}/kernel", convolution(images, size, width, width))
    else:
        _count_attention(tally, f"{path}/attn", images, size, width, scales, head_dim)
        _count_glumb(tally, f"{path}/conv_out", images, size, width)


def _count_attention(
    tally: Tally, path: str, images: int, size: tuple[int, int], width: int, scales: tuple[int, ...], head: int
) -> None:
    tokens, live = images * math.prod(size), tally.live

    def between_heads(flops: float, times: int) -> None:
        """What is multiplied with the zeros between heads."""
        tally.forward += flops
        tally.total += Flops(products=flops * times)

    for name in ("to_q", "to_k", "to_v"):
        tally.product(f"{path}/{name}/kernel", dense(tokens, width, width), live=live)
    live = tally.live
    for i, kernel in enumerate(scales):
        scale, around = f"{path}/to_qkv_multiscale_{i}", (kernel // 2, kernel // 2)
        depthwise = convolution(images, size, 1, 3 * width, kernel, padding=around)
        tally.product(f"{scale}/proj_in/kernel", depthwise, live=live)
        within = f"{scale}/proj_out/kernel"
        between_heads(dense(tokens, width - head, 3 * width), 1 + tally.live + tally.trained(within))
        tally.product(within, dense(tokens, head, 3 * width))
    # k^T v, q times that, q times the sum of k; backwards two products for each.
    count, times = 1 + len(scales), 1 + 2 * tally.live
    flops = count * (dense(tokens, head, 2 * width) + dense(tokens, 1, width))
    tally.forward += flops
    tally.total += Flops(model=flops * times, products=flops * times)
    between_heads(count * dense(tokens, width, 3 * width) - flops, times)
    tally.product(f"{path}/to_out/kernel", dense(tokens, width * count, width))


def _count_glumb(tally: Tally, path: str, images: int, size: tuple[int, int], width: int) -> None:
    tokens, hidden = images * math.prod(size), _HIDDEN * width
    tally.product(f"{path}/conv_inverted/kernel", dense(tokens, width, 2 * hidden))
    tally.product(f"{path}/conv_depth/kernel", convolution(images, size, 1, 2 * hidden))
    tally.product(f"{path}/conv_point/kernel", dense(tokens, hidden, width))
