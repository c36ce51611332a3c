"""The samplers of DDPM's noise process, as tables (`samplers.Steps`).

Legend: S sampling steps, T training timesteps.
"""

import numpy as np
from jaxtyping import Float

from dreamllm_jax.diffusion import multistep
from dreamllm_jax.diffusion.samplers import SamplerConfig, Steps
from dreamllm_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod


def make_steps(schedule: ScheduleConfig, config: SamplerConfig) -> tuple[Steps, float]:
    """The table of a sampler, DDIM if none is named, and the scale of the noise it begins with.

    Raises:
      ValueError: more steps than the schedule has timesteps, or steps beyond the last.
    """
    total = schedule.num_train_timesteps
    makers = {"ddpm": _ddpm, "ddim": _ddim, "euler": _euler, "euler_ancestral": _euler}
    make = makers.get(config.name, _multistep)
    most = total - (make is _multistep)
    if config.steps > most:
        raise ValueError(f"the number of sampling steps must lie in 1 ... {most}, got {config.steps}")
    alphas = alphas_cumprod(schedule).astype(np.float64)
    steps, start = make(alphas, schedule.prediction_type, config)
    if steps[0].max() > total - 1:
        raise ValueError(f"steps_offset={config.steps_offset} leads beyond the {total} timesteps: lower it")
    return Steps(*(np.asarray(column, np.float32) for column in steps)), start


def timesteps_of(total: int, config: SamplerConfig, last: int = 0) -> Float[np.ndarray, " S"]:
    """Descending timesteps; `last` more are counted and left out (a multistep solver's end)."""
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
    return (timesteps, ones, *_clean(now, prediction_type), kept, x0, zeros, zeros, deviation), 1.0


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
    return (timesteps, ones, *_clean(now, prediction_type), x, x0, zeros, zeros, noise), 1.0


def _sigmas(alphas: np.ndarray, timesteps: np.ndarray, config: SamplerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Ratios of noise to signal at the timesteps and, last, none; perhaps respaced, and the timesteps with them."""
    all_sigmas = np.sqrt((1 - alphas) / alphas)
    sigmas = np.interp(timesteps, np.arange(len(alphas)), all_sigmas)
    if config.use_karras_sigmas:
        rho, ramp = 7.0, np.linspace(0, 1, config.steps)
        # A multistep solver's reach over the whole schedule, Euler's over the timesteps.
        ends = sigmas[[0, -1]] if config.name == "euler" else all_sigmas[[-1, 0]]
        largest, smallest = ends ** (1 / rho)
        sigmas = (largest + ramp * (smallest - largest)) ** rho
        timesteps = np.interp(np.log(sigmas), np.log(all_sigmas), np.arange(len(alphas)))
        if config.name != "euler":
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
    return (timesteps, 1 / np.sqrt(variance), *clean, ratio, 1 - ratio, 0 * now, 0 * now, up), float(start)


def _multistep(alphas: np.ndarray, prediction_type: str, config: SamplerConfig) -> tuple[tuple, float]:
    """DPM-Solver++ or UniPC, see `multistep`."""
    sigmas, timesteps = _sigmas(alphas, timesteps_of(len(alphas), config, last=1), config)
    signal = 1 / np.sqrt(sigmas**2 + 1)
    columns = {"dpmpp_2m": multistep.dpmpp_2m, "unipc": multistep.unipc}[config.name](signal, sigmas * signal)
    ones, zeros = np.ones(config.steps), np.zeros(config.steps)
    return (timesteps, ones, *_clean(signal[:-1] ** 2, prediction_type), *columns, zeros), 1.0
