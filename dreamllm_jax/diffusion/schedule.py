"""The noise schedule of a denoising diffusion model and what a loss needs of it.

Legend: N images, h x w x c latents, T training timesteps.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PredictionType = Literal["epsilon", "v_prediction"]
VelocityWeights = Literal["original", "paper"]


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Names and defaults of Stable Diffusion's `scheduler_config.json`."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    prediction_type: PredictionType = "epsilon"

    def __post_init__(self):
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be positive, got {self.num_train_timesteps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"0 < beta_start <= beta_end < 1 must hold, got {self.beta_start} and {self.beta_end}")


# What a scheduler_config.json may hold beside ScheduleConfig's fields and be read without loss for training: settings
# of samplers, and options that are off.
_OFF = {"trained_betas": None, "rescale_betas_zero_snr": False, "thresholding": False}


def schedule_config_from_diffusers(config: Mapping[str, Any]) -> ScheduleConfig:
    """Reads a diffusers `scheduler_config.json`.

    Raises:
      ValueError: for a setting that changes the schedule and is not supported, naming it.
    """
    for name, off in _OFF.items():
        if config.get(name, off) != off:
            raise ValueError(f"scheduler setting {name}={config[name]!r} is not supported (only {off!r})")
    names = {field.name for field in dataclasses.fields(ScheduleConfig)}
    read = ScheduleConfig(**{name: value for name, value in config.items() if name in names})
    if read.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {read.prediction_type!r} is not supported (epsilon, v_prediction)")
    alphas_cumprod(read)
    return read


def alphas_cumprod(config: ScheduleConfig) -> Float[np.ndarray, " T"]:
    """Products of 1 - beta up to each timestep (Ho et al. 2020, eq. 4; diffusers' `DDPMScheduler`), in float32.

    Raises:
      ValueError: for an unknown `beta_schedule`.
    """
    steps = config.num_train_timesteps
    if config.beta_schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, steps, dtype=np.float64)
    elif config.beta_schedule == "scaled_linear":
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, steps, dtype=np.float64) ** 2
    elif config.beta_schedule == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, eq. 17
        bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    else:
        raise ValueError(f"unknown beta_schedule {config.beta_schedule!r}")
    return np.cumprod(1.0 - betas).astype(np.float32)


def _at(values: np.ndarray, timesteps: Int[Array, " N"]) -> Float[Array, "N 1 1 1"]:
    return jnp.asarray(values)[timesteps][:, None, None, None]


def add_noise(
    alphas: Float[np.ndarray, " T"],
    latents: Float[Array, "N h w c"],
    noise: Float[Array, "N h w c"],
    timesteps: Int[Array, " N"],
) -> Float[Array, "N h w c"]:
    """sqrt(a) x + sqrt(1 - a) n: the forward process at `timesteps`."""
    a = _at(alphas, timesteps)
    return jnp.sqrt(a) * latents + jnp.sqrt(1.0 - a) * noise


def velocity(
    alphas: Float[np.ndarray, " T"],
    latents: Float[Array, "N h w c"],
    noise: Float[Array, "N h w c"],
    timesteps: Int[Array, " N"],
) -> Float[Array, "N h w c"]:
    """sqrt(a) n - sqrt(1 - a) x: the target of v-prediction (Salimans and Ho 2022)."""
    a = _at(alphas, timesteps)
    return jnp.sqrt(a) * noise - jnp.sqrt(1.0 - a) * latents


def min_snr_weights(
    alphas: Float[np.ndarray, " T"],
    timesteps: Int[Array, " N"],
    gamma: float,
    prediction_type: PredictionType,
    velocity: VelocityWeights = "original",
) -> Float[Array, " N"]:
    """min-SNR weights of the squared errors, with s the signal-to-noise ratio (Hang et al. 2023, arXiv 2303.09556).

    For noise min(s, gamma) / s. For velocity the paper has min(s, gamma) / (s + 1) ("paper"), as diffusers' training
    scripts have it now; DreamLLM's program has min(s + 1, gamma) / (s + 1) ("original"), as they had it then.
    """
    a = jnp.asarray(alphas)[timesteps]
    snr = a / (1.0 - a)
    if prediction_type == "epsilon":
        return jnp.minimum(snr, gamma) / snr
    return jnp.minimum(snr + (velocity == "original"), gamma) / (snr + 1.0)
