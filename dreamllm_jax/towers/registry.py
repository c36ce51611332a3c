"""The towers that there are, by role: an import and a word for each. A configuration names one by its `kind`."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

from dreamllm_jax.towers.connectors.newline import NewlineConfig
from dreamllm_jax.towers.connectors.projector import IdentityConfig, ProjectorConfig
from dreamllm_jax.towers.connectors.transformer import TransformerConfig
from dreamllm_jax.towers.image_decoders.sana import SanaConfig
from dreamllm_jax.towers.image_decoders.stable_diffusion import StableDiffusionConfig
from dreamllm_jax.towers.image_decoders.stable_diffusion_3 import StableDiffusion3Config
from dreamllm_jax.towers.image_decoders.stable_diffusion_xl import StableDiffusionXLConfig
from dreamllm_jax.towers.language_models.llama import LlamaConfig
from dreamllm_jax.towers.language_models.qwen2 import Qwen2Config
from dreamllm_jax.towers.language_models.qwen3 import Qwen3Config
from dreamllm_jax.towers.language_models.qwen25_vl import Qwen25VLConfig
from dreamllm_jax.towers.vision_encoders.clip import ClipVisionConfig
from dreamllm_jax.towers.vision_encoders.intern_vit import InternVitConfig
from dreamllm_jax.towers.vision_encoders.qwen25_vl import Qwen25VisionConfig
from dreamllm_jax.towers.vision_encoders.siglip import SiglipVisionConfig

# The first of a role is taken where a public file does not say what it is.
LANGUAGE_MODELS = (LlamaConfig, Qwen2Config, Qwen3Config, Qwen25VLConfig)
VISION_ENCODERS = (ClipVisionConfig, SiglipVisionConfig, InternVitConfig, Qwen25VisionConfig)
VISUAL_PROJECTORS = (ProjectorConfig, NewlineConfig, IdentityConfig)
CONNECTORS = (ProjectorConfig, TransformerConfig)
IMAGE_DECODERS = (StableDiffusionConfig, StableDiffusionXLConfig, SanaConfig, StableDiffusion3Config)


def _any_of(classes: Sequence[type]) -> Any:
    """The union of the classes, for annotations."""
    return functools.reduce(operator.or_, classes)


LanguageModelConfig = _any_of(LANGUAGE_MODELS)
VisionEncoderConfig = _any_of(VISION_ENCODERS)
VisualProjectorConfig = _any_of(VISUAL_PROJECTORS)
ConnectorConfig = _any_of(CONNECTORS)
ImageDecoderConfig = _any_of(IMAGE_DECODERS)


def projector_of(vision_encoder: str) -> dict[str, Any]:
    """What the vision encoders of this kind say of the visual projector that they were published with."""
    return dict(next(tower.projector for tower in VISION_ENCODERS if tower.kind == vision_encoder))


def published(classes: Sequence[type]) -> dict[str, dict[str, Any]]:
    """The settings that were published of these towers, by the names that recipes' arguments give them."""
    return {name: settings for tower in classes for name, settings in tower.PUBLISHED.items()}
