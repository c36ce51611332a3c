"""At an image of an interleaved document: paint it, then read it, as published; or read it first, and so paint what has
been seen. The denoising loss of the latter is lower, for the answer is given; what counts is what it paints alone."""

import dataclasses
from typing import Literal

from ml_collections import ConfigDict

from dreamllm_jax import recipes

SWEEP = recipes.grid(order=("dream_see", "see_dream"))


@dataclasses.dataclass(frozen=True)
class Arguments(recipes.Ablation):
    """What may follow the file's name."""

    order: Literal["dream_see", "see_dream"] = "see_dream"


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, Arguments, arg)
    for corpus in config.data.corpora.values():
        corpus.see_first = given.order == "see_dream"
    return config
