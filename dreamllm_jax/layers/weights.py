"""What a parameter is before it has values: the logical axes along which it is split, and how it begins."""

import functools
import re
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

Initializer = nn.initializers.Initializer
LAYERS = "layers"  # the axis along which scanned layers are stacked
_IN_PATTERN = re.compile(rf"(?:^|/){LAYERS}/(\d+)_of_(\d+)/")
normal = functools.cache(nn.initializers.normal)  # alike ones are one, for `draw`


@struct.dataclass(eq=False)
class Weight(nn.LogicallyPartitioned):
    """A parameter (or its shape) with its logical axes and what it begins with, which is told for a single layer.

    `exact` ones are used in float32, whatever the model computes in; `fixed` ones are tables that are never trained.
    """

    init: Initializer | None = struct.field(default=None, pytree_node=False)
    exact: bool = struct.field(default=False, pytree_node=False)
    fixed: bool = struct.field(default=False, pytree_node=False)


def weight(init: Initializer, *axes: str | None, exact: bool = False, fixed: bool = False) -> Initializer:
    """The initializer of a parameter with these logical axes; for `exact` and `fixed` see `Weight`."""

    def boxed(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Weight:
        return Weight(init(key, shape, dtype), axes, init=init, exact=exact, fixed=fixed)

    return boxed


def draw(weights: dict[str, Weight], leaves: dict[str, jax.ShapeDtypeStruct], key: jax.Array) -> dict[str, jax.Array]:
    """Fresh parameters, each made directly in its shards, a function of its path and the key alone.

    One program that draws them all is compiled for minutes: here those that are alike share a small one.

    Args:
      weights: by path, as from `abstract_params`.
      leaves: those of them that are wanted, with their types and shardings.
    """
    programs: dict[tuple, Any] = {}
    drawn = {}
    for path, leaf in leaves.items():
        init, stacked = weights[path].init, weights[path].names[0] == LAYERS
        alike = init, stacked, leaf.shape, leaf.dtype, leaf.sharding
        if alike not in programs:
            make = functools.partial(_draw, init=init, stacked=stacked, shape=leaf.shape, dtype=leaf.dtype)
            programs[alike] = jax.jit(make, out_shardings=leaf.sharding)
        drawn[path] = programs[alike](jax.random.fold_in(key, zlib.crc32(path.encode())))
    return drawn


def _draw(key: jax.Array, init: Initializer, stacked: bool, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if stacked:
        return jax.vmap(lambda one: init(one, shape[1:], jnp.float32))(jax.random.split(key, shape[0])).astype(dtype)
    return init(key, shape, jnp.float32).astype(dtype)


def place_in_pattern(path: str) -> tuple[int, int]:
    """Of a parameter of stacked layers: which kind of layer it is of, and how many kinds take turns.

    Entry r of the stack is of layer `kinds * r + kind`.
    """
    found = _IN_PATTERN.search(path)
    return (int(found[1]), int(found[2])) if found else (0, 1)


def is_cast(path: str, weight: Weight) -> bool:
    """Whether the module of the parameter at this path casts it to the type of the computation before its use."""
    return path.endswith(("/kernel", "/embedding")) and not weight.exact


def cast_early(params: Any, weights: Any, dtype: Any) -> Any:
    """The parameters of towers as their modules would cast them anyway: before they travel.

    Args:
      weights: the same tree, as from `abstract_params`.
    """

    def one(path, x, weight):
        return x.astype(dtype) if is_cast(jax.tree_util.keystr(path, simple=True, separator="/"), weight) else x

    return jax.tree_util.tree_map_with_path(one, params, weights)
