"""Kind and depth of the projectors: linear as published, an MLP with GELU between, or a convolution over the tokens as
a square.

`which` is visual_projector (from the vision encoder to the language model), connector (from there to the image decoder)
or both. A run with another projector cannot begin with a model that has a linear one: import with
`--visual-projector=mlp:2` or `--connector=mlp:2`.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

SWEEP = [
    {"kind": "linear", "depth": 1},
    {"kind": "mlp", "depth": 2},
    {"kind": "mlp", "depth": 3},
    {"kind": "conv", "depth": 1},
]


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(
        __file__,
        arg,
        parent="stage1_joint",
        choices={"which": ("visual_projector", "connector", "both")},
        kind="mlp",
        depth=2,
        which="visual_projector",
    )
    for name in ("visual_projector", "connector"):
        if given.which in (name, "both"):
            config.model[name] = {"kind": given.kind, "depth": given.depth}
    return config
