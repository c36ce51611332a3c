"""Encoded documents to rows, and rows to a batch.

Documents are packed with their images still encoded, and the images of a row are decoded afterwards: that keeps the
open rows small.

Legend: B rows, L tokens in a row, K see slots, D dream slots.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from dreamllm_jax.batch import Batch
from dreamllm_jax.data import images
from dreamllm_jax.data.tokens import Encoded, RowShape

Row = Mapping[str, np.ndarray]


class Placed(NamedTuple):
    """An encoded image and the index of its first token, in its document."""

    data: bytes
    slot: int
    flip: bool = False


def to_features(encoded: Encoded, flip: bool = False) -> dict[str, np.ndarray]:
    """The arrays that are packed: two with an entry for each token, two with an entry for each image."""
    see = [Placed(data, int(slot)) for data, slot in zip(encoded.see, encoded.see_slots, strict=True)]
    dream = [Placed(data, int(slot), flip) for data, slot in zip(encoded.dream, encoded.dream_slots, strict=True)]
    return {
        "tokens": encoded.tokens,
        "loss_weights": encoded.loss_weights,
        "see": _objects(see),
        "dream": _objects(dream),
    }


def _capacities(shape: RowShape) -> dict[str, int]:
    return {
        "tokens": shape.length,
        "loss_weights": shape.length,
        "see": shape.see_slots,
        "dream": shape.dream_slots,
    }


def pack(documents: grain.IterDataset, shape: RowShape, bins: int, seed: int) -> grain.IterDataset:
    """Packs a stream of features into rows by first fit over `bins` open rows; `bins` = 0 gives each document a row."""
    return grain.experimental.FirstFitPackIterDataset(
        documents,
        length_struct=_capacities(shape),
        num_packing_bins=max(bins, 1),
        max_sequences_per_bin=None if bins else 1,
        seed=seed,
    )


def single_row(encoded: Encoded, shape: RowShape) -> Row:
    """The row that holds one document and nothing else."""
    row: dict[str, np.ndarray] = {}
    for name, values in to_features(encoded).items():
        capacity, used = _capacities(shape)[name], len(values)
        row[name] = np.zeros(capacity, values.dtype)
        row[name][:used] = values
        row[f"{name}_segment_ids"] = (np.arange(capacity) < used).astype(np.int32)
        row[f"{name}_positions"] = np.where(np.arange(capacity) < used, np.arange(capacity), 0).astype(np.int32)
    return row


class Pixels:
    """Decodes images to the sizes of a row, remembering the latest ones up to `memory` bytes of pixels.

    A small data set is then decoded once; a large one pays only the memory.
    """

    def __init__(self, shape: RowShape, memory: int = 64 << 20):
        self._shape, self._memory = shape, memory
        self._used = 0
        self._kept: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()

    def see(self, image: Placed) -> np.ndarray:
        """u8[H, W, 3] for CLIP."""
        return self._remember(images.clip_pixels, image.data, self._shape.see_size)

    def dream(self, image: Placed) -> np.ndarray:
        """u8[H', W', 3] for the diffusion model."""
        return self._remember(images.diffusion_pixels, image.data, self._shape.dream_size, image.flip)

    def _remember(self, crop: Callable[..., np.ndarray], data: bytes, *options: Any) -> np.ndarray:
        key = (crop, data, *options)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        pixels = crop(images.decode(data), *options)
        self._kept[key] = pixels
        self._used += pixels.nbytes + len(data)
        while self._used > self._memory:
            (_, old, *_), gone = self._kept.popitem(last=False)
            self._used -= gone.nbytes + len(old)
        return pixels


def to_batch(
    rows: Sequence[Row], shape: RowShape, pixels: Pixels, pad: int, strict: bool = False
) -> tuple[Batch, dict[str, int]]:
    """Decodes the images of packed rows.

    A document with an image that cannot be decoded teaches nothing: its loss weights become 0 and its slots empty, so
    that no text is ever learned from a picture that is not there, and no picture meets another's slot.

    Args:
      rows: B packed rows.
      shape: their shape.
      pixels: decoder.
      pad: the id of padding.
      strict: raise `ImageError` instead.

    Returns:
      The batch, and how much it holds: rows, documents, tokens, see, dream, and `dropped_<reason>` images.
    """
    count = len(rows)
    batch = Batch(
        tokens=np.stack([np.where(row["tokens_segment_ids"] > 0, row["tokens"], pad) for row in rows]),
        segment_ids=np.stack([row["tokens_segment_ids"] for row in rows]),
        positions=np.stack([row["tokens_positions"] for row in rows]),
        loss_weights=np.stack([row["loss_weights"] for row in rows]),
        see_images=np.zeros((count, shape.see_slots, shape.see_size, shape.see_size, 3), np.uint8),
        see_slots=np.full((count, shape.see_slots), -1, np.int32),
        dream_images=np.zeros((count, shape.dream_slots, shape.dream_size, shape.dream_size, 3), np.uint8),
        dream_slots=np.full((count, shape.dream_slots), -1, np.int32),
    )
    dropped: collections.Counter[str] = collections.Counter()
    for index, row in enumerate(rows):
        dropped.update(_fill(batch, index, row, pixels, strict))
    held = {
        "rows": count,
        "documents": int(batch.segment_ids.max(axis=1).sum()),
        "tokens": int((batch.segment_ids > 0).sum()),
        "see": int((batch.see_slots >= 0).sum()),
        "dream": int((batch.dream_slots >= 0).sum()),
    }
    return batch, held | dropped


def _fill(batch: Batch, index: int, row: Row, pixels: Pixels, strict: bool) -> list[str]:
    """Puts the images of one row in its slots; returns why images were dropped."""
    segments = batch.segment_ids[index]
    targets = (
        ("see", pixels.see, batch.see_slots[index], batch.see_images[index]),
        ("dream", pixels.dream, batch.dream_slots[index], batch.dream_images[index]),
    )
    broken: set[int] = set()
    reasons = []
    for name, decode, slots, canvas in targets:
        owners = row[f"{name}_segment_ids"]
        for place in np.flatnonzero(owners):
            image = row[name][place]
            try:
                canvas[place] = decode(image)
            except images.ImageError as error:
                if strict:
                    raise
                broken.add(int(owners[place]))
                reasons.append(f"dropped_{error.reason}")
                continue
            slots[place] = np.argmax(segments == owners[place]) + image.slot
    for segment in broken:
        batch.loss_weights[index][segments == segment] = 0
        for name, _, slots, canvas in targets:
            gone = row[f"{name}_segment_ids"] == segment
            slots[gone] = -1
            canvas[gone] = 0
    return reasons


def _objects(values: Sequence[Placed]) -> np.ndarray:
    array = np.empty(len(values), object)
    for index, value in enumerate(values):
        array[index] = value
    return array
