"""The vision encoder (CLIP) frozen, as published, or trained as the original program does where its `vit_llrd` is set:
its layers with a learning rate that decays by 0.9 from the last to the first, the rest of it with a tenth."""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

SWEEP = recipes.grid(trained=(False, True))


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, arg, trained=True)
    config.parameters.trainable = (("vision_encoder/.*", given.trained), *config.parameters.trainable)
    if given.trained:
        config.optimizer.learning_rates = (("vision_encoder/encoder/layers/.*", 1.0), ("vision_encoder/.*", 0.1))
        config.optimizer.layer_decays = (("vision_encoder/encoder/layers/.*", 0.9),)
    return config
