"""Pixels as vision encoders take them: bytes, or floats that are normalised already."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

NORMALISATION = ("image_mean", "image_std")  # the settings that normalise pixels in [0, 1], RGB


def require_beginning(config: Any) -> None:
    """Raises ValueError unless a tower's weights can begin with its settings, and its pixels be normalised by them."""
    if config.initializer_range < 0 or min(config.image_std) <= 0:
        raise ValueError(
            f"initializer_range must not be negative and image_std positive, got {config.initializer_range} and "
            f"{config.image_std}"
        )


def normalise(pixels: Array, mean: Sequence[float], std: Sequence[float]) -> Float[Array, "... 3"]:
    """u8[..., 3] RGB -> f32[..., 3] with the mean taken off and divided by the standard deviation."""
    return (pixels.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def normalised(images: UInt8[Array, "... 3"] | Float[Array, "... 3"], config: Any) -> Float[Array, "... 3"]:
    """Bytes normalised as a tower's settings say; floats as they are."""
    return normalise(images, config.image_mean, config.image_std) if images.dtype == jnp.uint8 else images
