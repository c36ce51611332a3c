"""Painting: hidden states at the dream queries -> pictures.

Legend: N images, Q dream queries, E llama width, C condition width, H x W pixels.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dreamllm_jax.diffusion.samplers import ddim, guided
from dreamllm_jax.models.dreamllm import DreamLLM


@functools.partial(jax.jit, static_argnames=("model", "size", "steps", "guided_by_null"))
def _paint(model, params, hidden, seeds, guidance, size: int, steps: int, guided_by_null: bool):
    apply = functools.partial(model.apply, {"params": params})
    condition = apply(hidden, method="condition")
    noise = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), model.config.latent_shape(size)))(seeds)

    def denoise(latents, timesteps, condition):
        return apply(latents, timesteps, condition, method="denoise")

    if guided_by_null:
        null = apply(apply(method="null_hidden")[None], method="condition")
        denoiser = guided(denoise, condition, jnp.broadcast_to(null, condition.shape), guidance)
    else:
        denoiser = functools.partial(denoise, condition=condition)
    latents = ddim(denoiser, noise, model.config.schedule, steps)
    pixels = apply(latents, method="paint").astype(jnp.float32)
    return jnp.round(jnp.clip(pixels * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


def paint(
    model: DreamLLM,
    params: dict,
    hidden: Float[Array, "N Q E"],
    seeds: Array,
    *,
    size: int,
    steps: int = 50,
    guidance: float = 3.5,
) -> UInt8[Array, "N H W 3"]:
    """Paints an image from the llama's hidden states at each image's queries.

    Args:
      hidden: as from `generation.text.read_queries`.
      seeds: u32[N], one an image; an image depends on its own seed and hidden states alone.
      size: pixels on a side.
      steps: sampling steps.
      guidance: classifier-free guidance scale; 1 leaves it out (no null condition is computed).
    """
    seeds = jnp.asarray(seeds, jnp.uint32)
    return _paint(model, params, hidden, seeds, jnp.float32(guidance), size, steps, guidance != 1.0)
