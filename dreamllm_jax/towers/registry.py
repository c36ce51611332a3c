"""The towers that there are, by role: a line for each. A configuration names one by its `kind`."""

from dreamllm_jax.towers.connectors import projector
from dreamllm_jax.towers.connectors.projector import ProjectorConfig
from dreamllm_jax.towers.image_decoders import stable_diffusion
from dreamllm_jax.towers.image_decoders.stable_diffusion import StableDiffusionConfig
from dreamllm_jax.towers.language_models import llama
from dreamllm_jax.towers.language_models.llama import LlamaConfig
from dreamllm_jax.towers.vision_encoders import clip
from dreamllm_jax.towers.vision_encoders.clip import ClipVisionConfig

# Whose public formats `interop` reads: the first of a role is taken where a file does not say what it is.
LANGUAGE_MODELS = (LlamaConfig,)
VISION_ENCODERS = (ClipVisionConfig,)
IMAGE_DECODERS = (StableDiffusionConfig,)

LanguageModelConfig = LlamaConfig
VisionEncoderConfig = ClipVisionConfig
VisualProjectorConfig = ProjectorConfig
ConnectorConfig = ProjectorConfig
ImageDecoderConfig = StableDiffusionConfig

# The shapes that were published, by role: name -> settings.
PUBLISHED = {
    "language_model": llama.PUBLISHED,
    "vision_encoder": clip.PUBLISHED,
    "connector": projector.PUBLISHED,
    "image_decoder": stable_diffusion.PUBLISHED,
}
