"""Share of interleaved documents in the mixture; the others keep their proportions."""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

SWEEP = recipes.grid(share=(0.0, 0.25, 0.5, 0.75, 1.0))


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, arg, share=0.5)
    recipes.set_share(config, "interleaved", given.share)
    return config
