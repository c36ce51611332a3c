"""How a run is tried on held-out documents while it trains, and when."""

import contextlib

import jax
from jax.sharding import NamedSharding

from dreamllm_jax.data.loader import Loader
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.experiment.experiment import Experiment
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.parallel.feeding import local_rows, to_mesh
from dreamllm_jax.training.metrics import MetricsLog
from dreamllm_jax.training.samples import answer, find_questions
from dreamllm_jax.training.state import TrainState, merge_params
from dreamllm_jax.training.validation import make_sums, validate


class HeldOut:
    """The held-out batches and questions of a run; without `validation.every` there are none, and nothing is due.

    Args:
      rows: how the rows of a batch lie on the mesh.

    Raises:
      FileNotFoundError, ValueError: a data set that is missing or does not fit, see `Loader`, `find_questions`.
    """

    def __init__(self, experiment: Experiment, tokenizer: Tokenizer, rows: NamedSharding):
        config, shape = experiment.validation, experiment.rows
        self._experiment, self._tokenizer, self._rows = experiment, tokenizer, rows
        self.batches, self.questions = [], []
        if not config.every:
            return
        same = experiment.held_out
        loader = Loader(
            same.data,
            same.row_shape,
            tokenizer,
            experiment.model.vision_encoder.preprocess,
            experiment.model.image_decoder.preprocess,
            rows_per_step=shape.per_step,
            seed=same.seed,
            prompting=experiment.model.prompting,
            mine=local_rows(rows, shape.per_step),
        )
        with contextlib.closing(loader):
            self.batches = [next(loader) for _ in range(config.batches)]  # this host's part of them
        if config.samples.documents:
            data = same.data
            self.questions = find_questions(config.samples, data.path, data.corpora, experiment.model, tokenizer)
        self._model = DreamLLM(experiment.model)
        self._losses = experiment.objective.held_out(experiment.model, config.buckets)
        self._sums = jax.jit(make_sums(self._losses))

    def due(self, step: int) -> bool:
        """Whether the model as it is after `step` is to be tried."""
        every = self._experiment.validation.every
        return bool(every and step) and step % every == 0

    def try_model(self, step: int, state: TrainState, key: jax.Array, log: MetricsLog) -> None:
        """Writes the losses, and what is painted and written, to `log`; all hosts must call it.

        Args:
          key: of the run's draws.
        """
        experiment = self._experiment
        placed = (to_mesh(batch, self._rows, experiment.rows.per_step) for batch in self.batches)
        means = validate(self._losses, self._sums, state, placed, key)
        if self.questions:
            params = merge_params(state.trainable, state.frozen)
            samples, size = experiment.validation.samples, experiment.rows.sample_size
            log.write_samples(step, answer(self.questions, samples, size, self._model, params, self._tokenizer))
        log.write_validation(step, means)  # last: with it, all is done
