"""Did the model learn its pairs? Each caption is painted, each picture is put into words, and both are compared."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from etils import epath

from dreamllm_jax.data.document import Document
from dreamllm_jax.evaluation import scores
from dreamllm_jax.evaluation.pairs import Answers, ask
from dreamllm_jax.generation.documents import png
from dreamllm_jax.runs.load import Trained


@dataclasses.dataclass(frozen=True)
class Recall(Answers):
    """What became of N pairs, and `nearest`: i32[N] index of the pair whose picture is nearest to the painted one (mean
    squared error of pixels)."""

    nearest: np.ndarray

    @property
    def right(self) -> dict[str, list[bool]]:
        """Of each pair, whether its painting is nearer to its own picture than to any other, and whether what was read
        is exactly its caption."""
        return {
            "creation_top1": [index == nearest for index, nearest in enumerate(self.nearest.tolist())],
            "comprehension_exact": [read == caption for read, caption in zip(self.read, self.captions, strict=True)],
        }


def recall(trained: Trained, pairs: Sequence[Document], *, steps: int = 50, guidance: float = 3.0) -> Recall:
    """Paints the pairs' captions and reads their pictures, see `ask`; all in one batch each.

    Args:
      steps, guidance: of the sampler.
    """
    found = ask(trained, pairs, steps=steps, guidance=guidance, batch=len(pairs))
    distances = np.square(found.painted[:, None].astype(np.float32) - found.pictures[None]).mean(axis=(2, 3, 4))
    return Recall(found.captions, found.pictures, found.painted, found.read, distances.argmin(axis=1))


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
