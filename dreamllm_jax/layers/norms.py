"""Norms that are functions of their weights."""

import functools

import jax
import jax.numpy as jnp

from dreamllm_jax.layers.linear import spread

Array = jax.Array


def rms_norm(x: Array, scale: Array, eps: float, unit_offset: bool = False) -> Array:
    """Root mean square normalisation (arXiv 1910.07467), its statistics in float32.

    Args:
      x: f[..., E].
      scale: f[E].
      eps: added to the mean square.
      unit_offset: multiply by 1 + scale, in float32 (Gemma).

    Returns:
      f[..., E] in the type of `x`.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if unit_offset:
        return (x32 * (1 + spread(scale, x.shape, jnp.float32))).astype(x.dtype)
    return x32.astype(x.dtype) * spread(scale, x.shape, x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3,))
def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Layer normalisation without weights, scaled by 1 + `scale` and shifted, in float32.

    Args:
      x: f[N,T,E].
      shift, scale: f32[N,E].
    """
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + eps) * (1 + scale[:, None]) + shift[:, None]
    return y.astype(x.dtype)
