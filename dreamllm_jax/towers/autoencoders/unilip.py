"""UniLIP's autoencoder (arXiv 2507.23278): latents are made of what the language model is given of a picture, pixels of
latents by the decoder of a deep compression autoencoder (`dc.py`).

A latent stands for as many pixels as one of those features; the decoder doubles its way to a picture somewhat larger
than the one that was seen (512 pixels for 448), which is then scaled to that size. The program is nnnth/UniLIP
(`vae_modules.py`, and `tokenizer/`, by which it is trained first: `objectives.reconstruction`). Parameters are named as
there.

Legend: N images, T features of an image, E their width, h x w x c latents, H x W pixels.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.layers.blocks import Dense, LayerNorm, shard_images
from dreamllm_jax.layers.flops import Tally, dense
from dreamllm_jax.towers.autoencoders import dc
from dreamllm_jax.towers.autoencoders.dc import DCAutoencoderConfig
from dreamllm_jax.towers.diffusers_config import require

_BLOCK_EPS, _EPS = 1e-6, 1e-5  # of the residual blocks' norms, and of the one after them


@dataclasses.dataclass(frozen=True)
class UnilipAutoencoderConfig:
    """Residual blocks over the features and two linear layers lead to latents; the defaults are UniLIP-1B's.

    Attributes:
      feature_width: of what the language model is given (E).
      blocks: residual blocks.
      decoder: of whose settings the decoder's alone count, and `latent_channels`.
      downscale: pixels along a side of the square that a feature, and so a latent, stands for.
      scaling_factor: by which latents are multiplied, UniLIP's `unilip_factor`.
    """

    feature_width: int = 896
    blocks: int = 3
    decoder: DCAutoencoderConfig = DCAutoencoderConfig()
    downscale: int = 28
    scaling_factor: float = 10.6
    kind: Literal["unilip"] = "unilip"
    deterministic: ClassVar[bool] = True
    encode_depends: ClassVar[tuple[str, ...]] = ("down_blocks", "down_mlp")
    public = None

    def __post_init__(self) -> None:
        for name in ("feature_width", "blocks", "downscale", "scaling_factor"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.decoder.latent_channels

    @property
    def encoded_channels(self) -> int:
        """Channels of what `encode` gives."""
        return self.latent_channels

    def latents(self, encoded: Float[Array, "N h w c"], noise: None = None) -> Float[Array, "N h w c"]:
        """What `encode` gave, scaled, in float32. Nothing is drawn."""
        return encoded.astype(jnp.float32) * self.scaling_factor

    def unscaled(self, latents: Float[Array, "N h w c"]) -> Float[Array, "N h w c"]:
        """The inverse of `latents`: what `decode` takes."""
        return latents / self.scaling_factor

    def run_public(self, module: Any, features: Any, latents: Any) -> dict[str, Any]:
        """What `interop.unilip_modules.autoencoder` makes of torch's f[N,T,E] features and f[N,c,h,w] latents."""
        return {"stored": module.encode(features), "images": module.decode(latents)}

    def make(self, dtype: Any) -> "UnilipAutoencoder":
        """The module; see there."""
        return UnilipAutoencoder(self, dtype=dtype)

    def encoder_flops(self, tally: Tally, images: int, height: int, width: int) -> None:
        """Adds the way from the features of so many images to their latents."""
        features = images * (height // self.downscale) * (width // self.downscale)
        own, channels = self.feature_width, self.latent_channels
        products = [(f"down_blocks_{block}/mlp_{layer}", own, own) for block in range(self.blocks) for layer in (1, 3)]
        for name, inputs, outputs in (*products, ("down_mlp_1", own, channels), ("down_mlp_3", channels, channels)):
            tally.product(f"{name}/kernel", dense(features, inputs, outputs))

    def decoder_flops(self, tally: Tally, images: int, height: int, width: int) -> None:
        """Adds the way from so many latents to pixels; scaling pictures is not counted."""
        self.decoder.decoder_flops(tally, images, (height // self.downscale, width // self.downscale))


# Name -> settings.
PUBLISHED: dict[str, dict[str, Any]] = {
    name: {
        "kind": "unilip",
        "feature_width": width,
        "decoder": dc.PUBLISHED["dc-ae-f32c32-sana-1.1"],
        "scaling_factor": factor,
    }
    for name, width, factor in (("unilip-1b", 896, 10.6), ("unilip-2b", 1536, 9.5))
}


class _Block(nn.Module):
    """x plus a perceptron of it."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N,T,E] -> f[N,T,E]."""
        h = LayerNorm(_BLOCK_EPS, self.dtype, name="mlp_0")(x)
        h = nn.gelu(Dense(x.shape[-1], dtype=self.dtype, name="mlp_1")(h), approximate=False)
        return x + Dense(x.shape[-1], dtype=self.dtype, name="mlp_3")(h)


class UnilipAutoencoder(nn.Module):
    """The autoencoder."""

    config: UnilipAutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        self.down_blocks = [_Block(dtype) for _ in range(config.blocks)]
        self.down_mlp_0 = LayerNorm(_EPS, dtype)
        self.down_mlp_1 = Dense(config.latent_channels, dtype=dtype)
        self.down_mlp_3 = Dense(config.latent_channels, dtype=dtype)
        self.decoder = dc.Decoder(config.decoder, dtype)

    def encode(self, features: Float[Array, "N T E"]) -> Float[Array, "N h w c"]:
        """Unscaled latents, in float32, of the features of square pictures, which lie line by line."""
        x, side = shard_images(features.astype(self.dtype)), math.isqrt(features.shape[1])
        for block in self.down_blocks:
            x = block(x)
        x = self.down_mlp_3(nn.gelu(self.down_mlp_1(self.down_mlp_0(x)), approximate=False))
        return x.reshape(len(x), side, side, -1).astype(jnp.float32)

    def decode(self, latents: Float[Array, "N h w c"]) -> Float[Array, "N H W 3"]:
        """Unscaled latents -> images in float32, scaled bilinearly (half-pixel centres, no antialiasing)."""
        x = self.decoder(shard_images(latents.astype(self.dtype))).astype(jnp.float32)
        size = tuple(side * self.config.downscale for side in latents.shape[1:3])
        return shard_images(jax.image.resize(x, (len(x), *size, x.shape[-1]), "linear", antialias=False))
