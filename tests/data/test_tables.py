"""However a table is divided into parts, they have every record once and in order; what is damaged is told."""

import csv
import gzip
import io
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from dreamllm_jax.data.corpora import tables
from dreamllm_jax.data.corpora.records import Dropped

ROWS = [
    {"id": str(i), "text": text * (1 + i % 3), "note": 'a "quoted", word' if i % 5 == 0 else ""}
    for i, text in enumerate(["a red fox", "über den Häusern 🦊", "[1, 2], {3}", "two\nlines, or\r\nthree", "\\"] * 8)
]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def separated(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=7)
    return file.getvalue()


def zipped(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
        archive.writestr("LICENSE", "none")
    return file.getvalue()


FILES = {
    "lines.jsonl": lines(ROWS),
    "lines-without-a-last-newline.ndjson": lines(ROWS).rstrip(),
    "blank-lines.jsonl": b"\xef\xbb\xbf\n" + lines(ROWS).replace(b"}\n", b"}\r\n\n"),
    "compact.json": json.dumps(ROWS, separators=(",", ":")).encode(),
    "indented.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode() + b"\n",
    "table.csv": separated(","),
    "table.tsv": separated("\t"),
    "table.parquet": parquet(),
    "packed.jsonl.gz": gzip.compress(lines(ROWS)),
    "packed.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "packed.csv.zst": pa.compress(separated(","), "zstd", asbytes=True),
    "packed.jsonl.zip": zipped("lines.jsonl", lines(ROWS)),
}


@pytest.mark.parametrize("name", FILES)
def test_parts_have_every_record_once(name, tmp_path):
    path = epath.Path(tmp_path / name)
    path.write_bytes(FILES[name])
    counts = set()
    for size in (1, 40, 137, 1000, 1 << 20):
        parts = tables.parts(path, size)
        assert [row for part in parts for row in tables.rows(part)] == ROWS, size
        counts.add(len(parts))
    assert counts == {1} if name.startswith("packed") else len(counts) > 2 and 1 in counts


def test_lines_of_text(tmp_path):
    path = epath.Path(tmp_path / "lines.txt")
    path.write_text("one\n\n  two \r\nthree")
    for size in (1, 6, 100):
        found = [row for part in tables.parts(path, size) for row in tables.rows(part)]
        assert found == [{"text": "one"}, {"text": "two"}, {"text": "three"}]


def test_a_list_longer_than_what_is_read_at_once(tmp_path):
    """Elements lie across the borders of what is read at once, in the middle of a character too."""
    rng = np.random.default_rng(0)
    rows = [{"id": i, "text": "ü🦊" * int(rng.integers(1, 20_000))} for i in range(60)]
    path = epath.Path(tmp_path / "long.json")
    path.write_bytes(json.dumps(rows, ensure_ascii=False).encode())
    parts = tables.parts(path, 1 << 18)
    assert len(parts) > 4 and [row for part in parts for row in tables.rows(part)] == rows


def rows_of(path) -> list:
    return [row for part in tables.parts(path, 50) for row in tables.rows(part)]


def test_damaged_records_are_told_and_the_others_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST", 64)
    path = epath.Path(tmp_path / "damaged.jsonl")
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n{"a": "' + b"x" * 200 + b'"}\n\xff\n{"a": 2}\n')
    want = [{"a": 1}, Dropped("not_json"), Dropped("fields"), Dropped("too_long"), Dropped("not_json"), {"a": 2}]
    assert rows_of(path) == want
    path = epath.Path(tmp_path / "damaged.csv")
    before = csv.field_size_limit(1000)  # other libraries may have raised it by far
    try:
        path.write_bytes(b"a,b\n1,2\n" + b"x" * 1001 + b",3\n4,5\n")
        assert rows_of(path) == [{"a": "1", "b": "2"}, Dropped("not_csv"), {"a": "4", "b": "5"}]
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("cut.json", json.dumps(ROWS).encode()[:-1], "the list ends before its closing bracket; is the file complete?"),
        ("cut.json", json.dumps(ROWS).encode()[:-9], "not JSON near byte"),
        ("odd.json", b'[{"a": 1}, nonsense]', "not JSON near byte 11"),
        ("table.xml", b"<a/>", "a table is one of"),
    ],
)
def test_files_whose_records_are_unknown_are_refused(name, data, message, tmp_path):
    path = epath.Path(tmp_path / name)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        rows_of(path)


def test_an_archive_has_one_table(tmp_path):
    path = epath.Path(tmp_path / "two.jsonl.zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", "{}")
        archive.writestr("b.jsonl", "{}")
    with pytest.raises(ValueError, match="an archive with one table is expected, this has 2"):
        rows_of(path)
