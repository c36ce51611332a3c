"""Latents that OpenUni's script has left of a corpus's images, in the place of those that would be computed.

Beside each image file of its list there is, in another folder, FILE.pt: what a deterministic autoencoder makes of the
image, cropped to a square at random, times its scaling factor, as a PyTorch tensor [c, h, w] in bfloat16. What is
stored here is not scaled. In bfloat16 nothing is lost by that: where a scaled value comes of a bfloat16 one, its
quotient, rounded, gives it again when it is scaled.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dreamllm_jax.data import images, storage
from dreamllm_jax.data.document import Document, Image
from dreamllm_jax.interop.files import open_tensors
from dreamllm_jax.model import DreamLLM

_LOOKED_AT, _COMPARED = 64, 8  # first documents of which one has latents; so many squares of them are encoded anew
_LEAST_COSINE, _LARGEST_RATIO = 0.5, 1.6  # a JPEG more, and another filter, leave 0.9 and 1.1; no scaling gives 2.4


class Latents:
    """The latents of a corpus's documents, one image each.

    Args:
      folder: where the files are.
      shape: h, w, c, as they are stored.

    Raises:
      FileNotFoundError: the corpus does not know its images' files.
      ValueError: the model's autoencoder makes more of an image than its latents.
    """

    def __init__(self, folder: Path, directory: str | os.PathLike, corpus: str, model: DreamLLM, shape: Sequence[int]):
        autoencoder = getattr(model.config.image_decoder, "autoencoder", None)
        if not getattr(autoencoder, "deterministic", False):
            raise ValueError(f"latents in {folder} need an autoencoder without a posterior, such as SANA's (kind dc)")
        self._names = storage.read_names(directory, corpus)
        self._folder, self._shape, self._scale = folder, tuple(shape), autoencoder.scaling_factor

    def read(self, number: int) -> list[np.ndarray | None]:
        """f32[h, w, c] of the document's image, as the autoencoder gave it; None if its file is missing or damaged.

        Raises:
          ValueError: it is of another shape.
        """
        file = self._folder / f"{self._names[number]}.pt"
        try:
            (latents,) = open_tensors(file).values()
            scaled = latents.read().astype(np.float32)
        except (OSError, ValueError):
            return [None]
        height, width, channels = self._shape
        if scaled.shape != (channels, height, width):
            raise ValueError(
                f"{file} has the shape {scaled.shape}, not {(channels, height, width)}: give the --size that it was "
                "made of, and the checkpoint with the autoencoder that made it"
            )
        return [scaled.transpose(1, 2, 0) / np.float32(self._scale)]

    def require_alike(
        self,
        documents: Sequence[Document],
        crop: Callable[[Image], np.ndarray | None],
        compute: Callable[[Sequence[np.ndarray]], Iterator[np.ndarray]],
    ) -> None:
        """Compares some with what the model's autoencoder makes of square pictures, which nobody has cropped.

        Raises:
          FileNotFoundError: none of the first documents has latents.
          ValueError: they are another autoencoder's, or scaled by another factor.
        """
        looked_at = range(min(_LOOKED_AT, len(documents)))
        found = [(number, latents) for number in looked_at if (latents := self.read(number)[0]) is not None]
        if not found:
            raise FileNotFoundError(f"no latents of the first documents, as {self._folder / self._names[0]}.pt")
        squares = []
        for number, latents in found:
            (image,) = documents[number].images
            width, height = images.size_of(image.data)
            if width == height and (pixels := crop(image)) is not None:
                squares.append((pixels, latents))
        given = [latents for _, latents in squares[:_COMPARED]]
        for ours, theirs in zip(compute([pixels for pixels, _ in squares[:_COMPARED]]), given, strict=True):
            ours, theirs = np.asarray(ours, np.float64).ravel(), theirs.astype(np.float64).ravel()
            ratio = np.linalg.norm(theirs) / np.linalg.norm(ours)
            cosine = ours @ theirs / (np.linalg.norm(theirs) * np.linalg.norm(ours))
            if cosine < _LEAST_COSINE or not 1 / _LARGEST_RATIO < ratio < _LARGEST_RATIO:
                raise ValueError(
                    f"the latents in {self._folder} are not this autoencoder's times its scaling_factor {self._scale}: "
                    f"of a square picture they are {ratio:.2f} times as large as what it gives, at a cosine of "
                    f"{cosine:.2f}"
                )
