"""Texts alone."""

import dataclasses
from collections.abc import Iterator

from dreamllm_jax.data.corpora import tables
from dreamllm_jax.data.corpora.records import Dropped, Format, Part, Record, find, read_text, setting


@dataclasses.dataclass(frozen=True)
class PlainText(Format):
    """JSON lines, CSV or Parquet with a field of text, or .txt with one document a line; also .gz, .zst, .zip."""

    text: str = setting("text", "field with the text")

    def parts(self) -> list[Part]:
        return [part for path in find(self.source, tables.SUFFIXES) for part in tables.parts(path, tables.CONTENTS)]

    def records(self, part: Part) -> Iterator[Record | Dropped]:
        for row in tables.rows(part):
            yield row if isinstance(row, Dropped) else Record("text", (read_text(row.get(self.text)),))
