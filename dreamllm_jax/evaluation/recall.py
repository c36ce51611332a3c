"""Did the model learn its pairs? Each caption is painted, each picture is put into words, and both are compared."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from etils import epath

from dreamllm_jax.data import images
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.evaluation import scores
from dreamllm_jax.generation.documents import png
from dreamllm_jax.generation.images import generate_images
from dreamllm_jax.generation.texts import generate_texts
from dreamllm_jax.runs.load import Trained

MAX_TOKENS = 32  # of the text written for a picture


@dataclasses.dataclass(frozen=True)
class Recall:
    """What became of N pairs.

    Attributes:
      captions: the N captions.
      pictures: u8[N, H, W, 3], as the model was to paint them.
      painted: u8[N, H, W, 3], painted from the captions.
      nearest: i32[N] index of the pair whose picture is nearest to the painted one (mean squared error of pixels).
      read: the text written for each picture.
    """

    captions: Sequence[str]
    pictures: np.ndarray
    painted: np.ndarray
    nearest: np.ndarray
    read: Sequence[str]

    @property
    def right(self) -> dict[str, list[bool]]:
        """Of each pair, whether its painting is nearer to its own picture than to any other, and whether what was read
        is exactly its caption."""
        return {
            "creation_top1": [index == nearest for index, nearest in enumerate(self.nearest.tolist())],
            "comprehension_exact": [read == caption for read, caption in zip(self.read, self.captions, strict=True)],
        }


def recall(
    trained: Trained,
    pairs: Sequence[Document],
    *,
    steps: int = 50,
    guidance: float = 3.0,
) -> Recall:
    """Paints the pairs' captions, pair i with seed i, and reads their pictures, greedily and all in one batch each.

    Args:
      steps, guidance: of the sampler.
    """
    size = trained.experiment.rows.sample_size
    captions = [pair.texts[0].text for pair in pairs]
    preprocess = trained.model.config.image_decoder.preprocess
    pictures = np.stack([preprocess(images.decode(pair.images[0].data), *size) for pair in pairs])

    common = trained.model, trained.params, trained.tokenizer
    painted = generate_images(
        *common,
        [[Text(caption)] for caption in captions],
        seeds=range(len(pairs)),
        size=size,
        sampler=SamplerConfig(steps=steps),
        guidance=guidance,
    )
    painted = np.asarray(painted)
    distances = np.square(painted[:, None].astype(np.float32) - pictures[None]).mean(axis=(2, 3, 4))
    read = generate_texts(*common, [[Image(pair.images[0].data)] for pair in pairs], max_tokens=MAX_TOKENS)
    return Recall(captions, pictures, painted, distances.argmin(axis=1), read)


FILE = "recall.json"


def save(result: Recall, step: int, directory: epath.PathLike) -> None:
    """Writes `recall.json` and the pictures it names, as PNG files beside it: of the checkpoint at `step`."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    items = []
    for i, caption in enumerate(result.captions):
        item = {"caption": caption, "read": result.read[i], "nearest": result.captions[result.nearest[i]]}
        for name, pixels in (("picture", result.pictures[i]), ("painted", result.painted[i])):
            item[name] = f"{i:04}-{name}.png"
            (directory / item[name]).write_bytes(png(pixels))
        items.append(item)
    metrics, _ = scores.summary(result.right)
    summary = {"step": step, **metrics, "pairs": len(items), "items": items}
    (directory / FILE).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
