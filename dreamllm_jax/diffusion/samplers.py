"""Samplers: from noise to latents by repeated denoising, as pure functions.

Every sampler here is linear in what it has at hand: the latents x, the clean latents x0 that the model's prediction
stands for, those of the step before, and fresh noise. So a sampler is a table of coefficients (`Steps`), computed
beforehand in float64, and one scanned loop runs them all. diffusers' schedulers are the reference, an oddity included:
DDIM steps down by the same number of timesteps whatever their spacing.

Legend: N images, h x w x c latents, S sampling steps, T training timesteps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dreamllm_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod

Denoiser = Callable[[Float[Array, "N h w c"], Float[Array, " N"]], Float[Array, "N h w c"]]
Name = Literal["ddpm", "ddim", "dpmpp_2m", "euler", "euler_ancestral"]
Spacing = Literal["leading", "linspace", "trailing"]


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How to sample; the settings' names are diffusers' where it has them.

    Attributes:
      name: "ddpm" (Ho et al. 2020), "ddim" (Song et al. 2021), "dpmpp_2m" (DPM-Solver++ of second order, Lu et al.
        2022), "euler" or "euler_ancestral" (Karras et al. 2022, as in k-diffusion).
      steps: how often the model is asked.
      timestep_spacing: which timesteps: "trailing" begins at the last one (Lin et al. 2024), "leading" is what Stable
        Diffusion was published with, "linspace" has both ends.
      steps_offset: added to the timesteps of "leading".
      set_alpha_to_one: DDIM ends without noise; otherwise at the first timestep's.
      use_karras_sigmas: noise levels as Karras et al. 2022 (eq. 5) space them: "dpmpp_2m" and "euler".
      eta: how much noise DDIM adds at each step: 0 none, 1 as DDPM does.
    """

    name: Name = "ddim"
    steps: int = 50
    timestep_spacing: Spacing = "trailing"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    use_karras_sigmas: bool = False
    eta: float = 0.0

    def __post_init__(self):
        for field, value, known in (
            ("name", self.name, get_args(Name)),
            ("timestep_spacing", self.timestep_spacing, get_args(Spacing)),
        ):
            if value not in known:
                raise ValueError(f"no sampler has {field}={value!r}; there are {', '.join(known)}")
        if self.steps < 1 or self.steps_offset < 0 or not 0 <= self.eta <= 1:
            raise ValueError(
                f"steps must be positive, steps_offset not negative, eta in 0 ... 1; got {self.steps}, "
                f"{self.steps_offset}, {self.eta}"
            )
        if self.use_karras_sigmas and self.name not in ("dpmpp_2m", "euler"):
            raise ValueError(f"use_karras_sigmas is for dpmpp_2m and euler, not for {self.name}")
        if self.eta and self.name != "ddim":
            raise ValueError(f"eta is for ddim, not for {self.name}")


class Steps(NamedTuple):
    """A sampler's coefficients, one row a step.

    The model is asked at `timestep` with `scale` x. Its prediction m stands for x0 = `clean_x` x + `clean_m` m; then
    x := `x` x + `x0` x0 + `before` (x0 of the step before) + `noise` (standard normal).
    """

    timestep: Float[np.ndarray, " S"]
    scale: Float[np.ndarray, " S"]
    clean_x: Float[np.ndarray, " S"]
    clean_m: Float[np.ndarray, " S"]
    x: Float[np.ndarray, " S"]
    x0: Float[np.ndarray, " S"]
    before: Float[np.ndarray, " S"]
    noise: Float[np.ndarray, " S"]


def make_steps(schedule: ScheduleConfig, config: SamplerConfig) -> tuple[Steps, float]:
    """The table of a sampler, and the scale of the noise it begins with.

    Raises:
      ValueError: more steps than the schedule has timesteps, or steps beyond the last.
    """
    total = schedule.num_train_timesteps
    makers = {"ddpm": _ddpm, "ddim": _ddim, "dpmpp_2m": _dpmpp_2m, "euler": _euler, "euler_ancestral": _euler}
    make = makers[config.name]
    most = total - (make is _dpmpp_2m)
    if config.steps > most:
        raise ValueError(f"the number of sampling steps must lie in 1 ... {most}, got {config.steps}")
    alphas = alphas_cumprod(schedule).astype(np.float64)
    steps, start = make(alphas, schedule.prediction_type, config)
    if steps[0].max() > total - 1:
        raise ValueError(f"steps_offset={config.steps_offset} leads beyond the {total} timesteps: lower it")
    return Steps(*(np.asarray(column, np.float32) for column in steps)), start


def advance(
    step: Steps,
    denoise: Denoiser,
    x: Float[Array, "N h w c"],
    before: Float[Array, "N h w c"],
    noise: Float[Array, "N h w c"] | float,
) -> tuple[Float[Array, "N h w c"], Float[Array, "N h w c"]]:
    """One row of a table: the next latents, and the clean ones the model saw in these."""
    predicted = denoise(step.scale * x, jnp.full(x.shape[:1], step.timestep))
    clean = step.clean_x * x + step.clean_m * predicted
    return step.x * x + step.x0 * clean + step.before * before + step.noise * noise, clean


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
    numbers = jnp.arange(1, len(steps.timestep) + 1)
    return jax.lax.scan(body, (x, jnp.zeros_like(x)), (numbers, jax.tree.map(jnp.asarray, steps)))[0][0]


def guided(
    denoise: Callable[[Array, Array, Any], Array],
    condition: Any,
    null_condition: Any,
    scale: Float[Array, ""] | float,
    rescale: Float[Array, ""] | float = 0.0,
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022): null + scale · (conditioned - null), in one doubled batch.

    Args:
      condition, null_condition: arrays [N, ...] or pytrees of them.
      rescale: how far each image's standard deviation is brought back to that of the conditioned prediction (Lin et al.
        2024, section 3.4): 0 not at all, 1 all the way.
    """
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), null_condition, condition)

    def guided_denoise(latents, timesteps):
        doubled = denoise(jnp.concatenate([latents, latents]), jnp.concatenate([timesteps, timesteps]), both)
        null, conditioned = jnp.split(doubled, 2)
        result = null + scale * (conditioned - null)
        axes = tuple(range(1, result.ndim))
        ratio = conditioned.std(axes, keepdims=True) / result.std(axes, keepdims=True)
        return jnp.where(rescale == 0, result, (rescale * ratio + 1 - rescale) * result)

    return guided_denoise


def timesteps_of(total: int, config: SamplerConfig, last: int = 0) -> Float[np.ndarray, " S"]:
    """Descending timesteps; `last` more are counted and left out (DPM-Solver's end)."""
    count = config.steps + last
    if config.timestep_spacing == "linspace":
        spaced = np.linspace(0, total - 1, count)[::-1]
        return (spaced if config.name.startswith("euler") else np.round(spaced))[: config.steps]
    if config.timestep_spacing == "leading":
        return (np.arange(count) * (total // count))[::-1][: config.steps].astype(np.float64) + config.steps_offset
    return np.round(np.arange(total, 0, -total / config.steps))[: config.steps] - 1


def _at(alphas: np.ndarray, timesteps: np.ndarray, before_all: float) -> np.ndarray:
    index = timesteps.astype(int)
    return np.where(index >= 0, alphas[np.clip(index, 0, len(alphas) - 1)], before_all)


def _clean(alpha: np.ndarray, prediction_type: str) -> tuple[np.ndarray, np.ndarray]:
    """x0 = first · x + second · prediction, for x of variance one."""
    if prediction_type == "epsilon":
        return 1 / np.sqrt(alpha), -np.sqrt((1 - alpha) / alpha)
    return np.sqrt(alpha), -np.sqrt(1 - alpha)


def _ddim(alphas: np.ndarray, prediction_type: str, config: SamplerConfig) -> tuple[tuple, float]:
    """Song et al. 2021, eq. 12 and 16."""
    timesteps = timesteps_of(len(alphas), config)
    now = _at(alphas, timesteps, 1.0)
    then = _at(alphas, timesteps - len(alphas) // config.steps, 1.0 if config.set_alpha_to_one else alphas[0])
    deviation = config.eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
    # The noise in x is (x - sqrt(now) x0) / sqrt(1 - now); so much of it stays.
    kept = np.sqrt(np.maximum(1 - then - deviation**2, 0)) / np.sqrt(1 - now)
    ones, zeros = np.ones_like(now), np.zeros_like(now)
    x0 = np.sqrt(then) - kept * np.sqrt(now)
    return (timesteps, ones, *_clean(now, prediction_type), kept, x0, zeros, deviation), 1.0


def _ddpm(alphas: np.ndarray, prediction_type: str, config: SamplerConfig) -> tuple[tuple, float]:
    """Ho et al. 2020, eq. 7, with the smaller variance."""
    timesteps = timesteps_of(len(alphas), config)
    now = _at(alphas, timesteps, 1.0)
    then = np.append(now[1:], 1.0)
    beta = 1 - now / then
    x = np.sqrt(1 - beta) * (1 - then) / (1 - now)
    x0 = np.sqrt(then) * beta / (1 - now)
    noise = np.sqrt(np.maximum((1 - then) / (1 - now) * beta, 1e-20)) * (timesteps > 0)
    ones, zeros = np.ones_like(now), np.zeros_like(now)
    return (timesteps, ones, *_clean(now, prediction_type), x, x0, zeros, noise), 1.0


def _sigmas(alphas: np.ndarray, timesteps: np.ndarray, config: SamplerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Ratios of noise to signal at the timesteps and, last, none; perhaps respaced, and the timesteps with them."""
    all_sigmas = np.sqrt((1 - alphas) / alphas)
    sigmas = np.interp(timesteps, np.arange(len(alphas)), all_sigmas)
    if config.use_karras_sigmas:
        rho, ramp = 7.0, np.linspace(0, 1, config.steps)
        # DPM-Solver's reach over the whole schedule, Euler's over the timesteps.
        ends = all_sigmas[[-1, 0]] if config.name == "dpmpp_2m" else sigmas[[0, -1]]
        largest, smallest = ends ** (1 / rho)
        sigmas = (largest + ramp * (smallest - largest)) ** rho
        timesteps = np.interp(np.log(sigmas), np.log(all_sigmas), np.arange(len(alphas)))
        if config.name == "dpmpp_2m":
            timesteps = np.round(timesteps)
    return np.append(sigmas, 0.0), timesteps


def _euler(alphas: np.ndarray, prediction_type: str, config: SamplerConfig) -> tuple[tuple, float]:
    """Karras et al. 2022, algorithm 1 without its churn; and k-diffusion's ancestral variant of it."""
    sigmas, timesteps = _sigmas(alphas, timesteps_of(len(alphas), config), config)
    now, then = sigmas[:-1], sigmas[1:]
    up = then * np.sqrt(np.maximum(now**2 - then**2, 0)) / now if config.name == "euler_ancestral" else 0 * now
    ratio = np.sqrt(then**2 - up**2) / now  # x moves along (x - x0) / now
    variance = now**2 + 1
    if prediction_type == "epsilon":
        clean = np.ones_like(now), -now
    else:
        clean = 1 / variance, -now / np.sqrt(variance)
    largest = sigmas.max()
    start = largest if config.timestep_spacing != "leading" else np.sqrt(largest**2 + 1)
    return (timesteps, 1 / np.sqrt(variance), *clean, ratio, 1 - ratio, 0 * now, up), float(start)


def _dpmpp_2m(alphas: np.ndarray, prediction_type: str, config: SamplerConfig) -> tuple[tuple, float]:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2, midpoint; of first order at the first step and at the last."""
    sigmas, timesteps = _sigmas(alphas, timesteps_of(len(alphas), config, last=1), config)
    signal = 1 / np.sqrt(sigmas**2 + 1)
    deviation = sigmas * signal
    decay = sigmas[1:] / sigmas[:-1]  # exp of minus the step in log signal-to-noise
    gain = signal[1:] * (1 - decay)
    half = np.zeros(config.steps)  # the second order's correction, half of gain over the steps' ratio
    logs = -np.log(sigmas[:-1])
    if config.steps > 2:
        ratio = np.diff(logs)[:-1] / np.diff(logs)[1:]
        half[1:-1] = 0.5 * gain[1:-1] / ratio
    clean = _clean(signal[:-1] ** 2, prediction_type)
    ones, zeros = np.ones(config.steps), np.zeros(config.steps)
    return (timesteps, ones, *clean, deviation[1:] / deviation[:-1], gain + half, -half, zeros), 1.0
