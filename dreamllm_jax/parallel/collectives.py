"""What travels between devices: weights to where they are used, their gradients back; and work that each does alone."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dreamllm_jax.parallel.mesh import STORED_APART, constrain, free_axes, mesh_spec


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_weight(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A weight, whole along the axes along which only its storage is split; its gradient is scattered again.

    Cast the weight to the type of the computation before: then what travels is small both ways.

    Args:
      weight: laid out as its logical axes say.
      axes: its logical axes; those other than `STORED_APART` stay split, and so does what is computed from them.
    """
    return constrain(weight, _where_used(axes))


def _where_used(axes: Sequence[str | None]) -> tuple[str | None, ...]:
    return tuple(None if axis in STORED_APART else axis for axis in axes)


def _gather_weight_fwd(weight, axes):
    return gather_weight(weight, axes), None


def _gather_weight_bwd(axes, _, gradient):
    return (constrain(gradient, axes),)


gather_weight.defvjp(_gather_weight_fwd, _gather_weight_bwd)


def copies(weight: jax.Array, axes: tuple[str | None, ...], over: tuple[str, ...]) -> jax.Array:
    """A weight gathered once, for work that each device does alone (`on_devices`): [devices, ...], a copy for each.

    Args:
      weight: laid out as its logical axes say.
      axes: its logical axes.
      over: the mesh axes of these devices, as from `split_over`.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    stacked = jnp.broadcast_to(gather_weight(weight, axes), (math.prod(shape[a] for a in over), *weight.shape))
    return _constrain(stacked, over, *_parts(mesh_spec(_where_used(axes), weight.shape), weight.ndim))


def sum_of_copies(gradients: jax.Array, axes: tuple[str | None, ...], over: tuple[str, ...]) -> jax.Array:
    """The gradient of a weight, laid out as the weight is, from those of its `copies`, [devices, ...].

    They travel once, in their type: each device is sent its part of all of them, and adds them in float32.
    """
    mesh, shape = jax.sharding.get_abstract_mesh().shape, gradients.shape[1:]
    target = _parts(mesh_spec(axes, shape), len(shape))
    by = [part if isinstance(part, tuple) else (part,) for part in target]
    taken = {axis for part in by for axis in part}
    # What each device is sent is cut out first: the dimension split where it lies would be transposed twice on the way.
    cut = next((i for i, part in enumerate(by) if set(part) & set(over)), None)
    first, count = (None, 1) if cut is None else (target[cut], math.prod(mesh[axis] for axis in by[cut]))
    rest = [None if i == cut else part for i, part in enumerate(target)]
    parts = gradients[None] if cut is None else jnp.stack(jnp.split(gradients, count, 1 + cut))
    parts = parts.reshape(count, *[mesh[axis] for axis in over], *parts.shape[2:])
    parts = _constrain(parts, first, *[None if axis in taken else axis for axis in over], *rest)
    here = jnp.sum(parts, [1 + i for i, axis in enumerate(over) if axis in taken], jnp.float32, keepdims=True)
    here = jax.lax.optimization_barrier(here)  # else XLA, seeing what the sum is rounded to, adds in that
    # Along what is left the sums travel: `jnp.sum` would make them float32 before.
    zero = np.zeros((), gradients.dtype)
    total = jax.lax.reduce(here.astype(gradients.dtype), zero, jax.lax.add, range(1, 1 + len(over)))
    return _constrain(jnp.moveaxis(total, 0, cut or 0).reshape(shape), *target)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def copied(weight: jax.Array, axes: tuple[str | None, ...], over: tuple[str, ...]) -> jax.Array:
    """`copies`, whose gradients are added up by `sum_of_copies`."""
    return copies(weight, axes, over)


copied.defvjp(
    lambda weight, axes, over: (copies(weight, axes, over), None),
    lambda axes, over, _, gradients: (sum_of_copies(gradients, axes, over),),
)


def _parts(spec: PartitionSpec, ndim: int) -> tuple:
    """A part of the spec for each dimension."""
    return (*spec, *[None] * (ndim - len(spec)))


def _constrain(x: jax.Array, *parts: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts)) if free_axes() else x


def replicate(arrays: Any) -> Any:
    """Results of which every device, and so every host, is to have all, to look at them."""
    if jax.sharding.get_abstract_mesh().empty:
        return arrays
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), arrays)


def on_shards(function: Callable, axes: Sequence[Sequence[str | None]], *args: jax.Array) -> Any:
    """`function(*args)` computed by each device on its own shards, for kernels that the partitioner cannot look into.

    Args:
      function: of arrays, to arrays that are laid out as the first of them.
      axes: the logical axes of each argument; along those that the rules split, the function must be independent.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if mesh.empty or mesh.size == 1 or not free:
        return function(*args)
    specs = tuple(mesh_spec(a, x.shape) for a, x in zip(axes, args, strict=True))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], axis_names=free, check_vma=False)(*args)


def on_devices(function: Callable, axes: tuple[str, ...], dimensions: tuple[int, ...], out: Any) -> Callable:
    """`function`, computed by each device along `axes` for itself: nothing travels along them while it runs.

    Args:
      axes: mesh axes, as from `split_over`; none, and it is `function`.
      dimensions: of each argument, an array or a pytree of them, the dimension that is split over `axes`.
      out: the same for what it gives, as a pytree's prefix.
    """
    if not axes:
        return function
    specs = jax.tree.map(lambda dimension: PartitionSpec(*[None] * dimension, axes), (dimensions, out))
    # Axes of size 1 too, so that kernels, which no axis may be left for, need nothing more.
    names = {axis for axis, size in jax.sharding.get_abstract_mesh().shape.items() if axis in axes or size == 1}
    return jax.shard_map(function, in_specs=specs[0], out_specs=specs[1], axis_names=names, check_vma=False)
