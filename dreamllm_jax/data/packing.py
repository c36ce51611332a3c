"""Encoded documents to rows, and rows to a batch.

Documents are packed with their images still encoded, and the images of a row are decoded afterwards: that keeps the
open rows small.

Legend: B rows, L tokens in a row, K see slots, D dream slots.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from dreamllm_jax.batch import Batch
from dreamllm_jax.data import images
from dreamllm_jax.data.tokens import Encoded, RowShape

Row = Mapping[str, np.ndarray]


def to_features(encoded: Encoded, flip: bool = False) -> dict[str, np.ndarray]:
    """The arrays that are packed; image features have one entry for each image, slots counted from the document."""
    return {
        "tokens": encoded.tokens,
        "loss_weights": encoded.loss_weights,
        "see": _objects(encoded.see),
        "see_slots": encoded.see_slots,
        "dream": _objects(encoded.dream),
        "dream_slots": encoded.dream_slots,
        "dream_flips": np.full(len(encoded.dream), flip),
    }


def _capacities(shape: RowShape) -> dict[str, int]:
    rooms = {"tokens": shape.length, "loss_weights": shape.length}
    rooms |= {"see": shape.see_slots, "see_slots": shape.see_slots}
    return rooms | {name: shape.dream_slots for name in ("dream", "dream_slots", "dream_flips")}


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


def to_batch(rows: Sequence[Row], shape: RowShape, pad: int, strict: bool = False) -> tuple[Batch, dict[str, int]]:
    """Decodes the images of packed rows.

    A document with an image that cannot be decoded teaches nothing: its loss weights become 0 and its slots empty, so
    that no text is ever learned from a picture that is not there, and no picture meets another's slot.

    Args:
      rows: B packed rows.
      shape: their shape.
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
    held = collections.Counter(rows=count)
    for index, row in enumerate(rows):
        held.update(_fill(batch, index, row, shape, strict))
    return batch, dict(held)


def _fill(batch: Batch, index: int, row: Row, shape: RowShape, strict: bool) -> dict[str, int]:
    """Puts the images of one row in its slots; says what the row holds."""
    segments = batch.segment_ids[index]
    starts = {int(s): int(i) for s, i in zip(*np.unique(segments, return_index=True), strict=True)}
    pictures: dict[bytes, Any] = {}
    broken: set[int] = set()
    dropped: collections.Counter[str] = collections.Counter()
    for name, slots, pixels in (
        ("see", batch.see_slots[index], batch.see_images[index]),
        ("dream", batch.dream_slots[index], batch.dream_images[index]),
    ):
        for place in np.flatnonzero(row[f"{name}_segment_ids"]):
            data, segment = row[name][place], int(row[f"{name}_segment_ids"][place])
            try:
                picture = pictures[data] if data in pictures else pictures.setdefault(data, images.decode(data))
                if name == "see":
                    pixels[place] = images.clip_pixels(picture, shape.see_size)
                else:
                    pixels[place] = images.diffusion_pixels(picture, shape.dream_size, bool(row["dream_flips"][place]))
            except images.ImageError as error:
                if strict:
                    raise
                broken.add(segment)
                dropped[f"dropped_{error.reason}"] += 1
                continue
            slots[place] = starts[segment] + row[f"{name}_slots"][place]
    for segment in broken:
        batch.loss_weights[index][segments == segment] = 0
        for name, slots in (("see", batch.see_slots[index]), ("dream", batch.dream_slots[index])):
            slots[row[f"{name}_segment_ids"] == segment] = -1
    return {
        "documents": int(segments.max(initial=0)),
        "tokens": int((segments > 0).sum()),
        "see": int((batch.see_slots[index] >= 0).sum()),
        "dream": int((batch.dream_slots[index] >= 0).sum()),
        **dropped,
    }


def _objects(values: Sequence[bytes]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array
