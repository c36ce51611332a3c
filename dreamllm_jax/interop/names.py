"""PyTorch parameter names and layouts to ours and back.

Our modules are named as their PyTorch counterparts, so one mechanical rule serves every tower: dots become slashes, the
index of a module list is fused with its name (`resnets.1` -> `resnets_1`), a scanned stack drops the index and gains a
leading layer axis, and `weight` is called `kernel`, `scale` or `embedding` by what it is.
"""

import re
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

SCANNED = "layers"
_LISTED = re.compile(
    r"^(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|to_out|net|projector)_(\d+)$"
)
_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def torch_name(path: str, layer: int | None = None) -> str:
    """`down_blocks_0/conv/kernel` -> `down_blocks.0.conv.weight`; the scanned stack's index is `layer`."""
    *modules, leaf = path.split("/")
    parts = []
    for module in modules:
        if module == SCANNED and layer is not None:
            parts.append(f"{SCANNED}.{layer}")
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
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _to_torch(leaf: str, array: np.ndarray) -> np.ndarray:
    if leaf != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _sources(path: str, shape: tuple[int, ...]) -> list[str]:
    """The torch tensors one of our leaves is made of: one, or one a layer."""
    if SCANNED not in path.split("/"):
        return [torch_name(path)]
    return [torch_name(path, layer) for layer in range(shape[0])]


def from_torch(template: Mapping, tensors: Mapping[str, np.ndarray]) -> dict:
    """Arranges torch tensors as our parameter tree.

    Args:
      template: the parameter tree's shapes (arrays or `jax.ShapeDtypeStruct`s).
      tensors: torch name -> array, in torch's layout; exactly those the template needs.

    Returns:
      The tree with numpy arrays in place of the template's leaves.

    Raises:
      ValueError: listing every missing, unexpected or wrongly shaped tensor.
    """
    leaves, problems, used = {}, [], set()
    for path, want in flatten_dict(template, sep="/").items():
        names, leaf = _sources(path, want.shape), path.rsplit("/", 1)[-1]
        scanned = SCANNED in path.split("/")
        used.update(names)
        if missing := [name for name in names if name not in tensors]:
            problems += [f"missing {name}" for name in missing]
            continue
        parts = [_to_ours(leaf, np.asarray(tensors[name]), len(want.shape) - scanned) for name in names]
        shape = want.shape[1:] if scanned else want.shape
        if wrong := [(n, p.shape) for n, p in zip(names, parts, strict=True) if p.shape != shape]:
            problems += [f"{name} has shape {got} where {shape} is expected (our layout)" for name, got in wrong]
            continue
        leaves[path] = np.stack(parts) if scanned else parts[0]
    problems += [f"unexpected {name} {np.shape(tensors[name])}" for name in sorted(set(tensors) - used)]
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit:\n  " + "\n  ".join(problems))
    return unflatten_dict(leaves, sep="/")


def to_torch(params: Mapping) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: our parameter tree as torch name -> array in torch's layout."""
    tensors = {}
    for path, array in flatten_dict(params, sep="/").items():
        names, leaf = _sources(path, array.shape), path.rsplit("/", 1)[-1]
        parts = np.asarray(array) if SCANNED in path.split("/") else [np.asarray(array)]
        tensors.update((name, _to_torch(leaf, part)) for name, part in zip(names, parts, strict=True))
    return tensors
