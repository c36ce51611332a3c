"""The deep compression autoencoder (diffusers' `AutoencoderDC`), Chen et al. 2410.10733, as SANA (2410.10629) uses it.

The configuration, encoder and decoder; what they are made of is in `dc_blocks.py`. There is no posterior: what `encode`
gives are the latents. Parameters are named as in diffusers; images are in [-1, 1]. Legend: N images, H,W image and
h,w,c latent (or feature map) height, width and channels.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dreamllm_jax.layers.blocks import Conv, RMSNorm, shard_images
from dreamllm_jax.layers.flops import Tally, convolution
from dreamllm_jax.towers.autoencoders.dc_blocks import (
    ACTIVATIONS,
    EPS,
    DCDownBlock2d,
    DCUpBlock2d,
    EfficientViTBlock,
    ResBlock,
    average_channels,
    count_block,
)
from dreamllm_jax.towers.autoencoders.kl import require_multiple
from dreamllm_jax.towers.diffusers_config import read_diffusers_config, require
from dreamllm_jax.towers.public import PublicForm

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
    feature_width: ClassVar[int] = 0
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
            ("decoder_conv_act_fn", tuple(ACTIVATIONS)),
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
            require(name in ACTIVATIONS, f"decoder_act_fns: {name!r}; choose from {tuple(ACTIVATIONS)}")

    def _check_half(self, half: str, per_stage: tuple[str, ...]) -> None:
        widths, layers = (getattr(self, f"{half}_{key}") for key in ("block_out_channels", "layers_per_block"))
        scales = getattr(self, f"{half}_qkv_multiscales")
        require(len(widths) > 1 and min(widths) > 0, f"{half}_block_out_channels={widths}: two stages at least")
        for key in per_stage:
            value = getattr(self, f"{half}_{key}")
            require(len(value) == len(widths), f"{half}_{key}={value}: one for each of {len(widths)} stages")
        require(
            min(layers) >= 0 and 0 not in layers[1:-1],
            f"{half}_layers_per_block={layers}: only the first and the last stage may have no layers",
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
            # A decoder's step to less than a quarter of the channels has no shortcut.
            fits = 4 * small % large == 0 if 4 * small >= large else half == "decoder"
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
                block = f"{stage}/{i}"
                count_block(tally, kind, block, images, size, channels, scales, self.attention_head_dim)
            if count and level < len(widths) - 1:
                halve(f"{stage}/{count}", channels, widths[level + 1])
        tally.product("encoder/conv_out/kernel", convolution(images, size, widths[-1], self.latent_channels))

    def decoder_flops(self, tally: Tally, images: int, size: tuple[int, int]) -> None:
        """Adds the way from the latents, of this height and width, of so many images to pixels."""
        widths, layers = self.decoder_block_out_channels, self.decoder_layers_per_block

        def double(path: str, inputs: int, outputs: int) -> None:
            nonlocal size
            if self.upsample_block_type == "interpolate":  # even and odd rows and columns: four convolutions of 2x2
                flops = 4 * convolution(images, size, inputs, outputs, kernel=2, padding=(1, 0))
            else:
                flops = convolution(images, size, inputs, 4 * outputs)
            tally.product(f"{path}/conv/kernel", flops)
            size = size[0] * 2, size[1] * 2

        tally.product("decoder/conv_in/kernel", convolution(images, size, self.latent_channels, widths[-1]))
        for level in (level for level in reversed(range(len(widths))) if layers[level]):
            first = level < len(widths) - 1
            if first:
                double(f"decoder/up_blocks_{level}/0", widths[level + 1], widths[level])
            kind, scales = self.decoder_block_types[level], self.decoder_qkv_multiscales[level]
            for i in range(layers[level]):
                block = f"decoder/up_blocks_{level}/{i + first}"
                count_block(tally, kind, block, images, size, widths[level], scales, self.attention_head_dim)
        if layers[0]:
            tally.product("decoder/conv_out/kernel", convolution(images, size, widths[0], self.in_channels))
        else:
            double("decoder/conv_out", widths[1], self.in_channels)


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
        x = ACTIVATIONS[config.decoder_conv_act_fn](RMSNorm(EPS, dtype, name="norm_out")(x))
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
