"""Parameters that every token, pixel or image meets: biases, scales, tables of embeddings.

Their gradients are sums over all of those, and in bfloat16 a sum stops growing at 256 times what is added to it: they
are taken in float32, whatever the type of the computation. (A kernel's gradient is a product, which accumulates in
float32 by itself.) Modules name their parameters as Flax's do.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dreamllm_jax.parallel.mesh import constrain


def spread(weight: Float[Array, "..."], shape: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    """A weight repeated over leading axes, in the type of the computation; its gradient is summed in float32."""
    return jnp.broadcast_to(weight.astype(jnp.float32), shape).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table: Float[Array, "V E"], tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T E"]:
    """Rows of a table, in `dtype`; a row's gradient is the float32 sum over all places where it stands."""
    return jnp.take(table.astype(dtype), tokens, axis=0)


def _look_up_fwd(table, tokens, dtype):
    return look_up(table, tokens, dtype), (table, tokens)


def _look_up_bwd(dtype, residuals, gradient):
    table, tokens = residuals
    # What travels is `dtype`: each device is sent its part of the width, of all tokens that it has no other part of.
    gradient = constrain(gradient, ("rows", "tokens", "embed"), first=2)
    sums = jnp.zeros(table.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32), mode="drop")
    return sums.astype(table.dtype), None


look_up.defvjp(_look_up_fwd, _look_up_bwd)


class Embedding(nn.Module):
    """A table of learned vectors; it is called with the numbers of those that are wanted."""

    num_embeddings: int
    features: int
    init: nn.initializers.Initializer
    dtype: Any = jnp.float32

    def setup(self):
        self.embedding = self.param("embedding", self.init, (self.num_embeddings, self.features))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        return look_up(self.embedding, tokens, self.dtype)


def _promote(inputs: Array, kernel: Array, bias: Array | None, *, dtype: Any) -> tuple[Array, Array, Array | None]:
    """What a product is computed in; a bias stays float32, so that the sum that its gradient is becomes one."""
    return inputs.astype(dtype), kernel.astype(dtype), None if bias is None else bias.astype(jnp.float32)


class Dense(nn.Dense):
    """Flax's linear layer, the gradient of its bias summed in float32."""

    dtype: Any = jnp.float32
    promote_dtype: Any = staticmethod(_promote)

    def __call__(self, x: Array) -> Array:
        """f[..., I] -> f[..., features]."""
        return super().__call__(x).astype(self.dtype)


class Conv(nn.Conv):
    """Flax's convolution, the gradient of its bias summed in float32."""

    dtype: Any = jnp.float32
    promote_dtype: Any = staticmethod(_promote)

    def __call__(self, x: Array) -> Array:
        """f[N, h, w, c] -> f[N, h', w', features]."""
        return super().__call__(x).astype(self.dtype)
