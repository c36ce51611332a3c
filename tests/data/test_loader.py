import contextlib
import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image as Picture

from dreamllm_jax.data import packing, readers, storage
from dreamllm_jax.data.corpora import compose
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.images import to_png
from dreamllm_jax.data.loader import Loader, joined_states
from dreamllm_jax.data.mixture import Mixture
from dreamllm_jax.data.settings import CorpusConfig, DataConfig
from tests.data.conftest import CROPS, PAIRS, assert_sound, with_slots, write


def loader(dataset, shape, tokenizer, rows=8, seed=0, mine=None, **options):
    config = DataConfig(path=str(dataset), **{"window": 8, **options})
    return Loader(config, shape, tokenizer, *CROPS, rows_per_step=rows, seed=seed, mine=mine)


def hosts_loaders(count, *arguments, **options):
    """The loaders of so many hosts, each of which feeds every count-th row, as hosts of TPU slices may."""
    return [loader(*arguments, mine=range(i, 8, count), **options) for i in range(count)]


def joined(loaders):
    """Their next batches as one."""
    return jax.tree.map(lambda *x: np.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *map(next, loaders))


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_batches_keep_the_contract(dataset, shape):
    tokenizer = storage.open_tokenizer(dataset)
    stream = loader(dataset, shape, tokenizer)
    for _ in range(10):
        batch = next(stream)
        assert_sound(batch, shape, tokenizer.special)
        (see,), (dream,) = batch.see, batch.dream
        assert see.images.shape == (8, 4, 8, 8, 3) and see.images.dtype == np.uint8
        assert dream.images.shape == (8, 3, 16, 16, 3) and not dream.stored
        assert all(x.dtype == np.int32 for x in (batch.tokens, batch.segment_ids, batch.positions, see.at, dream.at))
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
    parts = hosts_loaders(hosts, dataset, shape, text_tokenizer, workers=workers)
    for batch in undisturbed[1][:20]:
        assert_same(batch, joined(parts))
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


@pytest.fixture
def slow_reads(monkeypatch):
    """Sets how long each read of a document takes, as a function of its number."""
    read = storage.Corpus._read
    monkeypatch.setattr(storage, "KEPT_BYTES", 0)

    def set_seconds(seconds):
        def reading(corpus, index):
            time.sleep(seconds(index))
            if index % 25 == 24:
                raise RuntimeError("Corrupted Riegeli/records file")
            return read(corpus, index)

        monkeypatch.setattr(storage.Corpus, "_read", reading)

    return set_seconds


@pytest.fixture(scope="module")
def numbered(tmp_path_factory, text_tokenizer):
    """Texts of many lengths, too many to be seen twice in a test, and chats some of which teach nothing."""
    texts = [Document("text", (Text(f"number {i} " + "word " * (i * 7 % 40)),)) for i in range(900)]
    chats = [LONG if i % 20 == 7 else SHORT for i in range(300)]
    return write(tmp_path_factory.mktemp("numbered") / "set", text_tokenizer, texts=texts, chats=chats)


def history(stream, steps):
    """What is known of the stream after each of its next steps, JSON and batch."""
    for _ in range(steps):
        batch = next(stream)
        yield json.dumps([stream.records, stream.get_state()]), batch


@pytest.mark.parametrize(("workers", "readers"), [(0, 1), (1, 1), (3, 2), (2, 64)])
def test_reading_ahead_and_restarts_change_nothing(workers, readers, numbered, shape, text_tokenizer, slow_reads):
    """However late reads end and however many are under way: rows, states and counts of what is left out."""
    options = {"window": 20, "max_bad": 1.0, "corpora": {"texts": CorpusConfig(), "chats": CorpusConfig()}}
    slow_reads(lambda index: 0)
    expected = list(history(loader(numbered, shape, text_tokenizer, workers=0, **options), 24))
    slow_reads(lambda index: index * 37 % 5 / 1000)
    got = []
    for steps in (1, 2, 5, 16):
        stream = loader(numbered, shape, text_tokenizer, workers=workers, readers=readers, **options)
        with contextlib.closing(stream):
            if got:
                stream.set_state(json.loads(got[-1][0])[1])
            got += history(stream, steps)
    for (known, batch), (known_then, batch_then) in zip(expected, got, strict=True):
        assert known == known_then
        assert_same(batch, batch_then)
    counts = stream.counts()
    assert counts["texts"]["dropped_record"] > 5 and counts["chats"]["dropped_empty"] > 5
    assert not any("dropped_changed" in held for held in counts.values())


def test_a_run_goes_on_soon_where_reads_take_long(numbered, shape, text_tokenizer, slow_reads):
    """256 documents wait, for 20 ms each; one after the other they would take 5 s."""
    options = {"window": 32, "max_bad": 1.0}
    with contextlib.closing(loader(numbered, shape, text_tokenizer, **options)) as stream:
        next(stream)
        state = json.loads(json.dumps(stream.get_state()))
    slow_reads(lambda index: 0.02)
    stream = loader(numbered, shape, text_tokenizer, **options)
    began = time.monotonic()
    stream.set_state(state)
    next(stream)
    assert time.monotonic() - began < 2
    slow_reads(lambda index: 0.2)
    stream.set_state(state)  # whatever it begins to read now, nobody waits for
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 2


def test_a_read_that_hangs_does_not_keep_a_run_from_ending(numbered, shape, text_tokenizer, slow_reads, monkeypatch):
    monkeypatch.setattr(readers, "_PATIENCE", 0.2)
    stream, answer = loader(numbered, shape, text_tokenizer, window=4, max_bad=1.0), threading.Event()
    next(stream)
    slow_reads(lambda index: answer.wait(20) * 0)
    stream.set_state(json.loads(json.dumps(stream.get_state())))
    time.sleep(0.1)  # until somebody reads
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 5
    answer.set()


def test_what_waited_and_is_lost_or_another_document_now_is_left_out(tmp_path, shape, text_tokenizer, slow_reads):
    words = {"before": "red " * 20, "after": "green square " * 20}
    paths = {
        name: write(tmp_path / name, text_tokenizer, texts=[Document("text", (Text(text),))] * 40)
        for name, text in words.items()
    }
    options = {"rows": 4, "max_bad": 1.0}
    before = loader(paths["before"], shape, text_tokenizer, **options)
    next(before)
    state = json.loads(json.dumps(before.get_state()))
    waiting = sum(len(each) for _, *each in state["streams"].values())

    def counts_after(path):
        after = loader(path, shape, text_tokenizer, **options)
        after.set_state(state)
        for _ in range(20):
            assert next(after).loss_weights.any(axis=1).all()
        return after.counts()["texts"]

    assert counts_after(paths["after"])["dropped_changed"] == waiting > 10
    slow_reads(lambda index: 0 if index < 20 else 1 / 0)
    lost = counts_after(paths["before"])
    assert lost["dropped_record"] > 10 and "dropped_changed" not in lost


def test_a_run_moves_to_another_number_of_hosts(undisturbed, dataset, shape, text_tokenizer):
    _, batches = undisturbed
    parts = hosts_loaders(2, dataset, shape, text_tokenizer)
    for _ in range(3):
        joined(parts)
    state = json.loads(json.dumps(joined_states([part.get_state() for part in parts])))
    for hosts in (1, 4):
        moved = hosts_loaders(hosts, dataset, shape, text_tokenizer)
        for part in moved:
            part.set_state(state)
        for batch in batches[3:5]:
            assert_same(batch, joined(moved))


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
    mixture = Mixture({name: storage.Corpus(path, name) for name in texts}, corpora, streams=5, seed=1, shuffle=True)
    places = [mixture.place(record) for record in range(20_000)]
    for name, size, weight in (("a", 30, 2), ("b", 7, 1), ("c", 4200, 3)):
        mine = [place for place in places if place.corpus == name]
        assert abs(len(mine) - 20_000 * weight / 6) <= 5
        first = [place.document for place in mine if place.epoch == 0]
        assert sorted(first) == list(range(size)) and first != sorted(first)
        second = [place.document for place in mine if place.epoch == 1]
        assert sorted(set(second)) == sorted(second) and second != first[: len(second)]
    # No stream keeps to one corpus, and a record is found without those before it.
    assert all(len({place.corpus for place in places[stream:100:5]}) == 3 for stream in range(5))
    again = Mixture({name: storage.Corpus(path, name) for name in texts}, corpora, streams=5, seed=1, shuffle=True)
    assert again.place(19_999) == places[-1] and (again.draws(7) == mixture.draws(7)).all()


def test_epochs_weigh_corpora_by_their_size(tmp_path, shape, text_tokenizer):
    letters = {name: [Document("text", (Text(name),))] * size for name, size in (("a", 3), ("b", 300))}
    path = write(tmp_path / "set", text_tokenizer, **letters)
    corpora = {"a": CorpusConfig(epochs=50), "b": CorpusConfig(epochs=1)}
    stream = loader(path, shape, text_tokenizer, rows=10, corpora=corpora, pack=False)
    letters = [text_tokenizer.decode(row) for _ in range(60) for row in next(stream).tokens]
    assert abs(letters.count("a") - 200) <= 10  # each of ten streams is at most one away
    with pytest.raises(ValueError, match="give epochs to all corpora or to none: b has none"):
        loader(path, shape, text_tokenizer, corpora={"a": CorpusConfig(epochs=2), "b": CorpusConfig()})


def test_modes(dataset, shape, text_tokenizer):
    for mode in ("comprehension", "creation", "joint"):
        batch = next(loader(dataset, shape, text_tokenizer, rows=32, corpora={"pairs": CorpusConfig(mode=mode)}))
        assert batch.see[0].filled.any() == (mode != "creation")
        assert batch.dream[0].filled.any() == (mode != "comprehension")


def test_only_what_is_just_painted_is_mirrored(tmp_path, shape, text_tokenizer):
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, :8] = 255
    image = Image(to_png(Picture.fromarray(stripes)))
    kinds = {"pairs": "pair", "stories": "interleaved"}
    documents = {name: [Document(kind, (Text("a"), image))] for name, kind in kinds.items()}
    path = write(tmp_path / "set", text_tokenizer, **documents)
    for flip in (0.0, 1.0):
        for name, mode, moves in (("pairs", "creation", 1), ("stories", "creation", 1), ("stories", "joint", 0)):
            corpora = {name: CorpusConfig(mode=mode)}
            batch = next(loader(path, shape, text_tokenizer, rows=4, corpora=corpora, flip=flip))
            expected = stripes[:, ::-1] if flip and moves else stripes
            assert (batch.dream[0].images[batch.dream[0].filled] == expected).all()


def test_too_many_bad_documents_end_the_run(tmp_path, shape, text_tokenizer, monkeypatch):
    good = [Document("pair", (Text(text), Image(data))) for data, text in PAIRS]
    bad = Document("pair", (Text("half"), Image(PAIRS[0][0][:-30])))
    path = write(tmp_path / "set", text_tokenizer, fine=good * 3, poor=[*good, bad])
    stream = loader(path, shape, text_tokenizer, rows=8)
    for _ in range(30):  # one of fourteen
        next(stream)
    stream = loader(path, shape, text_tokenizer, rows=8, max_bad=0.03)
    told = r"documents had to be left out, more than data.max_bad=0.03.*worst corpus is 'poor'.*broken \d+"
    with pytest.raises(ValueError, match=told):
        for _ in range(30):
            next(stream)
    monkeypatch.setattr(packing, "MISSES", 100)
    path = write(tmp_path / "other", text_tokenizer, chats=[SHORT, *[LONG] * 120])
    with pytest.raises(ValueError, match=r"100 documents one after the other.*chats: empty"):
        next(loader(path, shape, text_tokenizer))


SHORT = Document("conversation", (Text("Hi", "user"), Text("Ho", "assistant")))
LONG = Document("conversation", (Text("word " * 400, "user"), Text("never reached", "assistant")))


def test_what_teaches_nothing_is_left_out(tmp_path, shape, text_tokenizer):
    for name, chats in (("set", [SHORT, LONG]), ("turned", [LONG, SHORT])):
        path = write(tmp_path / name, text_tokenizer, chats=chats)
        batch = next(loader(path, shape, text_tokenizer, rows=16, pack=False))
        assert batch.loss_weights.any(axis=1).all()
    path = write(tmp_path / "other", text_tokenizer, chats=[LONG])
    with pytest.raises(ValueError, match=r"corpus 'chats' in mode 'joint': a row of 128 tokens.*nothing to learn"):
        loader(path, shape, text_tokenizer)


def test_what_waits_in_the_windows_was_read_too(tmp_path, shape, text_tokenizer):
    """A few that are left out are no large share of those that were packed into the first rows."""
    path = write(tmp_path / "set", text_tokenizer, chats=[LONG if i % 50 == 7 else SHORT for i in range(100)])
    stream = loader(path, shape, text_tokenizer, rows=64, window=64, max_bad=0.05)
    for _ in range(20):
        next(stream)
    assert stream.counts()["chats"]["dropped_empty"] > 0


def test_a_damaged_first_record_is_one_of_many(dataset, shape, text_tokenizer, monkeypatch):
    read = storage.Corpus._read

    def unreadable(damaged):
        def reading(corpus, index):
            if index in damaged:
                raise RuntimeError("Corrupted Riegeli/records file")
            return read(corpus, index)

        monkeypatch.setattr(storage.Corpus, "_read", reading)

    unreadable({0})
    assert next(loader(dataset, shape, text_tokenizer)).loss_weights.any()
    unreadable(range(10**6))
    with pytest.raises(ValueError, match=r"the first 8 records of corpus '\w+' in .* cannot be read"):
        loader(dataset, shape, text_tokenizer)


def test_mistakes_are_named(dataset, shape, text_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"corpus 'pairs' in mode 'creation': .*0 dream slots has no room"):
        no_dreams = with_slots(shape, dream=0)
        loader(dataset, no_dreams, text_tokenizer, corpora={"pairs": CorpusConfig(mode="creation")})
    with pytest.raises(FileNotFoundError, match="no corpus 'pears'"):
        loader(dataset, shape, text_tokenizer, corpora={"pears": CorpusConfig()})
    with pytest.raises(FileNotFoundError, match=r"no data set in .*dataset\.json is missing"):
        loader(tmp_path, shape, text_tokenizer)
    with pytest.raises(FileNotFoundError, match="no data set in"):
        storage.open_tokenizer(tmp_path)
    for wrong in (
        {"window": 0},
        {"workers": -1},
        {"readers": 0},
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
    common = {"corpora": {"pairs": CorpusConfig()}}
    state = loader(dataset, shape, text_tokenizer, **common).get_state()
    # One that was saved before a corpus could drop anything, with all that there was then.
    earlier = {name: value for name, value in dataclasses.asdict(CorpusConfig()).items() if "drop" not in name}
    earlier = {**state, "settings": {**state["settings"], "corpora": {"pairs": earlier}}}
    loader(dataset, shape, text_tokenizer, **common).set_state(earlier)
    for options in ({"window": 4}, {"seed": 1}, {"rows": 16}, {"corpora": {"text": CorpusConfig()}}, {"flip": 0.5}):
        with pytest.raises(ValueError, match=f"the saved data state has {next(iter(options))}.*="):
            loader(dataset, shape, text_tokenizer, **common | options).set_state(state)
    with pytest.raises(ValueError, match="saved data state has shape="):
        loader(dataset, dataclasses.replace(shape, length=256), text_tokenizer, **common).set_state(state)
    older = {**state, "streams": {row: [80, 8, 16] for row in state["streams"]}}
    with pytest.raises(ValueError, match=r"has the form of an earlier version.*accept_changes=True"):
        loader(dataset, shape, text_tokenizer, **common).set_state(older)
    accepting = loader(dataset, shape, text_tokenizer, **common)
    accepting.set_state(older, accept_changes=True)
    next(accepting)
    assert min(record for row in accepting.records for record in row) >= 80


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
