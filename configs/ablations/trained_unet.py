"""The UNet frozen, as published, or trained with the rest. Trained, it needs memory for its gradients and moments (12
bytes a parameter more), and can no longer be shared with other models."""

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
    config.parameters.trainable = (("unet/.*", given.trained), *config.parameters.trainable)
    return config
