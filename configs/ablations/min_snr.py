"""Min-SNR weights of the image decoder's training error (arXiv 2303.09556); gamma=0 is the plain mean.

The weighted loss is another quantity: compare pictures, or the plain loss of checkpoints, not the curves. For velocity
prediction the original program's formula differs from the paper's: `velocity=original` or `velocity=paper`.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

SWEEP = recipes.grid(gamma=(0.0, 1.0, 5.0, 20.0))


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, arg, parent="stage1_creation", gamma=5.0, velocity="original")
    training = {"snr_gamma": given.gamma or None, "snr_velocity": given.velocity}
    config.model.image_decoder.training = training
    return config
