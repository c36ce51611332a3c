"""Stable Diffusion 3 and 3.5 medium as an image decoder (Esser et al., arXiv 2403.03206): a multimodal transformer that
learns a rectified flow over latents of 16 channels. DreamLLM's fork over Qwen2.5 paints with 3.5 medium.

That fork learns the clean latents (`flow.weighting`: "preconditioned") at times that are logit-normal.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from dreamllm_jax.diffusion.flow import FlowConfig
from dreamllm_jax.diffusion.samplers import Name
from dreamllm_jax.towers.autoencoders.kl import AutoencoderConfig
from dreamllm_jax.towers.autoencoders.pixel import PixelAutoencoderConfig
from dreamllm_jax.towers.image_decoders import mmdit
from dreamllm_jax.towers.image_decoders.flow_matching import FlowDecoder, FlowDecoderRole
from dreamllm_jax.towers.image_decoders.mmdit import MMDiTConfig

_AUTOENCODER = {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@dataclasses.dataclass(frozen=True)
class StableDiffusion3Config(FlowDecoderRole):
    """The decoder's parts, and how it is trained.

    Attributes:
      denoiser, autoencoder: their shapes.
      flow: the noise process, which of its times are learned and how they are weighted.
      remat: what the denoiser's layers keep for their backward pass: "none" (everything), "attention" (what its
        kernels on TPU give) or "full" (their input).
    """

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    default_sampler: ClassVar[Name] = "euler"

    denoiser: MMDiTConfig
    autoencoder: AutoencoderConfig | PixelAutoencoderConfig = AutoencoderConfig(**_AUTOENCODER)
    flow: FlowConfig = FlowConfig(shift=3.0)
    remat: Literal["none", "attention", "full"] = "none"
    kind: Literal["stable_diffusion_3"] = "stable_diffusion_3"

    public_parts: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "denoiser": (MMDiTConfig,),
        "autoencoder": (AutoencoderConfig,),
    }

    def make(self, dtype: Any) -> "StableDiffusion3":
        """The module; see there."""
        return StableDiffusion3(self, dtype=dtype)


class StableDiffusion3(FlowDecoder):
    """The decoder's computations."""

    config: StableDiffusion3Config


StableDiffusion3Config.PUBLISHED = {
    name: {
        "kind": "stable_diffusion_3",
        "denoiser": settings,
        "autoencoder": {"kind": "kl"} | _AUTOENCODER,
        "flow": {"shift": 3.0},
    }
    for name, settings in mmdit.PUBLISHED.items()
}
