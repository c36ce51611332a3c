"""What the training loop knows of an objective, and the objectives that there are."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax

from dreamllm_jax.data.batch import Batch
from dreamllm_jax.model import DreamLLM, DreamLLMConfig
from dreamllm_jax.objectives.joint import JointConfig
from dreamllm_jax.objectives.reconstruction import ReconstructionConfig

ObjectiveConfig = JointConfig | ReconstructionConfig


class ObjectiveRole(Protocol):
    """What is asked of an objective's configuration.

    Attributes:
      METRICS: the names of what the loss gives beside its value, `loss` first: loop and progress lines take them from
        here. Over microbatches they add up, so each is divided by the global batch's totals.
      BEST: those of them by which checkpoints can be kept: less is better.
      lm_weight, dm_weight: 0 where no text is predicted, or nothing painted; they, `drop_prob` (a document without a
        prompt is read) and `detach_condition` (no gradient goes back from what is painted) are what FLOPs depend on.
    """

    kind: str
    METRICS: ClassVar[tuple[str, ...]]
    BEST: ClassVar[tuple[str, ...]]
    lm_weight: float
    dm_weight: float
    drop_prob: float
    detach_condition: bool

    def require(self, model: DreamLLMConfig, trained: Callable[[str], bool], paints: bool) -> None:
        """Raises ValueError where it cannot be learned: by this model, of which these parameters are `trained`, or from
        rows that have, or have no, room for images to paint."""

    def make(self, model: DreamLLM) -> "Objective": ...
    def held_out(self, config: DreamLLMConfig, parts: int) -> "HeldOutLosses": ...


class Objective(Protocol):
    """A loss of a batch, pure in its arguments."""

    def totals(self, batch: Batch) -> Any:
        """Denominators over the global batch, so that the losses of its parts add up to its own."""

    def draws(self, key: jax.Array, batch: Batch) -> Any:
        """All randomness of the loss, arrays [B, ...], each number a function of (key, row, slot) alone."""

    def loss(self, params: dict, batch: Batch, draws: Any, totals: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """The value to be minimised, and the metrics."""


class HeldOutLosses(Protocol):
    """What held-out documents are measured by."""

    def sums(self, params: dict, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Of a batch; those of all batches are added."""

    def means(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """What is told of the sums, by name."""
