"""Samplers: from noise to latents by repeated denoising, as pure functions.

Every sampler here is linear in what it has at hand: the latents x, the clean latents x0 that the model's prediction
stands for, those of the two steps before, and fresh noise. So a sampler is a table of coefficients (`Steps`), computed
beforehand in float64 (`ddpm_samplers`, `flow_samplers`), and one scanned loop runs them all. diffusers' schedulers are
the reference, oddities included: DDIM steps down by the same number of timesteps whatever their spacing, and Euler's
method shifts the ends of a flow's times twice.

Legend: N images, h x w x c latents, S sampling steps.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

Denoiser = Callable[[Float[Array, "N h w c"], Float[Array, " N"]], Float[Array, "N h w c"]]
Name = Literal["ddpm", "ddim", "dpmpp_2m", "unipc", "euler", "euler_ancestral"]
Spacing = Literal["leading", "linspace", "trailing"]


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How to sample; the settings' names are diffusers' where it has them.

    Attributes:
      name: "ddpm" (Ho et al. 2020), "ddim" (Song et al. 2021), "dpmpp_2m" (DPM-Solver++ of second order, Lu et al.
        2022), "unipc" (Zhao et al. 2023, of second order), "euler" or "euler_ancestral" (Karras et al. 2022, as in
        k-diffusion). A flow has "dpmpp_2m", "unipc" and "euler". None is the image decoder's own
        (`default_sampler`), which it puts there by `named`.
      steps: how often the model is asked.
      timestep_spacing: which timesteps: "trailing" begins at the last one (Lin et al. 2024), "leading" is what Stable
        Diffusion was published with, "linspace" has both ends.
      steps_offset: added to the timesteps of "leading".
      set_alpha_to_one: DDIM ends without noise; otherwise at the first timestep's.
      use_karras_sigmas: noise levels as Karras et al. 2022 (eq. 5) space them: "dpmpp_2m", "unipc" and "euler".
      eta: how much noise DDIM adds at each step: 0 none, 1 as DDPM does.
    """

    name: Name | None = None
    steps: int = 50
    timestep_spacing: Spacing = "trailing"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    use_karras_sigmas: bool = False
    eta: float = 0.0

    def __post_init__(self):
        for field, value, known in (
            ("name", self.name, (None, *get_args(Name))),
            ("timestep_spacing", self.timestep_spacing, get_args(Spacing)),
        ):
            if value not in known:
                raise ValueError(f"no sampler has {field}={value!r}; there are {', '.join(filter(None, known))}")
        if self.steps < 1 or self.steps_offset < 0 or not 0 <= self.eta <= 1:
            raise ValueError(
                f"steps must be positive, steps_offset not negative, eta in 0 ... 1; got {self.steps}, "
                f"{self.steps_offset}, {self.eta}"
            )
        if self.use_karras_sigmas and self.name not in (None, "dpmpp_2m", "unipc", "euler"):
            raise ValueError(f"use_karras_sigmas is for dpmpp_2m, unipc and euler, not for {self.name}")
        if self.eta and self.name not in (None, "ddim"):
            raise ValueError(f"eta is for ddim, not for {self.name}")

    def named(self, default: Name) -> "SamplerConfig":
        """The same, of this name where it has none.

        Raises:
          ValueError: a setting that the sampler of this name does not have.
        """
        return dataclasses.replace(self, name=self.name or default)


class Steps(NamedTuple):
    """A sampler's coefficients, one row a step.

    The model is asked at `timestep` with `scale` x. Its prediction m stands for x0 = `clean_x` x + `clean_m` m; then
    x := `x` x + `x0` x0 + `before` (x0 of the step before) + `earlier` (of the one before that) + `noise` (standard
    normal).
    """

    timestep: Float[np.ndarray, " S"]
    scale: Float[np.ndarray, " S"]
    clean_x: Float[np.ndarray, " S"]
    clean_m: Float[np.ndarray, " S"]
    x: Float[np.ndarray, " S"]
    x0: Float[np.ndarray, " S"]
    before: Float[np.ndarray, " S"]
    earlier: Float[np.ndarray, " S"]
    noise: Float[np.ndarray, " S"]


Before = tuple[Float[Array, "N h w c"], Float[Array, "N h w c"]]


def advance(
    step: Steps,
    denoise: Denoiser,
    x: Float[Array, "N h w c"],
    before: Before,
    noise: Float[Array, "N h w c"] | float,
) -> tuple[Float[Array, "N h w c"], Before]:
    """One row of a table: the next latents, and the `before` of the next row.

    Args:
      before: the clean latents that the model saw at the step before, and at the one before that.
    """
    predicted = denoise(step.scale * x, jnp.full(x.shape[:1], step.timestep))
    clean = step.clean_x * x + step.clean_m * predicted
    last, earlier = before
    x = step.x * x + step.x0 * clean + step.before * last + step.earlier * earlier + step.noise * noise
    return x, (clean, last)


def sample(
    denoise: Denoiser,
    keys: Key[Array, " N"],
    shape: tuple[int, int, int],
    steps: Steps,
    start: float,
) -> Float[Array, "N h w c"]:
    """Latents from noise.

    Args:
      denoise: predicts what the table takes for its m, from noisy latents at a timestep.
      keys: one an image, which depends on no other.
      shape: (h, w, c) of the latents.
      steps, start: a sampler's table, and the scale of the noise it begins with.

    Returns:
      Scaled latents.
    """

    def normal(number) -> Float[Array, "N h w c"]:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape))(keys)

    def body(carry, xs):
        number, step = xs
        noise = normal(number) if any(steps.noise) else 0.0
        return advance(step, denoise, *carry, noise), None

    x = start * normal(0)
    nothing, numbers = jnp.zeros_like(x), jnp.arange(1, len(steps.timestep) + 1)
    return jax.lax.scan(body, (x, (nothing, nothing)), (numbers, jax.tree.map(jnp.asarray, steps)))[0][0]


def guided(
    denoise: Callable[[Array, Array, Any], Array],
    conditions: Sequence[Any],
    scales: Sequence[Float[Array, ""] | float],
    rescale: Float[Array, ""] | float = 0.0,
    interval: tuple[Float[Array, ""] | float, Float[Array, ""] | float] = (0.0, math.inf),
) -> Denoiser:
    """Classifier-free guidance: from the first condition's prediction by a scaled step to each of the next ones'.

    Of two conditions it is null + scale · (conditioned - null) (Ho and Salimans 2022); of three, nothing, images alone
    and images with text, InstructPix2Pix's of images and text (Brooks et al. 2023, eq. 3). All are asked in one batch.

    Args:
      conditions: arrays [N, ...] or pytrees of them, the one that is painted from last.
      scales: of the steps, one fewer.
      rescale: how far each image's standard deviation is brought back to that of the last prediction (Lin et al. 2024,
        section 3.4): 0 not at all, 1 all the way.
      interval: the timesteps, both ends included, between which there is guidance (Kynkäänniemi et al. 2024, arXiv
        2404.07724); beyond them the last prediction counts alone.
    """
    count, joined = len(conditions), jax.tree.map(lambda *parts: jnp.concatenate(parts), *conditions)

    def guided_denoise(latents, timesteps):
        repeated = denoise(jnp.concatenate([latents] * count), jnp.concatenate([timesteps] * count), joined)
        result, *others = predictions = jnp.split(repeated, count)
        for scale, before, after in zip(scales, predictions[:-1], others, strict=True):
            result = result + scale * (after - before)
        conditioned = predictions[-1]
        axes = tuple(range(1, result.ndim))
        ratio = conditioned.std(axes, keepdims=True) / result.std(axes, keepdims=True)
        result = jnp.where(rescale == 0, result, (rescale * ratio + 1 - rescale) * result)
        inside = (interval[0] <= timesteps) & (timesteps <= interval[1])
        return jnp.where(inside.reshape(-1, *(1,) * len(axes)), result, conditioned)

    return guided_denoise
