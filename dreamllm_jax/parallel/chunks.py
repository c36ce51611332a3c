"""Sums over many items, a chunk at a time: memory for one chunk, and no work for empty ones.

Legend: R groups of items (rows, or shards), n items in a group, c chunks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dreamllm_jax.parallel.collectives import copies, on_devices, sum_of_copies


def count(items: int, size: int) -> int:
    """How many equal chunks of at most `size` items there are; 0 or a larger size means one."""
    if not 0 < size < items:
        return 1
    return next(chunks for chunks in range(-(-items // size), items + 1) if items % chunks == 0)


def split(x: Array, chunks: int) -> Array:
    """[R, n, ...] -> [c, R, n / c, ...]: each chunk has its part of every group."""
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)


def join(x: Array) -> Array:
    """The inverse of `split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def chunked_sum(
    function: Callable[[Any, Any], Float[Array, ""]],
    shared: Any,
    items: Any,
    filled: Bool[Array, "R n"],
    chunks: int,
    axes: Any = None,
    over: tuple[str, ...] = (),
) -> Float[Array, ""]:
    """The sum of `function(shared, chunk)` over the chunks of `items`.

    Of several chunks, within each group the filled items come first, and a chunk without any is skipped. The gradient
    of a chunk is computed together with its value, for it only has to be scaled later: so the backward pass needs
    neither the chunk's intermediates nor its recomputation.

    Each device goes through its own groups alone, with its own copy of what is shared, whose gradient it adds up in
    float32. After the last chunk these travel, once.

    Args:
      function: (shared, items with leaves [R, n / c, ...]) -> the sum over these items, to which empty ones add 0.
      shared: what all chunks use, such as parameters.
      items: pytree of arrays [R, n, ...].
      filled: which items count.
      chunks: how many; it must divide n.
      axes: the logical axes of each array in `shared`, where it lies on a mesh.
      over: the mesh axes over which the groups are split, as from `sharding.split_over`.
    """
    axes = jax.tree.map(lambda _: (), shared) if axes is None else axes
    layout = over, tuple(jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)))
    if chunks == 1:
        return _sum(function, layout, shared, jax.tree.map(lambda x: x[None], (items, filled)))
    order = jnp.argsort(~filled, axis=1, stable=True)

    def arrange(x):
        index = order.reshape(order.shape + (1,) * (x.ndim - 2))
        return split(jnp.take_along_axis(x, index, axis=1, mode="clip"), chunks)

    return _sum(function, layout, shared, jax.tree.map(arrange, (items, filled)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(function, layout, shared, stacked):
    shared, shared_tree = jax.tree.flatten(shared)

    def on_device(values, stacked):
        shared = shared_tree.unflatten([value[0] for value in values])

        def add(total, chunk):
            items, filled = chunk
            return _if_any(filled, lambda: total + function(shared, items), total, len(stacked[1])), None

        return _scan(add, jnp.zeros((), jnp.float32), stacked, len(stacked[1]))[0][None]

    return jnp.sum(on_devices(on_device, layout[0], (0, 1), 0)(_copies(shared, layout), stacked))


def _sum_fwd(function, layout, shared, stacked):
    shared, shared_tree = jax.tree.flatten(shared)
    stacked, stacked_tree = jax.tree.flatten(stacked)
    chunks = len(stacked[0].value)

    def on_device(values, chunk_values):
        values = [value[0] for value in values]
        varied = _varied(shared, values)

        def add(carry, leaves):
            def value(by_shared, by_items):
                items, _ = stacked_tree.unflatten(_replace(stacked, leaves, by_items))
                return function(shared_tree.unflatten(_replace(shared, values, by_shared)), items)

            def compute():
                total, (by_shared, by_items) = jax.value_and_grad(value, (0, 1))(varied, _varied(stacked, leaves))
                return jax.tree.map(lambda sum, x: sum + x.astype(jnp.float32), carry, (total, by_shared)), by_items

            _, filled = stacked_tree.unflatten(leaves)
            nothing = carry, [jnp.zeros_like(x) for x in _varied(stacked, leaves)]
            return _if_any(filled, compute, nothing, chunks)

        start = jnp.zeros((), jnp.float32), [jnp.zeros(leaf.shape, jnp.float32) for leaf in varied]
        (total, by_shared), by_items = _scan(add, start, chunk_values, chunks)
        return total[None], [g.astype(leaf.dtype)[None] for g, leaf in zip(by_shared, varied, strict=True)], by_items

    over, axes = layout
    values = _copies([leaf.value for leaf in shared], layout), [leaf.value for leaf in stacked]
    totals, by_shared, by_items = on_devices(on_device, over, (0, 1), (0, 0, 1))(*values)
    by_shared = [sum_of_copies(g, a, over) for g, a in zip(by_shared, _varied(shared, axes), strict=True)]
    # Else the copies' gradients could wait for the optimizer, and lie in memory during the whole backward pass.
    by_shared, by_items = jax.lax.optimization_barrier((by_shared, by_items))
    nothing = [None] * len(shared), [None] * len(stacked)
    return jnp.sum(totals), (
        shared_tree.unflatten(_replace(shared, nothing[0], by_shared)),
        stacked_tree.unflatten(_replace(stacked, nothing[1], by_items)),
    )


def _sum_bwd(function, layout, gradients, cotangent):
    return jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradients)


_sum.defvjp(_sum_fwd, _sum_bwd, symbolic_zeros=True)


def _copies(values, layout):
    """[devices, ...]: what each device has of what is shared."""
    over, axes = layout
    return [copies(value, a, over) for value, a in zip(values, axes, strict=True)]


# One chunk takes neither loop nor branch: on CPU, convolutions inside of either are several times slower.


def _scan(body, start, stacked, chunks):
    if chunks > 1:
        return jax.lax.scan(body, start, stacked)
    carry, out = body(start, jax.tree.map(lambda x: x[0], stacked))
    return carry, jax.tree.map(lambda x: x[None], out)


def _if_any(filled, compute, nothing, chunks):
    """What `compute` gives, or `nothing` without computing it where nothing is filled."""
    return compute() if chunks == 1 else jax.lax.cond(filled.any(), compute, lambda: nothing)


def _varied(leaves, values):
    """Those of the leaves' values that something is differentiated for."""
    return [value for leaf, value in zip(leaves, values, strict=True) if leaf.perturbed]


def _replace(leaves, values, varied):
    """`values`, those of varied leaves replaced."""
    varied = iter(varied)
    return [next(varied) if leaf.perturbed else value for leaf, value in zip(leaves, values, strict=True)]
