"""Corpora of edits, each as its makers publish it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conftest import jpeg
from tests.data.imported import bring, plain, summary, write_tar

EDIT = plain("[red]", "paint it blue", "[blue]")


def share_gpt_4o(root: Path) -> Path:
    """Its images are in tars beside it."""
    row = {"input_prompt": "paint it blue", "input_image": ["image/in.png"], "output_image": "image/out.png"}
    (root / "text_and_image_to_image.json").write_text(json.dumps([row, row | {"output_image": "image/gone.png"}]))
    write_tar(root / "part_0.tar", {"image/in.png": jpeg("red"), "image/out.png": jpeg("blue")})
    return root / "text_and_image_to_image.json"


def gpt_image_edit(root: Path) -> Path:
    turns = [{"from": "human", "value": "<image>\npaint it\nblue"}, {"from": "gpt", "value": "<image>"}]
    rows = [{"image": ["red.jpg", "blue.jpg"], "conversations": turns}]
    rows += [{"image": ["red.jpg", "red.jpg", "blue.jpg"], "conversations": turns}]  # two images, one is spoken of
    (root / "edit.json").write_text(json.dumps(rows))
    return root / "edit.json"


def omni_edit(root: Path) -> Path:
    shown = {name: [{"bytes": jpeg(colour), "path": None}] * 2 for name, colour in SHOWN.items()}
    asked = ["make it blue", "paint it blue"]  # MetaQuery takes the last
    pq.write_table(pa.table(shown | {"edited_prompt_list": [asked, []]}), root / "train.parquet")
    return root / "train.parquet"


SHOWN = {"src_img": "red", "edited_img": "blue"}


def meta_query(root: Path) -> Path:
    red, blue = ({"bytes": jpeg(colour), "path": None} for colour in ("red", "blue"))
    rows = {"source_images": [[red], []], "target_image": [blue] * 2, "prompt": ["paint it blue"] * 2}
    pq.write_table(pa.table(rows), root / "train.parquet")
    return root / "train.parquet"


def openuni_edits(root: Path) -> Path:
    row = {"source_image": "red.jpg", "target_image": "blue.jpg", "annotation": "a.json"}
    (root / "a.json").write_text(json.dumps({"caption": "paint it blue"}))
    (root / "data.json").write_text(json.dumps([row, row | {"annotation": "b.json"}]))
    return root / "data.json"


def unilip_tars(root: Path) -> Path:
    whole = {"0.input.jpg": jpeg("red"), "0.output.jpg": jpeg("blue"), "0.txt": b"paint it blue"}
    write_tar(root / "0.tar", whole | {"1.input.jpg": jpeg("red"), "1.txt": b"paint it blue"})
    return root / "0.tar"


LAYOUTS = {
    share_gpt_4o: "missing",
    gpt_image_edit: "placeholders",
    omni_edit: "no_text",
    meta_query: "no_image",
    openuni_edits: "missing",
    unilip_tars: "no_image",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_edits(layout, walls):
    flags = [f"--images={walls}"] if layout is share_gpt_4o else []
    assert bring("edit", layout(walls), walls / "set", *flags) == [EDIT]
    assert summary(walls / "set")["dropped"] == {LAYOUTS[layout]: 1}
