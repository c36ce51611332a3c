"""Small files with one thing a line: prompts, captions."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dreamllm_jax.data.corpora import tables

_JSON_LINES = (".jsonl", ".ndjson")
_OTHERS = tuple(suffix for suffix in tables.SUFFIXES if suffix not in (*_JSON_LINES, ".json", ".txt"))


def kind(file: str | os.PathLike) -> str:
    """The suffix of a file's name, `.jsonl` for all JSON lines.

    Raises:
      ValueError: it is that of a table, whose lines would be taken for texts.
    """
    name = str(file).lower()
    if name.endswith(_OTHERS):
        raise ValueError(f"{file}: a table is not read here; write one text a line, or JSON lines (.jsonl)")
    return ".jsonl" if name.endswith(_JSON_LINES) else Path(name).suffix


def read(text: str, kind: str, field: str) -> Iterator[tuple[int, str | dict[str, Any]]]:
    """The lines that are not blank, with their numbers: objects of JSON lines, or texts.

    Without their name, as from a pipe, they are JSON lines if the first is an object that has the field.

    Raises:
      json.JSONDecodeError, TypeError, RecursionError: a line of JSON lines is no object.
    """
    # Not at U+2028, which may stand within a text.
    written = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    objects = kind == ".jsonl" or (written and _has(written[0][1], field))
    for number, line in written:
        one = json.loads(line) if objects else line
        if objects and not isinstance(one, dict):
            raise TypeError(f"line {number} is no object")
        yield number, one


def is_text(value: object) -> bool:
    """Whether it is a text that says something, and of whole characters."""
    return isinstance(value, str) and bool(value.strip()) and is_whole(value)


def is_whole(text: str) -> bool:
    """Whether UTF-8 can hold a text: JSON can tell halves of characters, which no tokenizer reads."""
    return not re.search("[\ud800-\udfff]", text)


def _has(line: str, field: str) -> bool:
    try:
        one = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(one, dict) and field in one
