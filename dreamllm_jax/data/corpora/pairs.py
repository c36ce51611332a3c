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
        if root.is_file():
            found = [root]
        elif root.is_dir():
            found = under(root, tars.SUFFIXES)
            found = found or [path for path in (root, *sorted(root.iterdir())) if path.is_dir() and _has_images(path)]
            found = found or find(self.source, [".parquet"])
        else:
            raise FileNotFoundError(f"no file or directory {self.source}")
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

    def records(self, part: Part) -> Iterator[Record | Dropped]:
        path = epath.Path(part.path)
        if path.suffix == ".parquet":
            samples = tables.rows(part)
        elif path.is_dir():
            samples = _files(path)
        else:
            samples = tars.samples(path)
        for sample in samples:
            yield sample if isinstance(sample, Dropped) else self._pair(sample)

    def _pair(self, sample: Mapping[str, Any]) -> Record | Dropped:
        values = {name.lower(): value for name, value in sample.items()}
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
class Folder(Format):
    """A folder of images with captions.jsonl, captions.csv, metadata.jsonl or metadata.csv; or such a table itself."""

    file: str = setting("file", "field with the image's file, relative to the folder")
    text: str = setting("text", "field with the caption")

    def parts(self) -> list[Part]:
        return tables.parts(self._table(), tables.REFERENCES)

    def records(self, part: Part) -> Iterator[Record | Dropped]:
        root = epath.Path(part.path).parent
        for row in tables.rows(part):
            if isinstance(row, Dropped):
                yield row
            else:
                file = row.get(self.file) or row.get("file_name")
                yield Record("pair", (read_text(row.get(self.text)), read_image(root, file)))

    def _table(self) -> epath.Path:
        root = local(self.source)
        if root.is_file():
            return root
        found = [root / name for name in CAPTIONS if (root / name).is_file()]
        if len(found) != 1:
            have = f"{len(found)} are there" if found else "none is there"
            raise FileNotFoundError(f"{root} needs one of {', '.join(CAPTIONS)}; {have}")
        return found[0]


@dataclasses.dataclass(frozen=True)
class ImagePairs(pictures.ImageTable):
    """A table of two images a row: what is given and what it is to become."""

    given: str = setting("source", "field with the image that is given")
    target: str = setting("target", "field with the image that is to be made of it")

    def record(self, row: Mapping[str, Any], root: str | epath.Path) -> Record | Dropped:
        return Record("image_image", tuple(read_image(root, row.get(field)) for field in (self.given, self.target)))


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
