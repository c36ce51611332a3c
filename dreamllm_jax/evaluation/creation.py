"""Pictures for captions, many thousands of them, over all hosts and however often it is interrupted.

DIR/settings.json    by what they are painted; other settings are refused
DIR/captions.json    caption by id
DIR/0/ID.png         the picture of each caption; 1/, 2/ ... where several are painted of each
"""

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from dreamllm_jax.common.configuration import changes
from dreamllm_jax.common.directories import read_text, remove_unfinished, write_whole
from dreamllm_jax.data import images, lines
from dreamllm_jax.data.document import Text
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.evaluation import fid, scores
from dreamllm_jax.evaluation.features import Features, Similarity, of_files
from dreamllm_jax.generation.documents import png
from dreamllm_jax.generation.images import generate_images
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.parallel.distributed import gather

SETTINGS, CAPTIONS = "settings.json", "captions.json"


@dataclasses.dataclass(frozen=True)
class Painting:
    """By what pictures are painted; the defaults are the original's for COCO.

    Attributes:
      size: pixels on a side.
      guidance, guidance_interval: see `generation.images.paint`.
      each: pictures of every caption.
      seed: of all; a picture's own comes from it, the caption's id and the picture's number alone.
    """

    size: int
    sampler: SamplerConfig = SamplerConfig(steps=150)
    guidance: float = 2.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    each: int = 1
    seed: int = 42


def read_captions(file: epath.PathLike, limit: int | None = None) -> dict[str, str]:
    """A caption for each image of a file, by the image's id.

    The file is COCO's (`captions_val2014.json`), JSON lines of `image_id` and `caption` (Localized Narratives), or has
    a caption a line. Of an image's captions one is drawn, and with `limit` so many images, both by their ids.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is of another form.
    """
    text, kind = read_text(file), lines.kind(file)
    try:
        if kind == ".json":
            pairs = [(one["image_id"], one["caption"]) for one in json.loads(text)["annotations"]]
        else:
            pairs = [
                (one["image_id"], one["caption"]) if isinstance(one, dict) else (f"{number - 1:06}", one)
                for number, one in lines.read(text, kind, "caption")
            ]
        if odd := [image for image, caption in pairs if not lines.is_text(caption)]:
            raise TypeError(f"the caption of {odd[0]!r} is empty or no text")
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} is neither COCO's captions (.json), nor JSON lines of image_id and caption (.jsonl): {error!r}"
        ) from None
    known: dict[str, list[str]] = {}
    for image, caption in pairs:
        known.setdefault(str(image), []).append(caption.strip())
    if strange := [image for image in known if not re.fullmatch(r"[\w-]+", image)]:
        raise ValueError(f"{file}: the image_id {strange[0]!r} cannot be the name of a file")
    if not known:
        raise ValueError(f"{file} has no captions")
    chosen = sorted(known, key=lambda image: (_draw("image", image), image))[:limit]
    return {image: known[image][_draw("caption", image) % len(known[image])] for image in sorted(chosen)}


def _draw(*words: Any) -> int:
    """A number of 31 bits that depends on the words alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:4]) >> 1


def begin(directory: epath.Path, captions: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Readies a directory, or makes sure that it was begun alike.

    Raises:
      ValueError: it was begun with other settings or captions.
    """
    known = directory / SETTINGS, directory / CAPTIONS
    for path, content in zip(known, (settings, captions), strict=True):
        if path.exists():
            before = json.loads(path.read_text())
            if changed := changes(before, json.loads(json.dumps(content))):
                raise ValueError(f"{path} has another {changed[:200]}: give the same again, or another --to")
        elif jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if jax.process_index() == 0:
        for pictures in directory.glob("[0-9]*"):
            remove_unfinished(pictures)
    gather(0)  # nobody writes before everybody has looked


def paint(
    model: DreamLLM,
    params: dict,
    tokenizer: Tokenizer,
    captions: Mapping[str, str],
    painting: Painting,
    directory: epath.Path,
    batch: int,
) -> None:
    """Paints what is missing; all hosts must call it.

    Captions are put into the same batches whatever is there already, so that what is painted after an interruption
    equals what would have been painted without one, to the last bit.
    """
    order = sorted(captions, key=lambda image: (len(tokenizer.encode_text(captions[image])), image))
    batches = [
        (number, order[start : start + batch])
        for number in range(painting.each)
        for start in range(0, len(order), batch)
    ]
    for number in range(painting.each):
        (directory / str(number)).mkdir(parents=True, exist_ok=True)
    there = [{path.name for path in (directory / str(number)).iterdir()} for number in range(painting.each)]
    for number, some in tqdm(batches[jax.process_index() :: jax.process_count()], disable=jax.process_index() > 0):
        missing = [image for image in some if f"{image}.png" not in there[number]]
        if not missing:
            continue
        filled = [*some, *[some[-1]] * (batch - len(some))]
        pixels = generate_images(
            model,
            params,
            tokenizer,
            [[Text(captions[image])] for image in filled],
            seeds=[_draw(painting.seed, image, number) for image in filled],
            size=painting.size,
            sampler=painting.sampler,
            guidance=painting.guidance,
            guidance_interval=painting.guidance_interval,
        )
        for image, picture in zip(some, np.asarray(pixels), strict=False):
            if image in missing:
                write_whole(directory / str(number) / f"{image}.png", png(picture))
    gather(0)  # what follows looks at all of them


def measure(
    captions: Mapping[str, str],
    directory: epath.Path,
    each: int,
    reference: fid.Statistics | None = None,
    inception: Features | None = None,
    similarity: Similarity | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of painted pictures, and standard errors of those that are means; all hosts must call it.

    `fid` and `clip_score` are of the first picture of each caption. Those of the pictures most similar to their
    captions among `each` have names of their own (`fid_best_of_8`), for choosing makes both better.

    Args:
      reference, inception: what FID compares with, by which features; None for no FID.
      similarity: None for no CLIP score, which is 100 times the cosine (Hessel et al. 2021, as torchmetrics scales it).
    """
    found: dict[str, Sequence[float] | float] = {}
    chosen = {"": [0] * len(captions)}
    if similarity:
        cosines = np.stack([_similarities(captions, directory / str(number), similarity) for number in range(each)])
        if each > 1:
            chosen[f"_best_of_{each}"] = cosines.argmax(axis=0).tolist()
        for name, numbers in chosen.items():
            found[f"clip_score{name}"] = 100 * np.maximum(cosines[numbers, range(len(captions))], 0)
    if reference and inception:
        for name, numbers in chosen.items():
            files = [directory / str(n) / f"{image}.png" for image, n in zip(captions, numbers, strict=True)]
            found[f"fid{name}"] = fid.distance(_statistics(files, inception), reference)
    return scores.summary(found)


def _statistics(files: Sequence[epath.Path], inception: Features) -> fid.Statistics:
    """Each host looks at its share of the files."""
    mine = files[jax.process_index() :: jax.process_count()]
    sent = None
    if mine:
        found = fid.statistics(of_files(mine, inception))
        numbers = np.concatenate([found.mean, found.covariance.ravel()])
        sent = {"count": found.count, "size": found.mean.size, "numbers": base64.b64encode(numbers.tobytes()).decode()}
    parts = []
    for one in filter(None, gather(sent)):
        numbers = np.frombuffer(base64.b64decode(one["numbers"]))
        size = one["size"]
        parts.append(fid.Statistics(numbers[:size], numbers[size:].reshape(size, size), one["count"]))
    return fid.pooled(parts)


def _similarities(
    captions: Mapping[str, str], folder: epath.Path, similarity: Similarity, batch: int = 32
) -> np.ndarray:
    """Each host looks at its share of the pictures."""
    pairs = list(captions.items())[jax.process_index() :: jax.process_count()]
    mine: list[float] = []
    for start in tqdm(range(0, len(pairs), batch), unit=f"{batch} pictures", disable=jax.process_index() > 0):
        some = pairs[start : start + batch]
        pictures = [np.asarray(images.decode((folder / f"{image}.png").read_bytes())) for image, _ in some]
        mine += similarity(pictures, [caption for _, caption in some]).tolist()
    found = np.zeros(len(captions))
    for index, share in enumerate(gather(mine)):
        found[index :: jax.process_count()] = share
    return found
