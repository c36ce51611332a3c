"""Numbers stored in fewer bits than they are computed in.

Rounding to the nearest would lose every update smaller than half a unit in the last place, in bfloat16 one part in 512:
small steps of a weight, and all of the second moment's decay. Rounding up or down at random, with probabilities such
that the mean is exact, loses none on average (Gupta et al. 2015, arXiv 1502.02551).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32


def stochastic_bfloat16(x: Float32[Array, "*shape"], key: jax.Array) -> BFloat16[Array, "*shape"]:
    """Rounds to one of the two neighbouring bfloat16 numbers, the nearer the likelier; exact numbers stay."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def widen(tree: Any) -> Any:
    """Every floating-point leaf in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def narrow(tree: Any, like: Any, key: jax.Array) -> Any:
    """Every leaf in the type of its counterpart in `like`; float32 to bfloat16 by `stochastic_bfloat16`.

    Args:
      key: each leaf is rounded by noise of its own, folded from it.
    """
    leaves, structure = jax.tree.flatten(tree)

    def cast(i, x, dtype):
        return stochastic_bfloat16(x, jax.random.fold_in(key, i)) if dtype == jnp.bfloat16 else x.astype(dtype)

    kinds = [leaf.dtype for leaf in jax.tree.leaves(like)]
    return structure.unflatten(
        [x if x.dtype == dtype else cast(i, x, dtype) for i, (x, dtype) in enumerate(zip(leaves, kinds, strict=True))]
    )
