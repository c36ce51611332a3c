"""Share of pictures that are painted without their condition, for classifier-free guidance (arXiv 2207.12598)."""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

SWEEP = recipes.grid(drop=(0.0, 0.05, 0.1, 0.2))


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, arg, parent="stage1_creation", drop=0.1)
    config.objective.drop_prob = given.drop
    return config
