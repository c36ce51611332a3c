"""The model that was trained in a run's directory, or imported, ready to be used."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from dreamllm_jax.checkpoints.saved import CONFIG_FILE, MODEL, find
from dreamllm_jax.common.directories import absolute
from dreamllm_jax.data.chat_template import find_template
from dreamllm_jax.data.storage import SUMMARY
from dreamllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from dreamllm_jax.experiment.experiment import Experiment
from dreamllm_jax.layers.weights import is_cast
from dreamllm_jax.model import DreamLLM, abstract_params
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, param_shardings
from dreamllm_jax.runs.start import DATA, read_recorded

SINGLE = ShardingConfig(fsdp=1)


_GROUP_BYTES = 256 << 20  # of parameters that are read together


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model, ready to generate."""

    experiment: Experiment
    tokenizer: Tokenizer
    model: DreamLLM
    params: dict


def require_run(workdir: epath.PathLike) -> epath.Path:
    """The directory of a run; FileNotFoundError if it is none."""
    workdir = absolute(workdir)
    if not (workdir / CONFIG_FILE).exists():
        raise FileNotFoundError(f"{workdir} has no {CONFIG_FILE}: it is not the --workdir of a training run")
    return workdir


def load_run(workdir: epath.PathLike, step: int | None = None) -> Trained:
    """The model of a run's directory, at `step` or the newest checkpoint, on the first local device.

    Raises:
      FileNotFoundError: no run or no such checkpoint in the directory.
    """
    workdir = require_run(workdir)
    experiment = read_recorded(workdir)
    if (workdir / DATA / SUMMARY).exists():
        experiment = dataclasses.replace(
            experiment, data=dataclasses.replace(experiment.data, path=str(workdir / DATA))
        )
    model, params, tokenizer = load_model(workdir if step is None else f"{workdir}@{step}")
    return Trained(dataclasses.replace(experiment, model=model.config), tokenizer, model, params)


def load_model(
    name: epath.PathLike, mesh: Mesh | None = None, sharding: ShardingConfig = SINGLE, template: str = ""
) -> tuple[DreamLLM, dict, Tokenizer]:
    """A trained or imported model, its parameters and its tokenizer: what generation takes.

    Parameters that are stored in more digits than `model.dtype` has are brought to it as they are read, where the model
    would do so itself each time: what it computes is the same, bit by bit.

    Args:
      name: a run's directory, `DIR@STEP` or `DIR@average`, or the directory of an imported model.
      mesh: over which the parameters are split, by the rules of `sharding`; default the first local device.
      template: of conversations, which the tokenizer must be able to write.

    Raises:
      FileNotFoundError, ValueError: there is none, see `saved.find`; it has no tokenizer, or another model's, or one
        that the template is not for.
    """
    found = find(str(name))
    tokenizer = load_tokenizer(found.tokenizer)
    if tokenizer.special != found.config.special_tokens:
        raise ValueError(
            f"{found.tokenizer} is another model's: its special tokens are {tokenizer.special}, those of {MODEL} "
            f"{found.config.special_tokens}"
        )
    if template:
        find_template(template, tokenizer)
    mesh = make_mesh(SINGLE, jax.local_devices()[:1]) if mesh is None else mesh
    weights = flatten_dict(abstract_params(found.config), sep="/")
    shardings = flatten_dict(param_shardings(abstract_params(found.config), mesh, sharding), sep="/")

    def needed(path: str, stored: Any) -> np.dtype:
        """The type in which a parameter is needed that is stored in another one."""
        stored, computed = np.dtype(stored), np.dtype(found.config.dtype)
        return computed if is_cast(path, weights[path]) and computed.itemsize < stored.itemsize else stored

    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, needed(path, leaf.dtype), sharding=shardings[path])
        for path, leaf in found.leaves().items()
    }
    params: dict[str, jax.Array] = {}
    for group in _groups(found.leaves()):  # not all at once: what is read would be there twice
        params |= found.restore({path: wanted[path] for path in group})
    return DreamLLM(found.config), unflatten_dict(params, sep="/"), tokenizer


def _groups(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> list[list[str]]:
    """The parameters' paths, together as many as `_GROUP_BYTES` hold, or one that is larger."""
    groups: list[list[str]] = [[]]
    size = 0
    for path, leaf in leaves.items():
        bytes_ = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if groups[-1] and size + bytes_ > _GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += bytes_
    return groups
