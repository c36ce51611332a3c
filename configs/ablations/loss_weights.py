"""How much pictures weigh beside text. The published weights of stages II and III are lm=1, dm=10."""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

SWEEP = recipes.grid(dm=(0.1, 1.0, 5.0, 10.0, 50.0))


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, arg, lm=1.0, dm=10.0)
    config.objective.lm_weight, config.objective.dm_weight = given.lm, given.dm
    return config
