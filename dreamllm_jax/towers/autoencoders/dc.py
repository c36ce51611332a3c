"""The deep compression autoencoder (diffusers' `AutoencoderDC`), Chen et al. 2410.10733, as SANA (2410.10629) uses it.

There is no posterior: what `encode` gives are the latents. Parameters are named as in diffusers; images are in
[-1, 1]. Legend: N images, H,W image and h,w,c latent (or feature map) height, width and channels.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dreamllm_jax.layers.blocks import EXACT_CONV, Conv, Dense, DoublingConv, RMSNorm, shard_images
from dreamllm_jax.layers.flops import Flops, Tally, convolution, dense
from dreamllm_jax.layers.linear import spread
from dreamllm_jax.towers.autoencoders.kl import require_multiple
from dreamllm_jax.towers.diffusers_config import read_diffusers_config, require
from dreamllm_jax.towers.public import PublicForm

_EPS = 1e-5
_ATTENTION_EPS = 1e-15
_ACTIVATIONS = {"silu": nn.silu, "swish": nn.silu, "relu": nn.relu}
_HIDDEN = 4  # width of a GLUMBConv's hidden layer, in widths of its input
# Settings that a config.json may give once for all stages.
_PER_STAGE = {"encoder_block_types": "encoder", "decoder_block_types": "decoder"}
_PER_STAGE |= {"decoder_norm_types": "decoder", "decoder_act_fns": "decoder"}

_WIDTHS = (128, 256, 512, 512, 1024, 1024)
_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_SCALES = ((), (), (), (5,), (5,), (5,))


@dataclasses.dataclass(frozen=True)
class DCAutoencoderConfig:
    """The settings of diffusers' `AutoencoderDC`, per-stage ones always as tuples; the defaults are SANA's.

    Stages are told from the full resolution down, in the decoder too. A first stage without layers has no parameters:
    images are halved on their way in and doubled on their way out.
    """

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] = _BLOCKS
    decoder_block_types: tuple[str, ...] = _BLOCKS
    encoder_block_out_channels: tuple[int, ...] = _WIDTHS
    decoder_block_out_channels: tuple[int, ...] = _WIDTHS
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = _SCALES
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = _SCALES
    upsample_block_type: str = "interpolate"
    downsample_block_type: str = "conv"
    decoder_norm_types: tuple[str, ...] = ("rms_norm",) * 6
    decoder_act_fns: tuple[str, ...] = ("silu",) * 6
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 0.41407
    kind: Literal["dc"] = "dc"
    deterministic: ClassVar[bool] = True
    encode_depends: ClassVar[tuple[str, ...]] = ("encoder/",)
    public = PublicForm(
        library="diffusers",
        torch_class="AutoencoderDC",
        folder="vae",
        settings=(
            "latent_channels",
            "encoder_block_out_channels",
            "decoder_block_out_channels",
            "encoder_layers_per_block",
            "decoder_layers_per_block",
            "scaling_factor",
        ),
    )

    def __post_init__(self) -> None:
        for key in ("in_channels", "latent_channels", "attention_head_dim", "scaling_factor"):
            require(getattr(self, key) > 0, f"{key} must be positive, got {getattr(self, key)}")
        for key, kinds in (
            ("upsample_block_type", ("interpolate", "pixel_shuffle")),
            ("downsample_block_type", ("conv", "pixel_unshuffle")),
            ("decoder_conv_act_fn", tuple(_ACTIVATIONS)),
        ):
            require(getattr(self, key) in kinds, f"{key}={getattr(self, key)!r}: choose from {kinds}")
        self._check_half("encoder", ("block_types", "layers_per_block", "qkv_multiscales"))
        self._check_half("decoder", ("block_types", "layers_per_block", "qkv_multiscales", "norm_types", "act_fns"))
        require(
            len(self.encoder_block_out_channels) == len(self.decoder_block_out_channels),
            "encoder_block_out_channels and decoder_block_out_channels must have as many stages",
        )
        for type_ in self.decoder_norm_types:
            require(type_ == "rms_norm", f"decoder_norm_types: {type_!r}; only 'rms_norm' is implemented")
        for name in self.decoder_act_fns:
            require(name in _ACTIVATIONS, f"decoder_act_fns: {name!r}; choose from {tuple(_ACTIVATIONS)}")

    def _check_half(self, half: str, per_stage: tuple[str, ...]) -> None:
        widths, layers = (getattr(self, f"{half}_{key}") for key in ("block_out_channels", "layers_per_block"))
        scales = getattr(self, f"{half}_qkv_multiscales")
        require(len(widths) > 1 and min(widths) > 0, f"{half}_block_out_channels={widths}: two stages at least")
        for key in per_stage:
            value = getattr(self, f"{half}_{key}")
            require(len(value) == len(widths), f"{half}_{key}={value}: one for each of {len(widths)} stages")
        require(
            layers[0] >= 0 and min(layers[1:]) > 0,
            f"{half}_layers_per_block={layers}: only the first stage may have no layers",
        )
        for kind, width, kernels in zip(getattr(self, f"{half}_block_types"), widths, scales, strict=True):
            known = ("ResBlock", "EfficientViTBlock")
            require(kind in known, f"{half}_block_types: {kind!r}; choose from {known}")
            require(
                kind == "ResBlock" or width % self.attention_head_dim == 0,
                f"{half}_block_out_channels: {width} cannot be split into heads of {self.attention_head_dim}",
            )
            require(
                all(size > 0 and size % 2 for size in kernels), f"{half}_qkv_multiscales: {kernels} must be odd sizes"
            )
        for small, large in itertools.pairwise(widths):
            fits = 4 * small % large == 0 and 4 * small >= large
            require(fits, f"{half}_block_out_channels: {large} does not divide 4 x {small}")
        require(
            not getattr(self, f"{half}_{'out' if half == 'encoder' else 'in'}_shortcut")
            or widths[-1] % self.latent_channels == 0,
            f"{half}_block_out_channels: {widths[-1]} is no multiple of latent_channels={self.latent_channels}",
        )
        if half == "encoder" and self.downsample_block_type == "pixel_unshuffle":
            require(all(width % 4 == 0 for width in widths), f"encoder_block_out_channels={widths}: multiples of 4")

    @property
    def downscale(self) -> int:
        """Pixels along one side of the square that a latent stands for."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    @property
    def encoded_channels(self) -> int:
        """Channels of what `encode` gives."""
        return self.latent_channels

    @classmethod
    def from_public(cls, settings: Mapping[str, Any]) -> "DCAutoencoderConfig":
        """Reads the `config.json` of a diffusers `AutoencoderDC`.

        Raises:
          ValueError: naming every setting that is not implemented.
        """
        settings = _PUBLIC_DEFAULTS | dict(settings)
        for key, half in _PER_STAGE.items():
            if isinstance(settings[key], str):
                settings[key] = (settings[key],) * len(settings[f"{half}_block_out_channels"])
        # Published files say "Conv", which diffusers takes for whatever is not "pixel_unshuffle".
        settings["downsample_block_type"] = settings["downsample_block_type"].lower()
        return read_diffusers_config(cls, settings, {})

    def to_public(self) -> dict[str, Any]:
        """The settings of an `AutoencoderDC`'s config.json."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "kind"}

    def run_public(self, module: Any, images: Any, latents: Any) -> dict[str, Any]:
        """What the public class makes of torch's f[N,3,H,W] images and f[N,c,h,w] unscaled latents."""
        return {"stored": module.encode(images).latent, "images": module.decode(latents).sample}

    def make(self, dtype: Any) -> "DCAutoencoder":
        """The module; see there."""
        return DCAutoencoder(self, dtype=dtype)

    def latents(self, encoded: jax.Array, noise: None = None) -> jax.Array:
        """What `encode` gave, scaled: f[N,h,w,c] -> f32[N,h,w,c]. Nothing is drawn."""
        return encoded.astype(jnp.float32) * self.scaling_factor

    def unscaled(self, latents: jax.Array) -> jax.Array:
        """The inverse of `latents`: what `decode` takes."""
        return latents / self.scaling_factor

    def encoder_flops(self, tally: Tally, images: int, height: int, width: int) -> None:
        """Adds the way from so many images to their latents."""
        widths, size = self.encoder_block_out_channels, (height, width)
        layers = self.encoder_layers_per_block

        def halve(path: str, inputs: int, outputs: int) -> None:
            nonlocal size
            if self.downsample_block_type == "conv":
                flops = convolution(images, size, inputs, outputs, stride=2)
            else:
                flops = convolution(images, size, inputs, outputs // 4)
            tally.product(f"{path}/conv/kernel", flops)
            size = size[0] // 2, size[1] // 2

        if layers[0]:
            tally.product("encoder/conv_in/kernel", convolution(images, size, self.in_channels, widths[0]))
        else:
            halve("encoder/conv_in", self.in_channels, widths[1])
        stages = zip(self.encoder_block_types, widths, layers, self.encoder_qkv_multiscales, strict=True)
        for level, (kind, channels, count, scales) in enumerate(stages):
            stage = f"encoder/down_blocks_{level}"
            for i in range(count):
                if kind == "ResBlock":
                    for name in ("conv1", "conv2"):
                        tally.product(f"{stage}/{i}/{name}/kernel", convolution(images, size, channels, channels))
                else:
                    _count_attention(
                        tally, f"{stage}/{i}/attn", images, size, channels, scales, self.attention_head_dim
                    )
                    _count_glumb(tally, f"{stage}/{i}/conv_out", images, size, channels)
            if count and level < len(widths) - 1:
                halve(f"{stage}/{count}", channels, widths[level + 1])
        tally.product("encoder/conv_out/kernel", convolution(images, size, widths[-1], self.latent_channels))


# What a config.json that leaves a setting out means by it.
_PUBLIC_DEFAULTS = {
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": _WIDTHS,
    "decoder_block_out_channels": _WIDTHS,
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 1.0,
}

# The second has another decoder's weights.
PUBLISHED = {
    name: {"kind": "dc", "scaling_factor": 0.41407} for name in ("dc-ae-f32c32-sana-1.0", "dc-ae-f32c32-sana-1.1")
}


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


def same_head(channels: int, head_dim: int) -> jax.Array:
    """bool[c,c]: whether two channels are of the same head."""
    head = jnp.arange(channels) // head_dim
    return head[:, None] == head


def linear_attention(q: jax.Array, k: jax.Array, v: jax.Array, head_dim: int) -> jax.Array:
    """Attention whose weights are relu(q) relu(k), normalised to sum to one; sums are float32.

    Heads are narrow against a matrix unit: one product of all channels with all, of which the heads' blocks are kept,
    costs less there than many small ones, and channels stay where they lie.

    Args:
      q, k, v: f[N,T,c], of heads that lie side by side.

    Returns:
      f[N,T,c] in their type.
    """
    q, k = nn.relu(q), nn.relu(k)
    same = same_head(q.shape[-1], head_dim)
    values = jnp.where(same, jnp.einsum("nti,ntj->nij", k, v, preferred_element_type=jnp.float32), 0)
    ones = jnp.where(same, jnp.sum(k, axis=1, dtype=jnp.float32)[:, :, None], 0)

    def weigh(sums: jax.Array) -> jax.Array:
        return jnp.einsum("nti,nij->ntj", q, sums.astype(q.dtype), preferred_element_type=jnp.float32)

    return (weigh(values) / (weigh(ones) + _ATTENTION_EPS)).astype(q.dtype)


def sort_by_role(kernel: jax.Array, head_dim: int) -> jax.Array:
    """The channels of a kernel's last axis from heads of (q, k, v) to the q of all heads, their k, their v.

    The public class joins the outputs of to_q, to_k and to_v, and takes a head's q, k and v from three blocks that are
    neighbours among them. Sorting weights leaves activations alone.
    """
    *rest, channels = kernel.shape
    heads = kernel.reshape(*rest, channels // (3 * head_dim), 3, head_dim)
    return heads.swapaxes(-3, -2).reshape(kernel.shape)


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


class ResBlock(nn.Module):
    """conv, activation, conv, norm, + input."""

    act_fn: str = "silu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N,h,w,c] -> f[N,h,w,c]."""
        h = _ACTIVATIONS[self.act_fn](Conv(x.shape[-1], dtype=self.dtype, name="conv1")(x))
        h = Conv(x.shape[-1], use_bias=False, dtype=self.dtype, name="conv2")(h)
        return shard_images(x + RMSNorm(_EPS, self.dtype, name="norm")(h))


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
        # As in `linear_attention`, the product of all channels with all.
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
            heads = linear_attention(*(y.reshape(n, height * width, channels) for y in roles), self.head_dim)
            out += jnp.matmul(heads, kernel, preferred_element_type=jnp.float32)
        out = out.astype(self.dtype).reshape(x.shape)
        return x + RMSNorm(_EPS, self.dtype, name="norm_out")(out)


class GLUMBConv(nn.Module):
    """A gated hidden layer that sees its neighbours: 1x1, silu, depthwise 3x3, gate by silu, 1x1, norm, + input."""

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
        return x + RMSNorm(_EPS, self.dtype, name="norm")(h)


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
    """Doubles height and width by a convolution; the shortcut repeats channels and spreads them over 2x2 pixels."""

    features: int
    kind: str
    shortcut: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N,h,w,c] -> f[N,2h,2w,features]."""
        height, width, channels = x.shape[1:]
        if self.kind == "interpolate":
            own = repeating(channels, self.features) if self.shortcut else None
            return DoublingConv(self.features, self.dtype, name="conv")(x, (2 * height, 2 * width), own)
        h = pixel_shuffle(Conv(4 * self.features, dtype=self.dtype, name="conv")(x))
        return h + pixel_shuffle(jnp.repeat(x, 4 * self.features // channels, axis=-1)) if self.shortcut else h


class _Stage(nn.Module):
    """The blocks of one resolution, and perhaps a change to or from the next: a torch `Sequential`."""

    kind: str
    layers: int
    act_fn: str
    head_dim: int
    scales: tuple[int, ...]
    first: nn.Module | None = None
    last: nn.Module | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        blocks = [] if self.first is None else [self.first]
        for _ in range(self.layers):
            if self.kind == "ResBlock":
                blocks.append(ResBlock(self.act_fn, self.dtype, parent=None))
            else:
                blocks.append(EfficientViTBlock(self.head_dim, self.scales, self.dtype, parent=None))
        blocks += [] if self.last is None else [self.last]
        for i, block in enumerate(blocks):
            x = block.clone(parent=self, name=str(i))(x)
        return x


class Encoder(nn.Module):
    """f[N,H,W,3] -> f[N,h,w,c]."""

    config: DCAutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, self.dtype
        widths, layers = config.encoder_block_out_channels, config.encoder_layers_per_block
        if layers[0]:
            x = Conv(widths[0], dtype=dtype, name="conv_in")(x)
        else:
            x = DCDownBlock2d(widths[1], config.downsample_block_type, shortcut=False, dtype=dtype, name="conv_in")(x)
        for i, kind in enumerate(config.encoder_block_types):
            if not layers[i]:
                continue
            last = None
            if i < len(widths) - 1:
                last = DCDownBlock2d(widths[i + 1], config.downsample_block_type, dtype=dtype, parent=None)
            settings = layers[i], "silu", config.attention_head_dim, config.encoder_qkv_multiscales[i]
            x = _Stage(kind, *settings, last=last, dtype=dtype, name=f"down_blocks_{i}")(x)
        h = Conv(config.latent_channels, dtype=dtype, name="conv_out")(x)
        return h + average_channels(x, config.latent_channels) if config.encoder_out_shortcut else h


class Decoder(nn.Module):
    """f[N,h,w,c] -> f[N,H,W,3]."""

    config: DCAutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, self.dtype
        widths, layers, kind = (
            config.decoder_block_out_channels,
            config.decoder_layers_per_block,
            config.upsample_block_type,
        )
        h = Conv(widths[-1], dtype=dtype, name="conv_in")(x)
        x = h + jnp.repeat(x, widths[-1] // config.latent_channels, axis=-1) if config.decoder_in_shortcut else h
        for i in reversed(range(len(widths))):
            if not layers[i]:
                continue
            first = DCUpBlock2d(widths[i], kind, dtype=dtype, parent=None) if i < len(widths) - 1 else None
            act_fn, scales = config.decoder_act_fns[i], config.decoder_qkv_multiscales[i]
            settings = layers[i], act_fn, config.attention_head_dim, scales
            x = _Stage(config.decoder_block_types[i], *settings, first=first, dtype=dtype, name=f"up_blocks_{i}")(x)
        x = _ACTIVATIONS[config.decoder_conv_act_fn](RMSNorm(_EPS, dtype, name="norm_out")(x))
        if layers[0]:
            return Conv(config.in_channels, dtype=dtype, name="conv_out")(x)
        return DCUpBlock2d(config.in_channels, kind, shortcut=False, dtype=dtype, name="conv_out")(x)


class DCAutoencoder(nn.Module):
    """The deep compression autoencoder."""

    config: DCAutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def encode(self, images: jax.Array) -> jax.Array:
        """f[N,H,W,3] in [-1, 1] -> unscaled latents f32[N,h,w,c].

        Raises:
          ValueError: if height or width is no multiple of the config's `downscale`.
        """
        require_multiple(images, self.config.downscale)
        return self.encoder(shard_images(images.astype(self.dtype))).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents f[N,h,w,c], already divided by the config's `scaling_factor`, -> images f32[N,H,W,3]."""
        return self.decoder(shard_images(latents.astype(self.dtype))).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstructs images."""
        return self.decode(self.encode(images))
