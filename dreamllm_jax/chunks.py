"""Sums over many items, a chunk at a time: memory for one chunk, and no work for empty ones.

Legend: R groups of items (rows, or shards), n items in a group, c chunks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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
) -> Float[Array, ""]:
    """The sum of `function(shared, chunk)` over the chunks of `items`.

    Of several chunks, within each group the filled items come first, and a chunk that no group fills is skipped. The
    gradient of a chunk is computed together with its value, for it only has to be scaled later: so the backward pass
    needs neither the chunk's intermediates nor its recomputation.

    Args:
      function: (shared, items with leaves [R, n / c, ...]) -> the sum over these items, to which empty ones add 0.
      shared: what all chunks use, such as parameters.
      items: pytree of arrays [R, n, ...].
      filled: which items count.
      chunks: how many; it must divide n.
    """
    if chunks == 1:
        return _sum(function, shared, jax.tree.map(lambda x: x[None], (items, filled)))
    order = jnp.argsort(~filled, axis=1, stable=True)

    def arrange(x):
        index = order.reshape(order.shape + (1,) * (x.ndim - 2))
        return split(jnp.take_along_axis(x, index, axis=1, mode="clip"), chunks)

    return _sum(function, shared, jax.tree.map(arrange, (items, filled)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(function, shared, stacked):
    def add(total, chunk):
        items, filled = chunk
        return total + _if_any(filled, lambda: function(shared, items), len(stacked[1])), None

    return _scan(add, jnp.zeros((), jnp.float32), stacked, len(stacked[1]))[0]


def _sum_fwd(function, shared, stacked):
    shared, shared_tree = jax.tree.flatten(shared)
    stacked, stacked_tree = jax.tree.flatten(stacked)
    varied, fixed = _varied(shared), [leaf.value for leaf in shared]

    def add(carry, leaves):
        def value(by_shared, by_items):
            items, _ = stacked_tree.unflatten(_replace(stacked, leaves, by_items))
            return function(shared_tree.unflatten(_replace(shared, fixed, by_shared)), items)

        def compute():
            own = [leaf for leaf, primal in zip(leaves, stacked, strict=True) if primal.perturbed]
            total, (by_shared, by_items) = jax.value_and_grad(value, (0, 1))(varied, own)
            return (total, [g.astype(jnp.float32) for g in by_shared]), by_items

        _, filled = stacked_tree.unflatten(leaves)
        sums, by_items = _if_any(filled, compute, chunks)
        return jax.tree.map(jnp.add, carry, sums), by_items

    chunks = len(stacked[0].value)
    start = jnp.zeros((), jnp.float32), [jnp.zeros(leaf.shape, jnp.float32) for leaf in varied]
    (total, by_shared), by_items = _scan(add, start, [leaf.value for leaf in stacked], chunks)
    by_shared = [g.astype(leaf.dtype) for g, leaf in zip(by_shared, varied, strict=True)]
    nothing = [None] * len(shared), [None] * len(stacked)
    return total, (
        shared_tree.unflatten(_replace(shared, nothing[0], by_shared)),
        stacked_tree.unflatten(_replace(stacked, nothing[1], by_items)),
    )


def _sum_bwd(function, gradients, cotangent):
    return jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradients)


_sum.defvjp(_sum_fwd, _sum_bwd, symbolic_zeros=True)


# One chunk takes neither loop nor branch: on CPU, convolutions inside of either are several times slower.


def _scan(body, start, stacked, chunks):
    if chunks > 1:
        return jax.lax.scan(body, start, stacked)
    carry, out = body(start, jax.tree.map(lambda x: x[0], stacked))
    return carry, jax.tree.map(lambda x: x[None], out)


def _if_any(filled, compute, chunks):
    """What `compute` gives, or zeros without computing it where nothing is filled."""
    if chunks == 1:
        return compute()
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(compute))
    return jax.lax.cond(filled.any(), compute, lambda: zeros)


def _varied(leaves):
    """The values of those leaves that something is differentiated for."""
    return [leaf.value for leaf in leaves if leaf.perturbed]


def _replace(leaves, values, varied):
    """`values`, those of varied leaves replaced."""
    varied = iter(varied)
    return [next(varied) if leaf.perturbed else value for leaf, value in zip(leaves, values, strict=True)]
