"""Tables of records: JSON lines, one JSON list, CSV, TSV and Parquet, read in parts.

Parts of uncompressed text are ranges of bytes that begin and end between records, so that a large file is shared among
workers; of Parquet, ranges of row groups. A compressed file (.gz, .zst, .zip) is one part.
"""

import codecs
import collections
import contextlib
import csv
import dataclasses
import gzip
import io
import itertools
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from dreamllm_jax.common.directories import NO_POINTER, is_lfs_pointer
from dreamllm_jax.data.corpora.records import Dropped, Format, Part, find, has_field, is_hidden

COMPRESSED = (".gz", ".zst", ".zip")
TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
SUFFIXES = (*TEXTS, *(text + packed for text in TEXTS for packed in COMPRESSED), ".parquet")
LONGEST = 64 << 20  # bytes of one record
REFERENCES = 1 << 20  # bytes of a part whose records name images
CONTENTS = 64 << 20  # bytes of a part whose records are all there is
_SEPARATED = (".csv", ".tsv")
_HEAD = 1 << 16  # bytes by which an encoding is known
_NO_TEXT = re.compile("[\0\udc80-\udcff]")
_LOOKED_AT = 16  # first records whose fields are looked at


def parts(path: epath.Path, size: int) -> list[Part]:
    """Parts of a file of about `size` bytes each.

    Raises:
      ValueError: the file is damaged in a way that leaves its records unknown, or of no known type or encoding.
    """
    kind, packed = _kind(path)
    if kind == ".parquet":
        try:
            return [Part(str(path), start, stop) for start, stop in _row_groups(path, size)]
        except pa.ArrowInvalid:
            with path.open("rb") as file:
                if is_lfs_pointer(file.read(_HEAD)):
                    raise ValueError(f"{path} {NO_POINTER}") from None
            return [Part(str(path))]  # told when it is read
    if packed:
        return [Part(str(path))]
    with _open(path) as file:
        if kind in _SEPARATED:
            ends = _csv_ends(file, _read_header(file, path, kind)[1])
        elif _is_list(file):
            ends = _list_ends(file, path)
        else:
            ends = _line_ends(file, size)
        start, found = next(ends), []
        for end in ends:
            if end - start >= size:
                found.append(Part(str(path), start, end))
                start = end
        if file.seek(0, io.SEEK_END) > start:
            found.append(Part(str(path), start, file.tell()))
    return found


def rows(part: Part) -> Iterator[dict[str, Any] | Dropped]:
    """The records of a part as dictionaries; a line of .txt as `{"text": line}`."""
    path = epath.Path(part.path)
    kind, _ = _kind(path)
    if kind == ".parquet":
        yield from _parquet_rows(path, part)
        return
    with _open(path) as file:
        header, separator = _read_header(file, path, kind) if kind in _SEPARATED else ([], "")
        listed = kind.startswith((".json", ".ndjson")) and _is_list(file)
        if part.stop:
            file.seek(part.start)
            file = io.BytesIO(file.read(part.stop - part.start))
        if kind in _SEPARATED:
            for row, _ in _csv(file, separator):
                yield row if isinstance(row, Dropped) else _named(header, row)
        elif listed:
            yield from _list_rows(file.read())
        else:
            yield from _line_rows(file, plain=kind == ".txt")


def require_fields(part: Part, needed: Sequence[tuple[str, ...]]) -> None:
    """Makes sure that the first records of a part have what is needed, for which else each of them would be dropped.

    Args:
      needed: of each tuple one field.

    Raises:
      ValueError: naming the fields that there are.
    """
    begin = dataclasses.replace(part, stop=min(part.stop, part.start + REFERENCES)) if _is_text(part) else part
    try:
        first = [row for row in itertools.islice(rows(begin), _LOOKED_AT) if isinstance(row, dict)]
    except (OSError, EOFError, zlib.error, pa.ArrowException):
        return  # damage is told when all of it is read
    there = dict.fromkeys(name for row in first for name in row)
    for names in needed:
        if first and not any(has_field(row, name) for row in first for name in names):
            raise ValueError(
                f"{part.path} has no field {' or '.join(map(repr, names))} in its first records; it has "
                f"{', '.join(map(repr, there))}"
            )


def _is_text(part: Part) -> bool:
    """Whether a part is a range of bytes."""
    return part.stop > 0 and _kind(epath.Path(part.path))[0] != ".parquet"


def columns(path: epath.Path) -> set[str]:
    """The names of a Parquet file's columns."""
    with _parquet(path) as file:
        return set(file.schema_arrow.names)


@dataclasses.dataclass(frozen=True)
class Table(Format):
    """A format of tables with a record in each row.

    Attributes:
      part_bytes: about the size of a part.
    """

    part_bytes: ClassVar[int] = REFERENCES

    def needed(self) -> list[tuple[str, ...]]:
        """Fields without which no record is of use, of each tuple one."""
        return []

    def tables(self) -> list[epath.Path]:
        """The files."""
        return find(self.source, SUFFIXES)

    def parts(self) -> list[Part]:
        found = []
        for path in self.tables():
            of_file = parts(path, self.part_bytes)
            if of_file and self.needed():
                require_fields(of_file[0], self.needed())
            found += of_file
        return found

    def rows(self, part: Part) -> Iterator[dict[str, Any] | Dropped]:
        return rows(part)


def _kind(path: epath.Path) -> tuple[str, str]:
    """What kind of table the name says it is, and how it is compressed."""
    name = path.name.lower()
    packed = next((packed for packed in COMPRESSED if name.endswith(packed)), "")
    kind = "." + name.removesuffix(packed).rsplit(".", 1)[-1]
    if kind not in (*TEXTS, ".parquet"):
        raise ValueError(f"{path}: a table is one of {', '.join((*TEXTS, '.parquet'))}, or compressed {COMPRESSED}")
    return kind, packed


@contextlib.contextmanager
def _open(path: epath.Path) -> Iterator[io.BufferedReader]:
    """The text of a table, its lines ending in LF.

    Raises:
      ValueError: it is not UTF-8, or only a pointer to the file.
    """
    _, packed = _kind(path)
    with path.open("rb") as file:
        if packed == ".gz":
            file = gzip.GzipFile(fileobj=file)
        elif packed == ".zst":
            file = pa.CompressedInputStream(file, "zstd")
        elif packed == ".zip":
            archive = zipfile.ZipFile(file)
            names = [name for name in archive.namelist() if name.lower().endswith(TEXTS) and not is_hidden(name)]
            if len(names) != 1:
                raise ValueError(f"{path}: an archive with one table is expected, this has {len(names)}")
            file = archive.open(names[0])
        with io.BufferedReader(file, _HEAD) as buffered:
            head = buffered.peek(_HEAD)
            if is_lfs_pointer(head):
                raise ValueError(f"{path} {NO_POINTER}")
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 4 * head.count(0) > len(head) > 0:
                raise ValueError(f"{path} is not UTF-8 but, it seems, UTF-16: save it as UTF-8 (Excel: CSV UTF-8)")
            if b"\r" in head and b"\n" not in head:  # old Mac programs, and Excel's "CSV (Macintosh)"
                yield io.BufferedReader(io.BytesIO(buffered.read().replace(b"\r", b"\n")))
            else:
                yield buffered


def _is_list(file: io.BufferedReader) -> bool:
    return file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _line_ends(file: IO[bytes], size: int) -> Iterator[int]:
    """Ends of lines about `size` apart, found without reading what lies between."""
    last = file.seek(0, io.SEEK_END)
    place = 0
    yield place
    while place + size < last:
        file.seek(place + size - 1)
        file.readline()
        place = file.tell()
        yield place


def _csv_ends(file: IO[bytes], separator: str) -> Iterator[int]:
    """Ends of rows, the first being the header's."""
    header = file.tell()
    yield header
    for _, size in _csv(file, separator):
        yield header + size


def _list_ends(file: IO[bytes], path: epath.Path) -> Iterator[int]:
    """Ends of a JSON list's elements, the first being that of its bracket.

    Read as Latin-1, in which every byte is a character and JSON's own signs are the same, so that places are bytes.
    """
    decoder = json.JSONDecoder()
    text, offset, place = "", 0, 0

    def more() -> bool:
        nonlocal text, offset, place
        read = file.read(1 << 20).decode("latin-1")
        if read:
            text, offset, place = text[place:] + read, offset + place, 0
        return bool(read)

    more()
    place = text.index("[") + 1
    yield offset + place
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if place == len(text):
            if not more():
                raise ValueError(f"{path}: the list ends before its closing bracket; is the file complete?")
            continue
        if text[place] == "]":
            return
        try:
            _, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            if len(text) - place > LONGEST or not more():
                raise ValueError(f"{path}: not JSON near byte {offset + place}") from None
            continue
        if end == len(text) and more():  # a number may go on
            continue
        place = end
        yield offset + place


def _list_rows(data: bytes) -> Iterator[dict[str, Any] | Dropped]:
    text = _decoded(data).strip().lstrip("[").strip(", \t\r\n").removesuffix("]").rstrip(", \t\r\n")
    try:
        elements = json.loads(f"[{text}]")
    except (json.JSONDecodeError, RecursionError):
        yield Dropped("not_json")
        return
    whole = _is_whole(text)
    for row in elements:
        if not whole and not _is_whole(json.dumps(row, ensure_ascii=False)):
            row = Dropped("encoding")
        yield row if isinstance(row, dict | Dropped) else Dropped("fields")


def _line_rows(file: IO[bytes], plain: bool) -> Iterator[dict[str, Any] | Dropped]:
    while line := file.readline(LONGEST):
        if len(line) == LONGEST and not line.endswith(b"\n"):
            while (rest := file.readline(LONGEST)) and not rest.endswith(b"\n"):
                pass
            yield Dropped("too_long")
            continue
        text = _decoded(line).strip()
        if not text:
            continue
        try:
            row = {"text": text} if plain else json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            row = Dropped("not_json")
        if isinstance(row, dict) and not _is_whole(text):
            row = Dropped("encoding")
        yield row if isinstance(row, dict | Dropped) else Dropped("fields")


def _decoded(data: bytes) -> str:
    """The text; bytes that are not UTF-8 become what `_is_whole` finds."""
    return data.decode("utf-8-sig", "surrogateescape")


def _is_whole(text: str) -> bool:
    """Whether all of it was UTF-8, and text."""
    return not _NO_TEXT.search(text)


def _read_header(file: IO[bytes], path: epath.Path, kind: str) -> tuple[list[str], str]:
    """The names of a table's columns, and what separates them; the file then is at the first row.

    Raises:
      ValueError: the first line is no header.
    """
    line = file.readline()
    while line and not line.strip():
        line = file.readline()
    readings = {}
    for separator in "\t" if kind == ".tsv" else ",;\t|":
        found, _ = next(_csv(io.BytesIO(line), separator), ([], 0))
        if isinstance(found, list):
            readings[separator] = [name.strip() for name in found]
    if line and not readings:
        raise ValueError(f"{path}: its first line is not the header of a table")
    separator = max(readings, key=lambda one: len(readings[one]), default=",")
    header = readings.get(separator, [])
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise ValueError(f"{path} has two columns {twice[0]!r}")
    return header, separator


def _named(header: Sequence[str], cells: Sequence[str]) -> dict[str, str] | Dropped:
    """A row by its columns' names; a row that has not as many cells was torn by a separator without quotes."""
    if len(cells) < len(header) or any(cells[len(header) :]):
        return Dropped("columns")
    return {name: cell for name, cell in zip(header, cells, strict=False) if name}


def _csv(file: IO[bytes], separator: str) -> Iterator[tuple[list[str] | Dropped, int]]:
    """The rows that follow, and how many bytes were read up to the end of each.

    Of one that cannot be read, as its quotes do not end, the first line is given up, and the next row begins behind it.
    """
    waiting: collections.deque[bytes] = collections.deque()
    taken: list[bytes] = []
    size = 0

    def texts() -> Iterator[str]:
        while line := waiting.popleft() if waiting else file.readline():
            taken.append(line)
            yield _decoded(line)

    while True:
        # A reader for each row: one that has failed may have kept a part of it.
        reader = csv.reader(texts(), delimiter=separator, strict=True, skipinitialspace=separator != "\t")
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            row = Dropped("not_csv")
            waiting.extendleft(reversed(taken[1:]))
            del taken[1:]
        size += sum(map(len, taken))
        taken.clear()
        if isinstance(row, list) and not all(map(_is_whole, row)):
            row = Dropped("encoding")
        if isinstance(row, Dropped) or any(cell.strip() for cell in row):  # spreadsheets end in rows of empty cells
            yield row, size


@contextlib.contextmanager
def _parquet(path: epath.Path) -> Iterator[pq.ParquetFile]:
    with path.open("rb") as file, pq.ParquetFile(file) as opened:
        yield opened


def _row_groups(path: epath.Path, size: int) -> Iterator[tuple[int, int]]:
    with _parquet(path) as file:
        start, held = 0, 0
        for group in range(file.num_row_groups):
            held += file.metadata.row_group(group).total_byte_size
            if held >= size or group == file.num_row_groups - 1:
                yield start, group + 1
                start, held = group + 1, 0


def _parquet_rows(path: epath.Path, part: Part) -> Iterator[dict[str, Any]]:
    with _parquet(path) as file:
        groups = range(part.start, part.stop) if part.stop else range(file.num_row_groups)
        for batch in file.iter_batches(batch_size=64, row_groups=list(groups)):
            yield from batch.to_pylist()
