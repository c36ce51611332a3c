"""Rows of encoded documents to a batch: tokens in their places, images decoded into their slots.

Legend: B rows, L tokens in a row, H x W pixels.
"""

import collections
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dreamllm_jax.data import images
from dreamllm_jax.data.batch import Batch, RowShape, Slots
from dreamllm_jax.data.document import Image
from dreamllm_jax.data.packing import Item
from dreamllm_jax.data.positions import grid_of, place
from dreamllm_jax.data.writing import Encoded, Placed

Counts = collections.Counter[tuple[str, str]]  # by corpus and what is counted


# Makes u8 pixels of a Pillow image, given height and width; what is painted is mirrored if it is told `flip=True`.
Crop = Callable[..., np.ndarray]


class Pixels:
    """What stands for images in a batch: what is stored of them, or their pixels in the sizes of a row.

    The latest pixels are remembered, up to `memory` bytes: a small data set is then decoded once; a large one pays only
    the memory. Threads may share it. `see` and `dream` raise `ImageError` for an image that cannot be used.

    Args:
      see, dream: the vision encoder's and the image decoder's `preprocess`.
    """

    def __init__(self, shape: RowShape, see: Crop, dream: Crop, memory: int = 64 << 20):
        self._shape, self._crops, self._memory = shape, {"see": see, "dream": dream}, memory
        self._used = 0
        self._kept: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._decode = functools.lru_cache(maxsize=8)(images.decode)  # what is painted is often read back

    def see(self, placed: Placed) -> np.ndarray:
        """u8 pixels for the vision encoder, or its stored features."""
        group = self._shape.see[placed.group]
        if group.stored:
            return _stored(placed.image, "features")
        return self._remember("see", placed.image.data, group.height, group.width)

    def dream(self, placed: Placed, flip: bool = False) -> np.ndarray:
        """u8[H, W, 3] for the image decoder, or what is stored of it."""
        group = self._shape.dream[placed.group]
        if group.stored:
            return _stored(placed.image, "moments")
        return self._remember("dream", placed.image.data, group.height, group.width, *([True] if flip else []))

    def sizes(self, placed: Placed, flip: bool = False) -> np.ndarray:
        """f32[6] of what is painted; see `images.paint_sizes`."""
        group = self._shape.dream[placed.group]
        return images.paint_sizes(images.size_of(placed.image.data), group.height, group.width, flip)

    def positions(self, encoded: Encoded, begin: int, end: int) -> np.ndarray:
        """Of the tokens from `begin` to `end`, a document or a part that begins anew: i32[n], or i32[n, 3]."""
        if self._shape.axes == 1:
            return np.arange(end - begin)
        groups = [self._shape.see[placed.group] for placed in encoded.see]
        grids = (grid_of(group.tokens, group.height, group.width) for group in groups)
        read = [(placed.at - begin, grid) for placed, grid in zip(encoded.see, grids, strict=True)]
        return place(end - begin, [image for image in read if 0 <= image[0] < end - begin])

    def _remember(self, use: str, data: bytes, *options: Any) -> np.ndarray:
        key = (use, data, *options)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        pixels = self._crops[use](self._decode(data), *options)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = pixels
                self._used += pixels.nbytes + len(data)
            while self._used > self._memory:
                (_, old, *_), gone = self._kept.popitem(last=False)
                self._used -= gone.nbytes + len(old)
        return pixels


def fill_row(batch: Batch, index: int, row: Sequence[Item], pixels: Pixels, strict: bool = False) -> Counts:
    """Writes one row into an empty batch.

    A document with an image that cannot be decoded teaches nothing: its loss weights stay 0 and its slots empty, so
    that no text is ever learned from a picture that is not there, and no picture meets another's slot.

    Args:
      strict: raise `ImageError` instead.

    Returns:
      What the row holds, by corpus: documents, tokens, see, dream, and `dropped_<reason>` for documents whose images
      cannot be decoded.
    """
    counts: Counts = collections.Counter()
    start = segment = 0
    for item in row:
        encoded, corpus = item.encoded, item.corpus
        stop = start + len(encoded.tokens)
        batch.tokens[index, start:stop] = encoded.tokens
        for begin, end in itertools.pairwise((*encoded.starts, stop - start)):
            segment, where = segment + 1, slice(start + begin, start + end)
            batch.segment_ids[index, where] = segment
            batch.positions[index, where] = pixels.positions(encoded, begin, end)
        counts[corpus, "documents"] += 1
        counts[corpus, "tokens"] += stop - start
        try:
            see = [pixels.see(placed) for placed in encoded.see]
            dream = [pixels.dream(placed, item.flip) for placed in encoded.dream]
        except images.ImageError as error:
            if strict:
                raise
            counts[corpus, f"dropped_{error.reason}"] += 1
        else:
            batch.loss_weights[index, start:stop] = encoded.loss_weights
            _fill_slots(batch.see, index, start, encoded.see, see)
            told = functools.partial(pixels.sizes, flip=item.flip)
            _fill_slots(batch.dream, index, start, encoded.dream, dream, told)
            counts[corpus, "see"] += len(see)
            counts[corpus, "dream"] += len(dream)
        start = stop
    return counts


def _fill_slots(
    groups: Sequence[Slots],
    index: int,
    start: int,
    places: Sequence[Placed],
    images: Sequence[np.ndarray],
    sizes: Callable[[Placed], np.ndarray] | None = None,
) -> None:
    """Puts a document's images, their places and, where wanted, sizes into the first empty slots of their groups."""
    for placed, image in zip(places, images, strict=True):
        slots = groups[placed.group]
        slot = int((slots.at[index] >= 0).sum())
        slots.at[index, slot], slots.images[index, slot] = start + placed.at, image
        if slots.sizes is not None:
            slots.sizes[index, slot] = sizes(placed)


def _stored(image: Image, name: str) -> np.ndarray:
    value = image.stored.get(name)
    if value is None or not np.isfinite(value.astype(np.float32)).all():
        raise images.ImageError("stored", f"an image without finite stored {name}")
    return value
