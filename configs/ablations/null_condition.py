"""What stands for "no condition" in classifier-free guidance: the document of queries alone, as generation has it, or
what the original's training code computes (`ObjectiveConfig.null_condition`). No published figure is known."""

import dataclasses
from typing import Literal

from ml_collections import ConfigDict

from dreamllm_jax import recipes

SWEEP = recipes.grid(null=("queries", "original"))


@dataclasses.dataclass(frozen=True)
class Arguments(recipes.Ablation):
    """What may follow the file's name."""

    parent: str = "stage1_creation"
    null: Literal["queries", "original"] = "queries"


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, Arguments, arg)
    config.objective.null_condition = given.null
    return config
