"""Every public layout, written here as its makers write it, becomes the documents it means; damage is counted."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture

from dreamllm_jax.data import storage
from dreamllm_jax.data.__main__ import parser
from dreamllm_jax.data.document import Image, Text, to_record
from dreamllm_jax.data.images import decode

ROOT = Path(__file__).parent.parent.parent
COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "white": (255, 255, 255)}


def jpeg(colour: str, size=(40, 30)) -> bytes:
    out = io.BytesIO()
    Picture.new("RGB", size, COLOURS[colour]).save(out, "JPEG", quality=95)
    return out.getvalue()


def run(*arguments) -> None:
    parsed = parser().parse_args([str(argument) for argument in arguments])
    parsed.main(parsed)


def read(directory, name="it") -> list[list[tuple[str, str]]]:
    """Each document as (role, text) and (role, [colour]) in order."""
    corpus = storage.Corpus(directory, name)
    return [
        [(s.role, s.text if isinstance(s, Text) else f"[{seen(s)}]") for s in corpus[i].segments]
        for i in range(len(corpus))
    ]


def seen(image: Image) -> str:
    pixel = np.asarray(decode(image.data)).mean((0, 1))
    return min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - pixel).sum())


def summary(directory, name="it") -> dict:
    return storage.read_summary(directory)["corpora"][name]


def plain(*texts) -> list[tuple[str, str]]:
    return [("", text) for text in texts]


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


PAIRS = [plain("a red wall", "[red]"), plain("a blue wall", "[blue]")]


def img2dataset_tar(path: Path) -> None:
    """Shards of `--output_format=webdataset`, the Parquet file with its columns beside them."""
    files = {}
    for index, colour in enumerate(("red", "blue")):
        key = f"00000{index:04d}"
        files |= {f"{key}.jpg": jpeg(colour), f"{key}.txt": f"a {colour} wall".encode()}
        files |= {
            f"{key}.json": json.dumps({"caption": f"a {colour} wall", "url": "http://x/y.jpg", "key": key}).encode()
        }
    write_tar(path / "00000.tar", files)
    pq.write_table(pa.table({"url": ["http://x"] * 2, "key": ["000000000", "000000001"]}), path / "00000.parquet")


def img2dataset_files(path: Path) -> None:
    (path / "00000").mkdir()
    for index, colour in enumerate(("red", "blue")):
        (path / f"00000/00000{index}.jpg").write_bytes(jpeg(colour))
        (path / f"00000/00000{index}.txt").write_text(f"a {colour} wall")


def img2dataset_parquet(path: Path) -> None:
    table = {"jpg": [jpeg("red"), jpeg("blue")], "caption": ["a red wall", "a blue wall"], "url": ["u", "v"]}
    pq.write_table(pa.table(table), path / "00000.parquet")


def hugging_face_parquet(path: Path) -> None:
    images = [{"bytes": jpeg(colour), "path": None} for colour in ("red", "blue")]
    pq.write_table(pa.table({"image": images, "text": ["a red wall", "a blue wall"]}), path / "train.parquet")


@pytest.mark.parametrize("layout", [img2dataset_tar, img2dataset_files, img2dataset_parquet, hugging_face_parquet])
def test_pairs_of_webdataset_and_img2dataset(layout, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    layout(source)
    run("import", "webdataset", source, "--to", tmp_path / "set", "--name=it", "--workers=1")
    assert read(tmp_path / "set") == PAIRS
    counts = summary(tmp_path / "set")
    assert (counts["documents"], counts["images"], counts["dropped"]) == (2, 2, {})


def test_a_named_caption_of_blip_laion(tmp_path):
    meta = {"caption": "SHOP NOW", "blip_caption": "a red wall"}
    write_tar(tmp_path / "0.tar", {"a.jpg": jpeg("red"), "a.txt": b"SHOP NOW", "a.json": json.dumps(meta).encode()})
    arguments = "--caption=blip_caption", "--to", tmp_path / "set", "--name=it", "--workers=1"
    run("import", "webdataset", tmp_path / "0.tar", *arguments)
    assert read(tmp_path / "set") == PAIRS[:1]


@pytest.mark.parametrize("table", ["captions.jsonl", "metadata.csv"])
def test_a_folder_with_captions(table, tmp_path):
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.jpg").write_bytes(jpeg(colour))
    rows = [{"file": f"{colour}.jpg", "text": f"a {colour} wall"} for colour in ("red", "blue")]
    lines = (
        [json.dumps(row) for row in rows]
        if table.endswith("jsonl")
        else ["file,text", *(",".join(r.values()) for r in rows)]
    )
    (tmp_path / table).write_text("\n".join(lines) + "\n")
    run("import", "folder", tmp_path, "--to", tmp_path / "set", "--name=it", "--workers=1")
    assert read(tmp_path / "set") == PAIRS


def test_image_pairs(tmp_path):
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.jpg").write_bytes(jpeg(colour))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"source": "red.jpg", "target": "blue.jpg"}) + "\n")
    run("import", "image_pairs", tmp_path / "pairs.jsonl", "--to", tmp_path / "set", "--name=it", "--workers=1")
    assert read(tmp_path / "set") == [plain("[red]", "[blue]")]


def page(**changes) -> dict:
    infos = [
        {"image_name": "b.jpg", "raw_url": "http://x/b", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "a.jpg", "raw_url": "http://x/a", "matched_text_index": 0, "matched_sim": 0.2},
    ]
    return {"text_list": ["One.", "Two.", "Three."], "image_info": infos, "url": "http://page"} | changes


def test_mmc4(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.jpg").write_bytes(jpeg("red"))
    (images / "b.jpg").write_bytes(jpeg("blue"))
    (tmp_path / "docs_shard_7_v2.jsonl").write_text(json.dumps(page()) + "\n")
    common = ["--images", images, "--name=it", "--workers=1"]
    run("import", "mmc4", tmp_path / "docs_shard_7_v2.jsonl", "--to", tmp_path / "after", *common)
    assert read(tmp_path / "after") == [plain("One.", "[red]", "Two. Three.", "[blue]")]
    run("import", "mmc4", tmp_path / "docs_shard_7_v2.jsonl", "--to", tmp_path / "before", "--place=before", *common)
    assert read(tmp_path / "before") == [plain("[red]", "One. Two.", "[blue]", "Three.")]
    common.append("--min_similarity=0.25")
    run("import", "mmc4", tmp_path / "docs_shard_7_v2.jsonl", "--to", tmp_path / "alike", *common)
    assert read(tmp_path / "alike") == [plain("One. Two. Three.", "[blue]")]
    assert summary(tmp_path / "alike")["dropped"] == {"similarity": 1}


def test_mmc4_in_tars(tmp_path):
    encoded = page(image_info=[{"image_base64": base64.b64encode(jpeg("red")).decode(), "matched_text_index": 1}])
    files = {"p1.json": json.dumps(encoded).encode()}
    run_page = page(image_info=[{"image_name": "pic.jpg", "matched_text_index": 1}])
    files |= {"p2.json": json.dumps(run_page).encode(), "p2.pic.jpg": jpeg("blue")}
    write_tar(tmp_path / "0.tar", files)
    run("import", "mmc4", tmp_path / "0.tar", "--to", tmp_path / "set", "--name=it", "--workers=1")
    assert read(tmp_path / "set") == [plain("One. Two.", "[red]", "Three."), plain("One. Two.", "[blue]", "Three.")]


def test_instruct_interleaved(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg("red"))
    (tmp_path / "b.jpg").write_bytes(jpeg("blue"))
    (tmp_path / "pages.json").write_text(json.dumps([page(instruction="Tell of walls.")]))
    run(
        "import",
        "instruct_interleaved",
        tmp_path / "pages.json",
        "--images",
        tmp_path,
        "--to",
        tmp_path / "set",
        "--name=it",
        "--workers=1",
    )
    told = [("assistant", text) for text in ("One.", "[red]", "Two. Three.", "[blue]")]
    assert read(tmp_path / "set") == [[("user", "Tell of walls."), *told]]


def test_obelics(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    files = {"0.jpg": jpeg("red"), "0.json": json.dumps({"url": "http://x/red.jpg"}).encode()}
    write_tar(
        images / "00000.tar", files | {"1.jpg": jpeg("green"), "1.json": json.dumps({"url": "http://x/g"}).encode()}
    )
    rows = {
        "images": [[None, "http://x/red.jpg", None, "http://x/gone.jpg"]],
        "texts": [["First.", None, "Then.", None]],
    }
    pq.write_table(pa.table(rows), tmp_path / "obelics.parquet")
    run(
        "import",
        "obelics",
        tmp_path / "obelics.parquet",
        "--images",
        images,
        "--to",
        tmp_path / "set",
        "--name=it",
        "--workers=1",
    )
    assert read(tmp_path / "set") == [plain("First.", "[red]", "Then.")]
    assert summary(tmp_path / "set")["dropped"] == {"missing": 1}
    with pytest.raises(ValueError, match="fetch them with img2dataset"):
        run("import", "obelics", tmp_path / "obelics.parquet", "--to", tmp_path / "other", "--name=it", "--workers=1")


def test_llava(tmp_path):
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.jpg").write_bytes(jpeg(colour))
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A wall."}]
    painted = [{"from": "human", "value": "Paint it."}, {"from": "gpt", "value": "Here: <dream>"}]
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    rows = [
        {"id": "1", "image": "red.jpg", "conversations": turns},
        {"id": "2", "image": ["red.jpg", "blue.jpg"], "conversations": [*turns, *painted]},
        {"id": "3", "conversations": talk},
        {"id": "4", "image": "red.jpg", "conversations": talk},  # the image has no place
        {"id": "5", "conversations": turns},  # the place has no image
        {"id": "6", "image": "gone.jpg", "conversations": turns},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(rows, indent=1))
    run("import", "llava", tmp_path / "llava.json", "--to", tmp_path / "set", "--name=it", "--workers=1")
    asked = [("user", "[red]"), ("user", "\nWhat is it?"), ("assistant", "A wall.")]
    answered = [("user", "Paint it."), ("assistant", "Here: "), ("assistant", "[blue]")]
    assert read(tmp_path / "set") == [asked, [*asked, *answered], [("user", "Hi"), ("assistant", "Ho")]]
    assert summary(tmp_path / "set")["dropped"] == {"missing": 1, "placeholders": 2}


@pytest.mark.parametrize("suffix", ["jsonl", "txt", "csv", "jsonl.gz", "parquet"])
def test_text(suffix, tmp_path):
    import gzip

    texts = [f"Text number {i}, with a comma." for i in range(50)]
    path = tmp_path / f"texts.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        lines = {"t": texts, "j": [json.dumps({"text": t}) for t in texts], "c": ["text", *(f'"{t}"' for t in texts)]}
        data = "\n".join(lines[suffix[0]]).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    run("import", "text", path, "--to", tmp_path / "set", "--name=it", "--workers=1")
    assert read(tmp_path / "set") == [plain(text) for text in texts]


def test_a_data_set_of_tfds(tmp_path, text_tokenizer):
    """One of ours is one of TFDS: its own fields are not a caption's, so a small one is made."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    features = tfds.features.FeaturesDict({"caption": tfds.features.Text(), "picture": tfds.features.Image()})
    folder = tmp_path / "walls/1.0.0"
    folder.mkdir(parents=True)
    writer = ArrayRecordWriter(str(folder / "walls-train.array_record-00000-of-00001"), "group_size:1")
    for colour in ("red", "blue"):
        example = {"caption": f"a {colour} wall", "picture": jpeg(colour)}
        writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[2],
        num_bytes=0,
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="walls", split="train", filetype_suffix="array_record"
        ),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[split], version="1.0.0", check_data=False
    )
    common = "--text=caption", "--image=picture", "--name=it", "--workers=1"
    run("import", "tfds", tmp_path / "walls", "--to", tmp_path / "set", *common)
    assert read(tmp_path / "set") == PAIRS
    with pytest.raises(ValueError, match="has no feature 'img'; it has caption, picture"):
        run("import", "tfds", tmp_path / "walls", "--to", tmp_path / "set", "--image=img", "--text=caption", "--name=x")


def test_what_cannot_be_used_is_counted_and_never_mispaired(tmp_path):
    bomb, small = io.BytesIO(), io.BytesIO()
    Picture.new("1", (12000, 12000)).save(bomb, "PNG")
    Picture.new("RGB", (8, 8)).save(small, "PNG")
    images = {
        "good": jpeg("red"),
        "cut": jpeg("blue")[:-300],
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "bomb": bomb.getvalue(),
        "small": small.getvalue(),
        "fine": jpeg("blue"),
    }
    files = {}
    for name, data in images.items():
        files |= {f"{name}.jpg": data, f"{name}.txt": f"a {name} picture".encode()}
    files |= {"mute.jpg": jpeg("green"), "bare.txt": b"no picture", "../out.jpg": jpeg("green"), "code.pkl": b"cos\n"}
    write_tar(tmp_path / "0.tar", files)
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 4])
    run("import", "webdataset", tmp_path, "--to", tmp_path / "set", "--name=it", "--workers=1", "--max_bad=0.9")
    assert read(tmp_path / "set") == [
        plain("a good picture", "[red]"),
        plain("a fine picture", "[blue]"),
        plain("a good picture", "[red]"),
    ]
    dropped = summary(tmp_path / "set")["dropped"]
    assert dropped["size"] == dropped["small"] == dropped["no_text"] == dropped["no_image"] == dropped["outside"] == 1
    assert dropped["pickle"] == dropped["damaged_file"] == 1 and dropped["broken"] >= 1 and dropped["format"] >= 1
    with pytest.raises(ValueError, match=r"8 of 10 records cannot be used \(.*pickle 1.*more than --max_bad=0.1"):
        run(
            "import",
            "webdataset",
            tmp_path / "0.tar",
            "--to",
            tmp_path / "other",
            "--name=it",
            "--workers=1",
            "--max_bad=0.1",
        )


def test_what_is_stored_is_small_upright_rgb(tmp_path):
    large, turned = io.BytesIO(), io.BytesIO()
    Picture.new("CMYK", (900, 700), (0, 250, 250, 0)).save(large, "JPEG")
    exif = Picture.Exif()
    exif[0x0112] = 6
    Picture.new("RGB", (60, 40), COLOURS["blue"]).save(turned, "JPEG", exif=exif)
    kept = jpeg("green")
    write_tar(
        tmp_path / "0.tar",
        {
            "a.jpg": large.getvalue(),
            "a.txt": b"a",
            "b.jpg": turned.getvalue(),
            "b.txt": b"b",
            "c.jpg": kept,
            "c.txt": b"c",
        },
    )
    run("import", "webdataset", tmp_path / "0.tar", "--to", tmp_path / "set", "--name=it", "--workers=1", "--size=256")
    corpus = storage.Corpus(tmp_path / "set", "it")
    opened = [Picture.open(io.BytesIO(corpus[i].images[0].data)) for i in range(3)]
    assert [image.size for image in opened] == [(329, 256), (40, 60), (40, 30)]
    assert all(image.mode == "RGB" and image.format == "JPEG" for image in opened)
    assert corpus[2].images[0].data == kept


def many(path: Path, tars: int) -> None:
    for tar in range(tars):
        files = {}
        for index in range(20):
            files |= {
                f"{tar}_{index}.jpg": jpeg("red", (64 + index, 64)),
                f"{tar}_{index}.txt": f"{tar} {index}".encode(),
            }
        write_tar(path / f"{tar:03d}.tar", files)


def records(directory: Path) -> list[dict]:
    corpus = storage.Corpus(directory, "it")
    return [to_record(corpus[i]) for i in range(len(corpus))]


@pytest.mark.slow
def test_killed_and_started_again_it_does_the_rest_and_workers_change_nothing(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    many(source, 40)
    run("import", "webdataset", source, "--to", tmp_path / "alone", "--name=it", "--workers=1")
    command = [
        sys.executable,
        "-m",
        "dreamllm_jax.data",
        "import",
        "webdataset",
        source,
        "--to",
        tmp_path / "set",
        "--name=it",
    ]
    process = subprocess.Popen(
        [*map(str, command), "--workers=2"], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    work = tmp_path / "set/.it.unfinished"
    while len(list(work.glob("part-*.json"))) < 8:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: os.stat(path).st_mtime_ns for path in work.glob("part-*.json")}
    assert 8 <= len(done) < 40 and not (tmp_path / "set/dataset.json").exists()
    with pytest.raises(FileExistsError, match="was made with another size: remove it, or choose another --name"):
        run("import", "webdataset", source, "--to", tmp_path / "set", "--name=it", "--size=100")
    torn = next(iter(done))  # the shard of a finished part is not written again
    shard = torn.with_suffix(".0")
    before = os.stat(shard).st_mtime_ns
    subprocess.run([*map(str, command), "--workers=3"], cwd=ROOT, check=True, capture_output=True)
    assert records(tmp_path / "set") == records(tmp_path / "alone") and not work.exists()
    inode = [p for p in (tmp_path / "set/it/1.0.0").iterdir() if os.stat(p).st_mtime_ns == before]
    assert inode
    run("import", "webdataset", source, "--to", tmp_path / "set", "--name=it")  # nothing is left to do
    assert read(tmp_path / "set")[21] == plain("1 1", "[red]") and len(read(tmp_path / "set")) == 800


@pytest.mark.slow
def test_on_beam_it_is_the_same(tmp_path):
    pytest.importorskip("apache_beam")
    (tmp_path / "source").mkdir()
    many(tmp_path / "source", 6)
    for name, how in (("alone", "--workers=1"), ("beam", "--beam=--runner=DirectRunner --direct_num_workers=1")):
        run("import", "webdataset", tmp_path / "source", "--to", tmp_path / name, "--name=it", how)
    assert records(tmp_path / "beam") == records(tmp_path / "alone")
    assert summary(tmp_path / "beam") == summary(tmp_path / "alone")


def test_without_beam_it_is_told_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n")
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ModuleNotFoundError, match=r"--beam needs Apache Beam: pip install 'dreamllm_jax\[beam\]'"):
        run("import", "text", tmp_path / "a.txt", "--to", tmp_path / "set", "--name=it", "--beam=--runner=DirectRunner")


def test_a_second_corpus_joins_the_first(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.txt").write_text("two\n")
    for name in ("a", "b"):
        run("import", "text", tmp_path / f"{name}.txt", "--to", tmp_path / "set", f"--name={name}", "--workers=1")
    assert read(tmp_path / "set", "a") == [plain("one")] and read(tmp_path / "set", "b") == [plain("two")]
    with pytest.raises(FileExistsError, match=r"another .*parts.* and source"):
        run("import", "text", tmp_path / "a.txt", "--to", tmp_path / "set", "--name=b", "--workers=1")
    with pytest.raises(ValueError, match="nothing is fetched from the web here"):
        run("import", "text", "https://example.com/a.txt", "--to", tmp_path / "set", "--name=c")
    with pytest.raises(FileNotFoundError, match="no file or directory"):
        run("import", "text", tmp_path / "gone", "--to", tmp_path / "set", "--name=c")
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        run("import", "text", tmp_path / "a.txt", "--to", tmp_path / "set", "--name=../c")


def test_a_page_without_a_tokenizer_is_refused_before_the_import(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(ValueError, match="--sample=2 shows tokens: give --tokenizer as well"):
        run("import", "text", tmp_path / "a.txt", "--to", tmp_path / "set", "--name=it", "--sample=2")
    assert not (tmp_path / "set").exists()


def test_the_page_shows_what_is_learned(dataset, tmp_path):
    run("sample", dataset, "--name=interleaved", "--to", tmp_path / "page.html", "--count=3")
    written = (tmp_path / "page.html").read_text()
    assert (
        written.count("<section>") == 3
        and written.count("<figure class=dream>") == written.count("<figure class=see>") > 3
    )
    assert (
        '<span class="learned special">dream_start</span>' in written
        and '<span class="special">im_start</span>' in written
    )
