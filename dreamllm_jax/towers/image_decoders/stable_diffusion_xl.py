"""Stable Diffusion XL as an image decoder (Podell et al., arXiv 2307.01952): a larger U-Net over the same noise
process, which is given a pooled vector as well, and told how large each picture was and where it was cropped.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from dreamllm_jax.towers.image_decoders.stable_diffusion import StableDiffusion, StableDiffusionConfig


@dataclasses.dataclass(frozen=True)
class StableDiffusionXLConfig(StableDiffusionConfig):
    """As `StableDiffusionConfig`, with a denoiser whose `addition_embed_type` is "text_time".

    Attributes:
      upcast: the autoencoder computes in float32 whatever the model does (diffusers' `force_upcast`); DreamLLM's
        authors say that training may not converge otherwise.
    """

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings
    added: ClassVar[str | None] = "text_time"
    wants_sizes: ClassVar[bool] = True

    upcast: bool = True
    kind: Literal["stable_diffusion_xl"] = "stable_diffusion_xl"

    def make(self, dtype: Any) -> "StableDiffusionXL":
        """The module; see there."""
        return StableDiffusionXL(self, dtype=dtype)


class StableDiffusionXL(StableDiffusion):
    """The decoder's computations, under conditions with a pooled vector and sizes."""

    config: StableDiffusionXLConfig


StableDiffusionXLConfig.PUBLISHED = {
    "sdxl": {  # base 1.0
        "kind": "stable_diffusion_xl",
        "denoiser": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "autoencoder": {"kind": "kl", "sample_size": 1024, "scaling_factor": 0.13025},
        "schedule": {"prediction_type": "epsilon"},
    },
}
