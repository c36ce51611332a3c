"""A folder of the user's own pictures with their captions.

`captions.jsonl` has one object a line, `{"file": "cat.jpg", "text": "a cat on a mat"}`; `captions.csv` has the columns
`file` and `text`, separated by commas, semicolons or tabs. Files are named relative to the folder.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamllm_jax.data import images
from dreamllm_jax.data.corpora import tables
from dreamllm_jax.data.corpora.records import Dropped, Part, field, inside, spellings
from dreamllm_jax.data.lines import is_whole

CAPTION_FILES = ("captions.jsonl", "captions.csv")
SHOWN = 5  # problems that are told
_PROBLEMS = {
    "not_json": "not JSON",
    "not_csv": "not CSV: a quote is not closed, or text follows it",
    "columns": "not as many cells as the header has: a comma within a text needs quotes around it",
    "encoding": "not UTF-8: save the file as UTF-8",
}


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
    problems: list[ValueError | FileNotFoundError] = []
    for number, row in enumerate(tables.rows(Part(str(found[0]))), 1):
        try:
            name, text = _read(folder, row)
            if name in rows:
                raise ValueError(f"{name} has a caption already")
            rows[name] = text
        except (ValueError, FileNotFoundError) as error:
            problems.append(type(error)(f"row {number}: {error}"))
    if problems:
        raise type(problems[0])(f"{found[0]}, {_listed(problems)}")
    if not rows:
        raise ValueError(f"{found[0]} lists no pictures")
    return list(rows.items())


def _read(folder: Path, row: Mapping[str, Any] | Dropped) -> tuple[str, str]:
    """The file and the caption of a row."""
    if isinstance(row, Dropped):
        raise ValueError(_PROBLEMS.get(row.reason, "needs a file and a text"))
    file, text = (field(row, name) for name in ("file", "text"))
    if missing := [name for name, value in (("file", file), ("text", text)) if value is None]:
        raise ValueError(f"needs a file and a text, there is no {' and no '.join(missing)} but {_known(row)}")
    if not isinstance(file, str) or not isinstance(text, str) or not file.strip() or not text.strip():
        raise ValueError("needs a file and a text")
    if not is_whole(text):
        raise ValueError(f"the caption {text!r} has halves of characters")
    name = inside(file.strip())
    if name is None:
        raise ValueError(f"{file} is not inside the folder")
    found = next((spelling for spelling in spellings(name) if (folder / spelling).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no file {file} in {folder}")
    return found, text.strip()


def _known(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "nothing"


def _listed(problems: Sequence[Exception]) -> str:
    """All that is wrong, as far as it can be read in a line."""
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(map(str, problems[:SHOWN])) + more


def pairs(folder: Path, count: int, size: int) -> Iterator[tuple[bytes, str]]:
    """The first `count` pictures (0: all) as (JPEG with a shorter side of at most `size` pixels, caption).

    Raises:
      ValueError: pictures cannot be decoded, all of which are named at the end, or there are fewer than `count`.
    """
    rows = captions(folder)
    if count > len(rows):
        raise ValueError(f"{folder} has {len(rows)} captioned pictures, not {count}")
    problems: list[Exception] = []
    for file, text in rows[: count or None]:
        try:
            picture = images.decode((folder / file).read_bytes())
        except images.ImageError as error:
            problems.append(ValueError(f"{folder / file} cannot be used: {error}"))
            continue
        yield images.to_jpeg(picture, size), text
    if problems:
        raise ValueError(_listed(problems))


def fingerprint(folder: Path) -> str:
    """Changes when a caption or a picture's size does."""
    rows = [(file, text, (folder / file).stat().st_size) for file, text in captions(folder)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
