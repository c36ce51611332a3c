"""Share of pictures that are painted without their condition, for classifier-free guidance (arXiv 2207.12598)."""

import dataclasses

from ml_collections import ConfigDict

from dreamllm_jax import recipes

SWEEP = recipes.grid(drop=(0.0, 0.05, 0.1, 0.2))


@dataclasses.dataclass(frozen=True)
class Arguments(recipes.Ablation):
    """What may follow the file's name."""

    parent: str = "stage1_creation"
    drop: float = 0.1


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, Arguments, arg)
    config.objective.drop_prob = given.drop
    return config
