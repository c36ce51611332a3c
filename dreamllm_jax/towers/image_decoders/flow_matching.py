"""What image decoders share that learn a rectified flow (`diffusion.flow`) over an autoencoder's latents.

Legend: N images, H x W pixels, h x w x c latents, T training timesteps.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key

from dreamllm_jax.diffusion import flow
from dreamllm_jax.diffusion.flow import FlowConfig
from dreamllm_jax.diffusion.flow_files import flow_config_from_diffusers, flow_config_to_diffusers
from dreamllm_jax.diffusion.flow_samplers import make_flow_steps
from dreamllm_jax.diffusion.samplers import SamplerConfig, Steps
from dreamllm_jax.towers.condition import Condition
from dreamllm_jax.towers.image_decoders.latent import LatentDecoder, LatentDecoderRole


@struct.dataclass
class FlowDraws:
    """All randomness of one training error, for one image each.

    Attributes:
      index: into the table of noise levels, which begins with pure noise.
      posterior_noise: None for an autoencoder without a posterior.
    """

    noise: Float[Array, "... h w c"]
    index: Int[Array, "..."]
    posterior_noise: Float[Array, "... h w c"] | None = None


class FlowDecoderRole(LatentDecoderRole):
    """Of a configuration with the fields `denoiser`, `autoencoder`, `flow` and `remat`."""

    flow: FlowConfig

    public_scheduler = "scheduler/scheduler_config.json"
    public_sampler = "FlowMatchEulerDiscreteScheduler"  # samples by a file that does not say its class
    public_trainer = "FlowMatchEulerDiscreteScheduler"  # as which programs that train read any such file

    def __post_init__(self):
        self.require_channels()

    @classmethod
    def from_public(cls, parts: Mapping[str, Any], scheduler: Mapping[str, Any]) -> "FlowDecoderRole":
        """The decoder of these parts and the settings of diffusers' scheduler.

        Raises:
          ValueError: naming the scheduler's setting that is not supported, or parts that do not fit.
        """
        return cls(**parts, flow=flow_config_from_diffusers(scheduler))

    def to_public_scheduler(self) -> dict[str, Any]:
        """The settings of diffusers' scheduler."""
        return flow_config_to_diffusers(self.flow)

    @property
    def noise_levels(self) -> np.ndarray:
        """What `public_noise_levels` are here."""
        return flow.sigmas(self.flow)

    @staticmethod
    def public_noise_levels(own: Any, trainer: Any) -> np.ndarray:
        """The noise level at each index by a scheduler of diffusers that trains, f32[T]; others have theirs of sampling
        alone."""
        return trainer.sigmas.numpy()

    @property
    def plain(self) -> "FlowDecoderRole":
        """The same decoder, its training error the plain mean of squares over all times alike."""
        return dataclasses.replace(self, flow=dataclasses.replace(self.flow, density="uniform", weighting="none"))

    def draws(self, keys: Key[Array, " 6"], shape: tuple[int, int, int]) -> FlowDraws:
        """The randomness of one image's error, its latents of this shape; the fourth key is left to the objective."""
        return FlowDraws(
            noise=jax.random.normal(keys[1], shape),
            index=flow.index_of(self.flow, flow.draw_time(self.flow, keys[2])),
            posterior_noise=None if self.autoencoder.deterministic else jax.random.normal(keys[0], shape),
        )

    def time_range(self, part: int, parts: int) -> tuple[int, int]:
        """First timestep of one of so many equal ranges of the table, and the first after it; the first has the least
        noise."""
        first, end = (self.flow.num_train_timesteps * edge // parts for edge in (part, part + 1))
        return first, end

    def within(self, draws: FlowDraws, part: int, parts: int) -> FlowDraws:
        """The draws with their indices moved, in order, to one of the equal ranges."""
        total = self.flow.num_train_timesteps
        first, end = self.time_range(part, parts)
        return draws.replace(index=total - end + draws.index * (end - first) // total)

    def steps(self, sampler: SamplerConfig, height: int, width: int) -> tuple[Steps, float]:
        """The sampler's table for images of so many pixels, and the scale of the noise that it begins with."""
        h, w, _ = self.latent_shape(height, width)
        return make_flow_steps(self.flow, sampler.named(self.default_sampler), h * w // self.denoiser.size_multiple**2)


@struct.dataclass
class FlowPrediction:
    """What a training error compares, for one image each."""

    prediction: Float[Array, "N h w c"]
    target: Float[Array, "N h w c"]
    error: Float[Array, " N"]


class FlowDecoder(LatentDecoder):
    """The decoder's computations."""

    def denoise(
        self, latents: Float[Array, "N h w c"], timesteps: Float[Array, " N"], condition: Condition
    ) -> Float[Array, "N h w c"]:
        """What the denoiser gives for noisy latents."""
        scale = self.config.flow.input_scale
        return super().denoise(latents if scale == 1 else scale * latents, timesteps, condition)

    def compare(self, condition: Condition, latents: Float[Array, "N h w c"], draws: FlowDraws) -> FlowPrediction:
        """The error of each image's velocity under its condition, weighted as `flow` says; what is compared is what the
        denoiser gives."""
        process = self.config.flow
        sigma = jnp.asarray(flow.sigmas(process))[draws.index]
        noisy = flow.add_noise(latents, draws.noise, sigma)
        target = flow.target(process, latents, draws.noise)
        prediction = self.denoise(noisy, flow.timesteps(process, sigma), condition)
        error = jnp.mean(jnp.square(prediction - target), axis=(1, 2, 3))
        return FlowPrediction(prediction, target, flow.weights(process, sigma) * error)

    def error(self, condition: Condition, latents: Float[Array, "N h w c"], draws: FlowDraws) -> Float[Array, " N"]:
        """The training error of each image; see `compare`."""
        return self.compare(condition, latents, draws).error
