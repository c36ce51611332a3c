"""One optimizer step: gradients of the objective over the global batch, in microbatches if asked."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dreamllm_jax.data.batch import Batch
from dreamllm_jax.experiment.experiment import Experiment
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.objectives.interface import Objective
from dreamllm_jax.parallel.compilation import compiler_options
from dreamllm_jax.parallel.mesh import constrain
from dreamllm_jax.training.optimizer import make_optimizer
from dreamllm_jax.training.rounding import narrow, widen
from dreamllm_jax.training.state import Leaves, TrainState, merge_params

Metrics = dict[str, jax.Array]
IN_FLIGHT = 2  # batches on the chips at a time: of the step that is computed, and of the next
ROUNDING = 2**32 - 1  # folded into a step's key; draws fold the numbers of their rows


def loss_and_gradients(
    objective: Objective,
    trainable: Leaves,
    frozen: Leaves,
    batch: Batch,
    draws: Any,
    microbatches: int = 1,
) -> tuple[Metrics, Leaves]:
    """The metrics of a global batch and the loss's gradients with respect to `trainable`, in float32.

    Rows are computed in `microbatches` parts one after the other; the numbers do not depend on how many.
    """
    totals = objective.totals(batch)

    def part(batch, draws):
        def loss(trainable):
            return objective.loss(merge_params(trainable, frozen), batch, draws, totals)

        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        return metrics, jax.tree.map(lambda g: g.astype(jnp.float32), gradients)

    if microbatches == 1:
        return part(batch, draws)

    def split(x):
        # Part i takes every microbatches-th row, so that each keeps its share of every device's rows.
        x = jnp.moveaxis(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 1, 0)
        return constrain(x, (None, "rows", *[None] * (x.ndim - 2)))

    parts = jax.tree.map(split, (batch, draws))
    shapes = jax.eval_shape(part, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, _ = jax.lax.scan(lambda total, xs: (jax.tree.map(jnp.add, total, part(*xs)), None), zeros, parts)
    return sums


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    skip_norm: float = 0.0,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """The function to jit: (state, batch, key of the run) -> (new state, metrics).

    A step whose loss or gradient is not finite changes nothing but the step's number; the metric `skipped` says so.

    Args:
      skip_norm: leave out steps whose gradient has a larger norm, too; 0 for none.
    """

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        draws = objective.draws(step_key, batch)
        metrics, gradients = loss_and_gradients(objective, state.trainable, state.frozen, batch, draws, microbatches)
        stored = state.trainable, state.opt_state
        params, opt_state = widen(stored)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        updated = optax.apply_updates(params, updates), opt_state
        updated = narrow(updated, stored, jax.random.fold_in(step_key, ROUNDING))
        norm = optax.tree.norm(gradients)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & (norm <= (skip_norm or jnp.inf))
        trainable, opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), updated, stored)
        metrics = metrics | {
            "grad_norm": norm,
            "skipped": 1 - good,
            "updates": optax.tree.get_all_with_path(state.opt_state, "count")[0][1],  # that were made before
            "tokens": jnp.sum(batch.segment_ids > 0),
            "images": sum((jnp.sum(slots.filled) for slots in batch.see + batch.dream), jnp.zeros((), jnp.int32)),
        }
        return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics

    return train_step


def jit_train_step(train_step: Callable, state: TrainState) -> Callable:
    """Jits a train step: the old state's memory is reused, and the new state lies where the old one did."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    options = compiler_options(state.step.sharding.mesh.devices.flat[0])
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def train_step_of(experiment: Experiment, state: TrainState) -> Callable:
    """The jitted step of an experiment; `state` may be abstract."""
    rows, optimizer = experiment.rows, make_optimizer(experiment.optimizer, experiment.steps)
    step = make_train_step(
        experiment.objective.make(DreamLLM(experiment.model)),
        optimizer,
        rows.microbatches,
        experiment.optimizer.skip_norm,
    )
    return jit_train_step(step, state)
