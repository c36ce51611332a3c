"""What a PyTorch checkpoint holds, laid out for our model and not yet read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax

from dreamllm_jax.common import recognise
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.names import Leaf, arrange
from dreamllm_jax.model import DreamLLMConfig, abstract_params


@dataclasses.dataclass(frozen=True)
class Part:
    """One tower of a checkpoint.

    Attributes:
      config: its configuration class.
      tensors: torch name -> tensor, named as `names.torch_name` names our part's parameters.
      left_out: tensors that stand there too but belong to nothing of ours, such as CLIP's text tower.
      where: the directory or file, for messages.
    """

    config: Any
    tensors: dict[str, Tensor]
    left_out: tuple[str, ...] = ()
    where: Path | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A whole model.

    Attributes:
      leaves: parameter path, such as "dream_queries/embedding" -> where it is read from.
      tokenizer: directory of the tokenizer that came with it.
      left_out: see `Part`.
    """

    config: DreamLLMConfig
    leaves: dict[str, Leaf]
    tokenizer: Path | None = None
    left_out: tuple[str, ...] = ()

    def restore(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The parameters as `abstract` asks for them; each device is given its shard alone, one parameter at a time."""

        def place(path: str, want: jax.ShapeDtypeStruct) -> jax.Array:
            read = self.leaves[path].read
            return jax.make_array_from_callback(
                want.shape, want.sharding, lambda index: read(index).astype(want.dtype, copy=False)
            )

        return {path: place(path, want) for path, want in abstract.items()}


def join(
    config: DreamLLMConfig,
    parts: Mapping[str, Mapping[str, Tensor]],
    left_out: tuple[str, ...] = (),
    where: Mapping[str, Path | None] = MappingProxyType({}),
) -> Source:
    """Accounts for every tensor of every part of the model.

    Args:
      parts: top-level name of the parameter tree, such as "llama" -> torch name -> tensor.
      where: the same name -> where it came from, for messages.

    Raises:
      ValueError: listing what is missing, unexpected or wrongly shaped, part by part.
    """
    leaves, problems = {}, []
    for name, template in nn.unbox(abstract_params(config)).items():
        try:
            found = arrange(template, parts.get(name, {}))
        except ValueError as error:
            problems.append(f"{name}{f' of {where[name]}' if where.get(name) else ''}: {error}")
        else:
            leaves |= {
                f"{name}/{path}": dataclasses.replace(leaf, path=f"{name}/{path}") for path, leaf in found.items()
            }
    if problems:
        raise ValueError("\n".join(problems))
    return Source(config, leaves, left_out=left_out)


def split(tensors: Mapping[str, Tensor], prefixes: Mapping[str, str], where: str) -> dict[str, dict[str, Tensor]]:
    """Distributes a file's tensors by the prefixes of their names: prefix -> key of the result.

    Raises:
      ValueError: listing the tensors that no prefix fits.
    """
    parts: dict[str, dict[str, Tensor]] = {key: {} for key in prefixes.values()}
    unexpected = []
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            unexpected.append(f"{name} {tensor.shape}")
        else:
            parts[prefixes[prefix]][name.removeprefix(prefix)] = tensor
    if unexpected:
        cause = recognise.cause(unexpected)
        raise ValueError(
            f"{where} holds {len(unexpected):,} unexpected tensors: {recognise.listed(sorted(unexpected), ', ')}"
            f"{cause and f'; {cause}'}"
        )
    return parts
