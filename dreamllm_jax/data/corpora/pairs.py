"""Pairs: an image and its caption, or an image and what it is to become."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dreamllm_jax.data.corpora import pictures, tables, tars
from dreamllm_jax.data.corpora.records import (
    Dropped,
    Format,
    Part,
    Record,
    find,
    local,
    read_image,
    read_text,
    setting,
    under,
)

IMAGE_COLUMNS = (*tars.IMAGES, "image", "img", "bytes")
TEXT_FIELDS = ("txt", "caption", "text")
CAPTIONS = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")


@dataclasses.dataclass(frozen=True)
class WebDataset(Format):
    """Images with captions in tars, in what else img2dataset writes (files, Parquet), or in Hugging Face's Parquet."""

    caption: str = setting("", "field of .json or column with the caption; else .txt, .caption, caption or text")

    def parts(self) -> list[Part]:
        root = local(self.source)
        found = []
        if root.is_dir():
            folders = [path for path in (root, *sorted(root.iterdir())) if path.is_dir()]
            found = under(root, tars.SUFFIXES) or [folder for folder in folders if _has_images(folder)]
        found = found or find(self.source, [".parquet"])
        if found[0].suffix != ".parquet":
            return [Part(str(path)) for path in found]
        return [part for path in found for part in self._table_parts(path)]

    def _table_parts(self, path: epath.Path) -> list[Part]:
        parts = tables.parts(path, 4 * tables.CONTENTS)
        if any(part.stop for part in parts):  # it is not damaged
            names = {name.lower() for name in tables.columns(path)}
            if not names & set(IMAGE_COLUMNS):
                urls = ": it lists addresses; fetch them first with img2dataset" if "url" in names else ""
                raise ValueError(f"{path} has no column with images ({', '.join(sorted(names))}){urls}")
        return parts

    def rows(self, part: Part) -> Iterator[Mapping[str, Any] | Dropped]:
        path = epath.Path(part.path)
        if path.suffix == ".parquet":
            return tables.rows(part)
        return _files(path) if path.is_dir() else tars.samples(path)

    def record(self, row: Mapping[str, Any], part: Part) -> Record | Dropped:
        values = {name.lower(): value for name, value in row.items()}
        image = next((v for name, v in values.items() if name.rsplit(".", 1)[-1] in IMAGE_COLUMNS and v), None)
        fields = values
        if isinstance(values.get("json"), bytes):
            try:
                fields = {**json.loads(values["json"]), **values}
            except (ValueError, TypeError, RecursionError):
                return Dropped("not_json")
        names = [self.caption] if self.caption else TEXT_FIELDS
        text = read_text(next((fields[name] for name in names if fields.get(name)), None))
        return Record("pair", (text, read_image("", image)))


@dataclasses.dataclass(frozen=True)
class Folder(tables.Table):
    """A folder of images with captions.jsonl, captions.csv, metadata.jsonl or metadata.csv; or such a table itself."""

    file: str = setting("file", "field with the image's file, relative to the folder")
    text: str = setting("text", "field with the caption")

    def parts(self) -> list[Part]:
        root = local(self.source)
        found = [root] if root.is_file() else [root / name for name in CAPTIONS if (root / name).is_file()]
        if len(found) != 1:
            have = f"{len(found)} are there" if found else "none is there"
            raise FileNotFoundError(f"{root} needs one of {', '.join(CAPTIONS)}; {have}")
        return tables.parts(found[0], self.part_bytes)

    def record(self, row: Mapping[str, Any], part: Part) -> Record:
        image = read_image(epath.Path(part.path).parent, row.get(self.file) or row.get("file_name"))
        return Record("pair", (read_text(row.get(self.text)), image))


@dataclasses.dataclass(frozen=True)
class ImagePairs(pictures.ImageTable):
    """A table of two images a row: what is given and what it is to become."""

    given: str = setting("source", "field with the image that is given")
    target: str = setting("target", "field with the image that is to be made of it")

    def record(self, row: Mapping[str, Any], part: Part) -> Record:
        return Record("image_image", tuple(self.read(row.get(field), part) for field in (self.given, self.target)))


def _has_images(folder: epath.Path) -> bool:
    return any(path.suffix.lower().lstrip(".") in tars.IMAGES for path in folder.iterdir())


def _files(folder: epath.Path) -> Iterator[dict[str, bytes]]:
    """The samples of a folder as `tars.samples` gives them."""
    for path in sorted(folder.iterdir()):
        extension = path.suffix.lower().lstrip(".")
        if extension in tars.IMAGES:
            sample = {extension: path.read_bytes()}
            for beside in ("txt", "caption", "json"):
                if (file := path.with_suffix(f".{beside}")).exists():
                    sample[beside] = file.read_bytes()
            yield sample
