"""Pairs asked for both ways: each caption is painted, each picture is put into words."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dreamllm_jax.data import images
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.generation.images import generate_images
from dreamllm_jax.generation.texts import generate_texts
from dreamllm_jax.runs.load import Trained

MAX_TOKENS = 32  # of the text written for a picture


@dataclasses.dataclass(frozen=True)
class Answers:
    """What became of N pairs.

    Attributes:
      captions: the N captions.
      pictures: u8[N, H, W, 3], as the model was to paint them.
      painted: u8[N, H, W, 3], painted from the captions.
      read: the text written for each picture.
    """

    captions: Sequence[str]
    pictures: np.ndarray
    painted: np.ndarray
    read: Sequence[str]


def ask(trained: Trained, pairs: Sequence[Document], *, steps: int, guidance: float, batch: int = 64) -> Answers:
    """Paints the pairs' captions, pair i with seed i, and reads their pictures, greedily.

    Args:
      steps, guidance: of the sampler.
      batch: how many at once.
    """
    size = trained.experiment.rows.sample_size
    common = trained.model, trained.params, trained.tokenizer
    captions = [pair.texts[0].text for pair in pairs]
    painted: list[np.ndarray] = []
    read: list[str] = []
    for start in range(0, len(pairs), batch):
        some = range(start, min(start + batch, len(pairs)))
        pictures = generate_images(
            *common,
            [[Text(captions[i])] for i in some],
            seeds=some,
            size=size,
            sampler=SamplerConfig(steps=steps),
            guidance=guidance,
        )
        painted.append(np.asarray(pictures))
        read += generate_texts(*common, [[Image(pairs[i].images[0].data)] for i in some], max_tokens=MAX_TOKENS)
    return Answers(captions, np.stack([picture(trained, pair) for pair in pairs]), np.concatenate(painted), read)


def picture(trained: Trained, pair: Document) -> np.ndarray:
    """u8[H, W, 3] of a pair, as the model is to paint it."""
    size = trained.experiment.rows.sample_size
    return trained.model.config.image_decoder.preprocess(images.decode(pair.images[0].data), *size)
