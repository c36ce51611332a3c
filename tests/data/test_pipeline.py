import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from dreamllm_jax.data import storage
from dreamllm_jax.data.corpora import compose
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.mixture import CorpusConfig, Mixture
from dreamllm_jax.data.pipeline import DataConfig, data_tokenizer, joined_states, make_loader
from dreamllm_jax.directories import building
from tests.data.conftest import PAIRS, assert_sound


def loader(dataset, shape, tokenizer, rows=8, seed=0, mine=slice(None), **options):
    config = DataConfig(path=str(dataset), **{"window": 8, **options})
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
    assert set(stream.fill()) == {"tokens", "see", "dream"} and all(0 < share <= 1 for share in stream.fill().values())
    tokens = sum(counts["tokens"] for counts in stream.counts().values())
    assert stream.fill()["tokens"] == tokens / (80 * shape.length) and set(stream.counts()) == set(compose.compose([]))


def test_the_same_seed_gives_the_same_stream(dataset, shape, text_tokenizer):
    first, second, other = (loader(dataset, shape, text_tokenizer, seed=seed) for seed in (3, 3, 4))
    differs = False
    for _ in range(5):
        batch = next(first)
        assert_same(batch, next(second))
        differs |= not np.array_equal(batch.tokens, next(other).tokens)
    assert differs


@pytest.fixture(scope="module")
def undisturbed(dataset, shape, text_tokenizer):
    """60 batches of 8 rows, made in the calling thread by one host, and the state before each."""
    stream, states, batches = loader(dataset, shape, text_tokenizer, workers=0), [], []
    for _ in range(60):
        states.append(json.dumps(stream.get_state()))
        batches.append(next(stream))
    return states, batches


@pytest.mark.parametrize(("hosts", "workers"), [(1, 2), (1, 3), (2, 0), (2, 3), (4, 2)])
def test_hosts_and_workers_change_nothing(hosts, workers, undisturbed, dataset, shape, text_tokenizer):
    parts = [
        loader(dataset, shape, text_tokenizer, workers=workers, mine=slice(8 * i // hosts, 8 * (i + 1) // hosts))
        for i in range(hosts)
    ]
    for batch in undisturbed[1][:20]:
        assert_same(batch, jax.tree.map(lambda *x: np.concatenate(x), *[next(part) for part in parts]))
    for part in parts:
        part.close()


@pytest.mark.parametrize("kept_bytes", [0, 1 << 26])
def test_resuming_is_exact_anywhere(kept_bytes, undisturbed, dataset, shape, text_tokenizer, monkeypatch):
    monkeypatch.setattr(storage, "KEPT_BYTES", kept_bytes)
    states, batches = undisturbed
    stream = loader(dataset, shape, text_tokenizer, workers=2)
    for start in np.random.default_rng(0).integers(58, size=50):  # forwards and backwards, batches being made ahead
        stream.set_state(json.loads(states[start]))
        for batch in batches[start : start + 2]:
            assert_same(batch, next(stream))
    stream.close()


def test_a_run_moves_to_another_number_of_hosts(undisturbed, dataset, shape, text_tokenizer):
    _, batches = undisturbed
    parts = [loader(dataset, shape, text_tokenizer, mine=mine) for mine in (slice(0, 4), slice(4, 8))]
    for _ in range(3):
        for part in parts:
            next(part)
    state = json.loads(json.dumps(joined_states([part.get_state() for part in parts])))
    for hosts in (1, 4):
        moved = [
            loader(dataset, shape, text_tokenizer, mine=slice(i * 8 // hosts, (i + 1) * 8 // hosts))
            for i in range(hosts)
        ]
        for part in moved:
            part.set_state(state)
        for batch in batches[3:5]:
            assert_same(batch, jax.tree.map(lambda *x: np.concatenate(x), *[next(part) for part in moved]))


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


def test_every_epoch_of_every_corpus_is_whole(tmp_path, shape, text_tokenizer):
    texts = {
        name: [Document("text", (Text(f"{name} {i}"),)) for i in range(size)]
        for name, size in (("a", 30), ("b", 7), ("c", 4500))
    }
    path = write(tmp_path / "set", text_tokenizer, **texts)
    corpora = {"a": CorpusConfig(weight=2), "b": CorpusConfig(), "c": CorpusConfig(weight=3, limit=4200)}
    mixture = Mixture({name: storage.Corpus(path, name) for name in texts}, corpora, streams=5, seed=1)
    places = [mixture.place(record) for record in range(20_000)]
    for index, (name, size) in enumerate((("a", 30), ("b", 7), ("c", 4200))):
        mine = [place for place in places if place.corpus == index]
        assert abs(len(mine) - 20_000 * (2, 1, 3)[index] / 6) <= 5
        first = [place.document for place in mine if place.epoch == 0]
        assert sorted(first) == list(range(size)) and first != sorted(first)
        second = [place.document for place in mine if place.epoch == 1]
        assert sorted(set(second)) == sorted(second) and second != first[: len(second)]
        assert {place.name for place in mine} == {name}
    # No stream keeps to one corpus, and a record is found without those before it.
    assert all(len({place.corpus for place in places[stream:100:5]}) == 3 for stream in range(5))
    again = Mixture({name: storage.Corpus(path, name) for name in texts}, corpora, streams=5, seed=1)
    assert again.place(19_999) == places[-1] and (again.draws(7) == mixture.draws(7)).all()


def test_weights_hold_over_many_rows(dataset, shape, text_tokenizer):
    weights = {"pairs": 0.5, "interleaved": 0.3, "text": 0.2}
    corpora = {name: CorpusConfig(weight=weight) for name, weight in weights.items()}
    stream = loader(dataset, shape, text_tokenizer, rows=20, corpora=corpora)
    for _ in range(500):
        next(stream)
    stream.close()
    documents = {name: counts["documents"] for name, counts in stream.counts().items()}
    for name, weight in weights.items():
        assert documents[name] / sum(documents.values()) == pytest.approx(weight, rel=0.01)


def test_epochs_weigh_corpora_by_their_size(dataset, tmp_path, shape, text_tokenizer):
    path = write(
        tmp_path / "set",
        text_tokenizer,
        a=[Document("text", (Text("a"),))] * 3,
        b=[Document("text", (Text("b"),))] * 300,
    )
    corpora = {"a": CorpusConfig(epochs=50), "b": CorpusConfig(epochs=1)}
    stream = loader(path, shape, text_tokenizer, rows=10, corpora=corpora, pack=False)
    letters = [text_tokenizer.decode(row) for _ in range(60) for row in next(stream).tokens]
    assert abs(letters.count("a") - 200) <= 10  # each of ten streams is at most one away
    with pytest.raises(ValueError, match="give epochs to all corpora or to none: b has none"):
        loader(path, shape, text_tokenizer, corpora={"a": CorpusConfig(epochs=2), "b": CorpusConfig()})


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
    assert stream.totals["pairs", "dropped_format"] == stream.totals["pairs", "dropped_broken"] == 4


def test_too_many_bad_documents_end_the_run(tmp_path, shape, text_tokenizer):
    good = [Document("pair", (Text(text), Image(data))) for data, text in PAIRS]
    bad = [Document("pair", (Text("half"), Image(PAIRS[0][0][:-30])))]
    path = write(tmp_path / "set", text_tokenizer, fine=good * 3, poor=[*good, *bad])
    stream = loader(path, shape, text_tokenizer, rows=8)
    for _ in range(30):  # one of fourteen
        next(stream)
    stream = loader(path, shape, text_tokenizer, rows=8, max_bad=0.03)
    told = r"documents had to be left out, more than data.max_bad=0.03.*worst corpus is 'poor'.*broken \d+"
    with pytest.raises(ValueError, match=told):
        for _ in range(30):
            next(stream)
    long = Document("conversation", (Text("word " * 400, "user"), Text("never reached", "assistant")))
    short = Document("conversation", (Text("Hi", "user"), Text("Ho", "assistant")))
    path = write(tmp_path / "other", text_tokenizer, chats=[short, *[long] * 1200])
    with pytest.raises(ValueError, match=r"1000 documents one after the other.*chats: empty"):
        next(loader(path, shape, text_tokenizer))


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
    for wrong in (
        {"window": 0},
        {"workers": -1},
        {"flip": 1.5},
        {"max_bad": -0.1},
        {"stored": ("latents",)},
        {"stored_dtype": "float16"},
        {"flip": 0.5, "stored": ("moments",)},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DataConfig(path="", **wrong)
    for wrong in ({"mode": "both"}, {"weight": 0.0}, {"epochs": -1}, {"limit": -1}, {"template": "alpaca"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CorpusConfig(**wrong)


def test_a_state_of_other_settings_is_refused(dataset, shape, text_tokenizer):
    state = loader(dataset, shape, text_tokenizer).get_state()
    for options in ({"window": 4}, {"seed": 1}, {"rows": 16}, {"corpora": {"pairs": CorpusConfig()}}, {"flip": 0.5}):
        with pytest.raises(ValueError, match=f"the saved data state has {next(iter(options))}.*="):
            loader(dataset, shape, text_tokenizer, **options).set_state(state)
    with pytest.raises(ValueError, match="saved data state has shape="):
        loader(dataset, dataclasses.replace(shape, length=256), text_tokenizer).set_state(state)


def test_accepted_changes_of_the_data_go_on_with_documents_not_read_yet(dataset, shape, text_tokenizer, caplog):
    before = loader(dataset, shape, text_tokenizer)
    read = set()
    for _ in range(5):
        next(before)
        read.update(record for row in before.records for record in row)
    state = before.get_state()
    after = loader(dataset, shape, text_tokenizer, rows=16, flip=0.5)
    after.set_state(state, accept_changes=True)
    assert "flip=0.0, this run has 0.5; rows_per_step=8, this run has 16" in caplog.text
    next(after)
    following = sorted(record for row in after.records for record in row)
    assert following[0] > max(read) and len(after.records) == 16
    waiting = max(first for first, *_ in state["streams"].values())
    assert waiting <= following[0] < waiting + 16


def test_tensorflow_is_not_imported(dataset):
    program = f"""
import sys
from dreamllm_jax.batch import RowShape
from dreamllm_jax.data.pipeline import DataConfig, data_tokenizer, make_loader
from dreamllm_jax.data import preparation
config = DataConfig(path={str(dataset)!r})
next(make_loader(config, RowShape(128, 4, 3, 4, 3, 8, 16), data_tokenizer(config), rows_per_step=2, seed=0))
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
