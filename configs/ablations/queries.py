"""How many dream queries an image is painted from.

    python launch/sweep.py --config=configs/ablations/queries.py --to=runs/queries --dry-run
    python launch/sweep.py --config=configs/ablations/queries.py:parent=tiny --to=runs/queries

The published 64 stands among them. More queries cost tokens of the row and attention in the image decoder; fewer leave
less room for what the text says.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

SWEEP = recipes.grid(queries=(1, 4, 16, 32, 64, 128, 256))


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, arg, parent="stage1_creation", queries=64)
    config.model.num_queries = given.queries
    room = -(-(given.queries + 34) // 128) * 128  # for one picture and a short caption
    config.rows.length = max(config.rows.length, room)
    return config
