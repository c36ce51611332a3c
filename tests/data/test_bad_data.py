"""Five hundred damaged documents among good ones: none stops a run, all are counted, none meets another's picture."""

import collections
import contextlib
import dataclasses
import random
import re

import numpy as np
import pytest
from PIL import Image as Picture

from dreamllm_jax.data import storage
from dreamllm_jax.data.document import Document, Image, Text, to_record
from dreamllm_jax.data.settings import CorpusConfig
from dreamllm_jax.training.journal import Journal
from dreamllm_jax.training.metrics import MetricsLog, Progress, read_metrics
from tests.data.conftest import assert_sound, bomb, encode, png, row_shape, write
from tests.data.test_loader import loader

BAD = 500


def colour(i: int) -> tuple[int, int, int]:
    return (i % 16 * 16, i // 16 % 16 * 16, 128)


def saved(i: int, kind: str, mode: str = "RGB", **options) -> bytes:
    return encode(Picture.new("RGB", (20, 16), colour(i)).convert(mode), kind, **options)


RED = Picture.new("RGB", (20, 16), (255, 0, 0))


def pair(i: int, data: bytes | None = None, text: str | None = None) -> dict:
    segments = (Text(f"number {i}" if text is None else text), Image(png(colour(i)) if data is None else data))
    return to_record(Document("pair", segments))


def without_image(i: int) -> dict:
    return pair(i) | {"images": []}


def without_text(i: int) -> dict:
    record = pair(i)
    return record | {"segments": record["segments"][1:]}


# What is done to a record -> how it is counted; "" for what can be used all the same.
DAMAGE = {
    lambda i: pair(i, saved(i, "JPEG", quality=95)[:-60]): "broken",
    lambda i: pair(i, b"<html>not found</html>"): "format",
    lambda i: pair(i, b""): "format",
    lambda i: pair(i, bomb(png(colour(i)), 60_000)): "size",
    lambda i: pair(i, saved(i, "TIFF", "F")): "mode",
    lambda i: pair(i, saved(i, "JPEG", "CMYK", quality=100)): "",
    lambda i: pair(i, saved(i, "GIF", save_all=True, append_images=[RED])): "",
    lambda i: pair(i, text=""): "empty",
    lambda i: pair(i, text=f"number {i} " + "word " * 20_000): "",
    without_image: "record",
    without_text: "record",
    lambda i: pair(i) | {"kind": "riddle"}: "record",
    lambda i: {"kind": "pair", "segments": [], "images": []}: "record",
}


@dataclasses.dataclass
class Raw:
    """A record that is no document."""

    record: dict
    images = ()


@pytest.fixture
def damaged(tmp_path, text_tokenizer, monkeypatch):
    """A data set of as many good as damaged pairs, and how many damaged ones there are of each sort."""
    sorts = random.Random(0).choices(list(DAMAGE), k=BAD)
    monkeypatch.setattr(storage, "to_record", lambda raw: raw.record)
    records = [Raw(record) for i in range(BAD) for record in (pair(i), sorts[i](i))]
    path = write(tmp_path / "set", text_tokenizer, pairs=records)
    return path, collections.Counter(reason for reason in map(DAMAGE.get, sorts) if reason)


SHAPE = row_shape(48, 1, 1)


@pytest.mark.parametrize("workers", [0, 3])
def test_nothing_stops_or_confuses_a_run(workers, damaged, text_tokenizer, tmp_path):
    path, expected = damaged
    assert len(expected) == 6 and min(expected.values()) > 20
    never_rows = expected["record"] + expected["empty"]
    learned = []
    # One row a step without packing: after as many steps as there are documents left, each was read once.
    options = {"corpora": {"pairs": CorpusConfig(mode="comprehension")}, "pack": False, "max_bad": 1.0}
    stream = loader(path, SHAPE, text_tokenizer, rows=1, workers=workers, **options)
    with contextlib.closing(stream), MetricsLog(tmp_path, 0) as log:
        for _ in range(2 * BAD - never_rows):
            batch = next(stream)
            if batch.loss_weights.any():
                assert_sound(batch, SHAPE, text_tokenizer.special)
                text = text_tokenizer.decode(batch.tokens[0, batch.segment_ids[0] > 0].tolist())
                i = int(re.search(r"number (\d+)", text)[1])
                assert batch.see[0].filled[0, 0]
                assert np.abs(batch.see[0].images[0, 0, 4, 4].astype(int) - colour(i)).max() <= 8, text
                learned.append(i)
            else:
                assert not batch.see[0].filled.any() and not batch.dream[0].filled.any()
        journal = Journal(tmp_path, log, Progress(1, ("loss",), 1.0, None), stream, lambda step: 0.0, 1)
        journal.add(
            {"tokens": 1.0, "images": 1.0, "skipped": 0.0, "updates": 0, "loss": 1.0, "lm_loss": 1.0, "dm_loss": 1.0}
        )
        journal.write(1)
    (line,) = read_metrics(tmp_path)
    dropped = {name: count for name, count in line.items() if name.startswith("dropped_")}
    assert len(learned) == 2 * BAD - expected.total() and set(learned) == set(range(BAD))
    assert dropped == {f"dropped_{reason}": count for reason, count in expected.items()}
