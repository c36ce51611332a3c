"""What a PyTorch checkpoint holds, laid out for our model and not yet read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax

from dreamllm_jax.common import recognise
from dreamllm_jax.interop.files import Tensor, open_model
from dreamllm_jax.interop.names import Leaf, arrange
from dreamllm_jax.model import DreamLLMConfig, abstract_params

IMAGE_DECODER = "image_decoder"  # which is of several parts
# Parts of the parameter tree, each by its path; an export reads and writes tensors in this order.
PARTS = (
    "vision_encoder",
    "connector",
    "language_model",
    "dream_queries",
    f"{IMAGE_DECODER}/denoiser",
    f"{IMAGE_DECODER}/autoencoder",
    "visual_projector",
)


def split_path(path: str) -> tuple[str, str]:
    """The part that a parameter is of, and its path there."""
    names = path.split("/")
    count = 2 if names[0] == IMAGE_DECODER else 1
    return "/".join(names[:count]), "/".join(names[count:])


def config_of(config: DreamLLMConfig, part: str) -> Any:
    """The configuration of a part of the model; None for dream queries, which have none."""
    for name in part.split("/"):
        config = getattr(config, name, None)
    return config


@dataclasses.dataclass(frozen=True)
class Stored:
    """The tensors of a tower, or of several, in a file that has others too.

    Attributes:
      tensors: by their names there.
      prefix: how these begin.
      where: the file or directory.
    """

    tensors: Mapping[str, Tensor]
    prefix: str
    where: Path

    def named(self) -> dict[str, Tensor]:
        """The tensors, by their names in a file of their own."""
        return {name.removeprefix(self.prefix): tensor for name, tensor in self.tensors.items()}


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

    @classmethod
    def of(cls, config: Any, tensors: Mapping[str, Tensor], where: Path | None = None) -> "Part":
        """The part of these tensors of its public class.

        Raises:
          ValueError: one that should be several has no so many equal parts.
        """
        names = {name: config.public.ours(name) for name in tensors}
        left_out = tuple(name for name, ours in names.items() if ours is None)
        found: dict[str, Tensor] = {}
        for name, ours in names.items():
            if ours is not None:
                parts = config.public.parts(ours)
                found |= zip(parts, tensors[name].split(len(parts)), strict=True)
        return cls(config, found, left_out, where)

    @classmethod
    def open(cls, config: Any, directory: Path) -> "Part":
        """The part in a directory that its public class wrote; errors as of `files.open_model`."""
        return cls.of(config, open_model(directory, *config.public.stems), directory)


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
      parts: path of a part of the parameter tree, such as "image_decoder/denoiser" -> torch name -> tensor.
      where: the same path -> where it came from, for messages.

    Raises:
      ValueError: listing what is missing, unexpected or wrongly shaped, part by part.
    """
    leaves, problems = {}, []
    for name, template in _templates(config).items():
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


def _templates(config: DreamLLMConfig) -> dict[str, Mapping]:
    """Part -> the shapes of its parameters."""
    tree = nn.unbox(abstract_params(config))
    inner = {f"{IMAGE_DECODER}/{name}": part for name, part in tree.pop(IMAGE_DECODER).items()}
    return tree | inner


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
