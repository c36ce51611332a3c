"""SANA as an image decoder (Xie et al., arXiv 2410.10629; 1.5: 2501.18427): a linear transformer that learns a
rectified flow over the latents of a deep compression autoencoder. MetaQuery, OpenUni and UniLIP paint with it.

The scheduler's file that was published with it is of a DPM-Solver with `flow_shift` 3: programs that train read it as a
FlowMatchEuler one, which knows no `flow_shift`. So times are learned unshifted, and sampled with a shift of 3.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from dreamllm_jax.diffusion.flow import FlowConfig
from dreamllm_jax.diffusion.samplers import Name
from dreamllm_jax.towers.autoencoders import dc, unilip
from dreamllm_jax.towers.autoencoders.dc import DCAutoencoderConfig
from dreamllm_jax.towers.autoencoders.pixel import PixelAutoencoderConfig
from dreamllm_jax.towers.autoencoders.unilip import UnilipAutoencoderConfig
from dreamllm_jax.towers.image_decoders import sana_transformer
from dreamllm_jax.towers.image_decoders.flow_matching import FlowDecoder, FlowDecoderRole
from dreamllm_jax.towers.image_decoders.sana_transformer import SanaTransformerConfig

# Positions are told to UniLIP's denoiser, though its file says `interpolation_scale` null: diffusers up to 0.32 takes
# null for 1 at these sizes, and the table is in the weights' type.
UNILIP_POSITIONS = {"interpolation_scale": 1.0, "narrow_positions": True}
_FLOW = FlowConfig(sampling_shift=3.0, integer_timesteps=True)


@dataclasses.dataclass(frozen=True)
class SanaConfig(FlowDecoderRole):
    """The decoder's parts, and how it is trained.

    Attributes:
      denoiser, autoencoder: their shapes.
      flow: the noise process, which of its times are learned and how they are weighted.
      remat: what the denoiser's layers keep for their backward pass: "none" (everything) or "full" (their input).
    """

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    default_sampler: ClassVar[Name] = "dpmpp_2m"

    denoiser: SanaTransformerConfig
    autoencoder: DCAutoencoderConfig | UnilipAutoencoderConfig | PixelAutoencoderConfig = DCAutoencoderConfig()
    flow: FlowConfig = _FLOW
    remat: Literal["none", "full"] = "none"
    kind: Literal["sana"] = "sana"

    public_parts: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "denoiser": (SanaTransformerConfig,),
        "autoencoder": (DCAutoencoderConfig,),
    }

    def make(self, dtype: Any) -> "Sana":
        """The module; see there."""
        return Sana(self, dtype=dtype)


class Sana(FlowDecoder):
    """The decoder's computations."""

    config: SanaConfig


_TIMES = {"sampling_shift": _FLOW.sampling_shift, "integer_timesteps": _FLOW.integer_timesteps}
SanaConfig.PUBLISHED = {
    name: {
        "kind": "sana",
        "denoiser": settings,
        "autoencoder": dc.PUBLISHED["dc-ae-f32c32-sana-1.0"],
        "flow": _TIMES,
    }
    for name, settings in sana_transformer.PUBLISHED.items()
} | {
    name: {
        "kind": "sana",
        "denoiser": sana_transformer.PUBLISHED[denoiser] | UNILIP_POSITIONS,
        "autoencoder": unilip.PUBLISHED[name],
        "flow": _TIMES | {"density": "logit_normal"},
    }
    for name, denoiser in (("unilip-1b", "sana-0.6b-512"), ("unilip-2b", "sana-1.6b-512"))
}
