"""Stable Diffusion 1.x and 2.x as an image decoder (Rombach et al., arXiv 2112.10752): a U-Net that denoises latents of
an autoencoder, over DDPM's noise process.

Legend: N images, H x W pixels, h x w x c latents, T training timesteps.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key, UInt8

from dreamllm_jax.data.images import paint_pixels
from dreamllm_jax.diffusion import schedule
from dreamllm_jax.diffusion.ddpm_samplers import make_steps
from dreamllm_jax.diffusion.samplers import SamplerConfig, Steps
from dreamllm_jax.diffusion.schedule import ScheduleConfig
from dreamllm_jax.layers.flops import Flops, Tally
from dreamllm_jax.parallel.mesh import constrain
from dreamllm_jax.towers.autoencoders.kl import AutoencoderConfig, sample_moments
from dreamllm_jax.towers.autoencoders.pixel import PixelAutoencoderConfig
from dreamllm_jax.towers.condition import Condition
from dreamllm_jax.towers.diffusers_config import require
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
class StableDiffusionConfig:
    """The decoder's parts, and how it is trained.

    Attributes:
      denoiser, autoencoder: their shapes.
      schedule: the noise process, and whether noise or velocity is predicted.
      training: how the training error is made.
    """

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings
    encodes_features: ClassVar[bool] = False

    denoiser: UNetConfig
    autoencoder: AutoencoderConfig | PixelAutoencoderConfig = AutoencoderConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: DenoisingConfig = DenoisingConfig()
    kind: Literal["stable_diffusion"] = "stable_diffusion"

    # Its public form, a directory of diffusers: the classes whose folders it has, and the scheduler's file.
    public_parts: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "denoiser": (UNetConfig,),
        "autoencoder": (AutoencoderConfig,),
    }
    public_scheduler = "scheduler/scheduler_config.json"
    public_sampler = "DDIMScheduler"  # a class that samples by that file
    public_trainer = "DDPMScheduler"  # as which programs that train, the original among them, read any such file

    def __post_init__(self):
        if self.denoiser.in_channels != self.autoencoder.latent_channels:
            raise ValueError(
                f"denoiser.in_channels is {self.denoiser.in_channels}, but the autoencoder's latents have "
                f"{self.autoencoder.latent_channels} channels"
            )

    @property
    def condition_width(self) -> int:
        """Of the condition's sequence (C)."""
        return self.denoiser.cross_attention_dim

    @property
    def default_size(self) -> int:
        """Pixels on a side of the images that it was made for."""
        return (self.denoiser.sample_size or 64) * self.autoencoder.downscale

    @property
    def size_multiple(self) -> int:
        """Height and width of what is painted must be multiples of it."""
        return self.autoencoder.downscale

    @property
    def training_size_multiple(self) -> int:
        """Height and width of what is learned must be multiples of it: no level of the U-Net then has a remainder."""
        return self.autoencoder.downscale * 2 ** (self.denoiser.levels - 1)

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
    def public_noise_levels(scheduler: Any) -> np.ndarray:
        """The signal's share at each training timestep by a scheduler of diffusers, f32[T]."""
        return scheduler.alphas_cumprod.numpy()

    @property
    def plain(self) -> "StableDiffusionConfig":
        """The same decoder whose training error is the plain mean of squares."""
        return dataclasses.replace(self, training=DenoisingConfig())

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) of the latents of an image of so many pixels."""
        scale = self.autoencoder.downscale
        return height // scale, width // scale, self.autoencoder.latent_channels

    # What can be stored of an image: the autoencoder's moments.
    stored_depends = ("autoencoder/encoder/", "autoencoder/quant_conv/")

    @property
    def stored_settings(self) -> dict[str, Any]:
        """The settings that what is stored depends on."""
        return {"autoencoder": dataclasses.asdict(self.autoencoder)}

    def stored_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of what is stored of an image: the autoencoder's moments."""
        *area, channels = self.latent_shape(height, width)
        return *area, 2 * channels

    def latent_shape_of(self, shape: tuple[int, ...], stored: bool) -> tuple[int, int, int]:
        """(h, w, c) of the latents of an image whose pixels, or whose stored moments, have this shape."""
        return (*shape[:2], shape[2] // 2) if stored else self.latent_shape(*shape[:2])

    def preprocess(self, image: Any, height: int, width: int, flip: bool = False) -> UInt8[np.ndarray, "H W 3"]:
        """The pixels of a Pillow image as they are learned, mirrored if told to."""
        return paint_pixels(image, height, width, flip)

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

    def steps(self, sampler: SamplerConfig) -> tuple[Steps, float]:
        """The sampler's table for this noise process, and the scale of the noise that it begins with."""
        return make_steps(self.schedule, sampler)

    def make(self, dtype: Any) -> "StableDiffusion":
        """The module; see there."""
        return StableDiffusion(self, dtype=dtype)

    def flops(
        self, tally: Tally, images: int, height: int, width: int, queries: int, condition_live: bool, stored: bool
    ) -> dict[str, Flops]:
        """FLOPs by part of the training error of so many images.

        Args:
          condition_live: whether gradients go back to the condition, which has so many `queries`.
          stored: whether the autoencoder is left out.
        """
        autoencoder = tally.part("autoencoder")
        if not stored:
            self.autoencoder.encoder_flops(autoencoder, images, height, width)
        denoiser = tally.part("denoiser", autoencoder.live)
        self.denoiser.flops(denoiser, images, self.latent_shape(height, width)[:2], queries, condition_live)
        return {"autoencoder": autoencoder.total, "denoiser": denoiser.total}


@struct.dataclass
class Prediction:
    """What a training error compares, for one image each."""

    noisy_latents: Float[Array, "N h w c"]
    prediction: Float[Array, "N h w c"]
    target: Float[Array, "N h w c"]
    error: Float[Array, " N"]


class StableDiffusion(nn.Module):
    """The decoder's computations, over the parameters of `denoiser` and `autoencoder`."""

    config: StableDiffusionConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.denoiser = self.config.denoiser.make(self.dtype)
        self.autoencoder = self.config.autoencoder.make(self.dtype)

    def stored(self, images: UInt8[Array, "N H W 3"] | Float[Array, "N H W 3"]) -> Float[Array, "N h w 2c"]:
        """What can be stored of images: mean and log-variance of their latents, before scaling."""
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 127.5 - 1.0
        return self.autoencoder.encode(constrain(images, ("images", None, None, None)))

    def encode(self, images: Array, draws: Draws, stored: bool = False) -> Float[Array, "N h w c"]:
        """Scaled latents of images, given as pixels or as what is `stored` of them."""
        moments = images if stored else self.stored(images)
        return sample_moments(moments, draws.posterior_noise) * self.config.autoencoder.scaling_factor

    def denoise(
        self, latents: Float[Array, "N h w c"], timesteps: Int[Array, " N"], condition: Condition
    ) -> Float[Array, "N h w c"]:
        """The U-Net's prediction (noise or velocity) for scaled noisy latents."""
        require(condition.mask is None, "Stable Diffusion's U-Net attends to all of its condition: it knows no mask")
        latents = constrain(latents, ("images", None, None, None))
        return self.denoiser(latents, timesteps, condition.sequence).astype(jnp.float32)

    def decode(self, latents: Float[Array, "N h w c"]) -> Float[Array, "N H W 3"]:
        """Scaled latents -> pixels in [-1, 1]."""
        return self.autoencoder.decode(latents / self.config.autoencoder.scaling_factor)

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

    def __call__(self, condition: Condition) -> None:
        """Touches every parameter once, on the smallest inputs: for `init`."""
        config = self.config
        side = config.training_size_multiple
        moments = self.stored(jnp.zeros((1, side, side, 3), jnp.uint8))
        latents = moments[..., : config.autoencoder.latent_channels]
        self.denoise(latents, jnp.zeros(1, jnp.int32), condition)
        self.decode(latents)


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
