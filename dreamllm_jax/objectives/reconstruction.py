"""How an autoencoder that is made of the vision encoder's features is trained, before anything is painted: the picture
that is decoded of a picture's latents is to be that picture.

UniLIP (arXiv 2507.23278; nnnth/UniLIP, `tokenizer/`) does so in three stages: at 224 pixels the autoencoder alone, then
the vision encoder and the visual projector too, then at 448. What is trained is said by `parameters.trainable`. Its
squared error and its self-distillation are here, by which what the language model is given stays what it was. NOT here
are its perceptual loss (LPIPS and ConvNeXt, weight 1.1) and its discriminator (weight 0.1), for which other networks
would have to be brought along: without them pictures come out softer than UniLIP's.

Legend: B rows, S slots of a group, N images, T tokens of an image, E language model's width, H x W pixels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dreamllm_jax.data.batch import Batch
from dreamllm_jax.model import TEACHER, DreamLLM, DreamLLMConfig
from dreamllm_jax.objectives.images import each, towers_of

_ERRORS = ("absolute_error", "squared_error", "distill_error")


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """What is minimised, of the pictures in the slots of images to paint: a sum of errors, each by its weight.

    Attributes:
      absolute_weight, squared_weight: of the mean absolute and squared error of a picture's pixels, in [0, 1].
      distill_weight: of the mean squared error of what the language model is given of a picture, next to what it was
        given when the run began (`model.teacher`).
      image_chunk: at most how many images each device puts through the towers at a time; 0 for all. Of several chunks,
        each is computed again in the backward pass.
    """

    absolute_weight: float = 0.0
    squared_weight: float = 1.0
    distill_weight: float = 0.0
    image_chunk: int = 8
    kind: Literal["reconstruction"] = "reconstruction"

    METRICS: ClassVar[tuple[str, ...]] = ("loss", *_ERRORS)
    BEST: ClassVar[tuple[str, ...]] = METRICS
    # Neither is any text predicted, nor anything painted.
    lm_weight: ClassVar[float] = 0.0
    dm_weight: ClassVar[float] = 0.0
    drop_prob: ClassVar[float] = 0.0
    detach_condition: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("absolute_weight", "squared_weight", "distill_weight", "image_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.absolute_weight == self.squared_weight == 0:
            raise ValueError("absolute_weight and squared_weight are both 0: nothing asks for the picture")

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of the errors, in their order."""
        return self.absolute_weight, self.squared_weight, self.distill_weight

    def require(self, model: DreamLLMConfig, trained: Callable[[str], bool], paints: bool) -> None:
        """Raises ValueError where there are no pictures, no autoencoder of features, or nothing to keep near to."""
        if not paints:
            raise ValueError("objective.kind=reconstruction needs images to paint, and rows.dream_slots=0")
        if model.image_decoder.encodes_features != "visual_projector":
            raise ValueError(
                "objective.kind=reconstruction is of image decoders whose latents are made of what the language model "
                "is given: choose model.image_decoder.autoencoder.kind=unilip"
            )
        if bool(self.distill_weight) != model.teacher:
            raise ValueError(
                f"objective.distill_weight={self.distill_weight:g} and model.teacher={model.teacher}: one needs the "
                "other"
            )

    def make(self, model: DreamLLM) -> "Reconstruction":
        """The objective for a model."""
        return Reconstruction(self, model)

    def held_out(self, config: DreamLLMConfig, parts: int) -> "HeldOutReconstruction":
        """The errors of held-out pictures; times have no part in it."""
        return HeldOutReconstruction(Reconstruction(self, DreamLLM(config)))


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The objective of a model; see `objectives.interface.Objective`."""

    config: ReconstructionConfig
    model: DreamLLM

    def totals(self, batch: Batch) -> Float[Array, ""]:
        """The pictures."""
        images = sum((jnp.sum(slots.filled) for slots in batch.dream), start=jnp.zeros((), jnp.int32))
        return images.astype(jnp.float32)

    def draws(self, key: jax.Array, batch: Batch) -> tuple[()]:
        """Nothing is random."""
        return ()

    def loss(
        self, params: dict, batch: Batch, draws: tuple[()] = (), totals: Float[Array, ""] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss, and the unweighted errors' means over pictures; empty slots contribute exactly nothing.

        Args:
          totals: of the global batch, where `batch` is a part of it: the parts' losses then add up to the batch's.
        """
        totals = self.totals(batch) if totals is None else totals
        errors = self.sums(params, batch) / jnp.maximum(totals, 1.0)
        loss = jnp.sum(jnp.asarray(self.config.weights) * errors)
        return loss, {"loss": loss, **dict(zip(_ERRORS, errors, strict=True))}

    def sums(self, params: dict, batch: Batch) -> Float[Array, "3"]:
        """The errors' sums over the pictures of a batch."""
        total = jnp.zeros(len(_ERRORS), jnp.float32)
        towers, weights = towers_of(self.model, params, "vision_encoder", "visual_projector", "image_decoder", TEACHER)
        for slots in batch.dream:
            errors = each(self.errors, towers, weights, slots, self.config.image_chunk)
            total += jnp.sum(jnp.where(slots.filled[..., None], errors, 0.0), axis=(0, 1))
        return total

    def errors(self, towers: dict, images: UInt8[Array, "N H W 3"]) -> Float[Array, "N 3"]:
        """Of each picture: mean absolute and squared error of its pixels, and what was distilled away."""
        joined = self.model.bind({"params": towers})
        seen = joined.see(images)
        pixels = joined.image_decoder.reconstruct(images, seen)
        difference = (pixels + 1.0) / 2.0 - images.astype(jnp.float32) / 255.0
        distilled = jnp.zeros(len(images), jnp.float32)
        if TEACHER in towers:
            before = jax.lax.stop_gradient(self.model.bind({"params": towers[TEACHER]}).see(images))
            moved = seen.astype(jnp.float32) - before.astype(jnp.float32)
            distilled = jnp.mean(jnp.square(moved), axis=(1, 2))
        of_pixels = (jnp.mean(x, axis=(1, 2, 3)) for x in (jnp.abs(difference), jnp.square(difference)))
        return jnp.stack([*of_pixels, distilled], axis=-1)


@dataclasses.dataclass(frozen=True)
class HeldOutReconstruction:
    """The errors by themselves."""

    objective: Reconstruction

    def sums(self, params: dict, batch: Batch, key: jax.Array) -> dict[str, Array]:
        """The sums of a batch's errors, and how many pictures it has."""
        found = self.objective.sums(params, batch)
        return {**dict(zip(_ERRORS, found, strict=True)), "images": self.objective.totals(batch)}

    def means(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """The means over all pictures, by name; of what is not distilled, none."""
        kept = _ERRORS if self.objective.config.distill_weight else _ERRORS[:2]
        return {name: float(sums[name] / sums["images"]) for name in kept} if sums["images"] else {}
