"""Does the model compose? Scenes are read from their pictures and painted from their captions, those that were learnt
and those that were held out, and each fact of each is right or wrong."""

import dataclasses
import functools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from dreamllm_jax.data.document import Document
from dreamllm_jax.data.scenes import matcher
from dreamllm_jax.data.scenes.words import parse
from dreamllm_jax.data.scenes.world import Scene, draw_scene
from dreamllm_jax.evaluation.pairs import Answers, ask
from dreamllm_jax.generation.documents import png
from dreamllm_jax.runs.load import Trained

FACTS = ("objects", "colours", "counts", "relation", "all")
FILE = "scenes.json"
BATCH = 50  # pictures, or texts, at once
CHANCES = 20  # scenes that are drawn for each, to say what chance gets right


@dataclasses.dataclass(frozen=True)
class Asked(Answers):
    """What became of N pairs that tell scenes."""

    @functools.cached_property
    def scenes(self) -> list[Scene]:
        """What the captions tell."""
        return [_told(caption) for caption in self.captions]

    @functools.cached_property
    def marks(self) -> dict[str, dict[str, list[bool]]]:
        """Of `read` and `painted`: each fact, right or not, of each scene."""
        found = {"read": map(parse, self.read), "painted": map(matcher.read, self.painted)}
        return {way: _marks(scenes, self.scenes) for way, scenes in found.items()}

    def psnr(self) -> tuple[float, float]:
        """Decibels of the painted pictures against the true ones: over all pixels, and over those of things alone."""
        errors = np.square((self.painted.astype(np.float64) - self.pictures) / 255)
        things = (self.pictures != 255).any(-1)
        return tuple(float(-10 * np.log10(max(some.mean(), 1e-10))) for some in (errors, errors[things]))


def facts(found: Scene | None, true: Scene) -> dict[str, bool]:
    """What of a scene was found: its objects, their colours, their counts, how they stand to each other, and all (sizes
    too)."""
    if found is None:
        return dict.fromkeys(FACTS, False)

    def same(told: Callable[[Scene], object]) -> bool:
        return told(found) == told(true)

    return {
        "objects": same(lambda scene: sorted(group.kind for group in scene.groups)),
        "colours": same(lambda scene: sorted((group.kind, group.colour) for group in scene.groups)),
        "counts": same(lambda scene: sorted((group.kind, group.count) for group in scene.groups)),
        "relation": same(lambda scene: (scene.relation, [group.kind for group in scene.groups])),
        "all": found == true,
    }


def _marks(found: Iterator[Scene | None], true: Sequence[Scene]) -> dict[str, list[bool]]:
    each = [facts(one, scene) for one, scene in zip(found, true, strict=True)]
    return {name: [one[name] for one in each] for name in FACTS}


def ask_scenes(trained: Trained, pairs: Sequence[Document], *, steps: int = 30, guidance: float = 2.0) -> Asked:
    """Reads the pictures of the pairs and paints their captions, see `ask`.

    Args:
      steps, guidance: of the sampler.

    Raises:
      ValueError: a caption tells no scene.
    """
    for pair in pairs:  # before anything is painted
        _told(pair.texts[0].text)
    return Asked(**vars(ask(trained, pairs, steps=steps, guidance=guidance, batch=BATCH)))


def _told(caption: str) -> Scene:
    scene = parse(caption)
    if scene is None:
        raise ValueError(f"{caption!r} tells no scene: this is for data that `data prepare scenes` made")
    return scene


def by_chance(true: Sequence[Scene]) -> dict[str, float]:
    """The share of each fact that a scene drawn at random gets right."""
    rng = random.Random(0)
    many = [scene for scene in true for _ in range(CHANCES)]
    return _shares(_marks((draw_scene(rng) for _ in many), many))


def by_nearest(asked: Asked, seen: Sequence[tuple[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """The shares that are right of the nearest scene that was learnt: to read, of that whose picture is nearest; to
    paint, of that whose caption has most words in common at their places.

    Args:
      seen: captions and pictures u8[H, W, 3] of scenes that were learnt.
    """
    scenes = [parse(text) for text, _ in seen]
    known = np.stack([picture for _, picture in seen]).reshape(len(seen), -1).astype(np.float32)
    wanted = asked.pictures.reshape(len(asked.scenes), -1).astype(np.float32)
    distances = np.square(known).sum(-1) - 2 * wanted @ known.T
    longest = max(len(text.split()) for text in (*asked.captions, *(text for text, _ in seen)))
    words = np.array([(text.split() + [""] * longest)[:longest] for text, _ in seen])
    common = [(words == (text.split() + ["-"] * longest)[:longest]).sum(-1).argmax() for text in asked.captions]
    return {
        "read": _shares(_marks((scenes[at] for at in distances.argmin(-1)), asked.scenes)),
        "painted": _shares(_marks((scenes[at] for at in common), asked.scenes)),
    }


def _shares(marks: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    return {name: float(np.mean(right)) for name, right in marks.items()}


def interval(right: Sequence[bool], z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of N, 95 %, by Wilson (JASA 22, 1927): of all or none right it is no point either."""
    share, count = float(np.mean(right)), len(right)
    middle = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (middle - half) / (1 + z**2 / count), (middle + half) / (1 + z**2 / count)


def report(asked: Asked, seen: Sequence[tuple[str, np.ndarray]]) -> dict:
    """What is told of scenes, as JSON: of each way, the shares that are right with their intervals, those by chance and
    of the nearest scene that was learnt; how near the painted pictures are."""
    nearest, chance = by_nearest(asked, seen), by_chance(asked.scenes)
    ways = {
        way: {
            "right": _shares(found),
            "interval": {name: interval(right) for name, right in found.items()},
            "chance": chance,
            "nearest_learnt": nearest[way],
        }
        for way, found in asked.marks.items()
    }
    psnr, psnr_of_things = asked.psnr()
    return {"scenes": len(asked.scenes), **ways, "psnr": psnr, "psnr_of_things": psnr_of_things}


def save(found: Mapping[str, tuple[Asked, dict]], step: int, directory: epath.PathLike) -> None:
    """Writes `scenes.json`, what is told of the scenes by their name (`seen`, `unseen`), and their pictures, as PNG
    files beside it: of the checkpoint at `step`."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    told: dict = {"step": step}
    for name, (asked, reported) in found.items():
        items = []
        for i, caption in enumerate(asked.captions):
            item = {"caption": caption, "read": asked.read[i]}
            item |= {f"{way}_right": marks["all"][i] for way, marks in asked.marks.items()}
            for kind, pixels in (("picture", asked.pictures[i]), ("painted", asked.painted[i])):
                item[kind] = f"{name}-{i:04}-{kind}.png"
                (directory / item[kind]).write_bytes(png(pixels))
            items.append(item)
        told[name] = {**reported, "items": items}
    (directory / FILE).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")


def lines(name: str, reported: Mapping) -> list[str]:
    """What is told of some scenes, for a person: a line of each way."""
    found = []
    for way in ("read", "painted"):
        told = reported[way]
        low, high = told["interval"]["all"]
        parts = ", ".join(f"{fact} {told['right'][fact]:.1%}" for fact in FACTS[:-1])
        found.append(
            f"{name}, {way}: all right {told['right']['all']:.1%} ({low:.1%} to {high:.1%}) of {reported['scenes']}; "
            f"{parts}; nearest learnt {told['nearest_learnt']['all']:.1%}, chance {told['chance']['all']:.1%}"
        )
    found.append(f"{name}: painted within {reported['psnr']:.1f} dB, {reported['psnr_of_things']:.1f} over things")
    return found
