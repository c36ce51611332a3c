"""A folder of the user's own pictures with their captions.

`captions.jsonl` has one object a line, `{"file": "cat.jpg", "text": "a cat on a mat"}`; `captions.csv` has the columns
`file` and `text`. Files are named relative to the folder.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dreamllm_jax.data import images
from dreamllm_jax.data.corpora import tables
from dreamllm_jax.data.corpora.records import Dropped, Part, is_inside

CAPTION_FILES = ("captions.jsonl", "captions.csv")


def captions(folder: Path) -> list[tuple[str, str]]:
    """The (file, text) rows of the folder's captions file, all files being there.

    Raises:
      FileNotFoundError, ValueError: the message names what is missing, empty, malformed or there twice.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; a source is openmoji, photographs or a folder of pictures")
    found = [folder / name for name in CAPTION_FILES if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"no {' or '.join(CAPTION_FILES)} in {folder}; each row needs the fields file and text")
    if len(found) > 1:
        raise ValueError(f"both {' and '.join(CAPTION_FILES)} are in {folder}; keep one")
    rows: dict[str, str] = {}
    for number, row in enumerate(tables.rows(Part(str(found[0]))), 1):
        place = f"{found[0]}, row {number}"
        if isinstance(row, Dropped):
            what = {"not_json": "not JSON", "not_csv": "not CSV"}.get(row.reason, "needs a file and a text")
            raise ValueError(f"{place}: {what}")
        if missing := [name for name in ("file", "text") if name not in row]:
            raise ValueError(f"{place}: needs a file and a text, there is no {' and no '.join(missing)}")
        file, text = row["file"], row["text"]
        if not isinstance(file, str) or not isinstance(text, str) or not file.strip() or not text.strip():
            raise ValueError(f"{place}: needs a file and a text")
        name = str(PurePosixPath(file))
        if not is_inside(file):
            raise ValueError(f"{place}: {file} is not inside the folder")
        if name in rows:
            raise ValueError(f"{place}: {file} has a caption already")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{place}: no file {file} in {folder}")
        rows[name] = text.strip()
    if not rows:
        raise ValueError(f"{found[0]} lists no pictures")
    return list(rows.items())


def pairs(folder: Path, count: int, size: int) -> Iterator[tuple[bytes, str]]:
    """The first `count` pictures (0: all) as (JPEG with a shorter side of at most `size` pixels, caption).

    Raises:
      ValueError: a picture cannot be decoded, or there are fewer than `count`.
    """
    rows = captions(folder)
    if count > len(rows):
        raise ValueError(f"{folder} has {len(rows)} captioned pictures, not {count}")
    for file, text in rows[: count or None]:
        try:
            picture = images.decode((folder / file).read_bytes())
        except images.ImageError as error:
            raise ValueError(f"{folder / file} cannot be used: {error}") from error
        yield images.to_jpeg(picture, size), text


def fingerprint(folder: Path) -> str:
    """Changes when a caption or a picture's size does."""
    rows = [(file, text, (folder / file).stat().st_size) for file, text in captions(folder)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
