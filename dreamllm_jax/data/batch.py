"""The batch: what the data pipeline hands to the model, with static shapes.

Legend: B rows, L tokens in a row, K see slots, D dream slots, H x W and H' x W' pixels, h x w x c latents.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static shape of a row; of text alone, unless told.

    Attributes:
      length: tokens in a row (L).
      see_slots: room for images to read (K).
      dream_slots: room for images to paint (D).
      num_patches: tokens of an image that is read (P).
      num_queries: tokens of an image that is painted (Q).
      see_size: pixels on a side of an image that is read.
      dream_size: pixels on a side of an image that is painted.
      see_features: shape of the stored features that stand for an image to read; empty where its pixels do.
      dream_moments: shape of the stored moments that stand for an image to paint; empty where its pixels do.
      stored_dtype: the type of both.
    """

    length: int
    see_slots: int = 0
    dream_slots: int = 0
    num_patches: int = 0
    num_queries: int = 0
    see_size: int = 0
    dream_size: int = 0
    see_features: tuple[int, ...] = ()
    dream_moments: tuple[int, ...] = ()
    stored_dtype: str = "bfloat16"

    def __post_init__(self):
        least = {"length": 1, "see_slots": 0, "dream_slots": 0}
        least |= {"num_patches": 1, "see_size": 1} if self.see_slots else {}
        least |= {"num_queries": 1, "dream_size": 1} if self.dream_slots else {}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} of a row must be at least {value}, got {getattr(self, name)}")


@struct.dataclass
class Batch:
    """Packed rows of documents.

    Attributes:
      tokens: i32[B, L] token ids; image and query positions hold their placeholder id.
      segment_ids: i32[B, L] 0 is padding, 1.. are the documents packed in the row.
      positions: i32[B, L] positions, restarting at 0 in each document.
      loss_weights: f32[B, L] weight of predicting `tokens[i]` from its prefix; 0 at the start of a document, on
        padding and on tokens that are not learned.
      see_images: u8[B, K, H, W, 3] images to read, resized and cropped for CLIP (floats are taken as normalised); None
        when `see_features` is given.
      see_slots: i32[B, K] index in the row of the image's first patch token, -1 for an empty slot.
      dream_images: u8[B, D, H', W', 3] images to paint (floats are taken as already in [-1, 1]); None when
        `dream_moments` is given.
      dream_slots: i32[B, D] index in the row of the image's first query, -1 for an empty slot.
      dream_moments: f[B, D, h, w, 2c] the autoencoder's stored output, instead of `dream_images`.
      see_features: f[B, K, P, width] the stored features of the frozen CLIP tower, instead of `see_images`.
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    loss_weights: Array
    see_images: Array | None
    see_slots: Array
    dream_images: Array | None
    dream_slots: Array
    dream_moments: Array | None = None
    see_features: Array | None = None


def empty_batch(count: int, shape: RowShape, pad: int = 0) -> Batch:
    """A batch of `count` rows in which nothing is filled."""

    def room(slots: int, *stored: int) -> np.ndarray:
        return np.zeros((count, slots, *stored), jnp.dtype(shape.stored_dtype))

    def pixels(slots: int, size: int) -> np.ndarray:
        return np.zeros((count, slots, size, size, 3), np.uint8)

    return Batch(
        tokens=np.full((count, shape.length), pad, np.int32),
        segment_ids=np.zeros((count, shape.length), np.int32),
        positions=np.zeros((count, shape.length), np.int32),
        loss_weights=np.zeros((count, shape.length), np.float32),
        see_images=None if shape.see_features else pixels(shape.see_slots, shape.see_size),
        see_slots=np.full((count, shape.see_slots), -1, np.int32),
        dream_images=None if shape.dream_moments else pixels(shape.dream_slots, shape.dream_size),
        dream_slots=np.full((count, shape.dream_slots), -1, np.int32),
        see_features=room(shape.see_slots, *shape.see_features) if shape.see_features else None,
        dream_moments=room(shape.dream_slots, *shape.dream_moments) if shape.dream_moments else None,
    )
