"""What every format of a corpus offers to the import, and what it hands over."""

import abc
import contextlib
import dataclasses
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from dreamllm_jax.data.document import Image, Kind, Text


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A record, or an image of one, that cannot be used; `reason` is one word for counting."""

    reason: str


_LEFT_BY_SYSTEMS = ("__macosx", "thumbs.db", "desktop.ini", "@eadir")
NOT_FETCHED = Dropped("not_fetched")  # an address that was dead: counted, and no damage


@dataclasses.dataclass(frozen=True)
class Record:
    """A document as its source has it: images as they were found, or the reason why they were not.

    `name` is what its source calls it, where something else may be found by that: the file of its image.
    """

    kind: Kind
    segments: tuple[Text | Image | Dropped, ...]
    name: str = ""


@dataclasses.dataclass(frozen=True, order=True)
class Part:
    """What is read at a time: all of a file, or a range of it (bytes, row groups or records; 0, 0 is all)."""

    path: str
    start: int = 0
    stop: int = 0


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """A format of corpora; what can be set are the fields of its dataclass, each with a `help` in its metadata."""

    source: str

    @abc.abstractmethod
    def parts(self) -> list[Part]:
        """The parts of the source, in an order that does not change.

        Raises:
          FileNotFoundError, ValueError: the source is not there or not of this format.
        """

    @abc.abstractmethod
    def rows(self, part: Part) -> Iterator[Any]:
        """What stands in a part for each record, in order; `Dropped` where it cannot be read."""

    @abc.abstractmethod
    def record(self, row: Any, part: Part) -> Record | Dropped:
        """What a row of a part means."""

    def records(self, part: Part) -> Iterator[Record | Dropped]:
        """The records of a part, in their order."""
        for row in self.rows(part):
            try:
                found = row if isinstance(row, Dropped) else self.record(row, part)
            except Exception:  # whatever a record leads to that is not as the format has it: the next one may be
                found = Dropped("odd_record")
            yield found

    def prepare(self, scratch: epath.Path) -> "Format":
        """Called once, before the first part is read, with a directory to keep something in; gives what then reads."""
        del scratch
        return self


def setting(default: str | float, help: str):
    """A field of a format, with what the command line says of it."""
    return dataclasses.field(default=default, metadata={"help": help})


def find(source: str, suffixes: Sequence[str]) -> list[epath.Path]:
    """The file `source`, or all files under the directory `source` whose names end in one of `suffixes`, sorted.

    Raises:
      FileNotFoundError: there are none.
    """
    path = local(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no file or directory {source}")
    files = under(path, suffixes)
    if not files:
        raise FileNotFoundError(f"no {', '.join(f'*{suffix}' for suffix in suffixes)} in {source}")
    return files


def under(folder: epath.Path, suffixes: Sequence[str]) -> list[epath.Path]:
    """All files under a directory whose names end in one of `suffixes`, in capitals too, sorted; no hidden ones."""
    found: list[epath.Path] = []
    for path in folder.iterdir():
        if is_hidden(path.name):
            continue
        if path.is_dir():
            found += under(path, suffixes)
        elif path.name.lower().endswith(tuple(suffixes)):
            found.append(path)
    return sorted(found)


def local(path: str) -> epath.Path:
    """The path of something to read.

    Raises:
      ValueError: it is a web address, from which nothing is ever fetched.
    """
    if is_url(path):
        raise ValueError(
            f"{path} is a web address and nothing is fetched from the web here: fetch the images with img2dataset first"
        )
    return epath.Path(path)


def is_url(name: str) -> bool:
    """Whether a name is a web address."""
    return re.match(r"(https?|ftp|data|file):", name, re.IGNORECASE) is not None


def inside(name: str) -> str | None:
    """A relative file name, also with Windows' separators, with `/` between its parts; None if it leaves its folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    leaves = path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name) or "\0" in name
    return None if leaves or not name else str(path)


def is_hidden(name: str) -> bool:
    """Whether a file is what systems leave beside the user's: `.DS_Store`, `._1.jpg`, `__MACOSX/`, `Thumbs.db`."""
    return any(part.startswith(".") or part.lower() in _LEFT_BY_SYSTEMS for part in PurePosixPath(name).parts)


def spellings(name: str) -> list[str]:
    """The name, and the ways in which file systems may compose its accents (macOS takes them apart)."""
    return list(dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]))


def field(row: Mapping[str, Any], name: str) -> Any:
    """What a row has under a name, or under the only one that differs from it in capitals and blanks alone."""
    return row[_key(row, name)] if has_field(row, name) else None


def first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What a row has under the first of the names under which there is something."""
    return next((found for name in names if (found := field(row, name))), None)


def has_field(row: Mapping[str, Any], name: str) -> bool:
    """Whether `field` finds something, be it None."""
    return _key(row, name) in row


def _key(row: Mapping[str, Any], name: str) -> str:
    alike = [other for other in row if isinstance(other, str) and other.strip().lower() == name.lower()]
    return alike[0] if name not in row and len(alike) == 1 else name


def read_image(root: str | epath.Path, value: object) -> Image | Dropped:
    """An image as a record has it: its bytes (also as Parquet files of Hugging Face hold them), or a file in `root`.

    Nothing outside of `root` is read and nothing from the web.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return Image(value)
    if not isinstance(value, str) or not value.strip():
        return Dropped("no_image")
    if is_url(value):
        return Dropped("url")
    name = inside(value)
    if name is None:
        return Dropped("outside")
    for spelling in spellings(name):
        with contextlib.suppress(OSError):
            return Image(epath.Path(root, spelling).read_bytes())
    return Dropped("missing")


def read_text(value: object) -> Text | Dropped:
    """A text as a record has it: the first of several, without the blanks around it."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            return Dropped("encoding")
        if "\0" in value:  # UTF-16 without a mark
            return Dropped("encoding")
    if not isinstance(value, str) or not value.strip():
        return Dropped("no_text")
    return Text(value.strip())
