"""What the training loop knows of an objective, and the objectives that there are."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax

from dreamllm_jax.data.batch import Batch
from dreamllm_jax.objectives.joint import JointConfig

ObjectiveConfig = JointConfig


class Objective(Protocol):
    """A loss of a batch, pure in its arguments; its configuration's `make` gives one for a model.

    The configuration's `METRICS` are the names of what `loss` gives beside its value, `loss` first: loop, progress
    lines and checkpoints take them from there.
    """

    def totals(self, batch: Batch) -> Any:
        """Denominators over the global batch, so that the losses of its parts add up to its own."""

    def draws(self, key: jax.Array, batch: Batch) -> Any:
        """All randomness of the loss, arrays [B, ...], each number a function of (key, row, slot) alone."""

    def loss(self, params: dict, batch: Batch, draws: Any, totals: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """The value to be minimised, and the metrics."""
