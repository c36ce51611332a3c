"""Turns a ConfigDict into typed, frozen dataclasses, refusing what does not fit before anything expensive starts."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from dreamllm_jax.data.pipeline import DataConfig, RowShape
from dreamllm_jax.models.dreamllm import DreamLLMConfig
from dreamllm_jax.objectives import ObjectiveConfig
from dreamllm_jax.sharding import ShardingConfig
from dreamllm_jax.training.checkpoints import CheckpointConfig
from dreamllm_jax.training.optimizer import OptimizerConfig
from dreamllm_jax.training.state import ParametersConfig

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line for the user."""


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
        chunk = self.objective.loss_chunk
        if chunk and rows.length % chunk:
            raise ConfigError(f"objective.loss_chunk={chunk} does not divide rows.length={rows.length}")

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


def read_experiment(config: Mapping[str, Any]) -> Experiment:
    """A configuration (ConfigDict or nested dict) as an `Experiment`.

    Raises:
      ConfigError: naming the first key that is unknown (with the nearest known one), missing, of the wrong type, or in
        conflict with another.
    """
    return read(Experiment, config)


def read(cls: type[T], config: Any, path: str = "config") -> T:
    """Reads a nested mapping as the frozen dataclass `cls`; see `read_experiment` for what it refuses."""
    if isinstance(config, cls):
        return config
    if not isinstance(config, Mapping) and not hasattr(config, "items"):
        raise ConfigError(f"{path} must be a group of settings, got {config!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given = dict(config.items())
    for name in given:
        if name not in fields:
            raise ConfigError(_unknown(path, name, list(fields)))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ConfigError(f"{path}.{name} is missing")
    values = {name: _value(hints[name], value, f"{path}.{name}") for name, value in given.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _unknown(path: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {path}.{near[0]}?" if near else f"there are {', '.join(known)}"
    return f"{path}.{name} is not a setting; {hint}"


def _value(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return read(hint, value, path)
    if origin in (typing.Union, types.UnionType):
        return _union(args, value, path)
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), map(str, args), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path} must be one of {', '.join(map(repr, args))}, got {value!r}{hint}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} must be a list, got {value!r}")
        if args[-1] is Ellipsis:
            return tuple(_value(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"{path} must have {len(args)} entries, got {len(value)}")
        return tuple(_value(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not hasattr(value, "items"):
            raise ConfigError(f"{path} must be a group of settings, got {value!r}")
        return {name: _value(args[1], item, f"{path}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path} must be {hint.__name__}, got {value!r}")
    return value


def _union(args: tuple, value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    kinds = [arg for arg in args if arg is not type(None)]
    if len(kinds) > 1 and hasattr(value, "items"):  # dataclasses are told apart by their fields
        fitting = [
            k
            for k in kinds
            if dataclasses.is_dataclass(k) and set(value.keys()) <= {f.name for f in dataclasses.fields(k)}
        ]
        if not fitting:
            known = [f.name for kind in kinds if dataclasses.is_dataclass(kind) for f in dataclasses.fields(kind)]
            unknown = next((name for name in value if name not in known), None)
            if unknown is not None:
                raise ConfigError(_unknown(path, unknown, known))
            raise ConfigError(f"{path}: these settings do not belong together: {', '.join(value.keys())}")
        return _value(fitting[0], value, path)
    errors = []
    for kind in kinds:
        try:
            return _value(kind, value, path)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]
