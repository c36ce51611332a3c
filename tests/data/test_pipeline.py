import dataclasses
import json
import subprocess
import sys

import grain
import jax
import numpy as np
import pytest

from dreamllm_jax.data import storage
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.pipeline import CorpusConfig, DataConfig, data_tokenizer, make_loader
from dreamllm_jax.directories import building
from tests.data.conftest import PAIRS, assert_sound


def loader(dataset, shape, tokenizer, rows=8, seed=0, mine=slice(None), **options):
    config = DataConfig(path=str(dataset), **options)
    return make_loader(config, shape, tokenizer, rows_per_step=rows, seed=seed, mine=mine)


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def write(path, tokenizer, **corpora):
    with building(path) as directory:
        tokenizer.save(directory / "tokenizer")
        counts = {name: storage.write_corpus(directory, name, documents) for name, documents in corpora.items()}
        storage.write_summary(directory, {"corpora": counts})
    return path


def test_batches_keep_the_contract(dataset, shape):
    tokenizer = data_tokenizer(DataConfig(path=str(dataset)))
    stream = loader(dataset, shape, tokenizer)
    for _ in range(10):
        batch = next(stream)
        assert_sound(batch, shape, tokenizer.special)
        assert batch.see_images.shape == (8, 4, 8, 8, 3) and batch.see_images.dtype == np.uint8
        assert batch.dream_images.shape == (8, 3, 16, 16, 3) and batch.dream_moments is None
        assert all(getattr(batch, n).dtype == np.int32 for n in ("tokens", "segment_ids", "positions", "see_slots"))
    assert stream.totals["rows"] == 80 and set(stream.fill()) == {"tokens", "see", "dream"}
    assert all(0 < share <= 1 for share in stream.fill().values())
    assert stream.fill()["tokens"] == stream.totals["tokens"] / (80 * shape.length)


def test_the_same_seed_gives_the_same_stream(dataset, shape, text_tokenizer):
    first, second, other = (loader(dataset, shape, text_tokenizer, seed=seed) for seed in (3, 3, 4))
    differs = False
    for _ in range(5):
        batch = next(first)
        assert_same(batch, next(second))
        differs |= not np.array_equal(batch.tokens, next(other).tokens)
    assert differs


@pytest.mark.parametrize("kept_bytes", [0, 1 << 26])
def test_resuming_is_exact(kept_bytes, dataset, shape, text_tokenizer, monkeypatch):
    monkeypatch.setattr(storage, "KEPT_BYTES", kept_bytes)
    stream = loader(dataset, shape, text_tokenizer, rows=4)
    assert isinstance(stream, grain.DatasetIterator)
    states, batches = [], []
    for _ in range(25):
        states.append(json.dumps(stream.get_state()))
        batches.append(next(stream))
    for start in (0, 1, 7, 13, 22):
        again = loader(dataset, shape, text_tokenizer, rows=4)
        again.set_state(json.loads(states[start]))
        for batch in batches[start : start + 3]:
            assert_same(batch, next(again))
    stream.set_state(json.loads(states[5]))  # also in place
    assert_same(batches[5], next(stream))


def test_hosts_share_one_stream(dataset, shape, text_tokenizer):
    whole = loader(dataset, shape, text_tokenizer)
    parts = [loader(dataset, shape, text_tokenizer, mine=mine) for mine in (slice(0, 4), slice(4, 8))]
    for _ in range(4):
        assert_same(next(whole), jax.tree.map(lambda *x: np.concatenate(x), *[next(part) for part in parts]))
    moved = loader(dataset, shape, text_tokenizer)
    moved.set_state(parts[1].get_state())  # a state does not know the number of hosts
    assert_same(next(whole), next(moved))


def test_an_epoch_has_every_document_once(tmp_path, shape, text_tokenizer):
    texts = [Document("text", (Text(f"number {i}"),)) for i in range(12)]
    path = write(tmp_path / "set", text_tokenizer, texts=texts)
    orders = []
    for shuffle in (True, False):
        stream = loader(path, shape, text_tokenizer, rows=12, pack=False, shuffle=shuffle)
        for _ in range(2):
            orders.append([text_tokenizer.decode(row) for row in next(stream).tokens])
            assert sorted(orders[-1]) == sorted(f"number {i}" for i in range(12))
    assert orders[0] != orders[1] and orders[2] == orders[3] == [f"number {i}" for i in range(12)]


def test_weights_are_shares_of_rows(tmp_path, shape, text_tokenizer):
    path = write(
        tmp_path / "set",
        text_tokenizer,
        a=[Document("text", (Text("a"),))] * 3,
        b=[Document("text", (Text("b"),))] * 300,
    )
    corpora = {"a": CorpusConfig(weight=3.0), "b": CorpusConfig(weight=1.0)}
    batch = next(loader(path, shape, text_tokenizer, rows=200, corpora=corpora, pack=False))
    letters = [text_tokenizer.decode(row) for row in batch.tokens]
    assert letters.count("a") == 150


def test_modes(dataset, shape, text_tokenizer):
    for mode in ("comprehension", "creation", "joint"):
        batch = next(loader(dataset, shape, text_tokenizer, rows=32, corpora={"pairs": CorpusConfig(mode=mode)}))
        assert (batch.see_slots >= 0).any() == (mode != "creation")
        assert (batch.dream_slots >= 0).any() == (mode != "comprehension")


def test_only_what_is_just_painted_is_mirrored(tmp_path, shape, text_tokenizer):
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, :8] = 255
    from PIL import Image as Picture

    from dreamllm_jax.data.images import to_png

    image = Image(to_png(Picture.fromarray(stripes)))
    pair = Document("pair", (Text("a"), image))
    story = Document("interleaved", (Text("a"), image))
    path = write(tmp_path / "set", text_tokenizer, pairs=[pair], stories=[story])
    for flip in (0.0, 1.0):
        for name, mode, moves in (
            ("pairs", "creation", True),
            ("stories", "creation", True),
            ("stories", "joint", False),
        ):
            corpora = {name: CorpusConfig(mode=mode)}
            batch = next(loader(path, shape, text_tokenizer, rows=4, corpora=corpora, flip=flip))
            expected = stripes[:, ::-1] if flip and moves else stripes
            assert (batch.dream_images[batch.dream_slots >= 0] == expected).all()


def test_broken_images_are_counted_and_never_stop_the_stream(tmp_path, shape, text_tokenizer):
    good = [Document("pair", (Text(text), Image(data))) for data, text in PAIRS]
    bad = [
        Document("pair", (Text("broken"), Image(b"not an image"))),
        Document("pair", (Text("half"), Image(PAIRS[0][0][:-30]))),
    ]
    path = write(tmp_path / "set", text_tokenizer, pairs=[*good, *bad])
    stream = loader(
        path, shape, text_tokenizer, rows=8, corpora={"pairs": CorpusConfig(mode="comprehension")}, pack=False
    )
    for _ in range(4):
        batch = next(stream)
        learned = batch.loss_weights.any(axis=1)
        assert (learned == (batch.see_slots >= 0).any(axis=1)).all() and learned.sum() == 6
    assert stream.totals["dropped_format"] == stream.totals["dropped_broken"] == 4


def test_what_teaches_nothing_is_left_out(tmp_path, shape, text_tokenizer):
    long = Document("conversation", (Text("word " * 400, "user"), Text("never reached", "assistant")))
    short = Document("conversation", (Text("Hi", "user"), Text("Ho", "assistant")))
    path = write(tmp_path / "set", text_tokenizer, chats=[short, long])
    batch = next(loader(path, shape, text_tokenizer, rows=16, pack=False))
    assert batch.loss_weights.any(axis=1).all()
    path = write(tmp_path / "other", text_tokenizer, chats=[long])
    with pytest.raises(ValueError, match=r"corpus 'chats' in mode 'joint': a row of 128 tokens.*nothing to learn"):
        loader(path, shape, text_tokenizer)


def test_mistakes_are_named(dataset, shape, text_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"corpus 'pairs' in mode 'creation': .*0 dream slots has no room"):
        no_dreams = dataclasses.replace(shape, dream_slots=0)
        loader(dataset, no_dreams, text_tokenizer, corpora={"pairs": CorpusConfig(mode="creation")})
    with pytest.raises(FileNotFoundError, match="no corpus 'pears'"):
        loader(dataset, shape, text_tokenizer, corpora={"pears": CorpusConfig()})
    with pytest.raises(FileNotFoundError, match=r"no data set in .*dataset\.json is missing"):
        loader(tmp_path, shape, text_tokenizer)
    with pytest.raises(FileNotFoundError, match="no data set in"):
        data_tokenizer(DataConfig(path=str(tmp_path)))
    for wrong in ({"packing_bins": 0}, {"workers": -1}, {"flip": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DataConfig(path="", **wrong)
    for wrong in ({"mode": "both"}, {"weight": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CorpusConfig(**wrong)


def test_a_state_of_other_settings_is_refused(dataset, shape, text_tokenizer):
    state = loader(dataset, shape, text_tokenizer).get_state()
    for options in ({"packing_bins": 4}, {"seed": 1}, {"corpora": {"pairs": CorpusConfig()}}, {"flip": 0.5}):
        with pytest.raises(ValueError, match=f"the saved data state has {next(iter(options))}="):
            loader(dataset, shape, text_tokenizer, **options).set_state(state)
    with pytest.raises(ValueError, match="saved data state has shape="):
        loader(dataset, dataclasses.replace(shape, length=256), text_tokenizer).set_state(state)


def test_tensorflow_is_not_imported(dataset):
    program = f"""
import sys
from dreamllm_jax.data.pipeline import DataConfig, RowShape, data_tokenizer, make_loader
from dreamllm_jax.data import preparation
config = DataConfig(path={str(dataset)!r})
next(make_loader(config, RowShape(128, 4, 3, 4, 3, 8, 16), data_tokenizer(config), rows_per_step=2, seed=0))
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.slow
def test_workers_read_ahead_and_resume(dataset, shape, text_tokenizer):
    stream = loader(dataset, shape, text_tokenizer, workers=1)
    next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream) for _ in range(3)]
    stream.close()
    again = loader(dataset, shape, text_tokenizer, workers=1)
    again.set_state(state)
    for batch in expected:
        assert_same(batch, next(again))
    again.close()
