"""Files that lie beside a table: in a folder or in tars, by their name; images also by the address they came from.

What img2dataset leaves is understood: the `url` in the .json beside a tar's image, and the columns `url` and `key` of
the Parquet files beside folders of images. A table with the columns `url` and `file` can say the same.
"""

import dataclasses
import functools
import json
import sqlite3
import tarfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Self

from etils import epath

from dreamllm_jax.data import images
from dreamllm_jax.data.corpora import tables, tars
from dreamllm_jax.data.corpora.records import (
    Dropped,
    Part,
    find,
    inside,
    is_hidden,
    is_url,
    local,
    read_image,
    setting,
    under,
)
from dreamllm_jax.data.document import Image

_ANYWHERE = "*/"  # before the name of a file of which the folder is not told


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images or other files under the directory `root`; `index` says where those are that have no file of that name."""

    root: str
    index: str = ""

    def read(self, *names: object) -> Image | Dropped:
        """The image of the first of the names (or addresses) that is found; otherwise why the first was not."""
        reasons = []
        for name in names:
            found = read_image(self.root, name)
            if isinstance(found, Dropped) and found.reason in ("missing", "url") and self.index:
                found = self._indexed(str(name), found)
            if isinstance(found, Image):
                return found
            reasons.append(found)
        return reasons[0] if reasons else Dropped("no_image")

    def _indexed(self, name: str, otherwise: Dropped) -> Image | Dropped:
        query = "SELECT path, offset, size FROM images WHERE name = ?"
        for key in (_indexable(name), _ANYWHERE + _indexable(name)):
            if row := _connect(self.index).execute(query, (key,)).fetchone():
                return _at(self.root, *row) if row[0] else Dropped("which_image")
        return Dropped("missing") if is_url(name) else otherwise


def _at(root: str | epath.Path, path: str, offset: int, size: int) -> Image | Dropped:
    """The image at a place of the index: `size` bytes of a tar, or if that is 0 a whole file."""
    if not size:
        return read_image(root, path)
    with epath.Path(root, path).open("rb") as file:
        file.seek(offset)
        return Image(file.read(size))


def _indexable(name: str) -> str:
    """A name or an address as it stands in the index: the same, however accents and separators are written."""
    return name if is_url(name) else unicodedata.normalize("NFC", inside(name) or name)


@dataclasses.dataclass(frozen=True)
class ImageTable(tables.Table):
    """A format of tables whose rows name files of images."""

    images: str = setting("", "directory of the images, as files or in tars; default the table's own, as files")
    found: Pictures | None = None

    def prepare(self, scratch: epath.Path) -> Self:
        return dataclasses.replace(self, found=make(self.images, scratch)) if self.images else self

    def read(self, name: object, part: Part) -> Image | Dropped:
        """The image that a row of the part names."""
        return self.found.read(name) if self.found else read_image(epath.Path(part.path).parent, name)


def make(
    root: str, scratch: epath.Path, table: str = "", *, suffixes: Sequence[str] = images.SUFFIXES, what: str = "images"
) -> Pictures:
    """The files under `root`, indexed in `scratch` where they cannot be found by name alone.

    What is in a tar is found by its name there, by that alone, and as where the tar is unpacked in a folder of its own
    name, or of what stands in that behind the last hyphen (`cc12m-train-0003.tar` in `0003/`, as OpenUni has it).

    Args:
      root: the directory.
      scratch: a directory for the index.
      table: a table with the columns `url` and `file`.
      suffixes: of the files that are looked for in tars.
      what: they are called in messages and in the index's name.

    Raises:
      FileNotFoundError, ValueError: the directory or the table cannot be used.
    """
    folder = local(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"no directory of {what} {root}")
    archives = under(folder, tars.SUFFIXES)
    lists = [path for path in under(folder, [".parquet"]) if path.with_suffix("").is_dir()]
    if not (archives or lists or table):
        return Pictures(str(folder))
    index = scratch / f"{what}.sqlite"
    if str(index).startswith("gs://"):
        raise ValueError(f"{what} in tars or by address need an index in a local directory, not in {scratch}")
    if not index.exists():
        unfinished = index.with_suffix(".unfinished")
        unfinished.unlink(missing_ok=True)
        with sqlite3.connect(unfinished) as connection:
            connection.execute("CREATE TABLE images (name TEXT PRIMARY KEY, path TEXT, offset INT, size INT)")
            for path in archives:
                _add(connection, folder, _members(folder, path, suffixes))
            for path in lists:
                _add(connection, folder, _listed(folder, path))
            if table:
                _add(connection, folder, _mapped(table))
        connection.close()
        unfinished.rename(index)
    return Pictures(str(folder), str(index))


def _add(connection: sqlite3.Connection, root: epath.Path, entries: Iterator[tuple[str, str, int, int]]) -> None:
    """Adds (name, path, offset, size) to the index; a name of pictures that differ is known to be of none of them."""
    for name, *place in entries:
        if connection.execute("INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?)", (name, *place)).rowcount:
            continue
        there = connection.execute("SELECT path, offset, size FROM images WHERE name = ?", (name,)).fetchone()
        if there[0] and there != tuple(place) and _at(root, *there) != _at(root, *place):
            connection.execute("UPDATE images SET path = '' WHERE name = ?", (name,))


@functools.cache
def _connect(index: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{index}?mode=ro&immutable=1", uri=True)


def _members(root: epath.Path, path: epath.Path, suffixes: Sequence[str]) -> Iterator[tuple[str, str, int, int]]:
    """A tar's files as `make` tells, and images by the `url` of the .json of the same sample."""
    archive = str(path.relative_to(root))
    places: dict[str, tuple[int, int]] = {}
    urls: list[tuple[str, str]] = []
    if path.suffix.lower() != ".tar":
        raise ValueError(f"{path}: files are found by their place in a tar, which needs an uncompressed one")
    try:
        with path.open("rb") as file, tars.open_tar(file, "r:") as tar:
            for member in tar:
                name = PurePosixPath(inside(member.name) or "")
                if not member.isfile() or not name.name or is_hidden(str(name)) or member.size > tars.LARGEST:
                    continue
                if name.suffix.lower() in suffixes:
                    places[str(name)] = member.offset_data, member.size
                elif name.suffix.lower() == ".json":
                    try:
                        urls.append((json.load(tar.extractfile(member)).get("url"), str(name.with_suffix(""))))
                    except (ValueError, AttributeError):
                        continue
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged ({error}); repair or remove it") from None
    for name, (offset, size) in places.items():
        yield _indexable(name), archive, offset, size
        yield _ANYWHERE + _indexable(PurePosixPath(name).name), archive, offset, size
        for unpacked in dict.fromkeys((path.stem, path.stem.rpartition("-")[2])):
            yield _ANYWHERE + _indexable(f"{unpacked}/{name}"), archive, offset, size
    stems: dict[str, list[tuple[int, int]]] = {}
    for name, place in places.items():
        stems.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(place)
    for url, stem in urls:
        if isinstance(url, str) and len(stems.get(stem, ())) == 1:  # of two it would not be known which
            yield url, archive, *stems[stem][0]


def _listed(root: epath.Path, path: epath.Path) -> Iterator[tuple[str, str, int, int]]:
    """Addresses and files of a folder of img2dataset, from the Parquet file beside it."""
    if not {"url", "key"} <= tables.columns(path):
        return
    files: dict[str, list[epath.Path]] = {}
    for file in under(path.with_suffix(""), images.SUFFIXES):
        files.setdefault(file.stem, []).append(file)
    for part in tables.parts(path, tables.CONTENTS):
        for row in tables.rows(part):
            if isinstance(row["url"], str):
                for file in files.get(str(row["key"]), ()):  # none of an address that was dead
                    yield row["url"], str(file.relative_to(root)), 0, 0


def _mapped(table: str) -> Iterator[tuple[str, str, int, int]]:
    (path,) = find(table, tables.SUFFIXES)[:1]
    for part in tables.parts(path, tables.CONTENTS):
        for row in tables.rows(part):
            if not isinstance(row, dict) or not isinstance(row.get("url"), str) or not isinstance(row.get("file"), str):
                raise ValueError(f"{table}: every row needs the fields url and file")
            yield row["url"], row["file"], 0, 0
