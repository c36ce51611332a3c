"""Edits: images, an instruction that is about them, and what they become."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dreamllm_jax.data import images
from dreamllm_jax.data.corpora import tables, tars
from dreamllm_jax.data.corpora.annotated import ANNOTATION, AnnotatedTable
from dreamllm_jax.data.corpora.records import Dropped, Part, Record, find, first, has_field, read_text, setting

# As the public corpora call them, each after those of ShareGPT-4o-Image.
_GIVEN = ("input_image", "source_images", "source_image", "src_img", "source", "input")
_TARGET = ("output_image", "target_image", "edited_img", "target", "output")
_INSTRUCTION = ("input_prompt", "prompt", "instruction", "edited_prompt_list", "caption", "text", "txt")


@dataclasses.dataclass(frozen=True)
class Edit(AnnotatedTable):
    """Images, an instruction and the image that comes of it: tables, Parquet with images in it, or tars.

    Known are the fields of ShareGPT-4o-Image, GPT-Image-Edit-1.5M, OmniEdit, MetaQuery-Instruct and OpenUni's lists,
    and tars as UniLIP writes them (1.input.jpg, 1.output.jpg, 1.txt). Of several instructions the last is taken, as
    MetaQuery does.
    """

    given: str = setting("", "field with the image that is given, or a list of such")
    target: str = setting("", "field with the image that is to be made of it")
    instruction: str = setting("", "field with the instruction")

    def parts(self) -> list[Part]:
        archives = [path for path in find(self.source, (*tars.SUFFIXES, *tables.SUFFIXES)) if tars.is_tar(path)]
        if archives and not self.images:  # else they hold the images of a table
            return [Part(str(path)) for path in archives]
        return super().parts()

    def needed(self) -> list[tuple[str, ...]]:
        return [
            (*self._names("given", _GIVEN), "image"),
            (*self._names("target", _TARGET), "image"),
            (*self._names("instruction", _INSTRUCTION), ANNOTATION, "conversations"),
        ]

    def _names(self, what: str, known: tuple[str, ...]) -> tuple[str, ...]:
        return (chosen,) if (chosen := getattr(self, what)) else known

    def rows(self, part: Part) -> Iterator[Mapping[str, Any] | Dropped]:
        if not tars.is_tar(part.path):
            yield from super().rows(part)
            return
        for sample in tars.samples(epath.Path(part.path)):
            yield sample if isinstance(sample, Dropped) else {_bare(name): data for name, data in sample.items()}

    def record(self, row: Mapping[str, Any], part: Part) -> Record | Dropped:
        if has_field(row, "conversations"):
            row = _plain(row)
            if isinstance(row, Dropped):
                return row
        given = first(row, self._names("given", _GIVEN))
        read = [self.read(file, part) for file in (given if isinstance(given, list) else [given])]
        names = self._names("instruction", _INSTRUCTION)
        asked = first(row, names)
        text = read_text(asked[-1]) if isinstance(asked, list) else self.text_of(row, names, part)
        return Record("edit", (*read, text, self.read(first(row, self._names("target", _TARGET)), part)))


def _bare(name: str) -> str:
    """`input` of `input.jpg`."""
    stem, _, extension = name.rpartition(".")
    return stem if extension in images.EXTENSIONS and stem else name


def _plain(row: Mapping[str, Any]) -> dict[str, Any] | Dropped:
    """A row of GPT-Image-Edit, all its images in `image` and one question to them, with the fields of ShareGPT-4o."""
    asked = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]
    if len(asked) != 1 or not isinstance(row.get("image"), list):
        return Dropped("fields")
    *given, target = row["image"]
    if asked[0].count("<image>") != len(given):
        return Dropped("placeholders")
    text = " ".join(asked[0].replace("<image>", " ").split())
    return {"input_image": given, "output_image": target, "input_prompt": text}
