"""Share of documents of text alone, from a corpus `text`, in the mixture: what keeps the language model's abilities."""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

SWEEP = recipes.grid(share=(0.0, 0.1, 0.25, 0.5))


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, arg, share=0.1)
    recipes.set_share(config, "text", given.share)
    return config
