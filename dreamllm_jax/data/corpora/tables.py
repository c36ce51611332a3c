"""Tables of records: JSON lines, one JSON list, CSV, TSV and Parquet, read in parts.

Parts of uncompressed text are ranges of bytes that begin and end between records, so that a large file is shared among
workers; of Parquet, ranges of row groups. A compressed file (.gz, .zst, .zip) is one part.
"""

import contextlib
import csv
import dataclasses
import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from typing import IO, Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from dreamllm_jax.data.corpora.records import Dropped, Format, Part, find

COMPRESSED = (".gz", ".zst", ".zip")
TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
SUFFIXES = (*TEXTS, *(text + packed for text in TEXTS for packed in COMPRESSED), ".parquet")
LONGEST = 64 << 20  # bytes of one record
REFERENCES = 1 << 20  # bytes of a part whose records name images
CONTENTS = 64 << 20  # bytes of a part whose records are all there is


def parts(path: epath.Path, size: int) -> list[Part]:
    """Parts of a file of about `size` bytes each.

    Raises:
      ValueError: the file is damaged in a way that leaves its records unknown, or of no known type.
    """
    kind = _kind(path)
    if path.suffix in COMPRESSED:
        return [Part(str(path))]
    if kind == ".parquet":
        try:
            return [Part(str(path), start, stop) for start, stop in _row_groups(path, size)]
        except pa.ArrowInvalid:
            return [Part(str(path))]  # told when it is read
    with _open(path) as file:
        if kind in (".csv", ".tsv"):
            ends = _csv_ends(file, kind)
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
    kind = _kind(path)
    if kind == ".parquet":
        yield from _parquet_rows(path, part)
        return
    with _open(path) as file:
        header = next(_csv(iter(file.readline, b""), kind), []) if kind in (".csv", ".tsv") else []
        listed = kind.startswith((".json", ".ndjson")) and _is_list(file)
        if part.stop:
            file.seek(part.start)
            file = io.BytesIO(file.read(part.stop - part.start))
        if header:
            for row in _csv(iter(file.readline, b""), kind):
                yield row if isinstance(row, Dropped) else dict(zip(header, row, strict=False))
        elif listed:
            yield from _list_rows(file.read())
        else:
            yield from _line_rows(file, plain=kind == ".txt")


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

    def parts(self) -> list[Part]:
        return [part for path in find(self.source, SUFFIXES) for part in parts(path, self.part_bytes)]

    def rows(self, part: Part) -> Iterator[dict[str, Any] | Dropped]:
        return rows(part)


def _kind(path: epath.Path) -> str:
    name = path.name
    for packed in COMPRESSED:
        name = name.removesuffix(packed)
    kind = "." + name.rsplit(".", 1)[-1].lower()
    if kind not in (*TEXTS, ".parquet"):
        raise ValueError(f"{path}: a table is one of {', '.join((*TEXTS, '.parquet'))}, or compressed {COMPRESSED}")
    return kind


@contextlib.contextmanager
def _open(path: epath.Path) -> Iterator[io.BufferedReader]:
    with path.open("rb") as file:
        if path.suffix == ".gz":
            file = gzip.GzipFile(fileobj=file)
        elif path.suffix == ".zst":
            file = pa.CompressedInputStream(file, "zstd")
        elif path.suffix == ".zip":
            archive = zipfile.ZipFile(file)
            names = [name for name in archive.namelist() if name.endswith(TEXTS)]
            if len(names) != 1:
                raise ValueError(f"{path}: an archive with one table is expected, this has {len(names)}")
            file = archive.open(names[0])
        with io.BufferedReader(file) as buffered:
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


def _csv_ends(file: IO[bytes], kind: str) -> Iterator[int]:
    """Ends of rows, the first being the header's."""
    place = 0

    def lines() -> Iterator[bytes]:
        nonlocal place
        for line in file:
            place += len(line)
            yield line

    for _ in _csv(lines(), kind):
        yield place
    if not place:
        yield 0


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
    text = (
        data.decode("utf-8-sig", "replace").strip().lstrip("[").strip(", \t\r\n").removesuffix("]").rstrip(", \t\r\n")
    )
    try:
        elements = json.loads(f"[{text}]")
    except (json.JSONDecodeError, RecursionError):
        yield Dropped("not_json")
        return
    for row in elements:
        yield row if isinstance(row, dict) else Dropped("fields")


def _line_rows(file: IO[bytes], plain: bool) -> Iterator[dict[str, Any] | Dropped]:
    while line := file.readline(LONGEST):
        if len(line) == LONGEST and not line.endswith(b"\n"):
            while (rest := file.readline(LONGEST)) and not rest.endswith(b"\n"):
                pass
            yield Dropped("too_long")
            continue
        text = line.decode("utf-8-sig", "replace").strip()
        if not text:
            continue
        if plain:
            yield {"text": text}
            continue
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            row = Dropped("not_json")
        yield row if isinstance(row, dict | Dropped) else Dropped("fields")


def _csv(lines: Iterator[bytes], kind: str) -> Iterator[list[str] | Dropped]:
    texts = (line.decode("utf-8-sig", "replace") for line in lines)
    reader = csv.reader(texts, delimiter="\t" if kind == ".tsv" else ",")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            row = Dropped("not_csv")
        if row:
            yield row


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
