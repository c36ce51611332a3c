"""Losses on held-out documents while a run trains, at draws that never change."""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from dreamllm_jax.data.batch import Batch
from dreamllm_jax.model import DreamLLM, DreamLLMConfig
from dreamllm_jax.objectives.images import hidden_states
from dreamllm_jax.objectives.interface import ObjectiveConfig
from dreamllm_jax.objectives.joint import Draws
from dreamllm_jax.training.state import TrainState, merge_params


def make_losses(
    config: DreamLLMConfig, objective: ObjectiveConfig, buckets: int
) -> Callable[[TrainState, Batch, jax.Array], dict[str, jax.Array]]:
    """The function to jit: (state, batch, key) -> sums over the batch, and what to divide them by.

    `lm` is the sum of weighted negative log-likelihoods, `tokens` that of the weights; `dm` has the sums of the images'
    plain mean squared errors by bucket, `images` is their number. Nothing is dropped, perturbed or reweighted.
    """
    decoder = config.image_decoder.plain
    model = DreamLLM(dataclasses.replace(config, image_decoder=decoder))
    plain = dataclasses.replace(objective, drop_prob=0.0, scaling="none").make(model)

    def losses(state: TrainState, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        params = merge_params(state.trainable, state.frozen)
        totals = plain.totals(batch)
        hidden = hidden_states(model, params, batch, objective.image_chunk)
        lm = plain.next_token_sum(params, hidden, batch)
        found = {"lm": lm, "tokens": totals.tokens, "images": totals.images}
        if not batch.dream:
            return found
        draws = plain.draws(key, batch)

        def within(bucket: int) -> tuple[Draws, ...]:
            return tuple(one.replace(decoder=decoder.within(one.decoder, bucket, buckets)) for one in draws)

        of_buckets = [plain.painting_sum(params, hidden, batch, within(bucket)) for bucket in range(buckets)]
        return found | {"dm": jnp.stack(of_buckets)}

    return losses


def validate(
    losses: Callable,
    state: TrainState,
    batches: Iterable[Batch],
    key: jax.Array,
    time_range: Callable[[int, int], tuple[int, int]],
) -> dict[str, float]:
    """Means over the batches: `lm_loss`, `dm_loss`, and `dm_loss_FIRST_LAST` by range of timesteps.

    Args:
      time_range: of the image decoder.
    """
    totals = None
    for number, batch in enumerate(batches):
        found = losses(state, batch, jax.random.fold_in(key, number))
        jax.block_until_ready(totals)  # of the batch before: never do more than two lie on the chips
        totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
    totals = jax.device_get(totals)
    means = {"lm_loss": float(totals["lm"] / totals["tokens"])} if totals["tokens"] else {}
    if not totals["images"]:
        return means
    of_buckets = [float(total / totals["images"]) for total in totals["dm"]]
    ranges = ((time_range(part, len(of_buckets)), value) for part, value in enumerate(of_buckets))
    named = {f"dm_loss_{first}_{end - 1}": value for (first, end), value in ranges}
    return means | {"dm_loss": sum(of_buckets) / len(of_buckets)} | named
