"""Rank of the language model's adapters, with alpha twice the rank; rank=0 trains the language model itself."""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import published, recipes

SWEEP = recipes.grid(rank=(4, 16, 64, 0))


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, arg, parent="stage3_sft", rank=16)
    published.adapt(config, given.rank)
    return config
