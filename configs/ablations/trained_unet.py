"""The image decoder's denoiser (the U-Net of Stable Diffusion) frozen, as published, or trained with the rest. Trained,
it needs memory for its gradients and moments (12 bytes a parameter more), and can no longer be shared with other
models."""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

SWEEP = recipes.grid(trained=(False, True))


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, arg, trained=True)
    config.parameters.trainable = (("image_decoder/denoiser/.*", given.trained), *config.parameters.trainable)
    return config
