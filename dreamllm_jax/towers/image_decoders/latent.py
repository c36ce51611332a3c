"""What image decoders share that denoise an autoencoder's latents: sizes, what is stored of an image, the way to
latents and back. A decoder's own file adds its noise process.

Legend: N images, H x W pixels, h x w x c latents.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dreamllm_jax.data.images import paint_pixels
from dreamllm_jax.layers.flops import Flops, Tally
from dreamllm_jax.parallel.mesh import constrain
from dreamllm_jax.towers.condition import Condition


class LatentDecoderRole:
    """Of a configuration with the fields `denoiser`, `autoencoder` and `remat`; see `towers.roles.ImageDecoderRole`."""

    wants_sizes: ClassVar[bool] = False
    upcast: ClassVar[bool] = False  # whether the autoencoder computes in float32, whatever the model does

    denoiser: Any
    autoencoder: Any
    remat: str

    @classmethod
    def describes(cls, parts: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether the config.json of parts, by name, that are of its classes are of this decoder."""
        return True

    def require_channels(self) -> None:
        """Raises ValueError if the denoiser is not for the autoencoder's latents."""
        if self.denoiser.in_channels != self.autoencoder.latent_channels:
            raise ValueError(
                f"denoiser.in_channels is {self.denoiser.in_channels}, but the autoencoder's latents have "
                f"{self.autoencoder.latent_channels} channels"
            )

    @property
    def encodes_features(self) -> Literal["", "vision_encoder", "visual_projector"]:
        """The tower of whose features latents are made, not of pixels."""
        return "visual_projector" if self.autoencoder.feature_width else ""

    def require_features(self, size: int, tokens: int, width: int) -> None:
        """Raises ValueError if latents cannot be made of so many features, so wide, of images of this size."""
        height, across, _ = self.latent_shape(self.default_size, self.default_size)
        if size != self.default_size or tokens != height * across:
            raise ValueError(
                f"image_decoder: its latents are {tokens} features of pictures of {size} pixels, as the vision encoder "
                f"sees them; it was made for {height * across} of {self.default_size} pixels"
            )
        if self.autoencoder.feature_width not in (0, width):
            raise ValueError(
                f"image_decoder.autoencoder.feature_width is {self.autoencoder.feature_width}, but features "
                f"have {width} channels"
            )

    @property
    def condition_width(self) -> int:
        """Of the condition's sequence (C)."""
        return self.denoiser.condition_width

    @property
    def pooled_width(self) -> int:
        """Of the condition's pooled vector; 0 for none."""
        return self.denoiser.pooled_width

    @property
    def default_size(self) -> int:
        """Pixels on a side of the images that it was made for."""
        return (self.denoiser.sample_size or 64) * self.autoencoder.downscale

    @property
    def size_multiple(self) -> int:
        """Height and width of what is painted must be multiples of it."""
        return self.autoencoder.downscale * self.denoiser.size_multiple

    @property
    def largest_size(self) -> int | None:
        """Of the height and width of images; None for any."""
        if self.encodes_features:
            return self.default_size
        most = self.denoiser.largest_size
        return most and most * self.autoencoder.downscale

    @property
    def training_size_multiple(self) -> int:
        """Height and width of what is learned must be multiples of it."""
        return self.default_size if self.encodes_features else self.size_multiple

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) of the latents of an image of so many pixels."""
        scale = self.autoencoder.downscale
        return height // scale, width // scale, self.autoencoder.latent_channels

    @property
    def stored_depends(self) -> tuple[str, ...]:
        """How the paths begin of the parameters that what is stored depends on."""
        return tuple(f"autoencoder/{path}" for path in self.autoencoder.encode_depends)

    @property
    def stored_settings(self) -> dict[str, Any]:
        """The settings that what is stored depends on."""
        return {"autoencoder": dataclasses.asdict(self.autoencoder)}

    def stored_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of what is stored of an image: what the autoencoder makes of it."""
        return *self.latent_shape(height, width)[:2], self.autoencoder.encoded_channels

    def latent_shape_of(self, shape: tuple[int, ...], stored: bool) -> tuple[int, int, int]:
        """(h, w, c) of the latents of an image whose pixels, or what is stored of it, have this shape."""
        return (*shape[:2], self.autoencoder.latent_channels) if stored else self.latent_shape(*shape[:2])

    def preprocess(self, image: Any, height: int, width: int, flip: bool = False) -> UInt8[np.ndarray, "H W 3"]:
        """The pixels of a Pillow image as they are learned, mirrored if told to."""
        return paint_pixels(image, height, width, flip)

    def flops(
        self, tally: Tally, images: int, height: int, width: int, queries: int, condition_live: bool, stored: bool
    ) -> dict[str, Flops]:
        """FLOPs by part of the training error of so many images.

        Args:
          condition_live: whether gradients go back to the condition, which has so many `queries`.
          stored: whether the autoencoder is left out.
        """
        autoencoder = tally.part("autoencoder")
        if not stored:
            self.autoencoder.encoder_flops(autoencoder, images, height, width)
        denoiser = tally.part("denoiser", autoencoder.live)
        size = self.latent_shape(height, width)[:2]
        self.denoiser.flops(denoiser, images, size, queries, condition_live, self.remat)
        return {"autoencoder": autoencoder.total, "denoiser": denoiser.total}

    def reconstruction_flops(
        self, tally: Tally, images: int, height: int, width: int, features_live: bool
    ) -> dict[str, Flops]:
        """FLOPs by part of what the autoencoder makes of the features of so many images, and of that pictures again.

        Args:
          features_live: whether gradients go back to the features.
        """
        autoencoder = tally.part("autoencoder", features_live)
        self.autoencoder.encoder_flops(autoencoder, images, height, width)
        self.autoencoder.decoder_flops(autoencoder, images, height, width)
        return {"autoencoder": autoencoder.total}


class LatentDecoder(nn.Module):
    """Its computations, over the parameters of `denoiser` and `autoencoder`."""

    config: Any
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.denoiser = self.config.denoiser.make(self.dtype, self.config.remat)
        self.autoencoder = self.config.autoencoder.make(jnp.float32 if self.config.upcast else self.dtype)

    def stored(
        self, images: UInt8[Array, "N H W 3"] | Float[Array, "N H W 3"], features: Float[Array, "N T E"] | None = None
    ) -> Float[Array, "N h w c"]:
        """What can be stored of images: what the autoencoder makes of them (or of their `features`), before scaling."""
        if features is not None:
            return self.autoencoder.encode(features)
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 127.5 - 1.0
        return self.autoencoder.encode(constrain(images, ("images", None, None, None)))

    def encode(
        self, images: Array, draws: Any, stored: bool = False, features: Float[Array, "N T E"] | None = None
    ) -> Float[Array, "N h w c"]:
        """Scaled latents of images, given as pixels or as what is `stored` of them.

        Args:
          features: of the images, where the configuration `encodes_features`.
        """
        encoded = images if stored else self.stored(images, features)
        return self.config.autoencoder.latents(encoded, draws.posterior_noise)

    def denoise(
        self, latents: Float[Array, "N h w c"], timesteps: Float[Array, " N"], condition: Condition
    ) -> Float[Array, "N h w c"]:
        """The denoiser's prediction for scaled noisy latents."""
        latents = constrain(latents, ("images", None, None, None))
        return self.denoiser(latents, timesteps, condition).astype(jnp.float32)

    def decode(self, latents: Float[Array, "N h w c"]) -> Float[Array, "N H W 3"]:
        """Scaled latents -> pixels in [-1, 1]."""
        return self.autoencoder.decode(self.config.autoencoder.unscaled(latents))

    def reconstruct(
        self, images: UInt8[Array, "N H W 3"], features: Float[Array, "N T E"] | None = None
    ) -> Float[Array, "N H W 3"]:
        """Pictures in [-1, 1], made by the autoencoder of what it made of images; `features` as of `encode`."""
        return self.autoencoder.decode(self.stored(images, features))

    def __call__(self, condition: Condition) -> None:
        """Touches every parameter once, on the smallest inputs: for `init`."""
        config, side = self.config, self.config.training_size_multiple
        height, width, _ = config.latent_shape(side, side)
        seen = config.autoencoder.feature_width
        features = jnp.zeros((1, height * width, seen)) if seen else None
        encoded = self.stored(jnp.zeros((1, side, side, 3), jnp.uint8), features)
        latents = encoded[..., : config.autoencoder.latent_channels]
        if config.wants_sizes:
            condition = condition.with_sizes(jnp.zeros((1, 6)))
        self.denoise(latents, jnp.zeros(1, jnp.int32), condition)
        self.decode(latents)
