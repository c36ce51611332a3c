"""Rows of encoded documents to a batch: tokens in their places, images decoded into their slots.

Legend: B rows, L tokens in a row, K see slots, D dream slots.
"""

import collections
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dreamllm_jax.data import images
from dreamllm_jax.data.batch import Batch, RowShape
from dreamllm_jax.data.document import Image
from dreamllm_jax.data.packing import Item

Counts = collections.Counter[tuple[str, str]]  # by corpus and what is counted


class Pixels:
    """What stands for images in a batch: what is stored of them, or their pixels in the sizes of a row.

    The latest pixels are remembered, up to `memory` bytes: a small data set is then decoded once; a large one pays only
    the memory. Threads may share it. Both methods raise `ImageError` for an image that cannot be used.
    """

    def __init__(self, shape: RowShape, memory: int = 64 << 20):
        self._shape, self._memory = shape, memory
        self._used = 0
        self._kept: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._decode = functools.lru_cache(maxsize=8)(images.decode)  # what is painted is often read back

    def see(self, image: Image) -> np.ndarray:
        """u8[H, W, 3] for CLIP, or its stored features."""
        if self._shape.see_features:
            return _stored(image, "features")
        return self._remember(images.clip_pixels, image.data, self._shape.see_size)

    def dream(self, image: Image, flip: bool = False) -> np.ndarray:
        """u8[H', W', 3] for the diffusion model, or its stored moments."""
        if self._shape.dream_moments:
            return _stored(image, "moments")
        return self._remember(images.diffusion_pixels, image.data, self._shape.dream_size, flip)

    def _remember(self, crop: Callable[..., np.ndarray], data: bytes, *options: Any) -> np.ndarray:
        key = (crop, data, *options)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        pixels = crop(self._decode(data), *options)
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
    see_into = batch.see_images if batch.see_features is None else batch.see_features
    dream_into = batch.dream_images if batch.dream_moments is None else batch.dream_moments
    start = 0
    for segment, item in enumerate(row, 1):
        encoded, corpus = item.encoded, item.corpus
        stop = start + len(encoded.tokens)
        batch.tokens[index, start:stop] = encoded.tokens
        batch.segment_ids[index, start:stop] = segment
        batch.positions[index, start:stop] = np.arange(stop - start)
        counts[corpus, "documents"] += 1
        counts[corpus, "tokens"] += stop - start
        try:
            see = [pixels.see(image) for image in encoded.see]
            dream = [pixels.dream(image, item.flip) for image in encoded.dream]
        except images.ImageError as error:
            if strict:
                raise
            counts[corpus, f"dropped_{error.reason}"] += 1
        else:
            batch.loss_weights[index, start:stop] = encoded.loss_weights
            _fill_slots(batch.see_slots[index], see_into[index], start + encoded.see_slots, see)
            _fill_slots(batch.dream_slots[index], dream_into[index], start + encoded.dream_slots, dream)
            counts[corpus, "see"] += len(see)
            counts[corpus, "dream"] += len(dream)
        start = stop
    return counts


def _fill_slots(slots: np.ndarray, into: np.ndarray, places: np.ndarray, images: Sequence[np.ndarray]) -> None:
    """Puts images and their places into the first empty ones of a row's slots."""
    first = int((slots >= 0).sum())
    for slot, (place, image) in enumerate(zip(places, images, strict=True), first):
        slots[slot], into[slot] = place, image


def _stored(image: Image, name: str) -> np.ndarray:
    value = image.stored.get(name)
    if value is None or not np.isfinite(value.astype(np.float32)).all():
        raise images.ImageError("stored", f"an image without finite stored {name}")
    return value
