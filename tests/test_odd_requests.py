"""Prompts and captions as people have them: read rightly, or refused by the name of their file."""

import io
import json
import re

import numpy as np
import pytest

from dreamllm_jax import generate
from dreamllm_jax.checkpoints import saved
from dreamllm_jax.data import storage
from dreamllm_jax.data.corpora import folder
from dreamllm_jax.data.document import Image, Text
from dreamllm_jax.evaluation import creation, features, fid
from dreamllm_jax.generation.documents import DOCUMENT, load_document
from tests.data.conftest import jpeg

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
UTF16 = "a red wall\n".encode("utf-16-le")
PICTURE = json.dumps({"prompt": "a wall", "images": ["a.jpg"], "id": 3})
REFUSED = {
    "p.json": json.dumps([{"prompt": "a wall"}], indent=1).encode(),
    "p.csv": b"prompt\na wall\n",
    "p.tsv.gz": b"prompt\na wall\n",
    "p.txt": POINTER,
    "utf16.txt": UTF16,
    "here.txt": b"<image> what is it?\n",
    "number.jsonl": b'{"prompt": 5}\n',
    "key.jsonl": b'{"prompt": "what is it?", "image": "a.jpg"}\n',
    "video.jsonl": b'{"prompt": "what is it?", "video_path": "a.mp4"}\n',
    "text.jsonl": b'{"prompt": "what is it?", "images": "a.jpg"}\n',
    "half.jsonl": b'{"prompt": "a \\ud83d wall"}\n',
    "deep.jsonl": b"[" * 100_000,
}


@pytest.mark.parametrize("name", REFUSED)
def test_prompts_that_would_be_taken_for_others_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(REFUSED[name])
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        generate.load_prompts([], str(tmp_path / name), [])


def test_pictures_of_words_are_none_of_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("a wall\n")
    with pytest.raises(ValueError, match="--image is of prompts that are given as words"):
        generate.load_prompts([], str(tmp_path / "p.txt"), ["a.jpg"])


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "p.txt", "-"])
def test_json_lines_are_known_without_their_name(name, tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(jpeg("red"))
    (tmp_path / name).write_text(f"{PICTURE}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(PICTURE))
    assert generate.load_prompts([], name, []) == [[Image(jpeg("red")), Text("a wall")]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.txt", POINTER),
        ("u.txt", UTF16),
        ("c.csv", b"image_id,caption\n1,a wall\n"),
        ("null.json", b'{"annotations": [{"image_id": 1, "caption": null}]}'),
        ("number.jsonl", b'{"image_id": 1, "caption": 5}\n'),
        ("empty.jsonl", b'{"image_id": 1, "caption": " "}\n'),
        ("half.jsonl", b'{"image_id": 1, "caption": "a \\ud83d wall"}\n'),
    ],
)
def test_captions_that_are_none_are_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        creation.read_captions(tmp_path / name)


def test_captions_of_any_name(tmp_path):
    for name in ("c.jsonl", "c.ndjson", "c.txt"):
        (tmp_path / name).write_text('{"image_id": 1, "caption": "a wall"}\r\n')
        assert creation.read_captions(tmp_path / name) == {"1": "a wall"}


@pytest.mark.parametrize(
    "content", [POINTER, b'{"corpora":', b"\xff\xfe", b"[]", b"{}", b'[{"image": "a.png"}]', b'["a"]']
)
def test_what_was_saved_and_is_damaged_is_named(content, tmp_path):
    """A model, a data set and a document, by their files of JSON."""
    for name, read in ((saved.MODEL, saved.find), (storage.SUMMARY, storage.read_summary), (DOCUMENT, load_document)):
        (tmp_path / name).write_bytes(content)
        if name == DOCUMENT and content in (b"[]", b"{}"):
            continue
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))) as refused:
            read(tmp_path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content", [b"PK\3\4nothing", POINTER, {"mu": [0.0, np.nan], "sigma": np.eye(2)}, {"mu": [0.0], "sigma": np.eye(2)}]
)
def test_statistics_that_are_none_are_refused(content, tmp_path):
    path = tmp_path / "s.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(ValueError, match=r"s\.npz does not hold the arrays mu and sigma"):
        fid.load(path)


def test_pictures_of_statistics_are_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.jpg cannot be used"):
        features.of_files([tmp_path / "a.jpg"], lambda pixels: pixels)


def test_halves_of_characters_in_captions_are_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg("red"))
    (tmp_path / "captions.jsonl").write_text('{"file": "a.jpg", "text": "a \\ud83d wall"}\n')
    with pytest.raises(ValueError, match=r"captions\.jsonl, row 1: .* halves of characters"):
        folder.captions(tmp_path)
