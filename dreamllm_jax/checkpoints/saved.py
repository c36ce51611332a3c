"""A model at rest: what `convert import` writes, or a run's directory at one of its steps.

DIR/model.json      what model it is (`DreamLLMConfig`), written last
DIR/tokenizer/      its tokenizer
DIR/params/         all parameters, as imported; or, in the directory of a run:
DIR/frozen/         the parameters that are not trained
DIR/checkpoints/    the others, by step; perhaps their averages too (`optimizer.ema_decay`)
"""

import dataclasses
import functools
import gc
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from dreamllm_jax.common.configuration import read
from dreamllm_jax.common.directories import absolute, is_remote, read_json, write_whole
from dreamllm_jax.common.recognise import looks
from dreamllm_jax.data.tokenizer import FOLDER as TOKENIZER
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.layers.lora import (
    LoraConfig,
    adapters_in,
    adapters_of,
    is_adapter,
    merge,
    tower_of,
    without_adapters,
)
from dreamllm_jax.model import DreamLLMConfig

MODEL, PARAMS, AVERAGE, FROZEN, CHECKPOINTS = "model.json", "params", "average", "frozen", "checkpoints"
CONFIG_FILE = "config.json"  # of a run: its complete configuration

# Small enough that a host which needs a shard does not read the whole array, and that little waits in memory.
_CHUNK_BYTES, _FILE_BYTES = 64 << 20, 256 << 20
# Orbax's event loop leaves cycles that would hold what was restored before; to find them takes half a second.
_COLLECT_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model's parameters in one or two Orbax directories.

    Attributes:
      step: steps it was trained for; 0 as imported.
    """

    directory: epath.Path
    config: DreamLLMConfig
    stores: tuple[epath.Path, ...]
    step: int

    @property
    def tokenizer(self) -> epath.Path:
        """Directory of the tokenizer, as `load_tokenizer` takes it."""
        return self.directory / TOKENIZER

    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and stored types of all parameters, by path."""
        return self._stored()

    def merged(self, kept: Mapping[str, LoraConfig] = MappingProxyType({})) -> "SavedModel":
        """The same model without adapters (`layers.lora`), which are added to the kernels as these are read.

        Args:
          kept: path of a tower -> adapters that stay, where it has exactly these.
        """
        found = adapters_in(self.config).items()
        adapters = {tower: lora for tower, lora in found if kept.get(tower) != lora}
        if not adapters:
            return self
        config = without_adapters(self.config, adapters)
        return _Merged(self.directory, config, self.stores, self.step, adapters)

    @functools.cached_property
    def _shapes(self) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
        """What each of the stores holds."""
        trees = [_handler().metadata(store).tree for store in self.stores]
        return tuple(
            {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tree.items()} for tree in trees
        )

    def _stored(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: leaf for shapes in self._shapes for path, leaf in shapes.items()}

    def restore(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The parameters that `abstract` names, as it asks for them: type and sharding."""
        return self._restore(abstract, ocp.checkpoint_utils.construct_restore_args(dict(abstract)))

    def read(self, paths: Iterable[str]) -> dict[str, np.ndarray]:
        """Parameters as they are stored, in the host's memory."""
        chosen = set(paths)
        wanted = {path: leaf for path, leaf in self._stored().items() if path in chosen}
        return self._restore(wanted, {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in wanted})

    def part(self, name: str) -> dict[str, Any]:
        """One part of the parameter tree, such as "language_model", as `read` gives it."""
        prefix = f"{name}/"
        found = self.read(path for path in self.leaves() if path.startswith(prefix))
        return unflatten_dict({path.removeprefix(prefix): array for path, array in found.items()}, sep="/")

    def _restore(self, wanted: Mapping[str, Any], restore_args: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for store, here in zip(self.stores, self._shapes, strict=True):
            item = {path: leaf for path, leaf in wanted.items() if path in here}
            if item:
                args = {path: restore_args[path] for path in item}
                request = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
                found |= _handler().restore(store, args=request)
        if sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in wanted.values()) > _COLLECT_BYTES:
            gc.collect()
        return {path: found[path] for path in wanted}


@dataclasses.dataclass(frozen=True)
class _Merged(SavedModel):
    """What `merged` gives; `config` is without `adapters`, which are those of the towers at these paths."""

    adapters: Mapping[str, LoraConfig]

    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: leaf for path, leaf in self._stored().items() if not (is_adapter(path) and self._is_of(path))}

    def restore(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        stored = self._stored()
        adapted = {path: names for path in abstract if (names := self._names(path)) and stored.keys() >= set(names)}
        found = super().restore({path: leaf for path, leaf in abstract.items() if path not in adapted})
        for path, names in adapted.items():  # one after the other: its adapter is whole on every device meanwhile
            whole = _whole(abstract[path].sharding)
            parts = {name: jax.ShapeDtypeStruct(stored[name].shape, "float32", sharding=whole) for name in names}
            parts = super().restore({path: abstract[path], **parts})
            found[path] = jax.jit(self._merge(path), out_shardings=abstract[path].sharding)(*parts.values())
        return {path: found[path] for path in abstract}

    def read(self, paths: Iterable[str]) -> dict[str, np.ndarray]:
        wanted = {path: self._names(path) for path in paths}
        found = super().read([*wanted, *(name for names in wanted.values() for name in names)])
        adapted = {path: names for path, names in wanted.items() if names and found.keys() >= set(names)}
        merged = {path: self._merge(path)(found[path], *map(found.get, names)) for path, names in adapted.items()}
        return {path: merged.get(path, found[path]) for path in wanted}

    def _is_of(self, path: str) -> bool:
        return tower_of(path, self.adapters) is not None

    def _names(self, path: str) -> tuple[str, ...]:
        return adapters_of(path) if self._is_of(path) else ()

    def _merge(self, path: str):
        return functools.partial(merge, scale=self.adapters[tower_of(path, self.adapters)].scale)


def _whole(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Not through a Checkpointer, which warns of every directory that a CheckpointManager wrote.
    return ocp.PyTreeCheckpointHandler()


def find(name: str) -> SavedModel:
    """The model in a directory: `DIR`, its newest step, or `DIR@STEP`; `DIR@average`, `DIR@STEP-average` its averages.

    Raises:
      FileNotFoundError, ValueError: no model there, or not of that step; the message says what is.
    """
    path, wanted, average = str(name), "", False
    if match := re.fullmatch(r"(.+)@(\d*)(-?average)?", path):
        path, wanted, average = match[1], match[2], bool(match[3])
    directory = absolute(path)
    if not (directory / MODEL).exists():
        raise FileNotFoundError(
            f"{directory} has no {MODEL}: it is not the --to of a finished `convert import`, nor the --workdir of a run"
            f"{'' if is_remote(path) else looks(Path(directory))}"
        )
    config = read(DreamLLMConfig, read_json(directory / MODEL), f"{directory / MODEL}")
    if (directory / PARAMS).exists():
        if wanted not in ("", "0") or average:
            raise FileNotFoundError(f"{directory} is an imported model: it has no step {wanted} and no averages")
        return SavedModel(directory, config, (directory / PARAMS,), 0)
    steps = sorted(ocp.path.step.checkpoint_steps(directory / CHECKPOINTS))
    if not steps or (wanted and int(wanted) not in steps):
        which = f"a checkpoint of step {wanted} (there are {steps})" if wanted else "a checkpoint"
        raise FileNotFoundError(f"{directory / CHECKPOINTS} does not hold {which}")
    step = int(wanted) if wanted else steps[-1]
    trained = directory / CHECKPOINTS / str(step) / (AVERAGE if average else PARAMS)
    if not trained.exists():
        raise FileNotFoundError(f"{trained} is not there: the run keeps no averages (optimizer.ema_decay)")
    stores = [trained, directory / FROZEN]
    return SavedModel(directory, config, tuple(store for store in stores if store.exists()), step)


def write_description(directory: epath.Path, config: DreamLLMConfig, tokenizer: Tokenizer | None) -> None:
    """Writes `model.json` and the tokenizer, if there is one."""
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(directory / TOKENIZER)
    write_whole(directory / MODEL, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def write_params(directory: epath.Path, leaves: Mapping[str, np.ndarray]) -> None:
    """Writes all parameters of an imported model; arrays mapped from a file are not brought to memory."""
    handlers = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()),
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
    )
    save_args = {path: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for path in leaves}
    request = ocp.args.PyTreeSave(dict(leaves), save_args=save_args, ocdbt_target_data_file_size=_FILE_BYTES)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)) as checkpointer:
        checkpointer.save(directory / PARAMS, args=request)
