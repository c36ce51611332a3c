"""Samplers: from noise to latents by repeated denoising, as pure functions.

Legend: N images, h x w x c latents, S sampling steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dreamllm_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod

Denoiser = Callable[[Float[Array, "N h w c"], Int[Array, "N"]], Float[Array, "N h w c"]]


def trailing_timesteps(num_train_timesteps: int, steps: int) -> Int[np.ndarray, "S"]:
    """Equally spaced timesteps that begin at the last, descending (Lin et al. 2024, table 2; diffusers' "trailing").

    Raises:
      ValueError: if there are more steps than timesteps.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"the number of sampling steps must lie in 1 ... {num_train_timesteps}, got {steps}")
    return np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / steps)).astype(np.int32)[:steps] - 1


def guided(
    denoise: Callable[[Array, Array, Array], Array],
    condition: Float[Array, "N Q C"],
    null_condition: Float[Array, "N Q C"],
    scale: Float[Array, ""] | float,
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022): null + scale · (conditioned - null), in one doubled batch."""
    both = jnp.concatenate([null_condition, condition])

    def guided_denoise(latents, timesteps):
        doubled = denoise(jnp.concatenate([latents, latents]), jnp.concatenate([timesteps, timesteps]), both)
        null, conditioned = jnp.split(doubled, 2)
        return null + scale * (conditioned - null)

    return guided_denoise


def ddim(
    denoise: Denoiser, noise: Float[Array, "N h w c"], config: ScheduleConfig, steps: int
) -> Float[Array, "N h w c"]:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with eta 0; diffusers' `DDIMScheduler`, trailing timesteps).

    Args:
      denoise: predicts noise or velocity, as `config.prediction_type` says, from scaled noisy latents.
      noise: standard normal start.

    Returns:
      Scaled latents.
    """
    alphas = alphas_cumprod(config)
    timesteps = trailing_timesteps(config.num_train_timesteps, steps)
    # After the last step nothing of the noise is left: alpha is 1 there.
    pairs = jnp.asarray(alphas[timesteps]), jnp.asarray(np.append(alphas[timesteps[1:]], np.float32(1.0)))

    def step(latents, xs):
        timestep, alpha, next_alpha = xs
        predicted = denoise(latents, jnp.full(latents.shape[:1], timestep))
        if config.prediction_type == "epsilon":
            clean = (latents - jnp.sqrt(1 - alpha) * predicted) / jnp.sqrt(alpha)
            epsilon = predicted
        else:
            clean = jnp.sqrt(alpha) * latents - jnp.sqrt(1 - alpha) * predicted
            epsilon = jnp.sqrt(alpha) * predicted + jnp.sqrt(1 - alpha) * latents
        return jnp.sqrt(next_alpha) * clean + jnp.sqrt(1 - next_alpha) * epsilon, None

    return jax.lax.scan(step, noise, (jnp.asarray(timesteps), *pairs))[0]
