"""Rows of the global batch: which of them each host feeds, and how they come to its devices."""

import functools
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dreamllm_jax.parallel.mesh import ShardingConfig


def row_shards(config: ShardingConfig, mesh_shape: Mapping[str, int]) -> int:
    """Into how many parts the mesh splits rows."""
    return math.prod(mesh_shape[axis] for axis in config.all_rules["rows"])


def rows_sharding(mesh: Mesh, config: ShardingConfig, rows: int) -> NamedSharding:
    """How a batch lies on the mesh: its leading axis over the axes of "rows".

    Raises:
      ValueError: if the mesh does not divide the rows.
    """
    axes = config.all_rules["rows"]
    parts = row_shards(config, mesh.shape)
    if rows % parts:
        raise ValueError(
            f"{rows} rows do not divide over {parts} shards ({' x '.join(axes)}): change rows.per_step or sharding"
        )
    return NamedSharding(mesh, PartitionSpec(tuple(axes)))


@functools.lru_cache  # asked at every step
def local_rows(sharding: NamedSharding, rows: int, process: int | None = None) -> tuple[int, ...]:
    """The rows of a global batch that a process's devices hold, and it must therefore feed; by default this one's.

    They need not follow each other: a host of a TPU slice is a square of chips, which the mesh goes through in lines.
    Hosts whose devices hold parts of the same rows feed them alike.
    """
    process = jax.process_index() if process is None else process
    spans = {
        index[0].indices(rows)
        for device, index in sharding.devices_indices_map((rows,)).items()
        if device.process_index == process
    }
    return tuple(sorted(row for span in spans for row in range(*span)))


def to_mesh(tree, sharding: NamedSharding, rows: int):
    """This host's `local_rows` (numpy) of a batch of `rows` rows -> global arrays on the mesh."""
    mine = local_rows(sharding, rows)

    def place(x: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            first = mine.index(start)
            return x[first : first + stop - start]

        return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, shard)

    return jax.tree.map(place, tree)
