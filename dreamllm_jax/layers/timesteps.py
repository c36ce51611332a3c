"""How a denoiser is told the time: sinusoids of the timestep, and a perceptron on them.

Legend: N images, T time embedding width.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dreamllm_jax.layers.blocks import EXACT_DENSE, Dense


def timestep_embedding(
    timesteps: jax.Array, width: int, flip_sin_to_cos: bool = True, freq_shift: float = 0
) -> jax.Array:
    """Sinusoidal embedding of the timesteps, i32[N] -> f32[N,width] (diffusers' `get_timestep_embedding`).

    The frequencies are float32 constants made on the host: at timestep 1000 the last bit of one is worth 6e-5 radians,
    so they must not depend on the device's exponential.
    """
    half = width // 2
    exponents = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    angles = timesteps[:, None].astype(jnp.float32) * np.exp(exponents)
    waves = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, width % 2)))


class TimestepEmbedding(nn.Module):
    """The two-layer perceptron on the sinusoidal embedding; float32, for bfloat16 cannot tell near timesteps apart."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N,c] -> f[N,T]."""
        linear = functools.partial(Dense, self.width, kernel_init=EXACT_DENSE)
        return linear(name="linear_2")(nn.silu(linear(name="linear_1")(x)))
