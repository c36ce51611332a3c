"""Rectified flow (Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206): what a loss needs of it.

x_s = (1 - s) x + s n lies on the straight line from latents x to noise n; the model learns its velocity n - x.
diffusers' `FlowMatchEulerDiscreteScheduler` and its training scripts are the reference: times come from a table of T
noise levels that begins with pure noise.

Legend: N images, h x w x c latents, T training timesteps.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dreamllm_jax.diffusion.schedule import require_scheduler, require_timesteps

TimeShift = Literal["exponential", "linear"]
Density = Literal["uniform", "logit_normal", "mode"]
Weighting = Literal["none", "sigma_sqrt", "cosmap", "preconditioned"]
PredictionType = Literal["flow_prediction", "sample"]
LEAST_NOISE = 0.05  # below which the clean latents' error weighs no more (Li and He, arXiv 2511.13720)


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Names and defaults of diffusers' `scheduler_config.json` where it has them.

    Attributes:
      shift: how far noise levels are moved towards noise, 1 not at all (Esser et al., eq. 23): those of training, and
        of sampling if `sampling_shift`, the `flow_shift` of diffusers' multistep solvers, is None.
      use_dynamic_shifting: neither of them counts; the shift grows with the number of the denoiser's tokens, from
        `base_shift` at `base_image_seq_len` to `max_shift` at `max_image_seq_len`, linearly and beyond them too. What
        grows so is the shift's logarithm ("exponential") or the shift itself ("linear"), by `time_shift_type`.
      integer_timesteps: samplers tell the denoiser timesteps without their fraction, as those solvers do.
      density: which times are learned (Esser et al., section 3.1): u is "uniform", or the logistic function of a normal
        number of `logit_mean` and `logit_std`, or is drawn with heavier tails by `mode_scale`.
      weighting: of squared errors, see `weights`.
      prediction_type: what the denoiser gives, the velocity ("flow_prediction") or the clean latents ("sample"; Li and
        He, arXiv 2511.13720: noise need not pass through a denoiser that is narrow for its patches). The error is that
        of the velocity either way.
      input_scale: what noisy latents are multiplied by before the denoiser sees them (the c_in of Karras et al.,
        arXiv 2206.00364, here a constant): a small one keeps noise from drowning what a denoiser that is trained from
        scratch is told of places.
      scheduler: the file's whole text, where the model came with one. How others sample stands there, which concerns
        nothing here: it goes out again as it came.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: TimeShift = "exponential"
    sampling_shift: float | None = None
    integer_timesteps: bool = False
    density: Density = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighting: Weighting = "none"
    prediction_type: PredictionType = "flow_prediction"
    input_scale: float = 1.0
    scheduler: str = ""

    def __post_init__(self):
        require_timesteps(self.num_train_timesteps)
        require_scheduler(self.scheduler)
        choices: dict[str, Any] = {"time_shift_type": TimeShift, "density": Density, "weighting": Weighting}
        choices["prediction_type"] = PredictionType
        for name, kinds in choices.items():
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"no flow has {name}={getattr(self, name)!r}; there are {', '.join(get_args(kinds))}")
        for name in ("use_dynamic_shifting", "integer_timesteps"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name, value in (("shift", self.shift), ("sampling_shift", self.sampling_shift)):
            if (name, value) != ("sampling_shift", None) and not (_is_number(value) and 0 < value <= _MOST_SHIFT):
                raise ValueError(f"{name} must be a positive number, at most {_MOST_SHIFT:g}, got {value!r}")
        if not (_is_number(self.logit_std) and self.logit_std > 0):
            raise ValueError(f"logit_std must be a positive number, got {self.logit_std!r}")
        if not (_is_number(self.input_scale) and self.input_scale > 0):
            raise ValueError(f"input_scale must be a positive number, got {self.input_scale!r}")
        for name in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "logit_mean"):
            if not _is_number(getattr(self, name)):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not 0 < self.base_image_seq_len < self.max_image_seq_len:
            raise ValueError(
                f"0 < base_image_seq_len < max_image_seq_len must hold, got {self.base_image_seq_len} and "
                f"{self.max_image_seq_len}"
            )
        if not (_is_number(self.mode_scale) and -1 <= self.mode_scale <= _MOST_SCALE):
            raise ValueError(f"mode_scale must lie in -1 ... {_MOST_SCALE:.4g}, got {self.mode_scale!r}")


_MOST_SHIFT = 100.0  # beyond which the greatest noise levels are the same in float32
_MOST_SCALE = 2 / (math.pi - 2)  # beyond which a u would have two times


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def dynamic_shift(config: FlowConfig, tokens: int) -> float:
    """The shift for so many tokens of the denoiser, as diffusers' `calculate_shift` and `time_shift` have it together.

    Raises:
      ValueError: a shift that is not positive, or too large.
    """
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = slope * tokens + config.base_shift - slope * config.base_image_seq_len
    shift = mu if config.time_shift_type == "linear" else math.exp(min(mu, 700.0))
    if not 0 < shift <= _MOST_SHIFT:
        raise ValueError(
            f"the shift for {tokens} tokens must be positive and at most {_MOST_SHIFT:g}, got {shift:.3g}: change "
            "base_shift, max_shift or the lengths that they are for"
        )
    return shift


def shifted(sigma: np.ndarray | float, shift: float) -> np.ndarray | float:
    """Noise levels from 0 to 1, moved towards 1 where the shift is greater than 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigmas(config: FlowConfig, tokens: int | None = None) -> Float[np.ndarray, " T"]:
    """The noise level at each index, from 1 down, in float32.

    Args:
      tokens: of the denoiser, for a dynamic shift. None leaves that out, as diffusers' training scripts do.
    """
    total = config.num_train_timesteps
    shift = config.shift
    if config.use_dynamic_shifting:
        shift = 1.0 if tokens is None else dynamic_shift(config, tokens)
    return shifted(np.arange(total, 0, -1) / total, shift).astype(np.float32)


def timesteps(config: FlowConfig, sigma: Float[Array, " N"]) -> Float[Array, " N"]:
    """What the denoiser is told of noise levels: T times them, not rounded."""
    return config.num_train_timesteps * sigma


def draw_time(config: FlowConfig, key: Key[Array, ""], shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
    """The random numbers that `index_of` takes: standard normal for "logit_normal", else uniform from 0 to 1."""
    if config.density == "logit_normal":
        return jax.random.normal(key, shape)
    return jax.random.uniform(key, shape)


def index_of(config: FlowConfig, draw: Float[Array, "..."]) -> Int[Array, "..."]:
    """The indices, into the table of `sigmas`, of random numbers from `draw_time`.

    diffusers' `compute_density_for_timestep_sampling`, whose u is a place in the table: great ones have little noise.
    """
    if config.density == "logit_normal":
        u = jax.nn.sigmoid(config.logit_mean + config.logit_std * draw)
    elif config.density == "mode":
        u = 1 - draw - config.mode_scale * (jnp.cos(math.pi / 2 * draw) ** 2 - 1 + draw)
    else:
        u = draw
    last = config.num_train_timesteps - 1
    return jnp.clip((u * config.num_train_timesteps).astype(jnp.int32), 0, last)  # a rounded u can be 1


def add_noise(
    latents: Float[Array, "N h w c"], noise: Float[Array, "N h w c"], sigma: Float[Array, " N"]
) -> Float[Array, "N h w c"]:
    """(1 - s) x + s n: the latents at these noise levels."""
    sigma = sigma[:, None, None, None]
    return (1.0 - sigma) * latents + sigma * noise


def target(
    config: FlowConfig, latents: Float[Array, "N h w c"], noise: Float[Array, "N h w c"]
) -> Float[Array, "N h w c"]:
    """What the denoiser learns to give: the velocity n - x, or the clean latents x."""
    return noise - latents if config.prediction_type == "flow_prediction" else latents


def weights(config: FlowConfig, sigma: Float[Array, " N"]) -> Float[Array, " N"]:
    """Weights of the squared errors of what the denoiser gives.

    Of velocity, "sigma_sqrt" is 1 / s² and "cosmap" 2 / (π (1 - 2 s + 2 s²)), as in diffusers'
    `compute_loss_weighting_for_sd3`; "preconditioned" is s², by which the error is that of the clean latents x - s v.
    Where these are given, their error is brought to that of velocity first, divided by s².
    """
    as_velocity = 1.0 if config.prediction_type == "flow_prediction" else jnp.maximum(sigma, LEAST_NOISE) ** -2.0
    if config.weighting == "sigma_sqrt":
        return as_velocity * sigma**-2.0
    if config.weighting == "cosmap":
        return as_velocity * 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    if config.weighting == "preconditioned":
        return as_velocity * sigma**2
    return as_velocity * jnp.ones_like(sigma)
