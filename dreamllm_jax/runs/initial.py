"""The model that a run begins with: one of ours at rest, or a checkpoint of the original program."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from dreamllm_jax.checkpoints import saved
from dreamllm_jax.checkpoints.saved import SavedModel
from dreamllm_jax.diffusion.flow import FlowConfig
from dreamllm_jax.interop.dreamllm import open_dreamllm
from dreamllm_jax.interop.source import Source
from dreamllm_jax.layers.lora import adapters_in, is_adapter, tower_of
from dreamllm_jax.model import TEACHER, DreamLLMConfig


def open_initial(name: str) -> SavedModel | Source:
    """Opens what `parameters.init_from` names; both kinds have `config`, `tokenizer` and `restore`.

    Args:
      name: `DIR` or `DIR@STEP` of ours (see `saved.find`), or a directory of the original program.

    Raises:
      FileNotFoundError, ValueError: naming what is missing there or does not fit.
    """
    path = epath.Path(name)
    if (path / "config.json").exists() and not (path / saved.MODEL).exists():
        return open_dreamllm(path)
    return saved.find(name)


def restore_initial(
    name: str, model: DreamLLMConfig, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The parameters that `parameters.init_from` names, laid out as `abstract` asks.

    A teacher is the checkpoint's own, or else as what it teaches is there. Adapters (`layers.lora`) stay in towers
    where `model` has the same; others are merged into the kernels. Those that only `model` has are not among the
    result.

    Raises:
      ValueError: the checkpoint is of another model.
    """
    initial = open_initial(name)
    require_same_model(initial.config, model, name)
    wanted = adapters_in(model)
    if isinstance(initial, SavedModel):
        initial = initial.merged(kept=wanted)
    kept = adapters_in(initial.config)
    there = {path: leaf for path, leaf in abstract.items() if not is_adapter(path) or tower_of(path, kept)}
    if initial.config.teacher or not model.teacher:
        return initial.restore(there)
    begin = f"{TEACHER}/"
    taught = {path.removeprefix(begin): leaf for path, leaf in there.items() if path.startswith(begin)}
    found = initial.restore({path: leaf for path, leaf in there.items() if not path.startswith(begin)})
    return found | {begin + path: leaf for path, leaf in initial.restore(taught).items()}


def require_same_model(theirs: DreamLLMConfig, ours: DreamLLMConfig, name: str) -> None:
    """Checks that a checkpoint is of `ours`: what no tensor's shape shows (token ids, heads, bases) included.

    Raises:
      ValueError: naming the first setting in which they differ.
    """
    _require_same(dataclasses.asdict(theirs), dataclasses.asdict(ours), "config.model", name)


# How a model is computed, trained, asked, sampled or was begun, not what it is; adapters can be added and merged. Of a
# flow it is a velocity at each noise level, whichever of these are learned.
_FLOW = tuple(field.name for field in dataclasses.fields(FlowConfig) if field.name != "num_train_timesteps")
_BEGUN = ("initializer_range", "init", "deviation", "copied")
_FREE = ("dtype", "remat", "teacher", "upcast", "training", "sample_size", "lora", "prompting", *_BEGUN, *_FLOW)


def _require_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: str, name: str) -> None:
    for key in [key for key in ours if key not in _FREE]:
        if isinstance(ours[key], Mapping) and isinstance(theirs.get(key), Mapping):
            _require_same(theirs[key], ours[key], f"{path}.{key}", name)
        elif theirs.get(key) != ours[key]:
            raise ValueError(f"{path}.{key} is {ours[key]!r}, but {name} has {theirs.get(key)!r}")
