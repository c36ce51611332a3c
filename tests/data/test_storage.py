import threading
import time

import pytest

from dreamllm_jax.data import storage
from dreamllm_jax.data.document import Document, Image, Text, from_record, to_record

DOCUMENTS = [
    Document("pair", (Text("häuser 漢字 <image>"), Image(b"\x00\xff\n not an image"))),
    Document("text", (Text(""), Text("x"))),
    Document("conversation", (Image(b"1", "user"), Text("a", "user"), Image(b"2", "assistant"), Text("b", "user"))),
    Document("interleaved", ()),
]


def write(directory, documents=DOCUMENTS):
    return storage.write_dataset(directory, {"things": documents})["corpora"]["things"]


def test_documents_come_back_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SHARD_BYTES", 200)  # several shards
    counts = write(tmp_path / "set", DOCUMENTS * 5)
    assert counts == {"documents": 20, "images": 15}
    assert len(list((tmp_path / "set/things/1.0.0").glob("*.array_record*"))) > 1
    for kept_bytes in (0, 1 << 20):
        monkeypatch.setattr(storage, "KEPT_BYTES", kept_bytes)
        corpus = storage.Corpus(tmp_path / "set", "things")
        assert [corpus[i] for i in range(len(corpus))] == DOCUMENTS * 5


def test_the_first_documents_are_read_together(tmp_path, monkeypatch):
    write(tmp_path / "set", DOCUMENTS * 5)
    corpus, together = storage.Corpus(tmp_path / "set", "things"), threading.Barrier(8)

    def read(corpus, index):
        together.wait(timeout=10)  # for seven others
        time.sleep((7 - index) / 100)
        if index == 3:
            raise RuntimeError("Corrupted Riegeli/records file")
        return DOCUMENTS[index % 4]

    monkeypatch.setattr(storage.Corpus, "_read", read)
    assert list(corpus.first(8)) == [(i, DOCUMENTS[i % 4]) for i in range(8) if i != 3]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def documents():
        yield DOCUMENTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set", documents())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="'things' has no documents"):
        write(tmp_path / "set", [])
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="exists already; choose another name or remove it"):
        write(tmp_path / "set")
    (tmp_path / "set" / "mine.txt").unlink()
    write(tmp_path / "set")


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data set in .*nothing.*prepare openmoji --to="):
        storage.Corpus(tmp_path / "nothing", "things")
    write(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match=r"no corpus 'other' in .*it has things"):
        storage.Corpus(tmp_path / "set", "other")


@pytest.mark.parametrize(
    ("kind", "segments", "message"),
    [
        ("novel", (), "unknown kind of document 'novel'"),
        ("pair", (Text("a"),), "one text and one image, got 1 and 0"),
        ("image_image", (Image(b""), Text("")), "two images and no text"),
        ("text", (Image(b""),), "a text document has no images"),
        ("conversation", (Text("a"),), "needs a role"),
        ("conversation", (Text("a", "assistant"),), "begins with the user's turn"),
        ("interleaved", (Text("a", "narrator"),), "unknown role 'narrator'"),
    ],
)
def test_documents_that_make_no_sense_are_refused(kind, segments, message):
    with pytest.raises(ValueError, match=message):
        Document(kind, segments)


def test_the_stored_record_is_flat():
    record = to_record(DOCUMENTS[2])
    assert record["images"] == [b"1", b"2"] and record["segments"][0] == {"role": "user", "text": "", "is_image": 1}
    columns = {name: [segment[name] for segment in record["segments"]] for name in record["segments"][0]}
    assert from_record({**record, "segments": columns}) == DOCUMENTS[2]
