"""The settings of a run beside its model, its data and its objective."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from dreamllm_jax.data.settings import CorpusConfig


@dataclasses.dataclass(frozen=True)
class SlotsConfig:
    """Room in a row for images of one size, in pixels."""

    slots: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """The shape of a batch.

    Attributes:
      per_step: rows of the global batch.
      length: tokens in a row.
      see_slots, dream_slots: room for images to see and to paint in a row.
      dream_size: side of the painted images in pixels; without effect where `dream` is given.
      see, dream: in place of these, groups of slots for images of several sizes; an image goes where least of it is
        cropped.
      microbatches: parts in which the rows are computed one after the other, to save memory.
    """

    per_step: int = 8
    length: int = 2048
    see_slots: int = 4
    dream_slots: int = 4
    dream_size: int = 512
    see: tuple[SlotsConfig, ...] = ()
    dream: tuple[SlotsConfig, ...] = ()
    microbatches: int = 1

    def __post_init__(self):
        if self.see_slots < 0 or self.dream_slots < 0:
            raise ValueError("see_slots and dream_slots must not be negative")
        if self.per_step < 1 or self.microbatches < 1 or self.per_step % self.microbatches:
            raise ValueError(f"microbatches={self.microbatches} does not divide per_step={self.per_step}")

    def seen(self, size: int) -> tuple[SlotsConfig, ...]:
        """The groups of images to see, of so many pixels on a side unless told otherwise."""
        return self.see or ((SlotsConfig(self.see_slots, size, size),) if self.see_slots else ())

    @property
    def painted(self) -> tuple[SlotsConfig, ...]:
        """The groups of images to paint."""
        square = SlotsConfig(self.dream_slots, self.dream_size, self.dream_size)
        return self.dream or ((square,) if self.dream_slots else ())

    @property
    def sample_size(self) -> tuple[int, int]:
        """Height and width of what is painted to be looked at: the first group's, or `dream_size` twice."""
        first = (*self.painted, SlotsConfig(1, self.dream_size, self.dream_size))[0]
        return first.height, first.width


@dataclasses.dataclass(frozen=True)
class ParametersConfig:
    """Which parameters are trained, how they are stored, and where they come from.

    Attributes:
      trainable: (regular expression, trained?) pairs; a parameter follows the first that matches its whole path, such
        as `language_model/layers/mlp/up_proj/kernel`, and every parameter must match one.
      dtype, frozen_dtype: storage types of trained and of frozen parameters.
      init_from: the model to begin with, empty for random parameters: the --to of `convert import`, another run's
        directory (`DIR` or `DIR@STEP`), or a checkpoint of the original program.
    """

    trainable: tuple[tuple[str, bool], ...] = ((".*", True),)
    dtype: Literal["float32", "bfloat16"] = "float32"
    frozen_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    init_from: str = ""

    def __post_init__(self):
        for pattern, _ in self.trainable:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"trainable: {pattern!r} is not a regular expression: {error}") from None

    def trained(self, path: str) -> bool:
        """Whether the parameter at a path is."""
        return next((train for pattern, train in self.trainable if re.fullmatch(pattern, path)), False)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's settings, and which parameters Muon moves in its place.

    Attributes:
      learning_rate: its peak, reached after the warm-up.
      warmup_ratio: share of the run's steps over which the learning rate rises linearly from 0.
      end_value: learning rate at the last step, as a share of the peak.
      clip_norm: gradients of a larger global norm are scaled down to it; 0 for no clipping.
      skip_norm: a step whose gradient has a larger global norm is left out; 0 for none.
      ema_decay: keep an average of the trained parameters that decays so a step, such as 0.9999; 0 for none.
      learning_rates: (regular expression, factor) pairs; the learning rate of the parameters whose whole path an
        expression matches is multiplied by the factor of the first that does.
      muon: regular expressions; matrices, and stacks of them, whose whole path one matches are moved by Muon (Jordan
        2024), as far in a step as AdamW would. It has one moment, and is not for embeddings, heads or norms.
      layer_decays: (regular expression, decay) pairs, for stacks of layers such as `language_model/layers/.*`: of N
        layers the learning rate of layer i, from 1, is multiplied by decay^(N - i) as well.
      mu_dtype, nu_dtype: storage types of the first and second moments; bfloat16 is rounded to at random (`rounding`).
    """

    learning_rate: float = 2e-5
    warmup_ratio: float = 0.003
    end_value: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    skip_norm: float = 0.0
    ema_decay: float = 0.0
    muon: tuple[str, ...] = ()
    learning_rates: tuple[tuple[str, float], ...] = ()
    layer_decays: tuple[tuple[str, float], ...] = ()
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    nu_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.learning_rate <= 0 or self.eps <= 0:
            raise ValueError(f"learning_rate and eps must be positive, got {self.learning_rate} and {self.eps}")
        for name in ("warmup_ratio", "end_value", "b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("b1", "b2", "ema_decay"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name} must be below 1, or nothing is ever learnt or averaged")
        for name in ("weight_decay", "clip_norm", "skip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for pattern in self.muon:
            _require_expression("muon", pattern)
        for name in ("learning_rates", "layer_decays"):
            for pattern, factor in getattr(self, name):
                _require_expression(name, pattern)
                if factor <= 0:
                    raise ValueError(
                        f"{name}: {pattern!r} has {factor}, which must be positive; to freeze parameters, "
                        "say so in parameters.trainable"
                    )


def _require_expression(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep.

    Attributes:
      every: steps between two checkpoints; one more is written at the end and when the run is asked to stop.
      minutes: save as well when so much time has passed since the last one, at the next progress line; 0 for never.
      keep: how many of the newest are kept.
      keep_every: keep those of every so many steps for ever; 0 for none.
      keep_best: how many of those with the lowest `best` are kept too; 0 for none.
      best: the metric that says which are best, of the objective's or grad_norm, averaged over the steps since the
        checkpoint before.
      accept_changes: continue a run whose settings were changed, as far as its parameters still fit.
    """

    every: int = 1000
    minutes: float = 0.0
    keep: int = 3
    keep_every: int = 0
    keep_best: int = 0
    best: str = "loss"
    accept_changes: bool = False

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"every and keep must be positive, got {self.every} and {self.keep}")
        for name in ("minutes", "keep_every", "keep_best"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """What to let the model make at each look at held-out documents.

    Attributes:
      documents: of each corpus, the first ones with a picture and words, or with a question; 0 for none.
      max_tokens: longest text to write.
      steps, guidance: of painting.
      guidance_interval: shares of the timesteps, 0 the picture and 1 the noise, between which there is guidance.
    """

    documents: int = 0
    max_tokens: int = 64
    steps: int = 25
    guidance: float = 3.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        for name, least in (("documents", 0), ("max_tokens", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must be two ascending numbers from 0 to 1, got {low} and {high}")


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """When to look at held-out documents, and at which.

    Attributes:
      every: steps between two looks; 0 for never.
      path: their data set's directory, as `python -m dreamllm_jax.data` leaves it.
      corpora: which of its corpora, and how; empty for those that are trained on.
      batches: of `rows.per_step` rows, always the same ones.
      buckets: equal ranges of timesteps, each of which has its own denoising loss.
      samples: what the model is to write and paint at each look, too.
    """

    every: int = 0
    path: str = ""
    corpora: Mapping[str, CorpusConfig] = dataclasses.field(default_factory=dict)
    batches: int = 1
    buckets: int = 4
    samples: SamplesConfig = SamplesConfig()

    def __post_init__(self):
        for name, least in (("every", 0), ("batches", 1), ("buckets", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.every and not self.path:
            raise ValueError("every needs path, a data set of documents that are not trained on")
        if self.samples.documents and not self.every:
            raise ValueError("samples.documents needs every, the steps between two looks")
