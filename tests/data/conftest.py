import dataclasses
import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamllm_jax.data import images, storage, tokenizer
from dreamllm_jax.data.batch import RowShape, SlotGroup
from dreamllm_jax.data.corpora import compose
from dreamllm_jax.data.templates import VICUNA_SYSTEM
from dreamllm_jax.towers.vision_encoders.clip import ClipVisionConfig

COLOURS = {
    "a red square": (250, 10, 20),
    "a green square": (15, 230, 40),
    "a blue square": (30, 20, 240),
    "a grey square": (128, 128, 128),
    "a white square": (255, 255, 255),
    "a yellow square": (250, 240, 10),
}


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(colour: tuple[int, int, int], size: tuple[int, int] = (20, 16)) -> bytes:
    return encode(Image.new("RGB", size, colour))


def bomb(data: bytes, side: int) -> bytes:
    """A PNG that says it has so many pixels on a side."""
    header = data[12:16] + side.to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


PAIRS = [(png(colour), text) for text, colour in COLOURS.items()]


@pytest.fixture(scope="session")
def text_tokenizer() -> tokenizer.Tokenizer:
    sentences = [VICUNA_SYSTEM, "USER: ASSISTANT:", *COLOURS, "What is in the picture?", "Paint this: Here it is:"]
    return tokenizer.train_tokenizer(sentences * 20, 420)


# What makes pixels of images that are read, and of those that are painted.
CROPS = ClipVisionConfig().preprocess, images.paint_pixels


def row_shape(length: int, see: int, dream: int, queries: int = 3, see_size: int = 8) -> RowShape:
    """A row with so many slots for images of 8 or so and of 16 pixels."""
    groups = (
        (SlotGroup(see, 4, see_size, see_size),) if see else (),
        (SlotGroup(dream, queries, 16, 16),) if dream else (),
    )
    return RowShape(length, *groups)


def with_slots(shape: RowShape, **counts: int) -> RowShape:
    """The shape with so many slots to `see` or to `dream`."""
    groups = {
        name: tuple(dataclasses.replace(group, slots=count) for group in getattr(shape, name)) if count else ()
        for name, count in counts.items()
    }
    return dataclasses.replace(shape, **groups)


@pytest.fixture(scope="session")
def shape() -> RowShape:
    return row_shape(128, 4, 3)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, text_tokenizer):
    """A stored data set of all kinds of documents."""
    return write(tmp_path_factory.mktemp("data") / "set", text_tokenizer, **compose.compose(PAIRS))


def write(path, text_tokenizer, **corpora):
    storage.write_dataset(path, corpora, text_tokenizer)
    return path


def assert_sound(batch, shape: RowShape, special) -> None:
    """Every promise of the batch contract that does not need to know the documents."""
    for row in range(len(batch.tokens)):
        tokens, segments = batch.tokens[row], batch.segment_ids[row]
        positions, weights = batch.positions[row], batch.loss_weights[row]
        used = int((segments > 0).sum())
        assert (segments[:used] > 0).all() and (tokens[used:] == special.pad).all()
        assert (np.diff(segments[:used]) >= 0).all() and not weights[used:].any() and not positions[used:].any()
        for segment in range(1, segments.max() + 1):
            (where,) = np.nonzero(segments == segment)
            assert (np.diff(where) == 1).all() and (positions[where] == np.arange(len(where))).all()
            assert tokens[where[0]] == special.bos and weights[where[0]] == 0
            assert (tokens[where[1:]] != special.bos).all()
        placeholders = np.isin(tokens, [special.im_patch, special.im_start, special.im_end, special.dream_end])
        assert not weights[placeholders].any()
        covered = np.zeros(shape.length, bool)
        for slots, start, end, length in (
            (slots.at[row], *around, group.tokens)
            for slots, group, around in (
                *((s, g, (special.im_start, special.im_end)) for s, g in zip(batch.see, shape.see, strict=True)),
                *(
                    (s, g, (special.dream_start, special.dream_end))
                    for s, g in zip(batch.dream, shape.dream, strict=True)
                ),
            )
        ):
            for slot in slots[slots >= 0]:
                assert tokens[slot - 1] == start and tokens[slot + length] == end
                assert (tokens[slot : slot + length] == special.im_patch).all()
                assert len(set(segments[slot - 1 : slot + length + 1])) == 1
                covered[slot : slot + length] = True
        assert (covered == (tokens == special.im_patch)).all()


PLAIN = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "white": (255, 255, 255)}


def jpeg(colour: str, size=(40, 30)) -> bytes:
    return encode(Image.new("RGB", size, PLAIN[colour]), "JPEG", quality=95)


@pytest.fixture
def walls(tmp_path) -> Path:
    """A folder with red.jpg and blue.jpg."""
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.jpg").write_bytes(jpeg(colour))
    return tmp_path
