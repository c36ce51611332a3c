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
    SlotsConfig,
    ValidationConfig,
)
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.objectives.interface import ObjectiveConfig
from dreamllm_jax.objectives.joint import JointConfig
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
    objective: ObjectiveConfig = JointConfig()
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
        if self.checkpoint.best not in (known := (*self.objective.BEST, "grad_norm")):
            raise ConfigError(f"checkpoint.best must be one of {', '.join(known)}, got {self.checkpoint.best!r}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        try:
            self.objective.require(model, self.parameters.trained, bool(rows.painted))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if model.teacher and not self.parameters.init_from:
            raise ConfigError("model.teacher=True needs parameters.init_from: a teacher knows what was learned before")
        if model.image_decoder.encodes_features and "moments" in self.data.stored:
            raise ConfigError(
                "data.stored: this image decoder makes latents of what the vision encoder sees, which are not computed "
                "beforehand: leave moments out"
            )
        if self.objective.drop_prob and (model.prompting or any(use.drops for use in self.data.corpora.values())):
            raise ConfigError(
                f"objective.drop_prob={self.objective.drop_prob:g}: with model.prompting, or where a corpus drops its "
                "text or images, that is all that is dropped: set it to 0, and data.corpora.NAME.drop_text to the share"
            )
        if model.dream_queries.init == "vocabulary" and not self.parameters.init_from:
            raise ConfigError(
                "model.dream_queries.init='vocabulary' begins with the mean of a trained language model's rows: import "
                "one with convert import --dream-queries=vocabulary, and name it in parameters.init_from"
            )
        if max(self.timeout, self.host_timeout) > threading.TIMEOUT_MAX:
            raise ConfigError(
                f"timeout={self.timeout:g} or host_timeout={self.host_timeout:g} is longer than any clock runs"
            )
        if self.timeout < 0 or self.host_timeout <= 0:
            raise ConfigError(
                f"timeout must not be negative and host_timeout positive, got {self.timeout} and {self.host_timeout}"
            )
        language_model = model.language_model
        if rows.length > (most := language_model.max_length):
            scaled = "" if language_model.rope_scaling is None else f", {most} as rope_scaling has it"
            raise ConfigError(
                f"rows.length={rows.length} exceeds model.language_model.max_position_embeddings="
                f"{language_model.max_position_embeddings}{scaled}: shorten the rows or set "
                "model.language_model.rope_scaling"
            )
        multiple, most = model.image_decoder.training_size_multiple, model.image_decoder.largest_size
        for group in rows.painted:
            for side in (group.height, group.width):
                if side < 1 or side % multiple or (most is not None and side > most):
                    name = "rows.dream: side" if rows.dream else "rows.dream_size"
                    bound = "" if most is None else f", at most {most},"
                    raise ConfigError(
                        f"{name}={side} must be a positive multiple of {multiple}{bound} for this image decoder"
                    )
        try:
            shape = self.row_shape
        except ValueError as error:
            raise ConfigError(f"rows: {error}") from None
        for groups, name, kept in ((shape.see, "see", "features"), (shape.dream, "paint", "moments")):
            for group in groups:
                if group.tokens + 2 >= rows.length:
                    need = f"an image to {name}, which takes {group.tokens + 2} tokens"
                    raise ConfigError(f"rows.length={rows.length} has no room for {need}")
            if kept in self.data.stored and (len(groups) > 1 or any(one.height != one.width for one in groups)):
                raise ConfigError(
                    f"data.stored: {kept} are of squares of one size: leave them out, or have one such group"
                )
            size = model.vision_encoder.image_size
            if kept == "features" in self.data.stored and any(one.height != size for one in groups):
                raise ConfigError(
                    f"data.stored: features are of pictures of the vision encoder's image_size={size}: leave them out, "
                    "or have one group of that in rows.see"
                )

    @property
    def held_out(self) -> "Experiment":
        """The same experiment on the documents of `validation`, whole and in an order that never changes."""
        whole = {"drop_text": 0.0, "drop_images": 0.0, "drop_both": 0.0}
        corpora = self.validation.corpora or self.data.corpora
        data = dataclasses.replace(
            self.data,
            path=self.validation.path,
            corpora={name: dataclasses.replace(use, **whole) for name, use in corpora.items()},
            stored=(),
            flip=0.0,
            shuffle=False,
        )
        return dataclasses.replace(self, data=data)

    @property
    def row_shape(self) -> RowShape:
        """The static shape of a row: its groups of slots, and what stands for images in them."""
        stored, dtype = self.data.stored, self.data.stored_dtype
        encoder, decoder = self.model.vision_encoder, self.model.image_decoder

        def group(given: SlotsConfig, tokens: int, tower: Any, name: str, **more: Any) -> SlotGroup:
            size = given.height, given.width
            kept = tower.stored_shape(*size) if name in stored else ()
            return SlotGroup(given.slots, tokens, *size, kept, dtype, **more)

        def see(given: SlotsConfig) -> SlotGroup:
            size = given.height, given.width
            tokens = encoder.tokens(*size)
            self.model.visual_projector.require_tokens(tokens)
            return group(given, tokens, encoder, "features", pixels=encoder.pixels_shape(*size))

        def dream(given: SlotsConfig) -> SlotGroup:
            return group(given, self.model.num_queries, decoder, "moments", sizes=decoder.wants_sizes)

        seen, painted = self.rows.seen(encoder.image_size), self.rows.painted
        axes = self.model.language_model.position_axes
        return RowShape(self.rows.length, tuple(map(see, seen)), tuple(map(dream, painted)), axes)


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
