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

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image as Picture

from dreamllm_jax.data import storage
from dreamllm_jax.data.corpora.plain import PlainText
from dreamllm_jax.data.document import to_record
from tests.data.conftest import PLAIN, bomb, encode, jpeg, png
from tests.data.imported import bring, plain, read, run, summary, write_tar

ROOT = Path(__file__).parent.parent.parent
PAIRS = [plain("a red wall", "[red]"), plain("a blue wall", "[blue]")]


def img2dataset_tar(path: Path) -> None:
    """Shards of `--output_format=webdataset`, the Parquet file with its columns beside them."""
    files = {}
    for key, colour in (("000000000", "red"), ("000000001", "blue")):
        meta = {"caption": f"a {colour} wall", "url": "http://x/y.jpg", "key": key}
        files |= {f"{key}.jpg": jpeg(colour), f"{key}.txt": f"a {colour} wall".encode()}
        files |= {f"{key}.json": json.dumps(meta).encode()}
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
    assert bring("webdataset", source, tmp_path / "set") == PAIRS
    counts = summary(tmp_path / "set")
    assert (counts["documents"], counts["images"], counts["dropped"]) == (2, 2, {})


def test_a_named_caption_of_blip_laion(tmp_path):
    meta = {"caption": "SHOP NOW", "blip_caption": "a red wall"}
    write_tar(tmp_path / "0.tar", {"a.jpg": jpeg("red"), "a.txt": b"SHOP NOW", "a.json": json.dumps(meta).encode()})
    assert bring("webdataset", tmp_path / "0.tar", tmp_path / "set", "--caption=blip_caption") == PAIRS[:1]


@pytest.mark.parametrize("table", ["captions.jsonl", "metadata.csv"])
def test_a_folder_with_captions(table, walls):
    rows = [{"file": f"{colour}.jpg", "text": f"a {colour} wall"} for colour in ("red", "blue")]
    lines = ["file,text", *(",".join(row.values()) for row in rows)]
    (walls / table).write_text("\n".join(map(json.dumps, rows) if table.endswith("jsonl") else lines) + "\n")
    assert bring("folder", walls, walls / "set") == PAIRS


def test_captions_of_several_kinds(tmp_path):
    told = {"prompt": "a red wall", "short": "", "long": "a red wall, of bricks"}
    write_tar(tmp_path / "0.tar", {"a.jpg": jpeg("red"), "a.json": json.dumps(told).encode()})
    assert bring("webdataset", tmp_path / "0.tar", tmp_path / "set") == PAIRS[:1]  # text-to-image-2M has a prompt alone
    for chosen in ("long", "short,long"):
        found = bring("webdataset", tmp_path / "0.tar", tmp_path / chosen, f"--caption={chosen}")
        assert found == [plain("a red wall, of bricks", "[red]")]


def listed_in_folders(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)


def listed_in_tars(root: Path, files: dict[str, bytes]) -> None:
    """Not unpacked: the lists name what is in `cc12m-train-0003.tar` as in the folder 0003."""
    for folder in {name.split("/")[0] for name in files}:
        inside = {name.split("/")[1]: data for name, data in files.items() if name.startswith(folder)}
        write_tar(root / f"cc12m-train-{folder}.tar", inside)


@pytest.mark.parametrize("put", [listed_in_folders, listed_in_tars])
def test_lists_of_openuni(put, tmp_path):
    """Images and captions apart, the same names in several folders; captions in JSON or, as BLIP3o's, in text files."""
    told = {"caption": "", "re_caption": "a red wall"}
    (tmp_path / "raw").mkdir()
    (tmp_path / "captions").mkdir()
    put(tmp_path / "raw", {"0003/a.jpg": jpeg("red"), "0004/a.jpg": jpeg("blue"), "0004/b.jpg": jpeg("green")[:-300]})
    captions = {"0003/a.json": json.dumps(told).encode(), "0004/a.txt": b" a blue wall\n", "0004/b.json": b"{"}
    put(tmp_path / "captions", captions)
    pairs = [("0003/a", "json"), ("0004/a", "txt"), ("0004/b", "json"), ("0004/a", "json"), ("0005/a", "json")]
    rows = [{"image": f"{name}.jpg", "annotation": f"{name}.{kind}"} for name, kind in pairs]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    flags = (f"--images={tmp_path / 'raw'}", f"--annotations={tmp_path / 'captions'}", "--max_bad=0.9")
    found = bring("folder", tmp_path / "data.json", tmp_path / "set", *flags, "--text=re_caption")
    assert found == PAIRS
    assert summary(tmp_path / "set")["dropped"] == {"not_json": 1, "missing": 2}
    assert storage.read_names(tmp_path / "set", "it") == ["0003/a.jpg", "0004/a.jpg"]


def test_image_pairs(walls):
    (walls / "pairs.jsonl").write_text(json.dumps({"source": "red.jpg", "target": "blue.jpg"}) + "\n")
    assert bring("image_pairs", walls / "pairs.jsonl", walls / "set") == [plain("[red]", "[blue]")]


def page(**changes) -> dict:
    infos = [
        {"image_name": "blue.jpg", "raw_url": "http://x/b", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "red.jpg", "raw_url": "http://x/a", "matched_text_index": 0, "matched_sim": 0.2},
    ]
    return {"text_list": ["One.", "Two.", "Three."], "image_info": infos, "url": "http://page"} | changes


def test_mmc4(walls):
    pages = walls / "docs_shard_7_v2.jsonl"
    pages.write_text(json.dumps(page()) + "\n")
    for place, flags, told in (
        ("after", [], plain("One.", "[red]", "Two. Three.", "[blue]")),
        ("before", ["--place=before"], plain("[red]", "One. Two.", "[blue]", "Three.")),
        ("alike", ["--min_similarity=0.25"], plain("One. Two. Three.", "[blue]")),
    ):
        assert bring("mmc4", pages, walls / place, f"--images={walls}", *flags) == [told]
    assert summary(walls / "alike")["dropped"] == {"similarity": 1}


def test_mmc4_in_tars(tmp_path):
    encoded = page(image_info=[{"image_base64": base64.b64encode(jpeg("red")).decode(), "matched_text_index": 1}])
    named = page(image_info=[{"image_name": "pic.jpg", "matched_text_index": 1}])
    files = {"p1.json": json.dumps(encoded).encode(), "p2.json": json.dumps(named).encode(), "p2.pic.jpg": jpeg("blue")}
    damaged = [page(image_info=[{"image_base64": code, "matched_text_index": 1}]) for code in ("?", "\u00e9")]
    files |= {"p3.json": b"{", "p4.json": b"[]"} | {f"p5{i}.json": json.dumps(damaged[i]).encode() for i in range(2)}
    write_tar(tmp_path / "0.tar", files)
    told = [plain("One. Two.", f"[{colour}]", "Three.") for colour in ("red", "blue")]
    found = bring("mmc4", tmp_path / "0.tar", tmp_path / "set", "--max_bad=0.5")
    assert found == [*told, *[plain("One. Two. Three.")] * 2]
    assert summary(tmp_path / "set")["dropped"] == {"not_json": 1, "fields": 1, "broken": 2}


def test_one_odd_record_takes_no_other_with_it(tmp_path, monkeypatch):
    lines = [json.dumps({"text": f"text {i}"}) for i in range(9)]
    lines[4] = '{"text": "half a \\ud83d character"}'  # JSON can hold what UTF-8 cannot
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    told = [plain(f"text {i}") for i in range(9)]
    told[4] = plain("half a \ufffd character")
    assert bring("text", tmp_path / "a.jsonl", tmp_path / "whole") == told

    read = PlainText.record

    def odd(self, row, part):
        if "text 6" in str(row):
            raise ValueError("as no reader foresees it")
        return read(self, row, part)

    monkeypatch.setattr(PlainText, "record", odd)
    assert bring("text", tmp_path / "a.jsonl", tmp_path / "some", "--workers=1", "--max_bad=0.2") == told[:6] + told[7:]
    assert summary(tmp_path / "some")["dropped"] == {"odd_record": 1}


def test_instruct_interleaved(walls):
    (walls / "pages.json").write_text(json.dumps([page(instruction="Tell of walls.")]))
    told = [("assistant", text) for text in ("One.", "[red]", "Two. Three.", "[blue]")]
    documents = bring("instruct_interleaved", walls / "pages.json", walls / "set", f"--images={walls}")
    assert documents == [[("user", "Tell of walls."), *told]]


def fetched_as_tars(images: Path) -> list[str]:
    """`img2dataset --output_format=webdataset`."""
    files = {"0.jpg": jpeg("red"), "0.json": json.dumps({"url": "http://x/red.jpg"}).encode()}
    files |= {"1.jpg": jpeg("green"), "1.json": json.dumps({"url": "http://x/g"}).encode()}
    write_tar(images / "00000.tar", files)
    return []


def fetched_as_files(images: Path) -> list[str]:
    """`img2dataset --output_format=files`; what could not be fetched stands in the table without a file."""
    (images / "00000").mkdir()
    (images / "00000" / "000000000.jpg").write_bytes(jpeg("red"))
    urls, keys = ["http://x/red.jpg", "http://x/gone.jpg"], ["000000000", "000000001"]
    table = pa.table({"url": urls, "key": keys, "status": ["success", "failed_to_download"]})
    pq.write_table(table, images / "00000.parquet")
    return []


def mapped(images: Path) -> list[str]:
    (images / "a.jpg").write_bytes(jpeg("red"))
    (images.parent / "map.csv").write_text("url,file\nhttp://x/red.jpg,a.jpg\nhttp://x/gone.jpg,b.jpg\n")
    return [f"--map={images.parent / 'map.csv'}"]


@pytest.mark.parametrize("fetched", [fetched_as_tars, fetched_as_files, mapped])
def test_obelics(fetched, tmp_path):
    images, table = tmp_path / "images", tmp_path / "obelics.parquet"
    images.mkdir()
    rows = {
        "images": [[None, "http://x/red.jpg", None, "http://x/gone.jpg"]],
        "texts": [["First.", None, "Then.", None]],
    }
    pq.write_table(pa.table(rows), table)
    flags = [f"--images={images}", *fetched(images)]
    assert bring("obelics", table, tmp_path / "set", *flags) == [plain("First.", "[red]", "Then.")]
    assert summary(tmp_path / "set")["dropped"] == {"missing": 1}
    with pytest.raises(ValueError, match="fetch them with img2dataset"):
        bring("obelics", table, tmp_path / "other")


def test_llava(walls):
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
    (walls / "llava.json").write_text(json.dumps(rows, indent=1))
    asked = [("user", "[red]"), ("user", "\nWhat is it?"), ("assistant", "A wall.")]
    answered = [("user", "Paint it."), ("assistant", "Here: "), ("assistant", "[blue]")]
    told = [asked, [*asked, *answered], [("user", "Hi"), ("assistant", "Ho")]]
    assert bring("llava", walls / "llava.json", walls / "set") == told
    assert summary(walls / "set")["dropped"] == {"missing": 1, "placeholders": 2}


@pytest.mark.parametrize("suffix", ["jsonl", "txt", "csv", "jsonl.gz", "jsonl.zst", "parquet"])
def test_text(suffix, tmp_path):
    texts = [f"Text number {i}, with a comma." for i in range(50)]
    path = tmp_path / f"texts.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        lines = {"t": texts, "j": [json.dumps({"text": t}) for t in texts], "c": ["text", *(f'"{t}"' for t in texts)]}
        with pa.output_stream(path) as file:  # compressed as its name says
            file.write("\n".join(lines[suffix[0]]).encode())
    assert bring("text", path, tmp_path / "set") == [plain(text) for text in texts]


def test_a_data_set_of_tfds(tmp_path):
    """One of ours is one of TFDS: its own fields are not a caption's, so a small one is made."""
    features = tfds.features.FeaturesDict({"caption": tfds.features.Text(), "picture": tfds.features.Image()})
    folder = tmp_path / "walls/1.0.0"
    folder.mkdir(parents=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="walls", split="train", filetype_suffix="array_record"
    )
    writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1")
    for colour in ("red", "blue"):
        example = {"caption": f"a {colour} wall", "picture": jpeg(colour)}
        writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()
    split = tfds.core.SplitInfo(name="train", shard_lengths=[2], num_bytes=0, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[split], version="1.0.0", check_data=False
    )
    assert bring("tfds", tmp_path / "walls", tmp_path / "set", "--text=caption", "--image=picture") == PAIRS
    with pytest.raises(ValueError, match="has no feature 'img'; it has caption, picture"):
        bring("tfds", tmp_path / "walls", tmp_path / "set", "--image=img", "--text=caption")


def test_what_cannot_be_used_is_counted_and_never_mispaired(tmp_path):
    images = {
        "good": jpeg("red"),
        "cut": jpeg("blue")[:-300],
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "bomb": bomb(png((0, 0, 0)), 12_000),
        "small": png((0, 0, 0), (8, 8)),
        "fine": jpeg("blue"),
    }
    files = {}
    for name, data in images.items():
        files |= {f"{name}.jpg": data, f"{name}.txt": f"a {name} picture".encode()}
    files |= {"mute.jpg": jpeg("green"), "bare.txt": b"no picture", "../out.jpg": jpeg("green"), "code.pkl": b"cos\n"}
    write_tar(tmp_path / "0.tar", files)
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        for name, kind in (("folder.jpg", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            tar.addfile(info)
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 4])
    good, fine = plain("a good picture", "[red]"), plain("a fine picture", "[blue]")
    assert bring("webdataset", tmp_path, tmp_path / "set", "--max_bad=0.9") == [good, fine, good]
    dropped = summary(tmp_path / "set")["dropped"]
    once = ("size", "small", "no_text", "no_image", "outside", "pickle", "link", "damaged_file")
    assert all(dropped[reason] == 1 for reason in once), dropped
    assert dropped["broken"] >= 1 and dropped["format"] >= 1
    with pytest.raises(ValueError, match=r"9 of 11 records cannot be used \(.*pickle 1.*more than --max_bad=0.1"):
        bring("webdataset", tmp_path / "0.tar", tmp_path / "other", "--max_bad=0.1")


def test_what_is_stored_is_small_upright_rgb(tmp_path):
    exif = Picture.Exif()
    exif[0x0112] = 6
    pictures = {
        "a": encode(Picture.new("CMYK", (900, 700), (0, 250, 250, 0)), "JPEG"),
        "b": encode(Picture.new("RGB", (60, 40), PLAIN["blue"]), "JPEG", exif=exif),
        "c": jpeg("green"),
    }
    named = [(f"{name}.jpg", data) for name, data in pictures.items()]
    write_tar(tmp_path / "0.tar", dict(sorted([*named, *((f"{name}.txt", name.encode()) for name in pictures)])))
    bring("webdataset", tmp_path / "0.tar", tmp_path / "set", "--size=256")
    corpus = storage.Corpus(tmp_path / "set", "it")
    opened = [Picture.open(io.BytesIO(corpus[i].images[0].data)) for i in range(3)]
    assert [image.size for image in opened] == [(329, 256), (40, 60), (40, 30)]
    assert all(image.mode == "RGB" and image.format == "JPEG" for image in opened)
    assert corpus[2].images[0].data == pictures["c"]


def many(path: Path, tars: int) -> None:
    for tar in range(tars):
        files = {}
        for index in range(20):
            name = f"{tar}_{index}"
            files |= {f"{name}.jpg": jpeg("red", (64 + index, 64)), f"{name}.txt": name.replace("_", " ").encode()}
        write_tar(path / f"{tar:03d}.tar", files)


def records(directory: Path) -> list[dict]:
    corpus = storage.Corpus(directory, "it")
    return [to_record(corpus[i]) for i in range(len(corpus))]


@pytest.mark.slow
def test_killed_and_started_again_it_does_the_rest_and_workers_change_nothing(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    many(source, 40)
    bring("webdataset", source, tmp_path / "alone")
    command = [sys.executable, "-m", "dreamllm_jax.data", "import", "webdataset", source, f"--to={tmp_path / 'set'}"]
    process = subprocess.Popen(
        [*command, "--name=it", "--workers=2"], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
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
    subprocess.run([*command, "--name=it", "--workers=3"], cwd=ROOT, check=True, capture_output=True)
    assert records(tmp_path / "set") == records(tmp_path / "alone") and not work.exists()
    assert before in [os.stat(file).st_mtime_ns for file in (tmp_path / "set/it/1.0.0").iterdir()]
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


def test_tokens_are_counted_and_shown_after_an_import(dataset, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one wall\nand another\n")
    tokenizer = f"--tokenizer={dataset}/tokenizer"
    run("import", "text", tmp_path / "a.txt", "--to", tmp_path / "set", "--name=it", "--sample=2", tokenizer)
    tokens = summary(tmp_path / "set")["tokens"]
    assert f"it: 2 documents, {tokens} tokens, " in capsys.readouterr().out and tokens >= 4
    page = (tmp_path / "set" / "it.html").read_text()
    assert page.count("<section>") == 2 and page.count('class="learned') == tokens + 2  # and an end each


def test_the_page_shows_what_is_learned(dataset, tmp_path):
    run("sample", dataset, "--name=interleaved", "--to", tmp_path / "page.html", "--count=3")
    written = (tmp_path / "page.html").read_text()
    read, painted = (written.count(f"<figure class={kind}>") for kind in ("see", "dream"))
    assert written.count("<section>") == 3 and read == painted > 3
    assert '<span class="learned special">dream_start</span>' in written
    assert '<span class="special">im_start</span>' in written
