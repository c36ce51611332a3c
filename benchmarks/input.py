"""How fast rows are made from stored documents, and how many cores a host of a pod needs for it.

    python -m benchmarks.input [--documents=400] [--steps=20] [--latency=0.03 | --family]

Builds a corpus of interleaved documents and captioned pictures as in stage II: photographs of scikit-image at 640 x 480
pixels, texts of the lengths of MMC4's and BLIP's. It is read with rows of stage II (2048 tokens, 6 + 6 images) and of
stage I's creation (pictures of 512 pixels to paint only). Printed are rows and images a second on one core, where the
time goes, how full the rows are, and the cores that the hosts of a v5e-8 and a v5p-8 would need.

With `--latency` every read of a record takes so many seconds more, as in a bucket. Printed are then, without decoding
any picture, how long a run of 64 rows a host with 256 waiting documents each takes to continue, and the rows that are
read and packed a second; and beside them the rows that one core decodes.

With `--family` captioned pictures are read as OpenUni, MetaQuery and UniLIP learn them: rows of eight with 256 queries
each, pictures of 512 or 448 pixels, also with an edit's source beside each, and with what SANA's autoencoder made of
them stored. The pictures are as `data import` leaves them, 683 x 512.

Needs scikit-image, and a tokenizer of real size: `--tokenizer`, or what `pip install mistral-common` brings.
"""

import argparse
import contextlib
import cProfile
import dataclasses
import importlib.util
import io
import json
import os
import pstats
import shutil
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image as Picture

from dreamllm_jax.data import storage, stored, tokenizer
from dreamllm_jax.data.batch import RowShape, SlotGroup
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.images import paint_pixels
from dreamllm_jax.data.loader import Loader
from dreamllm_jax.data.rows import Pixels
from dreamllm_jax.data.settings import CorpusConfig, DataConfig
from dreamllm_jax.data.tokens import encode_document
from dreamllm_jax.data.writing import Placed
from dreamllm_jax.towers.vision_encoders.clip import ClipVisionConfig

CROPS = ClipVisionConfig().preprocess, paint_pixels
STAGE_2 = RowShape(2048, (SlotGroup(6, 256, 224, 224),), (SlotGroup(6, 64, 512, 512),))
WINDOW = 256
RESUMED, READ = 64, 32  # rows a host: of a run that is continued, of one that reads
MIXTURE = {"interleaved": CorpusConfig(), "pairs": CorpusConfig()}
# Rows of pictures to paint only: stage I, creation.
STAGE_1 = RowShape(2048, (), (SlotGroup(20, 64, 512, 512),))
# Pictures with 256 queries each: how large they are; rows for eight of them with short captions, and for eight edits.
QUERIES = {"OpenUni, MetaQuery": 512, "UniLIP": 448}
PAIRS, EDITS = 2304, 4352
LATENTS = (16, 16, 32)
# What a host feeds: chips, and seconds a step of the plan for so many rows a chip (docs/performance.md).
HOSTS = {"v5p-8, stage II": (4, 8, 3.0), "v5e-8, stage II": (8, 2, 1.9)}
FUNCTIONS = {
    "reading records": ("storage.py", "_read"),
    "text to tokens": ("tokens.py", "encode_document"),
    "pictures for CLIP": ("rows.py", "see"),
    "pictures to paint": ("rows.py", "dream"),
}


def photographs() -> list[np.ndarray]:
    """scikit-image's photographs, of 800 x 600 pixels."""
    folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    pieces = []
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg"):
        picture = Picture.open(folder / name).convert("RGB")
        pieces.append(np.asarray(picture.resize((800, 600), Picture.Resampling.LANCZOS)))
    return pieces


def documents(count: int, width: int = 640, height: int = 480, **jpeg: int) -> dict[str, list[Document]]:
    """Documents whose numbers of images and lengths of text are those of MMC4-core and BLIP-LAION."""
    rng, pieces = np.random.default_rng(0), photographs()
    words = ["the", "a", "photograph", "of", "light", "on", "red", "stone", "people", "standing", "near", "houses"]

    def text(tokens: float) -> Text:
        return Text(" ".join(rng.choice(words, max(int(tokens / 1.15), 1))))

    def image() -> Image:
        piece, left, top = pieces[rng.integers(len(pieces))], rng.integers(800 - width), rng.integers(600 - height)
        out = io.BytesIO()
        Picture.fromarray(piece[top : top + height, left : left + width]).save(out, "JPEG", **{"quality": 90} | jpeg)
        return Image(out.getvalue())

    interleaved = []
    for _ in range(count):
        images = max(1, rng.poisson(4.1))
        share = rng.dirichlet(np.ones(images + 1)) * rng.lognormal(np.log(330) - 0.35, 0.84)
        segments = [part for tokens in share[:-1] for part in (text(tokens), image())]
        interleaved.append(Document("interleaved", (*segments, text(share[-1]))))
    pairs = [Document("pair", (text(rng.lognormal(2.9, 0.4)), image())) for _ in range(count)]
    return {"interleaved": interleaved, "pairs": pairs}


def measure(path: Path, shape: RowShape, corpora: dict, tokens: tokenizer.Tokenizer, workers: int, steps: int):
    """Rows a second, the loader, and the loader's profile where `workers` is 0."""
    config = DataConfig(path=str(path), corpora=corpora, workers=workers, window=WINDOW)
    loader = Loader(config, shape, tokens, *CROPS, rows_per_step=8, seed=0)
    loader._pixels._memory = 0  # every picture is decoded, as in a corpus that is not seen twice
    for _ in range(3):  # the windows are filled
        next(loader)
    profile = cProfile.Profile()
    clock = time.perf_counter if workers else time.process_time  # so that others' work on one core does not count
    began = clock()
    for _ in range(steps):
        next(loader)
    seconds = clock() - began
    if workers == 0:
        profile.enable()
        for _ in range(max(steps // 2, 1)):
            next(loader)
        profile.disable()
    loader.close()
    return 8 * steps / seconds, loader, profile


def padded(path: Path, tokens: tokenizer.Tokenizer, together: int = 8) -> float:
    """Share of tokens in rows of one document each, padded to the longest of so many, the original's way."""
    corpora = [storage.Corpus(path, name) for name in ("interleaved", "pairs")]
    rng, count = np.random.default_rng(0), 100 * together
    drawn = (corpora[rng.integers(2)][rng.integers(len(corpora[0]))] for _ in range(count))
    lengths = np.array([len(encode_document(one, tokens, STAGE_2, draw=rng.random()).tokens) for one in drawn])
    return lengths.sum() / (together * lengths.reshape(-1, together).max(axis=1).sum())


class Blank(Pixels):
    """Black pictures, for measuring everything but decoding."""

    def see(self, placed: Placed) -> np.ndarray:
        return np.zeros((224, 224, 3), np.uint8)

    def dream(self, placed: Placed, flip: bool = False) -> np.ndarray:
        return np.zeros((512, 512, 3), np.uint8)


def blank_loader(path: Path, tokens: tokenizer.Tokenizer, rows: int) -> Loader:
    loader = Loader(DataConfig(path=str(path), window=WINDOW), STAGE_2, tokens, *CROPS, rows_per_step=rows, seed=0)
    loader._pixels = Blank(STAGE_2, *CROPS)
    return loader


def far_away(path: Path, tokens: tokenizer.Tokenizer, latency: float, steps: int) -> None:
    """Prints how fast is read what takes so many seconds more a record."""
    decoded, *_ = measure(path, STAGE_2, MIXTURE, tokens, 0, steps)
    storage.KEPT_BYTES = 0  # every document is read anew
    with contextlib.closing(blank_loader(path, tokens, RESUMED)) as loader:
        next(loader)
        state = json.loads(json.dumps(loader.get_state()))
    read = storage.Corpus._read

    def slowly(corpus: storage.Corpus, index: int) -> Document:
        time.sleep(latency)
        return read(corpus, index)

    storage.Corpus._read = slowly
    with contextlib.closing(blank_loader(path, tokens, RESUMED)) as loader:
        began = time.perf_counter()
        loader.set_state(state)
        next(loader)
        seconds = time.perf_counter() - began
    waited = sum(len(waiting) for _, *waiting in state["streams"].values())
    print(f"{RESUMED} rows with {waited} waiting documents, {latency} s more a read, continue after {seconds:.1f} s")
    with contextlib.closing(blank_loader(path, tokens, READ)) as loader:
        for _ in range(3):
            next(loader)
        began = time.perf_counter()
        for _ in range(steps):
            next(loader)
        rows = READ * steps / (time.perf_counter() - began)
        each = sum(map(len, loader.records)) / READ
    print(f"{rows:.1f} rows/s of {each:.1f} documents each are read and packed, {READ} rows a step")
    print(f"{decoded:.1f} rows/s are tokenised and decoded by one core, with nothing to wait for")


def family(folder: Path, tokens: tokenizer.Tokenizer, count: int, steps: int) -> None:
    """Prints how fast rows are read of pictures that are painted with 256 queries each."""
    pairs = documents(count, 683, 512, quality=95, subsampling=0)["pairs"]
    edits = [
        Document("edit", (two.images[0], *one.segments)) for one, two in zip(pairs, pairs[1:] + pairs[:1], strict=True)
    ]
    path = folder / "family"
    storage.write_dataset(path, {"pairs": pairs, "edits": edits})
    rng, place = np.random.default_rng(0), stored.folder(path, "pairs", "moments")
    place.mkdir(parents=True)
    for part, numbers in stored.parts(place, count).items():
        stored.write_part(part, (rng.normal(size=(1, *LATENTS)).astype(jnp.bfloat16) for _ in numbers))
    stored.write_description(place, stored.Description(LATENTS, "bfloat16", count, "", {}, {}, complete=True))
    for name, size in QUERIES.items():
        painted, read = SlotGroup(8, 256, size, size), SlotGroup(8, 256, 448, 448)
        cases = {"pairs": RowShape(PAIRS, (), (painted,)), "edits": RowShape(EDITS, (read,), (painted,))}
        if size == 512:
            kept = dataclasses.replace(painted, stored=LATENTS)
            cases["pairs, latents stored"] = RowShape(PAIRS, (), (kept,))
        for what, shape in cases.items():
            corpora = {what.split(",")[0]: CorpusConfig(mode="creation")}
            rows, loader, _ = measure(path, shape, corpora, tokens, 0, steps)
            used = sum(count for (_, kind), count in loader.totals.items() if kind == "dream") / loader._rows
            filled = ", ".join(f"{part} {share:.1%}" for part, share in loader.fill().items())
            print(f"{name}, {size} px, {what}: {rows:.1f} rows/s, {rows * used:.0f} documents/s on one core; {filled}")


def where(profile: cProfile.Profile) -> str:
    stats = pstats.Stats(profile)
    parts = {
        label: sum(
            entry[3]
            for (file, _, name), entry in stats.stats.items()
            if file.endswith(f"data/{place}") and name == what
        )
        for label, (place, what) in FUNCTIONS.items()
    }
    rest = stats.total_tt - sum(parts.values())
    return ", ".join(f"{label} {seconds / stats.total_tt:.0%}" for label, seconds in {**parts, "rest": rest}.items())


def mistral(folder: Path) -> Path:
    """The tokenizer of mistral-common, under the name that a directory of a model would have it by."""
    there = Path(importlib.util.find_spec("mistral_common").origin).parent / "data/tokenizer.model.v1"
    return Path(shutil.copy(there, folder / tokenizer.SENTENCEPIECE_FILE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--family", action="store_true")
    parser.add_argument("--tokenizer", default="", help="instead of mistral-common's")
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set"
        tokens = tokenizer.load_tokenizer(Path(arguments.tokenizer or mistral(Path(folder))))
        if arguments.family:
            family(Path(folder), tokens, arguments.documents, arguments.steps)
            return
        storage.write_dataset(path, documents(arguments.documents))
        if arguments.latency:
            far_away(path, tokens, arguments.latency, arguments.steps)
            return
        cases = {
            "stage II": (STAGE_2, MIXTURE),
            "stage I, creation": (STAGE_1, {"pairs": CorpusConfig(mode="creation")}),
        }
        rows_a_second = {}
        for name, (shape, corpora) in cases.items():
            rows, loader, profile = measure(path, shape, corpora, tokens, 0, arguments.steps)
            rows_a_second[name] = rows
            used = sum(loader.totals[corpus, what] for corpus in corpora for what in ("see", "dream"))
            images = rows * used / loader._rows
            filled = ", ".join(f"{what} {share:.1%}" for what, share in loader.fill().items())
            print(f"{name}: {rows:.1f} rows/s, {images:.0f} images/s on one core; filled: {filled}")
            print(f"  {where(profile)}")
            many, *_ = measure(path, shape, corpora, tokens, os.cpu_count(), arguments.steps)
            print(f"  with {os.cpu_count()} threads on {os.cpu_count()} cores: {many:.1f} rows/s")
        print(f"each document alone, padded to the longest of 8: {padded(path, tokens):.1%} of tokens")
        for host, (chips, rows, seconds) in HOSTS.items():
            need = chips * rows / seconds
            print(f"a host of {host} takes {need:.1f} rows/s: {need / rows_a_second['stage II']:.1f} cores")


if __name__ == "__main__":
    main()
