"""Stable Diffusion 1.x and 2.x as an image decoder (Rombach et al., arXiv 2112.10752): a U-Net that denoises latents of
an autoencoder, over DDPM's noise process.

Legend: N images, H x W pixels, h x w x c latents, T training timesteps.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key

from dreamllm_jax.diffusion import schedule
from dreamllm_jax.diffusion.ddpm_samplers import make_steps
from dreamllm_jax.diffusion.samplers import Name, SamplerConfig, Steps
from dreamllm_jax.diffusion.schedule import ScheduleConfig
from dreamllm_jax.towers.autoencoders.kl import AutoencoderConfig
from dreamllm_jax.towers.autoencoders.pixel import PixelAutoencoderConfig
from dreamllm_jax.towers.condition import Condition
from dreamllm_jax.towers.image_decoders.latent import LatentDecoder, LatentDecoderRole
from dreamllm_jax.towers.image_decoders.unet import UNetConfig


@dataclasses.dataclass(frozen=True)
class DenoisingConfig:
    """How the training error is made.

    Attributes:
      noise_offset: strength of the noise added to whole channels, 0 for none.
      input_perturbation: strength of the noise added to the U-Net's input but not to its target (Ning et al. 2023).
      snr_gamma: gamma of the min-SNR weights (Hang et al. 2023), None for plain means.
      snr_velocity: their formula for velocity prediction (`schedule.min_snr_weights`): the "original" program's, so
        that published settings give published numbers, or the "paper"'s.
    """

    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    snr_gamma: float | None = None
    snr_velocity: schedule.VelocityWeights = "original"

    def __post_init__(self):
        for name in ("noise_offset", "input_perturbation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"snr_gamma must be positive, got {self.snr_gamma}")


@struct.dataclass
class Draws:
    """All randomness of one training error, for one image each. Options that are off have None."""

    posterior_noise: Float[Array, "... h w c"]
    noise: Float[Array, "... h w c"]
    timesteps: Int[Array, "..."]
    offset_noise: Float[Array, "... 1 1 c"] | None = None
    perturbation: Float[Array, "... h w c"] | None = None


@dataclasses.dataclass(frozen=True)
class StableDiffusionConfig(LatentDecoderRole):
    """The decoder's parts, and how it is trained.

    Attributes:
      denoiser, autoencoder: their shapes.
      schedule: the noise process, and whether noise or velocity is predicted.
      training: how the training error is made.
      remat: what the denoiser keeps for its backward pass: "none" (everything) or "full" (a block's input).
    """

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings
    added: ClassVar[str | None] = None  # `addition_embed_type` of its denoisers

    default_sampler: ClassVar[Name] = "ddim"

    denoiser: UNetConfig
    autoencoder: AutoencoderConfig | PixelAutoencoderConfig = AutoencoderConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: DenoisingConfig = DenoisingConfig()
    remat: Literal["none", "full"] = "none"
    kind: Literal["stable_diffusion"] = "stable_diffusion"

    # Its public form, a directory of diffusers: the classes whose folders it has, and the scheduler's file.
    public_parts: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "denoiser": (UNetConfig,),
        "autoencoder": (AutoencoderConfig,),
    }
    public_scheduler = "scheduler/scheduler_config.json"
    public_sampler = "DDIMScheduler"  # samples by a file that does not say its class
    public_trainer = "DDPMScheduler"  # as which programs that train, the original among them, read any such file

    def __post_init__(self):
        self.require_channels()
        if (found := self.denoiser.addition_embed_type) != self.added:
            other = "stable_diffusion_xl" if found else "stable_diffusion"
            raise ValueError(
                f"{self.kind} has a denoiser of addition_embed_type {self.added!r}, got {found!r}: its kind is {other}"
            )

    @classmethod
    def describes(cls, parts: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether the config.json of its parts are of this decoder; those of other decoders have the same classes."""
        return parts["denoiser"].get("addition_embed_type") == cls.added

    @property
    def training_size_multiple(self) -> int:
        """Height and width of what is learned must be multiples of it: no level of the U-Net then has a remainder."""
        return self.size_multiple * 2 ** (self.denoiser.levels - 1)

    @classmethod
    def from_public(cls, parts: Mapping[str, Any], scheduler: Mapping[str, Any]) -> "StableDiffusionConfig":
        """The decoder of these parts and the settings of diffusers' scheduler.

        Raises:
          ValueError: naming the scheduler's setting that is not supported, or parts that do not fit.
        """
        return cls(**parts, schedule=schedule.schedule_config_from_diffusers(scheduler))

    def to_public_scheduler(self) -> dict[str, Any]:
        """The settings of diffusers' scheduler."""
        return schedule.schedule_config_to_diffusers(self.schedule)

    @property
    def noise_levels(self) -> np.ndarray:
        """What `public_noise_levels` are here."""
        return schedule.alphas_cumprod(self.schedule)

    @staticmethod
    def public_noise_levels(own: Any, trainer: Any) -> np.ndarray:
        """The signal's share at each training timestep by the file's own scheduler of diffusers, f32[T]."""
        return own.alphas_cumprod.numpy()

    @property
    def plain(self) -> "StableDiffusionConfig":
        """The same decoder whose training error is the plain mean of squares."""
        return dataclasses.replace(self, training=DenoisingConfig())

    def draws(self, keys: Key[Array, " 6"], shape: tuple[int, int, int]) -> Draws:
        """The randomness of one image's error, its latents of this shape.

        Args:
          keys: six; the fourth is left to the objective.
        """
        training, channels = self.training, shape[-1]
        return Draws(
            posterior_noise=jax.random.normal(keys[0], shape),
            noise=jax.random.normal(keys[1], shape),
            timesteps=jax.random.randint(keys[2], (), 0, self.schedule.num_train_timesteps),
            offset_noise=jax.random.normal(keys[4], (1, 1, channels)) if training.noise_offset else None,
            perturbation=jax.random.normal(keys[5], shape) if training.input_perturbation else None,
        )

    def time_range(self, part: int, parts: int) -> tuple[int, int]:
        """First timestep of one of so many equal ranges, and the first after it."""
        first, end = (self.schedule.num_train_timesteps * edge // parts for edge in (part, part + 1))
        return first, end

    def within(self, draws: Draws, part: int, parts: int) -> Draws:
        """The draws with their timesteps moved, in order, to one of the equal ranges."""
        first, end = self.time_range(part, parts)
        return draws.replace(timesteps=first + draws.timesteps * (end - first) // self.schedule.num_train_timesteps)

    def steps(self, sampler: SamplerConfig, height: int, width: int) -> tuple[Steps, float]:
        """The sampler's table, which is the same for images of any size, and the scale of the noise it begins with."""
        return make_steps(self.schedule, sampler.named(self.default_sampler))

    def make(self, dtype: Any) -> "StableDiffusion":
        """The module; see there."""
        return StableDiffusion(self, dtype=dtype)


@struct.dataclass
class Prediction:
    """What a training error compares, for one image each."""

    noisy_latents: Float[Array, "N h w c"]
    prediction: Float[Array, "N h w c"]
    target: Float[Array, "N h w c"]
    error: Float[Array, " N"]


class StableDiffusion(LatentDecoder):
    """The decoder's computations: its denoiser predicts noise or velocity."""

    config: StableDiffusionConfig

    def compare(self, condition: Condition, latents: Float[Array, "N h w c"], draws: Draws) -> Prediction:
        """The denoising error of each image under its condition (DreamLLM, eq. 5), weighted as `training` says."""
        training, process = self.config.training, self.config.schedule
        alphas = schedule.alphas_cumprod(process)
        noise = draws.noise
        if draws.offset_noise is not None:
            noise = noise + training.noise_offset * draws.offset_noise
        given = noise
        if draws.perturbation is not None:
            given = noise + training.input_perturbation * draws.perturbation
        noisy = schedule.add_noise(alphas, latents, given, draws.timesteps)
        if process.prediction_type == "epsilon":
            target = noise
        else:
            target = schedule.velocity(alphas, latents, noise, draws.timesteps)
        prediction = self.denoise(noisy, draws.timesteps, condition)
        error = jnp.mean(jnp.square(prediction - target), axis=(1, 2, 3))
        if training.snr_gamma is not None:
            gamma, formula = training.snr_gamma, training.snr_velocity
            weights = schedule.min_snr_weights(alphas, draws.timesteps, gamma, process.prediction_type, formula)
            error = error * weights
        return Prediction(noisy, prediction, target, error)

    def error(self, condition: Condition, latents: Float[Array, "N h w c"], draws: Draws) -> Float[Array, " N"]:
        """The training error of each image; see `compare`."""
        return self.compare(condition, latents, draws).error


_BLOCKS = (320, 640, 1280, 1280)
StableDiffusionConfig.PUBLISHED = {
    "sd21": {  # 2.1-base
        "kind": "stable_diffusion",
        "denoiser": {
            "block_out_channels": _BLOCKS,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "autoencoder": {"kind": "kl", "scaling_factor": 0.18215},
        "schedule": {"prediction_type": "epsilon"},
    },
    "sd15": {
        "kind": "stable_diffusion",
        "denoiser": {
            "block_out_channels": _BLOCKS,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "use_linear_projection": False,
        },
        "autoencoder": {"kind": "kl", "scaling_factor": 0.18215},
        "schedule": {"prediction_type": "epsilon"},
    },
}
