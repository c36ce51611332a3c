"""Pairs: an image and its caption, or an image and what it is to become."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dreamllm_jax.data import images
from dreamllm_jax.data.corpora import pictures, tables, tars
from dreamllm_jax.data.corpora.annotated import ANNOTATION, AnnotatedTable
from dreamllm_jax.data.corpora.records import (
    NOT_FETCHED,
    Dropped,
    Format,
    Part,
    Record,
    field,
    find,
    first,
    is_hidden,
    local,
    read_image,
    read_text,
    setting,
    under,
)

IMAGE_COLUMNS = (*images.EXTENSIONS, "image", "img", "bytes")
TEXT_FIELDS = ("txt", "caption", "text", "prompt")  # the last: text-to-image-2M
CAPTIONS = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
_PICTURES = ("image", "img", "picture", "rgb")  # in `1.image.jpg`; in `1.depth.png` it is something else
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class WebDataset(Format):
    """Images with captions in tars, in what else img2dataset writes (files, Parquet), or in Hugging Face's Parquet.

    The picture of a sample is its only image (`1.jpg`); one with another name before the extension (`1.depth.png`)
    is not, unless --image names it.
    """

    caption: str = setting(
        "",
        "field of .json or column with the caption, or several (a,b): the first; else txt, caption, text or prompt",
    )
    image: str = setting("", "extension or column of the picture, as png or depth.png; else the only one of an image")

    def parts(self) -> list[Part]:
        root = local(self.source)
        found = []
        if root.is_dir():
            archives, folders = under(root, tars.SUFFIXES), _folders_of_images(root)
            found = archives or folders
            if archives and folders:
                _logger.warning(
                    "%s: its tars are read, not the images in folders beside them (%d folders, %s first)",
                    root,
                    len(folders),
                    folders[0],
                )
        found = found or find(self.source, [".parquet"])
        if found[0].suffix.lower() != ".parquet":
            return [Part(str(path)) for path in found]
        return [part for path in found for part in self._table_parts(path)]

    def _table_parts(self, path: epath.Path) -> list[Part]:
        parts = tables.parts(path, 4 * tables.CONTENTS)
        if any(part.stop for part in parts):  # it is not damaged
            names = {name.lower() for name in tables.columns(path)}
            if not names & {*IMAGE_COLUMNS, self.image.lower()}:
                urls = ": it lists addresses; fetch them first with img2dataset" if "url" in names else ""
                raise ValueError(f"{path} has no column with images ({', '.join(sorted(names))}){urls}")
        return parts

    def rows(self, part: Part) -> Iterator[Mapping[str, Any] | Dropped]:
        path = epath.Path(part.path)
        if path.suffix.lower() == ".parquet":
            return tables.rows(part)
        return _files(path) if path.is_dir() else _dotted(tars.samples(path))

    def record(self, row: Mapping[str, Any], part: Part) -> Record | Dropped:
        values = {name.lower(): value for name, value in row.items()}
        shown = self._pictures([name for name, value in values.items() if value])
        if not shown and isinstance(values.get("status"), str) and values["status"] != "success":
            return NOT_FETCHED
        if len(shown) > 1 or (not shown and any(_is_image(name) and value for name, value in values.items())):
            return Dropped("which_image")
        fields = values
        if isinstance(values.get("json"), bytes):
            try:
                told = json.loads(values["json"])
            except (ValueError, RecursionError):
                return Dropped("not_json")
            fields = {**told, **values} if isinstance(told, dict) else values  # a list is of something else
        names = self.caption.split(",") if self.caption else TEXT_FIELDS
        text = read_text(first(fields, names))
        return Record("pair", (text, read_image(epath.Path(part.path).parent, values[shown[0]] if shown else None)))

    def _pictures(self, names: list[str]) -> list[str]:
        """Those that are the picture, one if all is well."""
        if self.image:
            return [name for name in names if name == self.image.lower()]
        alone = [name for name in names if name in IMAGE_COLUMNS]
        return alone or [name for name in names if _is_image(name) and name.rsplit(".", 1)[0] in _PICTURES]


@dataclasses.dataclass(frozen=True)
class Folder(AnnotatedTable):
    """A folder of images with captions.jsonl, captions.csv, metadata.jsonl or metadata.csv; or any such table.

    OpenUni's lists of its corpora are such tables; their captions stand in files of their own, named by `annotation`.
    """

    file: str = setting("", "field with the image's file; else file, file_name, image or output_image")
    text: str = setting("", "field with the caption, or several (a,b): the first; else text, caption or a prompt")

    def needed(self) -> list[tuple[str, ...]]:
        return [self._files, (*self._texts, ANNOTATION)]

    @property
    def _files(self) -> tuple[str, ...]:
        return (self.file,) if self.file else ("file", "file_name", "image", "output_image")

    @property
    def _texts(self) -> tuple[str, ...]:
        return tuple(self.text.split(",")) if self.text else ("text", "caption", "prompt", "input_prompt")

    def tables(self) -> list[epath.Path]:
        root = local(self.source)
        found = [root] if root.is_file() else [root / name for name in CAPTIONS if (root / name).is_file()]
        if len(found) != 1:
            have = f"{len(found)} are there" if found else "none is there"
            raise FileNotFoundError(f"{root} needs one of {', '.join(CAPTIONS)}; {have}")
        return found

    def record(self, row: Mapping[str, Any], part: Part) -> Record:
        file = first(row, self._files)
        return Record("pair", (self.text_of(row, self._texts, part), self.read(file, part)), str(file))


@dataclasses.dataclass(frozen=True)
class ImagePairs(pictures.ImageTable):
    """A table of two images a row: what is given and what it is to become."""

    given: str = setting("source", "field with the image that is given")
    target: str = setting("target", "field with the image that is to be made of it")

    def needed(self) -> list[tuple[str, ...]]:
        return [(self.given,), (self.target,)]

    def record(self, row: Mapping[str, Any], part: Part) -> Record:
        return Record("image_image", tuple(self.read(field(row, name), part) for name in (self.given, self.target)))


def _is_image(name: str) -> bool:
    """Whether an extension of a sample's file, such as `depth.png`, is that of an image."""
    return name.rsplit(".", 1)[-1] in images.EXTENSIONS


def _dotted(samples: Iterator[dict[str, bytes] | Dropped]) -> Iterator[dict[str, bytes] | Dropped]:
    """The samples of a tar; `photo 2.0 red.jpg` and `photo 2.0 red.txt` are one, though their name has a dot in it."""
    for sample in samples:
        stems = {} if isinstance(sample, Dropped) else {name.rpartition(".")[0] for name in sample if _is_image(name)}
        # Beside a picture without a dot, `seg.png` and `seg.json` tell more about it.
        beside = (".txt", ".caption", *(() if "" in stems else (".json",)))
        own = {stem for stem in stems if stem and any(stem + ending in sample for ending in beside)}
        for stem in sorted(own):
            yield {name[len(stem) + 1 :]: data for name, data in sample.items() if name.rpartition(".")[0] == stem}
        rest = sample
        if own:
            rest = {name: data for name, data in sample.items() if name.rpartition(".")[0] not in own}
        if rest:
            yield rest


def _folders_of_images(folder: epath.Path) -> list[epath.Path]:
    """The folders with images, at any depth."""
    return sorted({path.parent for path in under(folder, images.SUFFIXES)})


def _files(folder: epath.Path) -> Iterator[dict[str, bytes] | Dropped]:
    """The samples of a folder as `tars.samples` gives them: the files that have an image's name up to the last dot."""
    stems: dict[str, list[epath.Path]] = {}
    for path in sorted(folder.iterdir()):
        if not is_hidden(path.name) and path.suffix.lower() in (*images.SUFFIXES, ".txt", ".caption", ".json"):
            stems.setdefault(path.stem, []).append(path)
    for files in stems.values():
        if any(path.suffix.lower() in images.SUFFIXES for path in files):
            sample = {path.suffix.lower().lstrip("."): path.read_bytes() for path in files}
            yield sample if len(sample) == len(files) else Dropped("duplicate")  # 1.jpg and 1.JPG
