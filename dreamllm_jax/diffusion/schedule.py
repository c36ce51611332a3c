"""The noise schedule of a denoising diffusion model and what a loss needs of it.

Legend: N images, h x w x c latents, T training timesteps.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PredictionType = Literal["epsilon", "v_prediction"]
VelocityWeights = Literal["original", "paper"]


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Names and defaults of Stable Diffusion's `scheduler_config.json`.

    Attributes:
      scheduler: the file's whole text, where the model came with one. How others sample stands there, which concerns
        nothing here: it goes out again as it came.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    prediction_type: PredictionType = "epsilon"
    scheduler: str = ""

    def __post_init__(self):
        if self.prediction_type not in get_args(PredictionType):
            known = ", ".join(get_args(PredictionType))
            raise ValueError(f"prediction_type {self.prediction_type!r} is not supported ({known})")
        require_timesteps(self.num_train_timesteps)
        require_scheduler(self.scheduler)
        betas = self.beta_start, self.beta_end
        numbers = all(isinstance(beta, int | float) and not isinstance(beta, bool) for beta in betas)
        if not numbers or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"0 < beta_start <= beta_end < 1 must hold, got {betas[0]!r} and {betas[1]!r}")
        alphas = alphas_cumprod(self)
        if not (alphas[0] < 1 and alphas[-1] > 0):
            raise ValueError(
                f"this noise schedule keeps {alphas[0]} of the signal at its first timestep and {alphas[-1]} at its "
                "last: there must be some noise at the first and some signal at the last"
            )


_MOST_TIMESTEPS = 1_000_000


def require_timesteps(number: Any) -> None:
    """Raises `ValueError` unless a schedule can have so many training timesteps."""
    if type(number) is not int or not 1 <= number <= _MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps must be a whole number from 1 to {_MOST_TIMESTEPS:,}, got {number!r}")


def require_scheduler(text: str) -> None:
    """Raises `ValueError` unless it is empty or the text of a diffusers `scheduler_config.json`."""
    try:
        known = not text or isinstance(json.loads(text), dict)
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"scheduler is not the text of a scheduler_config.json: {text:.60}")


# diffusers' schedulers over this noise process, and the betas that they have where a file is silent.
_EARLY, _KARRAS, _DISTILLED = (1e-4, 0.02, "linear"), (0.00085, 0.012, "linear"), (0.00085, 0.012, "scaled_linear")
_SCHEDULERS = {
    "DDPMScheduler": _EARLY,
    "DDPMParallelScheduler": _EARLY,
    "DDIMScheduler": _EARLY,
    "DDIMParallelScheduler": _EARLY,
    "PNDMScheduler": _EARLY,
    "LMSDiscreteScheduler": _EARLY,
    "EulerDiscreteScheduler": _EARLY,
    "EulerAncestralDiscreteScheduler": _EARLY,
    "DPMSolverMultistepScheduler": _EARLY,
    "DPMSolverSinglestepScheduler": _EARLY,
    "DEISMultistepScheduler": _EARLY,
    "UniPCMultistepScheduler": _EARLY,
    "SASolverScheduler": _EARLY,
    "HeunDiscreteScheduler": _KARRAS,
    "KDPM2DiscreteScheduler": _KARRAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS,
    "DPMSolverSDEScheduler": _KARRAS,
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
}
_BETAS = ("beta_start", "beta_end", "beta_schedule")
# Settings by which even these are of another process, and what they are where it is this one.
_OFF = {
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False, None),
    "use_flow_sigmas": (False, None),
    "timestep_type": ("discrete", None),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
# What Stable Diffusion was published with, for models that did not come with a scheduler.
_PUBLISHED = {
    "_class_name": "PNDMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def schedule_config_from_diffusers(config: Mapping[str, Any]) -> ScheduleConfig:
    """Reads a diffusers `scheduler_config.json`.

    Raises:
      ValueError: for a scheduler of another noise process, or a setting that changes it, naming it.
    """
    for name, off in _OFF.items():
        if config.get(name) not in off:
            raise ValueError(f"scheduler setting {name}={config[name]!r} is not supported (only {off[0]!r})")
    names, kind = {field.name for field in dataclasses.fields(ScheduleConfig)}, config.get("_class_name")
    betas = dict(zip(_BETAS, _SCHEDULERS.get(kind, _EARLY), strict=True))
    given = {name: value for name, value in config.items() if name in names}
    read = ScheduleConfig(**betas | given | {"scheduler": json.dumps(dict(config))})
    if kind is None and (silent := [name for name in _BETAS if name not in config]):
        raise ValueError(f"it says neither _class_name nor {', '.join(silent)}: which noise schedule is not known")
    if kind is not None and kind not in _SCHEDULERS:
        raise ValueError(
            f"{kind} is of another noise process than this image decoder learns: noise or velocity over DDPM's betas, "
            "as with DDPM, DDIM, PNDM, Euler, DPM-Solver++ and their like"
        )
    return read


def schedule_config_to_diffusers(config: ScheduleConfig) -> dict[str, Any]:
    """A diffusers `scheduler_config.json`: the one that the model came with, but for what is otherwise since."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name != "scheduler"}
    if not config.scheduler:
        return _PUBLISHED | fields
    kept = json.loads(config.scheduler)
    came = schedule_config_from_diffusers(kept)
    return kept | {name: value for name, value in fields.items() if value != getattr(came, name)}


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
