"""The training run, from a checked configuration to the last checkpoint, top to bottom."""

import contextlib
import logging
import math
import time

import jax
import numpy as np
from etils import epath

from dreamllm_jax.batch import Batch
from dreamllm_jax.chips import chip_of
from dreamllm_jax.data.pipeline import make_loader
from dreamllm_jax.data.storage import read_summary
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.distributed import gather, local_rows
from dreamllm_jax.exits import Preempted
from dreamllm_jax.experiment import Experiment, require_mesh_fits
from dreamllm_jax.flops import model_flops
from dreamllm_jax.models.dreamllm import DreamLLM
from dreamllm_jax.precompute import require_frozen, require_same_towers
from dreamllm_jax.sharding import make_mesh, rows_sharding, to_mesh, use
from dreamllm_jax.training.checkpoints import Checkpoints
from dreamllm_jax.training.initial import restore_initial
from dreamllm_jax.training.journal import Journal
from dreamllm_jax.training.metrics import MetricsLog, Progress
from dreamllm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from dreamllm_jax.training.preemption import watch_for_preemption
from dreamllm_jax.training.samples import Question, answer, find_questions
from dreamllm_jax.training.state import (
    TrainState,
    abstract_state,
    init_leaves,
    merge_params,
    state_from_leaves,
)
from dreamllm_jax.training.step import compile_train_step, make_train_step
from dreamllm_jax.training.validation import make_losses, validate
from dreamllm_jax.training.watchdog import Watchdog

_logger = logging.getLogger(__name__)


def train(experiment: Experiment, tokenizer: Tokenizer, workdir: epath.Path) -> TrainState:
    """Trains, or continues a run that was interrupted, until `experiment.steps` are done.

    Args:
      experiment: the checked configuration, its data prepared and its special tokens those of `tokenizer`.
      workdir: receives checkpoints, `metrics.jsonl` and TensorBoard files.

    Raises:
      ValueError, FileNotFoundError: a mesh, data set or checkpoint that does not fit, before anything is compiled.
      FloatingPointError: too many steps in a row had a loss or gradient that is not finite.
      Preempted: the machine is about to be taken away; everything is saved.
    """
    # Mesh and data.
    mesh = make_mesh(experiment.sharding)
    require_mesh_fits(experiment, mesh.shape)
    rows = rows_sharding(mesh, experiment.sharding, experiment.rows.per_step)
    batches = make_loader(
        experiment.data,
        experiment.row_shape,
        tokenizer,
        rows_per_step=experiment.rows.per_step,
        seed=experiment.seed,
        mine=local_rows(rows, experiment.rows.per_step),
    )
    held_out = _held_out(experiment, tokenizer, local_rows(rows, experiment.rows.per_step))
    asked = _questions(experiment, tokenizer)

    # Model, optimizer and state.
    model = DreamLLM(experiment.model)
    optimizer = make_optimizer(experiment.optimizer, experiment.steps)
    abstract = abstract_state(experiment.model, experiment.parameters, experiment.optimizer, mesh, experiment.sharding)
    _log_parameters(abstract)
    init_key, draws_key = jax.random.split(jax.random.key(experiment.seed))

    with (
        watch_for_preemption() as preemption,
        Checkpoints(workdir, experiment.checkpoint) as checkpoints,
        Watchdog(experiment.timeout, experiment.host_timeout) as watchdog,
        contextlib.closing(batches),
    ):
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(abstract, batches)
            _logger.info("continuing %s from step %d", workdir, int(state.step))
        else:
            wanted, leaves = {**abstract.trainable, **abstract.frozen}, {}
            if experiment.parameters.init_from:
                leaves = restore_initial(experiment.parameters.init_from, experiment.model, wanted)
            missing = {path: leaf for path, leaf in wanted.items() if path not in leaves}  # all, or adapters
            leaves |= init_leaves(experiment.model, missing, init_key)
            state = state_from_leaves(abstract, leaves, optimizer)
        _require_frozen(experiment, state)
        watchdog.alive()

        # The step.
        train_step = compile_train_step(
            make_train_step(
                model,
                experiment.objective,
                optimizer,
                experiment.rows.dream_size,
                experiment.rows.microbatches,
                experiment.optimizer.skip_norm,
            ),
            state,
        )
        losses = jax.jit(
            make_losses(model, experiment.objective, experiment.rows.dream_size, experiment.validation.buckets)
        )
        learning_rate = learning_rate_schedule(experiment.optimizer, experiment.steps)

        # The loop.
        start = int(state.step)
        chip = chip_of(mesh.devices.flat[0])
        flops_per_chip = model_flops(experiment) / mesh.size
        progress = Progress(experiment.steps, flops_per_chip, chip and chip.peak_flops)
        with (
            use(mesh, experiment.sharding),
            MetricsLog(workdir, start, jax.process_index() == 0, experiment.wandb) as log,
        ):
            journal = Journal(workdir, log, progress, batches, learning_rate, experiment.max_skipped)
            saved = time.monotonic()

            def look(step: int) -> None:
                """Validates, where that is due after `step` and was not done before the run was continued there."""
                if not held_out or not step or step % experiment.validation.every:
                    return
                if step == start and gather(log.is_validated(step))[0]:
                    return
                placed = (to_mesh(batch, rows, experiment.rows.per_step) for batch in held_out)
                means = validate(losses, state, placed, draws_key, experiment.model.schedule.num_train_timesteps)
                if asked:
                    params = merge_params(state.trainable, state.frozen)
                    size, samples = experiment.rows.dream_size, experiment.validation.samples
                    log.write_samples(step, answer(asked, samples, size, model, params, tokenizer))
                log.write_validation(step, means)  # last: with it, all is done
                progress.restart()
                watchdog.alive()

            for step in range(start + 1, experiment.steps + 1):
                look(step - 1)  # only now: a run that ends after its checkpoint, however, does it when it continues
                with progress.waiting():
                    batch = to_mesh(next(batches), rows, experiment.rows.per_step)
                began = time.monotonic()
                state, metrics = train_step(state, batch, draws_key)
                journal.add(metrics)
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    _logger.info("first step, compilation included, took %.1f s", time.monotonic() - began)
                    progress.restart()
                stopping = preemption.reached()
                due = step % experiment.checkpoint.every == 0 or step == experiment.steps or stopping
                looking = bool(held_out) and step % experiment.validation.every == 0
                # Before a checkpoint too: what is logged must reach as far as what is saved.
                if step % experiment.log_every == 0 or due or looking:
                    minutes = gather((time.monotonic() - saved) / 60)[0]
                    due = due or 0 < experiment.checkpoint.minutes < minutes
                    averages = journal.write(step, due)
                    if due:
                        checkpoints.save(step, state, batches, averages if experiment.checkpoint.keep_best else None)
                        saved = time.monotonic()
                watchdog.alive()
                if stopping:
                    break
            else:
                look(experiment.steps)
            checkpoints.finish()
        filled = ", ".join(f"{name} {share:.0%}" for name, share in batches.fill().items())
        _logger.info("data read: %s; rows filled: %s", batches.counts(), filled)
    if int(state.step) < experiment.steps:
        raise Preempted(f"asked to stop: step {int(state.step)} of {experiment.steps} is saved in {workdir}")
    return state


def _held_out(experiment: Experiment, tokenizer: Tokenizer, mine: slice) -> list[Batch]:
    """This host's part of the batches to validate with; errors as of `make_loader`."""
    if not experiment.validation.every:
        return []
    same = experiment.held_out
    loader = make_loader(
        same.data, same.row_shape, tokenizer, rows_per_step=same.rows.per_step, seed=same.seed, mine=mine
    )
    return [next(loader) for _ in range(experiment.validation.batches)]


def _questions(experiment: Experiment, tokenizer: Tokenizer) -> list[Question]:
    """What the model is asked at each look at held-out documents; errors as of `find_questions`."""
    config, data, rows = experiment.validation.samples, experiment.held_out.data, experiment.rows
    if not config.documents:
        return []
    see, dream = bool(rows.see_slots), bool(rows.dream_slots)
    return find_questions(config, data.path, data.corpora, experiment.model, tokenizer, see, dream)


def _require_frozen(experiment: Experiment, state: TrainState) -> None:
    """Raises ValueError if stored arrays would stand for towers that are trained, or other ones than made them."""
    require_frozen(experiment.data.stored, state.trainable)
    for name in experiment.data.stored:
        for corpus in experiment.data.corpora or read_summary(experiment.data.path)["corpora"]:
            require_same_towers(experiment.data.path, corpus, name, state.frozen)


def _log_parameters(abstract: TrainState) -> None:
    for name, leaves in (("trained", abstract.trainable), ("frozen", abstract.frozen)):
        count = sum(math.prod(leaf.shape) for leaf in leaves.values())
        size = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves.values())
        _logger.info("%s parameters: %s (%.2f GiB)", name, f"{count:,}", size / 2**30)
