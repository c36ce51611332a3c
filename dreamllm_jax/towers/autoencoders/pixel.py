"""An autoencoder without parameters or loss, in pixel space: for models trained from scratch on small pictures."""

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.layers.blocks import shard_images
from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.towers.autoencoders.kl import LOGVAR_MIN, require_multiple, sample_moments
from dreamllm_jax.towers.diffusers_config import require


@dataclasses.dataclass(frozen=True)
class PixelAutoencoderConfig:
    """Latents that are squares of `patch_size` x `patch_size` pixels."""

    patch_size: int = 1
    scaling_factor: float = 1.0
    kind: Literal["pixel"] = "pixel"
    deterministic: ClassVar[bool] = False
    feature_width: ClassVar[int] = 0
    public = None

    def __post_init__(self) -> None:
        require(self.patch_size > 0, f"patch_size={self.patch_size!r} must be a positive integer")
        require(self.scaling_factor > 0, f"scaling_factor must be positive, got {self.scaling_factor}")

    @property
    def latent_channels(self) -> int:
        """Numbers in a latent."""
        return 3 * self.patch_size**2

    @property
    def downscale(self) -> int:
        """Pixels along one side of the square that a latent stands for."""
        return self.patch_size

    @property
    def encoded_channels(self) -> int:
        """Of what `encode` gives: means and log-variances."""
        return 2 * self.latent_channels

    @property
    def encode_depends(self) -> tuple[str, ...]:
        """How the paths begin of the parameters that `encode` depends on: there are none."""
        return ()

    def latents(self, encoded: Float[Array, "N h w 2c"], noise: Float[Array, "N h w c"]) -> Float[Array, "N h w c"]:
        """Scaled latents, of the smallest variance there is."""
        return sample_moments(encoded, noise) * self.scaling_factor

    def unscaled(self, latents: Float[Array, "N h w c"]) -> Float[Array, "N h w c"]:
        """What `decode` takes."""
        return latents / self.scaling_factor

    def make(self, dtype: Any) -> "PixelAutoencoder":
        """The module; see there."""
        return PixelAutoencoder(self, dtype=dtype)

    def encoder_flops(self, tally: Tally, images: int, height: int, width: int) -> None:
        """Nothing is multiplied."""


class PixelAutoencoder(nn.Module):
    """The interface of `Autoencoder` without parameters or loss: space to depth, and back, in float32."""

    config: PixelAutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    def encode(self, images: jax.Array) -> jax.Array:
        """f[N,H,W,3] -> moments f32[N,h,w,2c], of the smallest variance there is.

        Raises:
          ValueError: if height or width is no multiple of `patch_size`.
        """
        p = self.config.patch_size
        require_multiple(images, p)
        n, height, width, channels = images.shape
        mean = images.astype(jnp.float32).reshape(n, height // p, p, width // p, p, channels)
        mean = mean.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // p, width // p, p * p * channels)
        return shard_images(jnp.concatenate([mean, jnp.full_like(mean, LOGVAR_MIN)], axis=-1))

    def decode(self, latents: jax.Array) -> jax.Array:
        """f[N,h,w,c] -> images f32[N,H,W,3]."""
        p = self.config.patch_size
        n, height, width, channels = latents.shape
        x = latents.astype(jnp.float32).reshape(n, height, width, p, p, channels // p**2)
        return shard_images(x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height * p, width * p, channels // p**2))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Gives the images back."""
        return self.decode(jnp.split(self.encode(images), 2, axis=-1)[0])
