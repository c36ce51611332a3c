"""The batch: what the data hand to the model, with static shapes.

Images stand in *groups* of slots, each of one height and width, so that rows can hold images of several sizes and every
shape stays static.

Legend: B rows, L tokens in a row, S slots of a group, H x W pixels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class SlotGroup:
    """Room in a row for images of one size.

    Attributes:
      slots: how many (S).
      tokens: of the row that each takes: patches of an image that is seen, queries of one that is painted.
      height, width: pixels.
      pixels: shape of the array of an image's pixels; empty where that is height x width x 3.
      stored: shape of the stored array that stands for an image; empty where its pixels do.
      dtype: the type of stored arrays.
      sizes: whether the sizes of each picture stand beside it.
    """

    slots: int
    tokens: int
    height: int
    width: int
    stored: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    sizes: bool = False
    pixels: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("slots", "tokens", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a group of slots must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static shape of a row; of text alone, unless told.

    Attributes:
      length: tokens in a row (L).
      see: groups of slots for images that are read.
      dream: groups of slots for images that are painted.
      axes: of a token's position, 1 or 3 (`data.positions`), as the language model has them.
    """

    length: int
    see: tuple[SlotGroup, ...] = ()
    dream: tuple[SlotGroup, ...] = ()
    axes: int = 1

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length of a row must be at least 1, got {self.length}")

    @property
    def room(self) -> tuple[int, ...]:
        """Tokens, then the slots of each group: what documents take of a row."""
        return (self.length, *(group.slots for group in self.see + self.dream))

    @property
    def see_slots(self) -> int:
        """Images that a row has room to see, of all sizes."""
        return sum(group.slots for group in self.see)

    @property
    def dream_slots(self) -> int:
        """Images that a row has room to paint, of all sizes."""
        return sum(group.slots for group in self.dream)


@struct.dataclass
class Slots:
    """A group of slots in all rows.

    Attributes:
      at: i32[B, S] index in the row of an image's first token, -1 for an empty slot.
      images: u8[B, S, H, W, 3] pixels (floats are taken as normalised for the tower), apart where the tower sees them
        so, as u8[B, S, ...]; or f[B, S, ...] what is stored of them; None where images are only painted from, not
        learned.
      stored: whether `images` are stored arrays.
      sizes: f32[B, S, 6] what was done to pictures, see `data.images.paint_sizes`; None where the denoiser is not told.
    """

    at: Array
    images: Array | None
    stored: bool = struct.field(pytree_node=False, default=False)
    sizes: Array | None = None

    @property
    def filled(self) -> Array:
        """bool[B, S]: which slots have an image."""
        return self.at >= 0


@struct.dataclass
class Batch:
    """Packed rows of documents.

    Attributes:
      tokens: i32[B, L] token ids; image and query positions hold their placeholder id.
      segment_ids: i32[B, L] 0 is padding, 1.. are the documents packed in the row.
      positions: i32[B, L] positions, restarting at 0 in each document; i32[B, L, 3] for a language model whose
        positions have three axes (`data.positions`).
      loss_weights: f32[B, L] weight of predicting `tokens[i]` from its prefix; 0 at the start of a document, on
        padding and on tokens that are not learned, below on those of an answer that is worse than the segment before.
      see: images that are read, by group.
      dream: images that are painted, by group.
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    loss_weights: Array
    see: tuple[Slots, ...] = ()
    dream: tuple[Slots, ...] = ()


def empty_batch(count: int, shape: RowShape, pad: int = 0) -> Batch:
    """A batch of `count` rows in which nothing is filled."""

    def room(group: SlotGroup) -> Slots:
        size, dtype = group.pixels or (group.height, group.width, 3), jnp.uint8
        if group.stored:
            size, dtype = group.stored, jnp.dtype(group.dtype)
        at = np.full((count, group.slots), -1, np.int32)
        sizes = np.zeros((count, group.slots, 6), np.float32) if group.sizes else None
        return Slots(at, np.zeros((count, group.slots, *size), dtype), bool(group.stored), sizes)

    return Batch(
        tokens=np.full((count, shape.length), pad, np.int32),
        segment_ids=np.zeros((count, shape.length), np.int32),
        positions=np.zeros((count, shape.length) if shape.axes == 1 else (count, shape.length, shape.axes), np.int32),
        loss_weights=np.zeros((count, shape.length), np.float32),
        see=tuple(map(room, shape.see)),
        dream=tuple(map(room, shape.dream)),
    )
