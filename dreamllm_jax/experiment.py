"""What an experiment consists of: every part's configuration, and how they must fit together."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dreamllm_jax.configuration import ConfigError, read
from dreamllm_jax.data.pipeline import DataConfig, RowShape
from dreamllm_jax.models.dreamllm import DreamLLMConfig
from dreamllm_jax.objectives import ObjectiveConfig
from dreamllm_jax.sharding import ShardingConfig
from dreamllm_jax.training.checkpoints import CheckpointConfig
from dreamllm_jax.training.optimizer import OptimizerConfig
from dreamllm_jax.training.state import ParametersConfig


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """The shape of a batch.

    Attributes:
      per_step: rows of the global batch.
      length: tokens in a row.
      see_slots, dream_slots: room for images to read and to paint in a row.
      dream_size: side of the painted images in pixels.
      microbatches: parts in which the rows are computed one after the other, to save memory.
    """

    per_step: int = 8
    length: int = 2048
    see_slots: int = 4
    dream_slots: int = 4
    dream_size: int = 512
    microbatches: int = 1


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run depends on.

    Attributes:
      steps: optimizer steps of the whole run.
      seed: of parameters, data order and draws.
      log_every: steps between two progress lines.
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
    seed: int = 0
    log_every: int = 20

    def __post_init__(self):
        rows, model = self.rows, self.model
        if self.steps < 1 or self.log_every < 1:
            raise ConfigError(f"steps and log_every must be positive, got {self.steps} and {self.log_every}")
        if rows.per_step < 1 or rows.microbatches < 1 or rows.per_step % rows.microbatches:
            raise ConfigError(f"rows.microbatches={rows.microbatches} does not divide rows.per_step={rows.per_step}")
        if rows.see_slots < 0 or rows.dream_slots < 0:
            raise ConfigError("rows.see_slots and rows.dream_slots must not be negative")
        for slots, name, need in (
            (rows.see_slots, "an image to see", model.clip.num_patches + 2),
            (rows.dream_slots, "an image to paint", model.num_queries + 2),
        ):
            if slots and need >= rows.length:
                raise ConfigError(f"rows.length={rows.length} has no room for {name}, which takes {need} tokens")
        if rows.length > model.llama.max_position_embeddings and model.llama.rope_scaling is None:
            raise ConfigError(
                f"rows.length={rows.length} exceeds model.llama.max_position_embeddings="
                f"{model.llama.max_position_embeddings}: shorten the rows or set model.llama.rope_scaling"
            )
        multiple = model.vae.downscale * 2 ** (len(model.unet.block_out_channels) - 1)
        if rows.dream_slots and (rows.dream_size < 1 or rows.dream_size % multiple):
            raise ConfigError(
                f"rows.dream_size={rows.dream_size} must be a positive multiple of {multiple} for this UNet"
            )

    @property
    def row_shape(self) -> RowShape:
        return RowShape(
            length=self.rows.length,
            see_slots=self.rows.see_slots,
            dream_slots=self.rows.dream_slots,
            num_patches=self.model.clip.num_patches,
            num_queries=self.model.num_queries,
            see_size=self.model.clip.image_size,
            dream_size=self.rows.dream_size,
        )


def require_mesh_fits(experiment: Experiment, mesh: Mapping[str, int]) -> None:
    """Refuses a mesh over which the llama or its rows cannot be split, and would silently be repeated.

    Args:
      mesh: sizes of the mesh axes.

    Raises:
      ConfigError: naming the axis and the size that it does not divide.
    """
    llama = experiment.model.llama
    for axes, name, size in (
        (("tensor",), "model.llama.num_attention_heads", llama.num_attention_heads),
        (("tensor",), "model.llama.intermediate_size", llama.intermediate_size),
        (("fsdp", "sequence"), "model.llama.hidden_size", llama.hidden_size),
        (("sequence",), "rows.length", experiment.rows.length),
    ):
        parts = math.prod(mesh[axis] for axis in axes)
        if size % parts:
            given = " x ".join(f"sharding.{axis}={mesh[axis]}" for axis in axes if mesh[axis] > 1)
            raise ConfigError(f"{given} does not divide {name}={size}: change the mesh")


def read_experiment(config: Mapping[str, Any]) -> Experiment:
    """A configuration (ConfigDict or nested dict) as an `Experiment`.

    Raises:
      ConfigError: see `configuration.read`; before anything expensive starts.
    """
    return read(Experiment, config)
