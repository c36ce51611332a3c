"""Losses on held-out documents while a run trains, at draws that never change."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from dreamllm_jax.data.batch import Batch
from dreamllm_jax.objectives.interface import HeldOutLosses
from dreamllm_jax.training.state import TrainState, merge_params

Sums = Callable[[TrainState, Batch, jax.Array], dict[str, jax.Array]]


def make_sums(losses: HeldOutLosses) -> Sums:
    """The function to jit: (state, batch, key) -> what `losses` sums up over the batch."""

    def sums(state: TrainState, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        return losses.sums(merge_params(state.trainable, state.frozen), batch, key)

    return sums


def validate(
    losses: HeldOutLosses, sums: Sums, state: TrainState, batches: Iterable[Batch], key: jax.Array
) -> dict[str, float]:
    """The means over the batches.

    Args:
      sums: as from `make_sums`, jitted.
    """
    totals = None
    for number, batch in enumerate(batches):
        found = sums(state, batch, jax.random.fold_in(key, number))
        jax.block_until_ready(totals)  # of the batch before: never do more than two lie on the chips
        totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
    return losses.means(jax.device_get(totals))
