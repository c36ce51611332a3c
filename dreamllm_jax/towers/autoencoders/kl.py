"""The variational autoencoder of Stable Diffusion (diffusers' `AutoencoderKL`), Rombach et al. 2112.10752.

Parameters are named as in diffusers; images are in [-1, 1]. Legend: N images, H,W image and h,w,c latent height, width
and channels.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.layers.blocks import (
    Attention,
    Conv,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Upsample2D,
    count_resnet,
    count_self_attention,
    shard_images,
)
from dreamllm_jax.layers.flops import Tally, convolution, dense
from dreamllm_jax.towers.diffusers_config import read_diffusers_config, require
from dreamllm_jax.towers.public import PublicForm

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
_EPS = 1e-6
# What the attention's layers were called in older files, where some are 1x1 convolutions.
_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# Settings of a config.json with the only value that is implemented.
_FIXED = {
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The settings of diffusers' `AutoencoderKL` that vary among Stable Diffusion's models.

    Scaled latents are (latents - shift_factor) · scaling_factor.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    layers_per_block: int = 2
    norm_num_groups: int = 32
    act_fn: str = "silu"
    sample_size: int = 512
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    kind: Literal["kl"] = "kl"
    deterministic: ClassVar[bool] = False
    feature_width: ClassVar[int] = 0
    public = PublicForm(
        library="diffusers",
        torch_class="AutoencoderKL",
        folder="vae",
        renamed=tuple(
            (rf"^(.*\.mid_block\.attentions\.\d+)\.{then}\.(weight|bias)$", rf"\1.{today}.\2")
            for then, today in _LEGACY.items()
        ),
        settings=("latent_channels", "block_out_channels", "layers_per_block", "scaling_factor", "shift_factor"),
    )

    def __post_init__(self) -> None:
        sizes = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups", "sample_size")
        for key in (*sizes, "scaling_factor"):
            require(getattr(self, key) > 0, f"{key} must be positive, got {getattr(self, key)}")
        require(
            min(self.block_out_channels, default=0) > 0, f"block_out_channels={self.block_out_channels} has no size"
        )
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            want = (kind,) * len(self.block_out_channels)
            require(getattr(self, key) == want, f"{key}={getattr(self, key)!r}: only {want!r} is implemented")
        require(self.act_fn == "silu", f"act_fn={self.act_fn!r}: only 'silu' is implemented")
        groups = self.norm_num_groups
        for channels in self.block_out_channels:
            require(channels % groups == 0, f"block_out_channels: {channels} cannot be split into {groups} norm groups")

    @property
    def downscale(self) -> int:
        """Pixels along one side of the square that a latent stands for."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def encoded_channels(self) -> int:
        """Of what `encode` gives: means and log-variances."""
        return 2 * self.latent_channels

    @property
    def encode_depends(self) -> tuple[str, ...]:
        """How the paths begin of the parameters that `encode` depends on."""
        return ("encoder/", "quant_conv/")

    def latents(self, encoded: Float[Array, "N h w 2c"], noise: Float[Array, "N h w c"]) -> Float[Array, "N h w c"]:
        """Scaled latents, drawn from the posterior."""
        drawn = sample_moments(encoded, noise)
        return (drawn - self.shift_factor if self.shift_factor else drawn) * self.scaling_factor

    def unscaled(self, latents: Float[Array, "N h w c"]) -> Float[Array, "N h w c"]:
        """What `decode` takes."""
        latents = latents / self.scaling_factor
        return latents + self.shift_factor if self.shift_factor else latents

    @classmethod
    def from_public(cls, settings: Mapping[str, Any]) -> "AutoencoderConfig":
        """Reads the `config.json` of a diffusers `AutoencoderKL`; `force_upcast` is ours to choose by `dtype`.

        Raises:
          ValueError: naming every setting that is not implemented.
        """
        settings = {key: value for key, value in settings.items() if key != "force_upcast"}
        return read_diffusers_config(cls, settings, _FIXED)

    def to_public(self) -> dict[str, Any]:
        """The settings of an `AutoencoderKL`'s config.json; the youngest of them only where they are used."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "kind"}
        later = {"shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True}
        return {name: value for name, value in settings.items() if name not in later or value != later[name]}

    def run_public(self, module: Any, images: Any, latents: Any) -> dict[str, Any]:
        """What the public class makes of torch's f[N,3,H,W] images and f[N,c,h,w] unscaled latents."""
        return {
            "stored": module.encode(images).latent_dist.parameters,
            "images": module.decode(latents).sample,
        }

    def make(self, dtype: Any) -> "Autoencoder":
        """The module; see there."""
        return Autoencoder(self, dtype=dtype)

    def encoder_flops(self, tally: Tally, images: int, height: int, width: int) -> None:
        """Adds the way from so many images to their moments."""
        widths, moments, size, path = self.block_out_channels, 2 * self.latent_channels, (height, width), "encoder"
        tally.product(f"{path}/conv_in/kernel", convolution(images, size, self.in_channels, widths[0]))
        inputs = widths[0]
        for level, channels in enumerate(widths):
            block = f"{path}/down_blocks_{level}"
            for i in range(self.layers_per_block):
                count_resnet(tally, f"{block}/resnets_{i}", images, size, inputs, channels)
                inputs = channels
            if level < len(widths) - 1:
                halved = convolution(images, size, channels, channels, stride=2, padding=(0, 1))
                tally.product(f"{block}/downsamplers_0/conv/kernel", halved)
                size = size[0] // 2, size[1] // 2
        count_resnet(tally, f"{path}/mid_block/resnets_0", images, size, inputs, inputs)
        count_self_attention(tally, f"{path}/mid_block/attentions_0", images, math.prod(size), inputs, heads=1)
        count_resnet(tally, f"{path}/mid_block/resnets_1", images, size, inputs, inputs)
        tally.product(f"{path}/conv_out/kernel", convolution(images, size, inputs, moments))
        if self.use_quant_conv:
            tally.product("quant_conv/kernel", dense(images * math.prod(size), moments, moments))


def sample_moments(moments: jax.Array, noise: jax.Array) -> jax.Array:
    """Draws unscaled latents from the posterior: f[N,h,w,2c], f[N,h,w,c] -> f32[N,h,w,c].

    As `DiagonalGaussianDistribution.sample` of diffusers: the moments are mean and log-variance, the latter clipped.
    """
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean + jnp.exp(0.5 * jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX)) * noise


class _Layers(nn.Module):
    """The resnets of one resolution, then the change of resolution, if any."""

    channels: int
    layers: int
    norm_num_groups: int
    resample: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = ResnetBlock2D(self.channels, self.norm_num_groups, _EPS, self.dtype, name=f"resnets_{i}")(x)
        if self.resample == "down":  # padded at the bottom and the right only
            x = Downsample2D(((0, 1), (0, 1)), self.dtype, name="downsamplers_0")(x)
        elif self.resample == "up":
            x = Upsample2D(self.dtype, name="upsamplers_0")(x)
        return x


class _MidBlock(nn.Module):
    """Resnet, single-head attention over all positions, resnet (diffusers' `UNetMidBlock2D`)."""

    norm_num_groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, height, width, channels = x.shape
        x = ResnetBlock2D(channels, self.norm_num_groups, _EPS, self.dtype, name="resnets_0")(x)
        attention = Attention(1, self.norm_num_groups, _EPS, self.dtype, name="attentions_0")
        x += attention(x.reshape(n, height * width, channels)).reshape(x.shape)
        return ResnetBlock2D(channels, self.norm_num_groups, _EPS, self.dtype, name="resnets_1")(x)


class Encoder(nn.Module):
    """f[N,H,W,3] -> f[N,h,w,2c]."""

    config: AutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, groups = self.config, self.config.norm_num_groups
        x = Conv(config.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        last = len(config.block_out_channels) - 1
        for i, channels in enumerate(config.block_out_channels):
            resample = "down" if i < last else None
            x = _Layers(channels, config.layers_per_block, groups, resample, self.dtype, name=f"down_blocks_{i}")(x)
        x = _MidBlock(groups, self.dtype, name="mid_block")(x)
        x = nn.silu(GroupNorm(num_groups=groups, epsilon=_EPS, dtype=self.dtype, name="conv_norm_out")(x))
        return Conv(2 * config.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """f[N,h,w,c] -> f[N,H,W,3]."""

    config: AutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, groups = self.config, self.config.norm_num_groups
        x = Conv(config.block_out_channels[-1], dtype=self.dtype, name="conv_in")(x)
        x = _MidBlock(groups, self.dtype, name="mid_block")(x)
        last = len(config.block_out_channels) - 1
        for i, channels in enumerate(reversed(config.block_out_channels)):
            resample = "up" if i < last else None
            x = _Layers(channels, config.layers_per_block + 1, groups, resample, self.dtype, name=f"up_blocks_{i}")(x)
        x = nn.silu(GroupNorm(num_groups=groups, epsilon=_EPS, dtype=self.dtype, name="conv_norm_out")(x))
        return Conv(config.out_channels, dtype=self.dtype, name="conv_out")(x)


class Autoencoder(nn.Module):
    """The variational autoencoder of Stable Diffusion."""

    config: AutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        channels = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        if self.config.use_quant_conv:
            self.quant_conv = Conv(2 * channels, kernel_size=(1, 1), padding=0, dtype=self.dtype)
        if self.config.use_post_quant_conv:
            self.post_quant_conv = Conv(channels, kernel_size=(1, 1), padding=0, dtype=self.dtype)

    def encode(self, images: jax.Array) -> jax.Array:
        """f[N,H,W,3] in [-1, 1] -> moments f32[N,h,w,2c]: means, then log-variances, as `sample_moments` takes them.

        Raises:
          ValueError: if height or width is no multiple of the config's `downscale`.
        """
        require_multiple(images, self.config.downscale)
        x = shard_images(images.astype(self.dtype))
        x = self.encoder(x)
        return (self.quant_conv(x) if self.config.use_quant_conv else x).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents f[N,h,w,c], `unscaled`, -> images f32[N,H,W,3]."""
        x = shard_images(latents.astype(self.dtype))
        return self.decoder(self.post_quant_conv(x) if self.config.use_post_quant_conv else x).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstructs images from the posterior's mean."""
        return self.decode(jnp.split(self.encode(images), 2, axis=-1)[0])


def require_multiple(images: jax.Array, factor: int) -> None:
    height, width = images.shape[1:3]
    require(
        height % factor == 0 and width % factor == 0,
        f"images of {height} x {width} pixels: both sides must be multiples of {factor}",
    )
