"""Files as people have them: what is read is right, or counted and named, or refused by the name of its file."""

import gzip
import io
import json
import struct
import tarfile
import unicodedata
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture

from dreamllm_jax.data import images, preparation
from dreamllm_jax.data.corpora import folder, tables, tars
from dreamllm_jax.data.corpora.records import inside
from tests.data.conftest import encode, jpeg
from tests.data.imported import bring, plain, summary, write_tar

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


def sample(key: str, colour: str) -> dict[str, bytes]:
    return {f"{key}.jpg": jpeg(colour), f"{key}.txt": f"a {colour} wall".encode()}


def told(*colours: str) -> list:
    return [plain(f"a {colour} wall", f"[{colour}]") for colour in colours]


def tar_of(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


# ---- tars


def test_hidden_files_take_nothing_with_them(tmp_path):
    left = {".DS_Store": b"x", "._1.jpg": b"x", "__MACOSX/._2.jpg": b"x", "a/.hidden": b"x", "./._1.txt": b"x"}
    one, two = sample("1", "red"), sample("./a/2", "blue")
    members = [*list(one.items())[:1], *left.items(), *list(one.items())[1:], *left.items(), *two.items()]
    (tmp_path / "0.tar").write_bytes(tar_of(*members))
    assert bring("webdataset", tmp_path / "0.tar", tmp_path / "set") == told("red", "blue")
    assert summary(tmp_path / "set")["dropped"] == {}


@pytest.mark.parametrize("others", [["depth.png"], ["seg.png", "mask.png"], ["thumb.jpg"]])
def test_the_picture_is_the_image_without_another_name(others, tmp_path):
    beside = {f"1.{other}": encode(Picture.new("RGB", (40, 30), "white")) for other in others}
    write_tar(tmp_path / "0.tar", beside | sample("1", "red"))
    assert bring("webdataset", tmp_path / "0.tar", tmp_path / "set") == told("red")
    named = bring("webdataset", tmp_path / "0.tar", tmp_path / "other", f"--image={others[0]}")
    assert named == [plain("a red wall", "[white]")]


def test_of_two_pictures_or_only_a_depth_map_none_is_taken(tmp_path):
    depth = encode(Picture.new("RGB", (40, 30), "white"))
    files = sample("1", "red") | {"1.png": depth} | {"2.depth.png": depth, "2.txt": b"a wall"} | sample("3", "blue")
    write_tar(tmp_path / "0.tar", files)
    assert bring("webdataset", tmp_path / "0.tar", tmp_path / "set", "--max_bad=0.7") == told("blue")
    assert summary(tmp_path / "set")["dropped"] == {"which_image": 2}
    assert summary(tmp_path / "set")["examples"] == {"which_image": ["0.tar record 1"]}


def test_a_name_may_have_a_dot_in_it(tmp_path):
    files = sample("photo 2.0 red", "red") | sample("photo 2.5 blue", "blue") | sample("photo 2", "green")
    write_tar(tmp_path / "0.tar", files)
    assert sorted(bring("webdataset", tmp_path / "0.tar", tmp_path / "set")) == sorted(told("red", "blue", "green"))


def test_samples_of_the_same_name_in_a_row_are_counted(tmp_path):
    members = [*sample("1", "red").items(), *sample("1", "blue").items(), *sample("2", "green").items()]
    (tmp_path / "0.tar").write_bytes(tar_of(*members, *sample("1", "white").items()))
    assert bring("webdataset", tmp_path / "0.tar", tmp_path / "set") == told("green", "white")
    assert summary(tmp_path / "set")["dropped"] == {"duplicate": 2}


WHOLE = tar_of(*sample("1", "red").items(), *sample("2", "blue").items(), *sample("3", "green").items())
_MEMBERS = list(tarfile.open(fileobj=io.BytesIO(WHOLE)))  # noqa: SIM115
THIRD = _MEMBERS[4].offset
DAMAGED = WHOLE[:THIRD] + b"\xff" * 512 + WHOLE[THIRD + 512 :]


@pytest.mark.parametrize(
    ("data", "colours", "damaged"),
    [
        (WHOLE[:THIRD], "red blue", 1),  # between two members
        (WHOLE[: THIRD + 100], "red blue", 1),  # within a header
        (WHOLE[: THIRD + 600], "red blue", 1),  # within what a member holds
        (WHOLE[: _MEMBERS[-1].offset_data + 512], "red blue green", 1),  # only the end is missing
        (DAMAGED, "red blue", 1),
        (WHOLE + tar_of(*sample("4", "white").items()), "red blue green white", 0),
        (gzip.compress(WHOLE) + gzip.compress(tar_of(*sample("4", "white").items())), "red blue green white", 0),
        (gzip.compress(WHOLE)[:-40], "red blue", 1),
        (gzip.compress(WHOLE[:THIRD]), "red blue", 1),
    ],
    ids=["cut", "header", "data", "end", "damaged", "joined", "joined-gz", "cut-gz", "cut-in-gz"],
)
def test_a_tar_is_read_to_its_end_or_told_as_damaged(data, colours, damaged, tmp_path):
    (tmp_path / "0.TAR").write_bytes(data)
    found = bring("webdataset", tmp_path, tmp_path / "set", "--max_bad=0.9")
    dropped = summary(tmp_path / "set")["dropped"]
    assert found == told(*colours.split())
    assert dropped.pop("no_text", 0) <= damaged  # of a picture that was the last to be read
    assert dropped == ({"damaged_file": 1} if damaged else {})
    assert all("0.TAR" in place for place in summary(tmp_path / "set")["examples"].get("damaged_file", []))


def test_a_damaged_tar_of_images_beside_a_table_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.tar").write_bytes(WHOLE[:THIRD])
    (tmp_path / "pages.jsonl").write_text(json.dumps({"text_list": ["One."], "image_info": []}) + "\n")
    with pytest.raises(ValueError, match=r"images/0\.tar is damaged"):
        bring("mmc4", tmp_path / "pages.jsonl", tmp_path / "set", f"--images={tmp_path / 'images'}")


@pytest.mark.parametrize("pack", ["gz", "bz2", "xz"])
def test_compressed_tars(pack, tmp_path):
    with tarfile.open(tmp_path / f"0.tar.{pack}", f"w:{pack}") as tar:
        for name, data in sample("1", "red").items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert bring("webdataset", tmp_path, tmp_path / "set") == told("red")


def test_the_picture_of_a_page_is_the_one_of_its_whole_name(tmp_path):
    info = [{"image_name": "pic.v2.jpg", "matched_text_index": 0}]
    page = json.dumps({"text_list": ["One."], "image_info": info}).encode()
    write_tar(tmp_path / "0.tar", {"p.json": page, "p.pic.v1.jpg": jpeg("red"), "p.pic.v2.jpg": jpeg("blue")})
    assert bring("mmc4", tmp_path / "0.tar", tmp_path / "set") == [plain("One.", "[blue]")]


# ---- tables


def csv_rows(data: bytes, path) -> list:
    path.write_bytes(data)
    return [row for part in tables.parts(tables.epath.Path(path), 8) for row in tables.rows(part)]


def reasons(rows) -> list:
    return [row if isinstance(row, dict) else row.reason for row in rows]


RED, BLUE = {"file": "r.jpg", "text": "red"}, {"file": "b.jpg", "text": "blue"}
READ = {
    "comma": (b"file,text\nr.jpg,red, as fire\nb.jpg,blue\n", ["columns", BLUE]),
    "short": (b"file,text,from\nr.jpg,red\nb.jpg,blue,web\n", ["columns", BLUE | {"from": "web"}]),
    "empty cells behind": (b"file,text,,\nr.jpg,red,,\nb.jpg,blue,,,\n", [RED, BLUE]),
    "quote": (b'file,text\nx.jpg,"red\nr.jpg,red\nb.jpg,blue\n', ["not_csv", RED, BLUE]),
    "quote and another": (b'file,text\nx.jpg,"red\nr.jpg,"red"\nb.jpg,blue\n', ["not_csv", RED, BLUE]),
    "behind a quote": (b'file,text\nx.jpg,"red" wall\nb.jpg,blue\n', ["not_csv", BLUE]),
    "latin-1": (b"file,text\nx.jpg,caf\xe9\nb.jpg,blue\n", ["encoding", BLUE]),
    "nul": (b"file,text\nx.jpg,r\0ed\nb.jpg,blue\n", ["encoding", BLUE]),
    "mark": (b"\xef\xbb\xbffile,text\r\nr.jpg,red\r\nb.jpg,blue\r\n", [RED, BLUE]),
    "old mac": (b"file,text\rr.jpg,red\rb.jpg,blue\r", [RED, BLUE]),
    "semicolons": (b'file;text\nr.jpg;red\n"b.jpg";"blue"\n', [RED, BLUE]),
    "tabs": (b"file\ttext\nr.jpg\tred\nb.jpg\tblue\n", [RED, BLUE]),
    "blanks": (b'file, text\nr.jpg, "red"\nb.jpg, blue\n', [RED, BLUE]),
    "several lines": (b'file,text\nr.jpg,"red,\n""so""\r\nit is"\n', [RED | {"text": 'red,\n"so"\r\nit is'}]),
    "quotes within": (b'file,text\nr.jpg,a 5" pipe\n', [RED | {"text": 'a 5" pipe'}]),
}


@pytest.mark.parametrize("name", READ)
def test_rows_of_csv_are_right_or_counted(name, tmp_path):
    data, want = READ[name]
    assert reasons(csv_rows(data, tmp_path / "t.csv")) == want


REFUSED = {
    "utf-16": ("\ufefffile,text\nr.jpg,red\n".encode("utf-16-le"), "t.csv is not UTF-8 but, it seems, UTF-16"),
    "utf-16 without a mark": ("file,text\nr.jpg,red\n".encode("utf-16-be"), "t.csv is not UTF-8 but, it seems, UTF-16"),
    "pointer": (POINTER, "t.csv is a pointer of git-lfs instead of the file"),
    "columns twice": (b"file,text,text\nr.jpg,red,blue\n", "t.csv has two columns 'text'"),
    "no header": (b'"file,te"xt\nr.jpg,red\n', "t.csv: its first line is not the header of a table"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_tables_that_cannot_be_read_are_refused_by_name(name, packed, tmp_path):
    data, message = REFUSED[name]
    path = tmp_path / f"t.csv{packed}"
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(ValueError, match=message.replace("t.csv", rf"t\.csv{packed}")):
        bring("folder", path, tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "tsv", "txt", "parquet"])
def test_the_same_of_other_tables(suffix, tmp_path):
    for data, message in (
        (f'{{"text": "one"}}{" " * 200}\n'.encode("utf-16"), "is not UTF-8"),
        (POINTER, "is a pointer of git-lfs"),
    ):
        if suffix != "parquet" or data == POINTER:
            (tmp_path / f"t.{suffix}").write_bytes(data)
            with pytest.raises(ValueError, match=rf"t\.{suffix} {message}"):
                bring("text", tmp_path / f"t.{suffix}", tmp_path / "set")


def test_one_wrong_letter_costs_one_record(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "two\xe2\x80\xa8lines"}\n')
    (tmp_path / "b.json").write_bytes(b'[{"text": "three"}, {"text": "caf\xe9"}, {"text": "four"}]')
    (tmp_path / "c.TXT").write_bytes(b"five\ncaf\xe9\n")
    found = bring("text", tmp_path, tmp_path / "set")
    assert sorted(text for ((_, text),) in found) == ["five", "four", "three", "two\u2028lines"]
    assert summary(tmp_path / "set")["dropped"] == {"encoding": 3}


@pytest.mark.parametrize("data", ["caf\xe9".encode("latin-1"), "a red wall".encode("utf-16"), b"r\0e\0d\0"])
def test_a_caption_in_another_encoding_is_counted(data, tmp_path):
    write_tar(tmp_path / "0.tar", {"1.jpg": jpeg("red"), "1.txt": data} | sample("2", "blue"))
    assert bring("webdataset", tmp_path / "0.tar", tmp_path / "set") == told("blue")
    assert summary(tmp_path / "set")["dropped"] == {"encoding": 1}


def test_a_mark_before_a_caption_is_none_of_it(tmp_path):
    write_tar(tmp_path / "0.tar", {"1.jpg": jpeg("red"), "1.txt": "\ufeffa red wall".encode()})
    assert bring("webdataset", tmp_path / "0.tar", tmp_path / "set") == told("red")


def test_columns_are_found_in_other_letters_and_named_when_not(walls):
    (walls / "captions.csv").write_text(" File ; TEXT\nred.jpg;a red wall\n")
    assert bring("folder", walls, walls / "set") == told("red")
    assert folder.captions(walls) == [("red.jpg", "a red wall")]
    for name, content in (
        ("captions.csv", "picture,caption\nred.jpg,a red wall\n"),
        ("metadata.jsonl", '{"picture": 1}'),
    ):
        (walls / "captions.csv").unlink(missing_ok=True)
        (walls / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} has no field 'file' or 'file_name' or .*; it has 'picture'"):
            bring("folder", walls, walls / "other")
    with pytest.raises(ValueError, match=r"metadata\.jsonl has no field 'text' .*; it has 'picture'"):
        bring("text", walls / "metadata.jsonl", walls / "other")


def test_names_of_windows_and_of_macos(walls):
    (walls / "sub").mkdir()
    (walls / "red.jpg").rename(walls / "sub" / unicodedata.normalize("NFD", "\u00e9.jpg"))
    (walls / "blue.jpg").rename(walls / unicodedata.normalize("NFC", "\u00fc.jpg"))
    names = ["sub\\\u00e9.jpg", unicodedata.normalize("NFD", "\u00fc.jpg")]
    rows = [{"file": name, "text": f"a {colour} wall"} for name, colour in zip(names, ("red", "blue"), strict=True)]
    (walls / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert bring("folder", walls, walls / "set") == told("red", "blue")
    assert [text for _, text in folder.captions(walls)] == ["a red wall", "a blue wall"]
    assert [inside(name) for name in ("..\\x", "C:\\x", "\\x", "a/../../x", "")] == [None] * 5


def test_prepare_names_all_that_is_wrong(walls):
    for name in ("one.jpg", "two.jpg"):
        (walls / name).write_bytes(POINTER if name == "one.jpg" else b"nothing")
    rows = [{"file": f"{name}.jpg", "text": name} for name in ("one", "red", "two")]
    (walls / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"one\.jpg cannot be used: is a pointer of git-lfs.*; .*two\.jpg cannot"):
        preparation.prepare(walls, walls / "set")
    (walls / "captions.jsonl").write_text('{"file": "gone.jpg", "text": "x"}\n[]\n{"file": "red.jpg", "text": ""}\n')
    with pytest.raises(FileNotFoundError, match=r"row 1: no file gone\.jpg.*; row 2: needs a file.*; row 3: needs"):
        preparation.prepare(walls, walls / "set")
    (walls / "captions.jsonl").unlink()
    (walls / "captions.csv").write_text('file,text\nred.jpg,red, as fire\nblue.jpg,"blue\n')
    with pytest.raises(ValueError, match=r"row 1: not as many cells as the header has.*; row 2: not CSV: a quote"):
        preparation.prepare(walls, walls / "set")


# ---- layouts


def test_dead_links_of_img2dataset_are_no_damage(tmp_path):
    status = ["failed_to_download"] * 3 + ["success", "failed_to_resize"]
    table = {"jpg": [None] * 3 + [jpeg("red"), None], "caption": ["a red wall"] * 5, "status": status}
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    assert bring("webdataset", tmp_path, tmp_path / "set", "--max_bad=0") == told("red")
    counts = summary(tmp_path / "set")
    assert counts["dropped"] == {"not_fetched": 4} and (counts["records"], counts["bad"]) == (1, 0)


def test_folders_at_any_depth_and_names_of_any_kind(tmp_path):
    source = tmp_path / "source"
    for place, colour in (("a/b/c/1.JFIF", "red"), ("a/2.jpe", "blue"), ("3.v2.JPEG", "green")):
        file = source / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(colour))
        file.with_suffix(".txt").write_text(f"a {colour} wall")
    (source / "a/._2.jpe").write_bytes(b"x")
    assert sorted(bring("webdataset", source, tmp_path / "set")) == sorted(told("red", "blue", "green"))
    assert summary(tmp_path / "set")["dropped"] == {}


def test_images_of_img2dataset_are_found_whatever_their_kind(tmp_path):
    (tmp_path / "images/00000").mkdir(parents=True)
    (tmp_path / "images/00000/000000000.png").write_bytes(encode(Picture.new("RGB", (40, 30), (250, 0, 0))))
    pq.write_table(pa.table({"url": ["http://x/r"], "key": ["000000000"]}), tmp_path / "images/00000.parquet")
    pq.write_table(pa.table({"images": [["http://x/r", None]], "texts": [[None, "It."]]}), tmp_path / "o.parquet")
    found = bring("obelics", tmp_path / "o.parquet", tmp_path / "set", f"--images={tmp_path / 'images'}")
    assert found == [plain("[red]", "It.")]


def test_conversations_about_what_is_not_there_are_left_out(walls):
    def talk(question="What is it?", *answers, **others) -> dict:
        turns = [{"from": "human", "value": question}, *({"from": "gpt", "value": answer} for answer in answers)]
        return {"conversations": turns, **others}

    rows = [
        talk("<image>\nWhat is it?", "A wall.", images=["red.jpg"]),
        talk("How do I write <video> in HTML?", "So."),
        talk("What is it?", "A wall.", images=["red.jpg"]),
        talk("<image>\nWhat is it?", "A wall.", image="red.jpg", images=["blue.jpg"]),
        talk("<video>\nWhat is it?", "A wall.", video="v.mp4"),
        talk("<audio>\nWhat is it?", "A wall."),
        talk("What is it?", "A wall.", audios=["a.wav"]),
        talk("What is it?", " "),
        talk("What is it?"),
    ]
    (walls / "llava.json").write_text(json.dumps(rows))
    found = bring("llava", walls / "llava.json", walls / "set", "--max_bad=0.8")
    assert [document[0][1] for document in found] == ["[red]", "How do I write <video> in HTML?"]
    assert summary(walls / "set")["dropped"] == {"fields": 3, "no_text": 2, "placeholders": 2}


# ---- pictures


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "ICO", "TGA", "DIB"])
def test_other_formats(kind):
    data = encode(Picture.new("RGB", (48, 48), (200, 30, 40)), kind)
    found = images.decode(data)
    assert max(abs(a - b) for a, b in zip(found.getpixel((20, 20)), (200, 30, 40), strict=True)) <= 2


def png_of(bits: int, colour: int, width: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of one row, its transparent colour as the file has it."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0), b"tRNS": transparent}
    parts |= {b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}
    chunks = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
              for name, data in parts.items())  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("picture", "want"),
    [
        ((16, 0, 2, struct.pack(">2H", 0, 5), struct.pack(">H", 0)), [255, 0]),
        ((16, 0, 2, struct.pack(">2H", 0x8001, 0x8000), struct.pack(">H", 0x8001)), [255, 128]),
        ((16, 2, 2, struct.pack(">6H", 5, 0x8005, 5, 900, 900, 900), struct.pack(">3H", 5, 0x8005, 5)), [255, 3]),
        ((8, 0, 2, b"\5\6", struct.pack(">H", 5)), [255, 6]),
        ((4, 0, 2, b"\x3a", struct.pack(">H", 3)), [255, 170]),
        ((2, 0, 4, b"\x1b", struct.pack(">H", 2)), [0, 85, 255, 255]),
        ((1, 0, 2, b"\x40", struct.pack(">H", 0)), [255, 255]),
    ],
)
def test_what_is_transparent_is_white_at_any_depth(picture, want):
    found = images.decode(png_of(*picture))
    assert [found.getpixel((x, 0)) for x in range(len(want))] == [(level,) * 3 for level in want]


def test_a_pointer_in_the_place_of_a_picture_is_told(tmp_path):
    with pytest.raises(images.ImageError, match="git lfs pull"):
        images.decode(POINTER)
    (tmp_path / "0.tar").write_bytes(POINTER)
    write_tar(tmp_path / "1.tar", sample("1", "red") | {"2.jpg": POINTER, "2.txt": b"a wall"})
    assert bring("webdataset", tmp_path, tmp_path / "set", "--max_bad=0.7") == told("red")
    counts = summary(tmp_path / "set")
    assert counts["dropped"] == {"lfs_pointer": 2} and "0.tar record 1" in counts["examples"]["lfs_pointer"]


def test_tars_beside_folders_are_told(tmp_path, caplog):
    (tmp_path / "source/more").mkdir(parents=True)
    write_tar(tmp_path / "source/0.tar", sample("1", "red"))
    (tmp_path / "source/more/2.jpg").write_bytes(jpeg("blue"))
    assert bring("webdataset", tmp_path / "source", tmp_path / "set") == told("red")
    assert "its tars are read, not the images in folders beside them" in caplog.text
    assert tars.is_tar("x/0.TAR.GZ") and not tars.is_tar("x/0.tart")


# ---- names that mean several things


@pytest.mark.parametrize("where", [".", "sub"])
def test_a_name_of_several_pictures_is_of_none(where, tmp_path):
    """Unless they are the same one, or one has the very name."""
    images_ = tmp_path / "images"
    for number, colour in enumerate(("red", "blue", "blue")):
        members = [(f"{where if number else '.'}/r.jpg", jpeg(colour)), ("b.jpg", jpeg("green"))]
        write_tar(images_ / f"{number}.tar", dict(members)) if images_.is_dir() else images_.mkdir()
    (images_ / "0.tar").write_bytes(tar_of(("r.jpg", jpeg("red")), ("b.jpg", jpeg("green"))))
    page = {"text_list": ["One."], "image_info": [{"image_name": f"{x}.jpg", "matched_text_index": 0} for x in "rb"]}
    (tmp_path / "pages.jsonl").write_text(json.dumps(page))
    found = bring("mmc4", tmp_path / "pages.jsonl", tmp_path / "set", f"--images={images_}")
    assert found == [plain("One.", "[green]") if where == "." else plain("One.", "[red]", "[green]")]
    assert summary(tmp_path / "set")["dropped"] == ({"which_image": 1} if where == "." else {})


def test_an_address_of_several_files_is_of_none(walls):
    (walls / "map.csv").write_text("url,file\nhttp://x/1,red.jpg\nhttp://x/1,blue.jpg\nhttp://x/2,blue.jpg\n")
    row = {"images": ["http://x/1", None, "http://x/2"], "texts": [None, "It.", None]}
    (walls / "o.jsonl").write_text(json.dumps(row))
    found = bring("obelics", walls / "o.jsonl", walls / "set", f"--images={walls}", f"--map={walls / 'map.csv'}")
    assert found == [plain("It.", "[blue]")]
    assert summary(walls / "set")["dropped"] == {"which_image": 1}


@pytest.mark.parametrize("name", ["1.JPG", "1.TXT"])
def test_files_whose_names_differ_in_capitals_alone_are_counted(name, tmp_path):
    for file, data in (*sample("1", "red").items(), *sample("2", "blue").items(), (name, b"another")):
        (tmp_path / file).write_bytes(data)
    assert bring("webdataset", tmp_path, tmp_path / "set") == told("blue")
    assert summary(tmp_path / "set")["dropped"] == {"duplicate": 1}


def test_what_other_systems_leave_is_passed_over(tmp_path):
    left = {"Thumbs.db": b"x", "desktop.ini": b"x", "@eaDir/1.jpg": b"x", ".ipynb_checkpoints/1.jpg": jpeg("white")}
    one = list(sample("1", "red").items())
    (tmp_path / "0.tar").write_bytes(tar_of(one[0], *left.items(), one[1]))
    assert bring("webdataset", tmp_path / "0.tar", tmp_path / "set") == told("red")
    assert summary(tmp_path / "set")["dropped"] == {}


def test_json_of_a_sample_may_be_a_list_and_its_name_may_have_a_dot(tmp_path):
    told_by_json = {"photo 2.0 blue.jpg": jpeg("blue"), "photo 2.0 blue.json": b'{"caption": "a blue wall"}'}
    seg = {"1.seg.png": jpeg("white"), "1.seg.json": b"{}"}
    write_tar(tmp_path / "0.tar", sample("1", "red") | {"1.json": b"[1, 2]"} | seg | told_by_json)
    assert bring("webdataset", tmp_path / "0.tar", tmp_path / "set") == told("red", "blue")
    assert summary(tmp_path / "set")["dropped"] == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, "red.jpg") for name in ("image_path", "imageFile", "img", "picture", "photo_url", "pixel_values")],
        *[(name, "v.mp4") for name in ("video_path", "audio_file", "frames", "pointcloud")],
    ],
)
def test_conversations_whose_files_have_other_keys_are_counted(name, value, walls):
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A wall."}]
    rows = [{"conversations": turns, **more} for more in ({name: value}, {name: None}, {"image_id": 3, name: 0})]
    (walls / "x.json").write_text(json.dumps(rows))
    assert len(bring("llava", walls / "x.json", walls / "set")) == 2
    assert summary(walls / "set")["dropped"] == {"fields": 1}


def test_similarities_that_are_no_numbers_do_not_pass(walls):
    infos = [{"image_name": "red.jpg", "matched_text_index": 0, "matched_sim": sim} for sim in ("0.1", None)]
    infos += [{"image_name": "blue.jpg", "matched_text_index": 0, "matched_sim": 0.3}]
    (walls / "p.jsonl").write_text(json.dumps({"text_list": ["One."], "image_info": infos}))
    found = bring("mmc4", walls / "p.jsonl", walls / "set", f"--images={walls}", "--min_similarity=0.2")
    assert found == [plain("One.", "[blue]")] and summary(walls / "set")["dropped"] == {"fields": 2}


def test_first_rows_without_a_text_and_rows_of_empty_cells_are_no_reason_to_refuse(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 20 + '{"text": "one"}\n')
    assert bring("text", tmp_path / "a.jsonl", tmp_path / "set", "--max_bad=1") == [plain("one")]
    assert reasons(csv_rows(b"file,text\nr.jpg,red\n,\n  \n,,\nb.jpg,blue\n", tmp_path / "t.csv")) == [RED, BLUE]


def test_a_file_of_blank_lines_holds_no_records(tmp_path):
    (tmp_path / "a.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match=r"a\.txt holds no records$"):
        bring("text", tmp_path / "a.txt", tmp_path / "set")


def test_a_similarity_to_begin_with_is_a_number(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bring("mmc4", tmp_path, tmp_path / "set", "--min_similarity=nan")
    assert "--min_similarity: must be a number, got nan" in capsys.readouterr().err
