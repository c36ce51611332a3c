"""Rank of the llama's adapters, with alpha twice the rank; rank=0 trains the llama itself."""

import dataclasses

from ml_collections import ConfigDict

from dreamllm_jax import published, recipes

SWEEP = recipes.grid(rank=(4, 16, 64, 0))


@dataclasses.dataclass(frozen=True)
class Arguments(recipes.Ablation):
    """What may follow the file's name."""

    parent: str = "stage3_sft"
    rank: int = 16


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, Arguments, arg)
    published.adapt(config, given.rank)
    return config
