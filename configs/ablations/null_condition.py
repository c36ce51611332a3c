"""What stands for "no condition" in classifier-free guidance: the document of queries alone, as generation has it, or
what the original's training code computes (`JointConfig.null_condition`). No published figure is known."""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

SWEEP = recipes.grid(null=("queries", "original"))


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, arg, parent="stage1_creation", null="queries")
    config.objective.null_condition = given.null
    return config
