"""How many dream queries an image is painted from.

    python launch/sweep.py --config=configs/ablations/queries.py --to=runs/queries --dry-run
    python launch/sweep.py --config=configs/ablations/queries.py:parent=tiny --to=runs/queries

The published 64 stands among them. More queries cost tokens of the row and attention in the UNet; fewer leave less room
for what the text says.
"""

import dataclasses

from ml_collections import ConfigDict

from dreamllm_jax import recipes

SWEEP = recipes.grid(queries=(1, 4, 16, 32, 64, 128, 256))


@dataclasses.dataclass(frozen=True)
class Arguments(recipes.Ablation):
    """What may follow the file's name."""

    parent: str = "stage1_creation"
    queries: int = 64


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, Arguments, arg)
    config.model.num_queries = given.queries
    room = -(-(given.queries + 34) // 128) * 128  # for one picture and a short caption
    config.rows.length = max(config.rows.length, room)
    return config
