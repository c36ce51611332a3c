"""PyTorch parameter names and layouts to ours and back.

Our modules are named as their PyTorch counterparts, so one mechanical rule serves every tower: dots become slashes, the
index of a module list is fused with its name (`resnets.1` -> `resnets_1`), a scanned stack drops the index and gains a
leading layer axis, and `weight` is called `kernel`, `scale` or `embedding` by what it is. Where layers of several kinds
alternate, each kind has a stack: entry r of `layers/1_of_6` is layer 6 r + 1. Where they follow each other likewise:
entry r of `transformer_blocks/13_to_23` is layer 13 + r.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamllm_jax.common import recognise
from dreamllm_jax.interop.files import Tensor, is_float, require_finite
from dreamllm_jax.layers.lora import is_adapter

STACKS = frozenset({"blocks", "layer", "layers", "transformer_blocks"})  # modules that are scanned stacks of layers
_LISTS = (
    *("down_blocks", "up_blocks", "resnets", "attentions", "transformer_blocks", "downsamplers", "upsamplers"),
    *("to_out", "to_qkv_multiscale", "net", "projector", "pooled_projector", "mlp", "down_mlp"),
)
_LISTED = re.compile(rf"^({'|'.join(_LISTS)})_(\d+)$")
_KIND = re.compile(r"^(\d+)_of_(\d+)$")
_RANGE = re.compile(r"^(\d+)_to_(\d+)$")
_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def torch_name(path: str, layer: int | None = None) -> str:
    """`down_blocks_0/conv/kernel` -> `down_blocks.0.conv.weight`; `layer` counts all layers of a scanned stack."""
    *modules, leaf = path.split("/")
    parts = []
    for module in modules:
        if module in STACKS and layer is not None:
            parts.append(f"{module}.{layer}")
        elif _KIND.match(module) or _RANGE.match(module):
            continue  # what `_sources` counts by
        elif match := _LISTED.match(module):
            parts.append(f"{match[1]}.{match[2]}")
        else:
            parts.append(module)
    return ".".join([*parts, _LEAF.get(leaf, leaf)])


def _to_ours(leaf: str, tensor: np.ndarray, ndim: int) -> np.ndarray:
    if leaf != "kernel":
        return tensor
    if tensor.ndim == 4 and ndim == 2 and tensor.shape[2:] == (1, 1):  # a 1x1 convolution stored for a linear layer
        tensor = tensor[:, :, 0, 0]
    return tensor.transpose(*range(2, tensor.ndim), 1, 0)


def _to_torch(leaf: str, array: np.ndarray) -> np.ndarray:
    if leaf != "kernel":
        return array
    return array.transpose(-1, -2, *range(array.ndim - 2))


def _is_scanned(path: str) -> bool:
    return not STACKS.isdisjoint(path.split("/"))


def _sources(path: str, shape: tuple[int, ...]) -> list[str]:
    """The torch tensors one of our leaves is made of: one, or one a layer.

    Raises:
      ValueError: the leaf is of an adapter, of which torch's classes know nothing.
    """
    if is_adapter(path):
        raise ValueError(f"{path} is of an adapter, which has no PyTorch name: merge it first (SavedModel.merged)")
    if not _is_scanned(path):
        return [torch_name(path)]
    first, step = 0, 1
    for module in path.split("/"):
        if match := _KIND.match(module):
            first, step = map(int, match.groups())
        elif match := _RANGE.match(module):
            first = int(match[1])
    return [torch_name(path, first + repeat * step) for repeat in range(shape[0])]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of ours, still in the files of its torch tensors: one, or one a layer of a scanned stack."""

    path: str
    shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    @property
    def dtype(self) -> np.dtype:
        """The type of all its tensors, or one that holds the values of all: float32, or wider."""
        kinds = {np.dtype(tensor.dtype) for tensor in self.tensors}
        return kinds.pop() if len(kinds) == 1 else functools.reduce(np.promote_types, kinds, np.dtype(np.float32))

    def parts(self) -> Iterator[np.ndarray]:
        """The layers in our layout, read one at a time; of an unscanned parameter the one array it is.

        Raises:
          ValueError: naming the first tensor with values that are not finite.
        """
        name, ndim = self.path.rsplit("/", 1)[-1], len(self.shape) - _is_scanned(self.path)
        for tensor in self.tensors:
            yield _to_ours(name, require_finite(tensor.read(), tensor.where or self.path), ndim)

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The array, or the part of it that `index` selects; a scanned stack is read layer by layer; errors as of
        `parts`."""
        if not _is_scanned(self.path):
            return next(self.parts())[index]
        layers, rest = (index or (slice(None),))[0], tuple(index[1:])
        chosen = dataclasses.replace(self, tensors=self.tensors[layers])
        return np.stack([part[rest] for part in chosen.parts()])


def arrange(template: Mapping, tensors: Mapping[str, Tensor]) -> dict[str, Leaf]:
    """Finds the torch tensors of every parameter.

    Args:
      template: the parameter tree's shapes (arrays or `jax.ShapeDtypeStruct`s).
      tensors: torch name -> tensor, in torch's layout; exactly those the template needs.

    Returns:
      Path -> parameter, nothing read yet.

    Raises:
      ValueError: listing missing, unexpected and wrongly shaped tensors, with shapes, and those that are no floating
        point numbers; the first ten, how many there are, and the likely cause if there is one.
    """
    leaves, problems, used = {}, [], set()
    for path, want in flatten_dict(template, sep="/").items():
        names, leaf = _sources(path, want.shape), path.rsplit("/", 1)[-1]
        shape = tuple(want.shape[1:] if _is_scanned(path) else want.shape)
        expected = _to_torch(leaf, np.broadcast_to(0, shape)).shape
        used.update(names)
        fitting = []
        for name in names:
            if name not in tensors:
                problems.append(f"missing {name} {expected}")
            elif tensors[name].shape not in (expected, (*expected, 1, 1) if leaf == "kernel" else None):
                problems.append(f"{name} has shape {tensors[name].shape}, expected {expected}")
            elif not is_float(tensors[name].dtype):
                problems.append(f"{name} is stored as {tensors[name].dtype}, not as floating point numbers")
            else:
                fitting.append(tensors[name])
        leaves[path] = Leaf(path, tuple(want.shape), tuple(fitting))
    problems += [f"unexpected {name} {tensors[name].shape}" for name in sorted(set(tensors) - used)]
    if problems:
        cause = recognise.cause(set(tensors) - used)
        raise ValueError(
            f"{len(problems):,} tensors do not fit:\n  {recognise.listed(problems)}{cause and f'{chr(10)}  {cause}'}"
        )
    return leaves


def from_torch(template: Mapping, tensors: Mapping[str, np.ndarray]) -> dict:
    """Torch tensors as our parameter tree of numpy arrays; arguments and errors as of `arrange`."""
    leaves = arrange(template, {name: Tensor.of(np.asarray(tensor)) for name, tensor in tensors.items()})
    return unflatten_dict({path: leaf.read() for path, leaf in leaves.items()}, sep="/")


def torch_tensors(path: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """One of our parameters as the torch tensors it stands for, in torch's layout."""
    leaf = path.rsplit("/", 1)[-1]
    for name, part in zip(_sources(path, array.shape), array if _is_scanned(path) else [array], strict=True):
        yield name, _to_torch(leaf, part)


def to_torch(params: Mapping) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: our parameter tree as torch name -> array in torch's layout."""
    flat = flatten_dict(params, sep="/")
    return {name: part for path, array in flat.items() for name, part in torch_tensors(path, np.asarray(array))}
