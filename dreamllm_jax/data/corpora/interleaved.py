"""Web pages and stories: texts and images in turn."""

import base64
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dreamllm_jax.data.corpora import pictures, tables, tars
from dreamllm_jax.data.corpora.records import Dropped, Format, Part, Record, find, read_text, setting
from dreamllm_jax.data.document import Image, Role, Text


@dataclasses.dataclass(frozen=True)
class Mmc4(Format):
    """Multimodal C4: sentences, and images matched to them; as JSON lines with images beside them, or both in tars.

    In tars a sample has the page as .json and its images under their `image_name`, as the original program reads them,
    or in the page itself as `image_base64`, as OpenFlamingo does.
    """

    images: str = setting("", "directory of the images, as files or in tars")
    place: str = setting("after", "put an image after or before the sentence it was matched to")
    min_similarity: float = setting(0.0, "leave out images whose matched_sim is lower")
    found: pictures.Pictures | None = None

    def __post_init__(self):
        if self.place not in ("after", "before"):
            raise ValueError(f"place is after or before, got {self.place!r}")

    def parts(self) -> list[Part]:
        found: list[Part] = []
        for path in find(self.source, (*tars.SUFFIXES, *tables.SUFFIXES)):
            found += [Part(str(path))] if tars.is_tar(path) else tables.parts(path, tables.REFERENCES)
        return found

    def prepare(self, scratch: epath.Path) -> "Mmc4":
        return dataclasses.replace(self, found=pictures.make(self.images, scratch)) if self.images else self

    def rows(self, part: Part) -> Iterator[tuple[Mapping[str, Any], Mapping[str, bytes]] | Dropped]:
        """Pages, each with the files that stand beside it in a tar."""
        if not tars.is_tar(part.path):
            for row in tables.rows(part):
                yield row if isinstance(row, Dropped) else (row, {})
            return
        for sample in tars.samples(epath.Path(part.path)):
            if isinstance(sample, Dropped):
                yield sample
                continue
            try:
                page = json.loads(sample.get("json", b""))
            except (ValueError, RecursionError):
                yield Dropped("not_json")
                continue
            yield (page, sample) if isinstance(page, dict) else Dropped("fields")

    def record(self, row: tuple[Mapping[str, Any], Mapping[str, bytes]], part: Part) -> Record | Dropped:
        placed = self._placed(*row, part)
        return placed if isinstance(placed, Dropped) else Record("interleaved", placed)

    def _placed(
        self, page: Mapping[str, Any], beside: Mapping[str, bytes], part: Part, role: Role = ""
    ) -> tuple[Text | Image | Dropped, ...] | Dropped:
        """The page's sentences and images in order. Sentences between two images become one text."""
        sentences, infos = page.get("text_list"), page.get("image_info")
        if not isinstance(sentences, list) or not isinstance(infos, list):
            return Dropped("fields")
        images = [self._image(info, beside, part, len(sentences)) for info in infos]
        shift = int(self.place == "after")
        segments: list[Text | Image | Dropped] = []
        start = 0
        # Dropped images stand nowhere (their index may be missing); they are there to be counted.
        segments += [image for _, image in images if isinstance(image, Dropped)]
        kept = [(index + shift, image) for index, image in images if isinstance(image, Image)]
        for stop, image in [*sorted(kept, key=lambda each: each[0]), (len(sentences), None)]:
            text = " ".join(s.strip() for s in sentences[start:stop] if isinstance(s, str) and s.strip())
            if text:
                segments.append(Text(text, role))
            if image:
                segments.append(dataclasses.replace(image, role=role))
            start = stop
        return tuple(segments)

    def _image(
        self, info: object, beside: Mapping[str, bytes], part: Part, sentences: int
    ) -> tuple[int, Image | Dropped]:
        """The index of an image's sentence, and the image."""
        index = info.get("matched_text_index") if isinstance(info, dict) else None
        if type(index) is not int or not 0 <= index < sentences:
            return 0, Dropped("fields")
        similarity = info.get("matched_sim")
        if self.min_similarity and not isinstance(similarity, int | float):
            return index, Dropped("fields")
        if self.min_similarity and not similarity >= self.min_similarity:  # so that NaN is none
            return index, Dropped("similarity")
        name, encoded = info.get("image_name"), info.get("image_base64")
        if isinstance(encoded, str):
            try:  # OpenFlamingo's own script stores it as Python prints bytes
                return index, Image(base64.b64decode(encoded.removeprefix("b'").removesuffix("'"), validate=True))
            except ValueError:
                return index, Dropped("broken")
        if beside and isinstance(name, str):
            return index, _beside(beside, name.lower())
        if not self.found:
            return index, Dropped("missing")
        shard = re.search(r"shard_(\d+)", part.path)
        inside = [f"{shard[1]}/{name}"] if shard else []
        return index, self.found.read(name, *inside, info.get("raw_url"))


def _beside(files: Mapping[str, bytes], name: str) -> Image | Dropped:
    """The file of that name, or the only one whose name differs from it in its extension alone."""
    stem = name.rsplit(".", 1)[0]
    alike = [other for other in files if other.rsplit(".", 1)[0] == stem and other != "json"]
    chosen = [name] if name in files else alike
    return Image(files[chosen[0]]) if len(chosen) == 1 else Dropped("missing")


@dataclasses.dataclass(frozen=True)
class InstructInterleaved(Mmc4):
    """An `instruction` and, as in MMC4, sentences and images that answer it: JSON lines, or one list."""

    def record(self, row: tuple[Mapping[str, Any], Mapping[str, bytes]], part: Part) -> Record | Dropped:
        instruction, placed = read_text(row[0].get("instruction")), self._placed(*row, part, role="assistant")
        for one in (instruction, placed):
            if isinstance(one, Dropped):
                return one
        return Record("instruct_interleaved", (dataclasses.replace(instruction, role="user"), *placed))


@dataclasses.dataclass(frozen=True)
class Obelics(tables.Table):
    """OBELICS: parallel lists `images` and `texts`, one of both None at each place; images by their address."""

    part_bytes = 16 * tables.REFERENCES
    images: str = setting("", "directory of the images: what img2dataset left, or any with --map")
    map: str = setting("", "table with the columns url and file")
    found: pictures.Pictures | None = None

    def prepare(self, scratch: epath.Path) -> "Obelics":
        if not self.images:
            raise ValueError(
                "OBELICS has addresses of images: fetch them with img2dataset and name its output: --images"
            )
        return dataclasses.replace(self, found=pictures.make(self.images, scratch, self.map))

    def record(self, row: Mapping[str, Any], part: Part) -> Record | Dropped:
        images, texts = row.get("images"), row.get("texts")
        if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
            return Dropped("fields")
        segments: list[Text | Image | Dropped] = []
        for image, text in zip(images, texts, strict=True):
            if image is not None:
                segments.append(self.found.read(image))
            elif isinstance(text, str) and text.strip():
                segments.append(Text(text.strip()))
        return Record("interleaved", tuple(segments))
