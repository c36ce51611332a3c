"""Min-SNR weights of the denoising loss (arXiv 2303.09556); gamma=0 is the plain mean.

The weighted loss is another quantity: compare pictures, or the plain loss of checkpoints, not the curves.
"""

from ml_collections import ConfigDict

from dreamllm_jax import recipes

SWEEP = recipes.grid(gamma=(0.0, 1.0, 5.0, 20.0))


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, arg, parent="stage1_creation", gamma=5.0)
    config.objective.snr_gamma = given.gamma or None
    return config
