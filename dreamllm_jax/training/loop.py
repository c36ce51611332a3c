"""The training run, from a checked configuration to the last checkpoint, top to bottom."""

import contextlib
import logging
import time
from collections.abc import Callable

import jax
from etils import epath

from dreamllm_jax.checkpoints.marks import require_frozen, require_same_towers
from dreamllm_jax.checkpoints.steps import Checkpoints
from dreamllm_jax.common.configuration import ConfigError
from dreamllm_jax.common.exits import Preempted
from dreamllm_jax.data.loader import Loader
from dreamllm_jax.data.storage import learnt
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.experiment.experiment import Experiment, require_mesh_fits
from dreamllm_jax.experiment.flops import model_flops
from dreamllm_jax.parallel.chips import chip_of
from dreamllm_jax.parallel.distributed import gather
from dreamllm_jax.parallel.feeding import local_rows, rows_sharding, to_mesh
from dreamllm_jax.parallel.mesh import make_mesh, use
from dreamllm_jax.training.held_out import HeldOut
from dreamllm_jax.training.journal import Journal
from dreamllm_jax.training.metrics import MetricsLog, Progress
from dreamllm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from dreamllm_jax.training.parameters import RANDOM_AND_FROZEN, count_and_bytes
from dreamllm_jax.training.preemption import watch_for_preemption
from dreamllm_jax.training.state import (
    Leaves,
    TrainState,
    abstract_state,
    from_items,
    init_leaves,
    state_from_leaves,
    to_items,
)
from dreamllm_jax.training.step import train_step_of
from dreamllm_jax.training.watchdog import Watchdog

_logger = logging.getLogger(__name__)


def train(
    experiment: Experiment,
    tokenizer: Tokenizer,
    workdir: epath.Path,
    initial: Callable[[Leaves], Leaves] | None = None,
    begun: Callable[[], None] = lambda: None,
) -> TrainState:
    """Trains, or continues a run that was interrupted, until `experiment.steps` are done.

    Args:
      experiment: the checked configuration, its data prepared and its special tokens those of `tokenizer`.
      workdir: receives checkpoints, `metrics.jsonl` and TensorBoard files.
      initial: gives the parameters that a new run begins with, laid out as abstract ones ask, by path; those that it
        does not give, or all if there is none, begin at random.
      begun: called when the state is there and fits the configuration.

    Raises:
      ValueError, FileNotFoundError: a mesh, data set or checkpoint that does not fit, before anything is compiled.
      FloatingPointError: too many steps in a row had a loss or gradient that is not finite.
      Preempted: the machine is about to be taken away; everything is saved.
    """
    # Mesh and data.
    mesh = make_mesh(experiment.sharding)
    require_mesh_fits(experiment, mesh.shape)
    rows = rows_sharding(mesh, experiment.sharding, experiment.rows.per_step)
    batches = Loader(
        experiment.data,
        experiment.row_shape,
        tokenizer,
        experiment.model.vision_encoder.preprocess,
        experiment.model.image_decoder.preprocess,
        rows_per_step=experiment.rows.per_step,
        seed=experiment.seed,
        prompting=experiment.model.prompting,
        mine=local_rows(rows, experiment.rows.per_step),
    )
    held_out = HeldOut(experiment, tokenizer, rows)

    # The state's shapes.
    abstract = abstract_state(experiment.model, experiment.parameters, experiment.optimizer, mesh, experiment.sharding)
    _log_parameters(abstract)
    init_key, draws_key = jax.random.split(jax.random.key(experiment.seed))

    with (
        watch_for_preemption() as preemption,
        Watchdog(experiment.timeout, experiment.host_timeout) as watchdog,
        Checkpoints(workdir, experiment.checkpoint) as checkpoints,  # left first: a host that fails ends after it
        contextlib.closing(batches),
    ):
        if checkpoints.latest_step is None:
            state = _begin(experiment, abstract, initial, init_key)
        else:
            state = from_items(*checkpoints.restore(to_items(abstract), abstract.frozen, batches))
            _logger.info("continuing %s from step %d", workdir, int(state.step))
        _require_frozen(experiment, state)
        watchdog.alive()
        start, last, every = int(state.step), experiment.steps, experiment.checkpoint.every
        if start > last:
            raise ConfigError(f"config.steps={last}, but {workdir} is at step {start} already")
        begun()
        train_step = train_step_of(experiment, state)
        chip = chip_of(mesh.devices.flat[0])
        progress = Progress(
            last, experiment.objective.METRICS, model_flops(experiment) / mesh.size, chip and chip.peak_flops
        )

        with (
            use(mesh, experiment.sharding),
            MetricsLog(workdir, start, jax.process_index() == 0, experiment.wandb) as log,
        ):
            learning_rate = learning_rate_schedule(experiment.optimizer, last)
            journal = Journal(workdir, log, progress, batches, learning_rate, experiment.max_skipped)
            saved, stopping = time.monotonic(), False

            def try_held_out(step: int) -> None:
                if not held_out.due(step) or (step == start and gather(log.is_validated(step))[0]):
                    return  # perhaps it was done before the run was interrupted
                held_out.try_model(step, state, draws_key, log)
                progress.restart()
                watchdog.alive()

            for step in range(start + 1, last + 1):
                try_held_out(step - 1)  # only now: a run that ends after its checkpoint does it when it continues
                with progress.waiting():
                    batch = to_mesh(next(batches), rows, experiment.rows.per_step)
                began = time.monotonic()
                state, metrics = train_step(state, batch, draws_key)
                journal.add(metrics)
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    _logger.info("first step, compilation included, took %.1f s", time.monotonic() - began)
                    progress.restart(untimed=1)
                stopping = preemption.reached()
                due = step % every == 0 or step == last or stopping
                # Before a checkpoint too: what is logged must reach as far as what is saved.
                if step % experiment.log_every == 0 or due or held_out.due(step):
                    minutes = gather((time.monotonic() - saved) / 60)[0]
                    due = due or 0 < experiment.checkpoint.minutes < minutes
                    averages = journal.write(step, due)
                    if due:
                        best = averages if experiment.checkpoint.keep_best else None
                        checkpoints.save(step, to_items(state), state.frozen, batches, best)
                        saved = time.monotonic()
                watchdog.alive()
                if stopping:
                    break
            else:
                try_held_out(last)
            checkpoints.finish()
        filled = ", ".join(f"{name} {share:.0%}" for name, share in batches.fill().items())
        _logger.info("data read: %s; rows filled: %s", batches.counts(), filled)
    if int(state.step) < last or (stopping and held_out.due(last)):
        raise Preempted(f"asked to stop: step {int(state.step)} of {last} is saved in {workdir}")
    return state


def _begin(
    experiment: Experiment, abstract: TrainState, initial: Callable[[Leaves], Leaves] | None, key: jax.Array
) -> TrainState:
    """The state of a new run."""
    wanted = {**abstract.trainable, **abstract.frozen}
    leaves = {} if initial is None else initial(wanted)
    if initial is None and abstract.frozen:
        _logger.warning(RANDOM_AND_FROZEN)
    missing = {path: leaf for path, leaf in wanted.items() if path not in leaves}  # all, or adapters
    optimizer = make_optimizer(experiment.optimizer, experiment.steps)
    return state_from_leaves(abstract, leaves | init_leaves(experiment.model, missing, key), optimizer)


def _require_frozen(experiment: Experiment, state: TrainState) -> None:
    """Raises ValueError if stored arrays would stand for towers that are trained, or other ones than made them."""
    require_frozen(experiment.model, experiment.data.stored, state.trainable)
    for name in experiment.data.stored:
        for corpus in experiment.data.corpora or learnt(experiment.data.path):
            require_same_towers(experiment.data.path, corpus, name, experiment.model, state.frozen)


def _log_parameters(abstract: TrainState) -> None:
    for name, leaves in (("trained", abstract.trainable), ("frozen", abstract.frozen)):
        count, size = count_and_bytes(leaves)
        _logger.info("%s parameters: %s (%.2f GiB)", name, f"{count:,}", size / 2**30)
