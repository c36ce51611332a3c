"""The batch: what the data pipeline hands to the model, with static shapes.

Legend: B rows, L tokens in a row, K see slots, D dream slots, H x W and H' x W' pixels, h x w x c latents.
"""

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray


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
