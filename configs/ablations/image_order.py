"""At an image of an interleaved document: paint it, then see it, as published; or see it first, and so paint what has
been seen. The `dm_loss` of the latter is lower, for the answer is given; what counts is what it paints alone."""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

SWEEP = recipes.grid(order=("dream_see", "see_dream"))


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, arg, choices={"order": ("dream_see", "see_dream")}, order="see_dream")
    for corpus in config.data.corpora.values():
        corpus.see_first = given.order == "see_dream"
    return config
