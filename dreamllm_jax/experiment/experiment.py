"""What an experiment consists of: every part's configuration, and how they must fit together."""

import dataclasses
import importlib.util
import math
import threading
from collections.abc import Mapping
from typing import Any

from dreamllm_jax.common.configuration import ConfigError, read
from dreamllm_jax.data.batch import RowShape, SlotGroup
from dreamllm_jax.data.settings import DataConfig
from dreamllm_jax.experiment.settings import (
    CheckpointConfig,
    OptimizerConfig,
    ParametersConfig,
    RowsConfig,
    ValidationConfig,
)
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.objectives.interface import ObjectiveConfig
from dreamllm_jax.parallel.feeding import row_shards
from dreamllm_jax.parallel.mesh import ShardingConfig


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run depends on.

    Attributes:
      steps: optimizer steps of the whole run.
      seed: of parameters, data order and draws.
      log_every: steps between two progress lines.
      max_skipped: so many steps in a row that are left out, for a loss or gradient that is not finite or too large, end
        the run.
      timeout: seconds without a finished step after which the run ends; 0 for never. Compiling counts.
      host_timeout: seconds without a sign of another host after which the run ends, unless `timeout` is 0.
      parent: the configuration file (`FILE.py:argument`) of which this one is a change; it only says what to compare.
      wandb: project of Weights & Biases that is told the metrics too; needs `pip install wandb`.
    """

    model: DreamLLMConfig
    data: DataConfig
    rows: RowsConfig
    optimizer: OptimizerConfig
    steps: int
    parameters: ParametersConfig = ParametersConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sharding: ShardingConfig = ShardingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    seed: int = 0
    log_every: int = 20
    max_skipped: int = 10
    timeout: float = 3600.0
    host_timeout: float = 60.0
    parent: str = ""
    wandb: str = ""

    def __post_init__(self):
        rows, model = self.rows, self.model
        for name in ("steps", "log_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        if self.objective.lm_weight == 0 and rows.dream_slots == 0:
            raise ConfigError("objective.lm_weight=0 and rows.dream_slots=0: there is nothing to learn")
        if max(self.timeout, self.host_timeout) > threading.TIMEOUT_MAX:
            raise ConfigError(
                f"timeout={self.timeout:g} or host_timeout={self.host_timeout:g} is longer than any clock runs"
            )
        if self.timeout < 0 or self.host_timeout <= 0:
            raise ConfigError(
                f"timeout must not be negative and host_timeout positive, got {self.timeout} and {self.host_timeout}"
            )
        if rows.per_step < 1 or rows.microbatches < 1 or rows.per_step % rows.microbatches:
            raise ConfigError(f"rows.microbatches={rows.microbatches} does not divide rows.per_step={rows.per_step}")
        if rows.see_slots < 0 or rows.dream_slots < 0:
            raise ConfigError("rows.see_slots and rows.dream_slots must not be negative")
        for slots, name, need in (
            (rows.see_slots, "an image to see", model.vision_encoder.num_patches + 2),
            (rows.dream_slots, "an image to paint", model.num_queries + 2),
        ):
            if slots and need >= rows.length:
                raise ConfigError(f"rows.length={rows.length} has no room for {name}, which takes {need} tokens")
        language_model, decoder = model.language_model, model.image_decoder
        if rows.length > (most := language_model.max_length):
            scaled = "" if language_model.rope_scaling is None else f", {most} as rope_scaling has it"
            raise ConfigError(
                f"rows.length={rows.length} exceeds model.language_model.max_position_embeddings="
                f"{language_model.max_position_embeddings}{scaled}: shorten the rows or set "
                "model.language_model.rope_scaling"
            )
        multiple = decoder.training_size_multiple
        if rows.dream_slots and (rows.dream_size < 1 or rows.dream_size % multiple):
            raise ConfigError(
                f"rows.dream_size={rows.dream_size} must be a positive multiple of {multiple} for this image decoder"
            )

    @property
    def held_out(self) -> "Experiment":
        """The same experiment on the documents of `validation`, in an order that never changes."""
        data = dataclasses.replace(
            self.data,
            path=self.validation.path,
            corpora=self.validation.corpora or self.data.corpora,
            stored=(),
            flip=0.0,
            shuffle=False,
        )
        return dataclasses.replace(self, data=data)

    @property
    def row_shape(self) -> RowShape:
        rows, data = self.rows, self.data
        encoder, decoder = self.model.vision_encoder, self.model.image_decoder
        side, painted = encoder.image_size, rows.dream_size
        features = encoder.stored_shape(side, side) if "features" in data.stored else ()
        moments = decoder.stored_shape(painted, painted) if "moments" in data.stored else ()
        see = SlotGroup(rows.see_slots, encoder.tokens(side, side), side, side, features, data.stored_dtype)
        dream = SlotGroup(rows.dream_slots, self.model.num_queries, painted, painted, moments, data.stored_dtype)
        return RowShape(rows.length, (see,) if rows.see_slots else (), (dream,) if rows.dream_slots else ())


def require_packages(experiment: Experiment) -> None:
    """Raises ConfigError if training needs a package that is not installed."""
    if experiment.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"wandb={experiment.wandb!r} needs the package of that name: pip install wandb")


def require_mesh_fits(experiment: Experiment, mesh: Mapping[str, int]) -> None:
    """Refuses a mesh over which the language model or rows cannot be split, and would silently be repeated.

    Args:
      mesh: sizes of the mesh axes.

    Raises:
      ConfigError: naming the axis and the size that it does not divide.
    """
    tower = experiment.model.language_model
    divided = [(axes, f"model.language_model.{name}", getattr(tower, name)) for axes, name in tower.divided]
    for axes, name, size in (*divided, (("sequence",), "rows.length", experiment.rows.length)):
        parts = math.prod(mesh[axis] for axis in axes)
        if size % parts:
            given = " x ".join(f"sharding.{axis}={mesh[axis]}" for axis in axes if mesh[axis] > 1)
            raise ConfigError(f"{given} does not divide {name}={size}: change the mesh")
    rows, axes = experiment.rows, experiment.sharding.all_rules["rows"]
    if rows.per_step % (rows.microbatches * row_shards(experiment.sharding, mesh)):
        parts = f" in rows.microbatches={rows.microbatches} parts" if rows.microbatches > 1 else ""
        over = " x ".join(f"sharding.{axis}={mesh[axis]}" for axis in axes)
        raise ConfigError(f"rows.per_step={rows.per_step}{parts} does not divide over {over}")


def read_experiment(config: Mapping[str, Any]) -> Experiment:
    """A configuration (ConfigDict or nested dict) as an `Experiment`.

    Raises:
      ConfigError: see `configuration.read`; before anything expensive starts.
    """
    return read(Experiment, config)
