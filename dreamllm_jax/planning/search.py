"""Finds the largest batch and the cheapest recomputation that fit a topology."""

import dataclasses
import logging

from dreamllm_jax.experiment.experiment import Experiment
from dreamllm_jax.parallel.chips import Topology
from dreamllm_jax.parallel.feeding import row_shards
from dreamllm_jax.parallel.mesh import make_mesh
from dreamllm_jax.planning.step import CompiledStep, Effort, compile_step

_logger = logging.getLogger(__name__)

_CHEAPEST_FIRST = ("none", "dots", "attention+gate", "attention", "full")
_MAX_ROWS_PER_SHARD = 256


def fit(experiment: Experiment, topology: Topology) -> CompiledStep:
    """The largest rows.per_step that fits with full rematerialisation, then the cheapest rematerialisation for it.

    Rows are doubled or halved from where the configuration begins. Trials are compiled at low effort, which reads
    memory a little too low, the last one at normal effort; if that does not fit, the next dearer choice is tried.

    Returns:
      The step that fits, or the smallest one, which does not.
    """
    shards = _row_shards(experiment, topology) * experiment.rows.microbatches

    def attempt(rows: int, remat: str, effort: Effort = "low") -> CompiledStep:
        trial = dataclasses.replace(
            experiment,
            rows=dataclasses.replace(experiment.rows, per_step=rows * shards),
            model=dataclasses.replace(experiment.model, remat=remat),
        )
        _logger.info("trying %d rows a step, remat %s, %s effort", rows * shards, remat, effort)
        step = compile_step(trial, topology, effort)
        verdict, memory = "fits" if step.memory.fits else "does not fit", step.memory
        _logger.info("... %.1f of %.1f GiB: %s", memory.peak / 2**30, memory.limit / 2**30, verdict)
        return step

    begin = rows = 2 ** max(0, (experiment.rows.per_step // shards).bit_length() - 1)
    step = attempt(rows, "full")
    while not step.memory.fits and rows > 1:
        rows //= 2
        step = attempt(rows, "full")
    if not step.memory.fits:
        return step
    while rows >= begin and rows < _MAX_ROWS_PER_SHARD and attempt(2 * rows, "full").memory.fits:
        rows *= 2

    while True:
        for remat in _CHEAPEST_FIRST:
            if remat == "full" or attempt(rows, remat).memory.fits:
                step = attempt(rows, remat, "normal")
                if step.memory.fits:
                    return step
        if rows == 1:
            return step
        rows //= 2


def _row_shards(experiment: Experiment, topology: Topology) -> int:
    mesh = make_mesh(experiment.sharding, topology.devices())
    return row_shards(experiment.sharding, mesh.shape)
