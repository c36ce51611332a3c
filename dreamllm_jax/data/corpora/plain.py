"""Texts alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dreamllm_jax.data.corpora import tables
from dreamllm_jax.data.corpora.records import Part, Record, field, read_text, setting


@dataclasses.dataclass(frozen=True)
class PlainText(tables.Table):
    """JSON lines, CSV or Parquet with a field of text, or .txt with one document a line; also .gz, .zst, .zip."""

    part_bytes = tables.CONTENTS
    text: str = setting("text", "field with the text")

    def needed(self) -> list[tuple[str, ...]]:
        return [(self.text,)]

    def record(self, row: Mapping[str, Any], part: Part) -> Record:
        return Record("text", (read_text(field(row, self.text)),))
