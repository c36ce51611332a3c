"""CLIP frozen, as published, or trained with a tenth of the learning rate that decays by 0.9 from layer to layer, as
the original program does where its `vit_llrd` is set."""

import dataclasses

from ml_collections import ConfigDict

from dreamllm_jax import recipes

SWEEP = recipes.grid(trained=(False, True))


@dataclasses.dataclass(frozen=True)
class Arguments(recipes.Ablation):
    """What may follow the file's name."""

    trained: bool = True


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, Arguments, arg)
    config.parameters.trainable = (("clip/.*", given.trained), *config.parameters.trainable)
    if given.trained:
        config.optimizer.learning_rates = (("clip/encoder/layers/.*", 1.0), ("clip/.*", 0.1))
        config.optimizer.layer_decays = (("clip/encoder/layers/.*", 0.9),)
    return config
