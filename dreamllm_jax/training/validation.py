"""Losses on held-out documents while a run trains, at draws that never change."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from dreamllm_jax.data.batch import Batch
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.objectives.joint import Draws, ObjectiveConfig, denoising_loss, draw, hidden_states, next_token_loss
from dreamllm_jax.training.state import TrainState, merge_params


def in_bucket(draws: Draws, bucket: int, buckets: int, num_timesteps: int) -> Draws:
    """The draws with their timesteps moved, in order, to one of the equal ranges of timesteps."""
    first, end = (num_timesteps * edge // buckets for edge in (bucket, bucket + 1))
    return draws.replace(timesteps=first + draws.timesteps * (end - first) // num_timesteps)


def make_losses(
    model: DreamLLM, objective: ObjectiveConfig, image_size: int, buckets: int
) -> Callable[[TrainState, Batch, jax.Array], dict[str, jax.Array]]:
    """The function to jit: (state, batch, key) -> sums over the batch, and what to divide them by.

    `lm` is the sum of weighted negative log-likelihoods, `tokens` that of the weights; `dm` has the sums of the images'
    plain mean squared errors by bucket, `images` is their number. Nothing is dropped, perturbed or reweighted.
    """
    plain = dataclasses.replace(
        objective, drop_prob=0.0, noise_offset=0.0, input_perturbation=0.0, snr_gamma=None, scaling="none"
    )
    latent_shape, timesteps = model.config.latent_shape(image_size), model.config.schedule.num_train_timesteps

    def losses(state: TrainState, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        params = merge_params(state.trainable, state.frozen)
        hidden = hidden_states(model, params, batch, plain.image_chunk)
        head = model.apply({"params": params}, method="head_kernel")
        found = {
            "lm": next_token_loss(hidden, head, batch.tokens, batch.loss_weights, plain.loss_chunk),
            "tokens": jnp.sum(batch.loss_weights),
            "images": jnp.sum(batch.dream_slots >= 0),
        }
        rows, slots = batch.dream_slots.shape
        if not slots:
            return found
        draws = draw(key, rows, slots, latent_shape, timesteps, plain)
        of_buckets = [
            denoising_loss(model, plain, params, hidden, batch, in_bucket(draws, bucket, buckets, timesteps))
            for bucket in range(buckets)
        ]
        return found | {"dm": jnp.stack(of_buckets)}

    return losses


def validate(
    losses: Callable, state: TrainState, batches: Iterable[Batch], key: jax.Array, num_timesteps: int
) -> dict[str, float]:
    """Means over the batches: `lm_loss`, `dm_loss`, and `dm_loss_FIRST_LAST` by range of timesteps."""
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
    edges = [num_timesteps * edge // len(of_buckets) for edge in range(len(of_buckets) + 1)]
    ranges = zip(itertools.pairwise(edges), of_buckets, strict=True)
    named = {f"dm_loss_{first}_{end - 1}": value for (first, end), value in ranges}
    return means | {"dm_loss": sum(of_buckets) / len(of_buckets)} | named
