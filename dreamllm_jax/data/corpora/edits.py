"""Edits: images, what is to be done to them, and the result."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dreamllm_jax.data import images
from dreamllm_jax.data.corpora import pictures, tables, tars
from dreamllm_jax.data.corpora.records import Dropped, Part, Record, field, local, read_text, setting, under


@dataclasses.dataclass(frozen=True)
class Edits(pictures.ImageTable):
    """Images, an instruction and the result: rows of a table, or samples of tars (`1.source.jpg`, `1.target.jpg`).

    In a tar the instruction stands in the sample's `.json`, in `1.instruction.txt` or in `1.txt`.
    """

    given: str = setting("source", "field with the image, or images, to edit; several fields with commas between")
    target: str = setting("target", "field with the result")
    text: str = setting("instruction", "field with the instruction; of several in it, the first")

    def needed(self) -> list[tuple[str, ...]]:
        return [(name,) for name in (*self._given, self.target, self.text)]

    def parts(self) -> list[Part]:
        root = local(self.source)
        archives = under(root, tars.SUFFIXES) if root.is_dir() else [root] if tars.is_tar(root) else []
        return [Part(str(path)) for path in archives] or super().parts()

    def rows(self, part: Part) -> Iterator[Mapping[str, Any] | Dropped]:
        path = epath.Path(part.path)
        return map(self._fields, tars.samples(path)) if tars.is_tar(path) else tables.rows(part)

    def record(self, row: Mapping[str, Any], part: Part) -> Record | Dropped:
        values = [field(row, name) for name in self._given]
        given = [one for value in values for one in (value if isinstance(value, list | tuple) else [value])]
        target = self.read(field(row, self.target), part)
        return Record("edit", (*(self.read(one, part) for one in given), read_text(field(row, self.text)), target))

    @property
    def _given(self) -> list[str]:
        return [name.strip() for name in self.given.split(",")]

    def _fields(self, sample: dict[str, bytes] | Dropped) -> dict[str, Any] | Dropped:
        """A tar's sample as a row: `source.jpg` is the field `source`."""
        if isinstance(sample, Dropped):
            return sample
        try:
            told = json.loads(sample.get("json", b"{}"))
        except (ValueError, RecursionError):
            return Dropped("not_json")
        fields = dict(told) if isinstance(told, dict) else {}
        for name, data in sample.items():
            stem, _, extension = name.rpartition(".")
            if extension in images.EXTENSIONS or extension == "txt":
                fields[stem or self.text] = data
        return fields
