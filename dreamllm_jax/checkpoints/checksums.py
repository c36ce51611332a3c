"""Checksums of arrays, by which a flipped bit in a checkpoint is noticed wherever it happened."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ODD = np.uint32(2654435761)  # 2^32 divided by the golden ratio (Knuth, multiplicative hashing)


@jax.jit  # one by one, for arrays alike share a program: one of all of them takes long to compile
def _one(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # An odd factor: however a bit flips, its product changes modulo 2^32.
    return jnp.sum(bits * ((place + 1) * _ODD | 1), dtype=jnp.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """A number for each array, a function of its bits and their places alone, computed where the array lies.

    Integers are added, so that the result does not depend on how the array is split over devices. One flipped bit
    always changes it; larger damage goes unnoticed once in 2^32.

    Args:
      tree: of arrays of at most 32 bits an element.
    """
    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True)
    values = jax.device_get([_one(x) for x in leaves])
    return {jax.tree_util.keystr(path): int(value) for path, value in zip(paths, values, strict=True)}
