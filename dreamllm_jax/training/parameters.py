"""A model's parameters in figures."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

RANDOM_AND_FROZEN = "what is frozen stays as random as it begins, for config.parameters.init_from names no model"


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters of one part of the model that are stored and treated alike."""

    part: str
    count: int
    dtype: str
    trained: bool


def count_and_bytes(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[int, int]:
    """Of all together."""
    counts = {path: math.prod(leaf.shape) for path, leaf in leaves.items()}
    return sum(counts.values()), sum(count * np.dtype(leaves[path].dtype).itemsize for path, count in counts.items())


def count_parameters(
    trainable: Mapping[str, jax.ShapeDtypeStruct], frozen: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[Parameters, ...]:
    """The parameters, given by path, by part of the model, storage type, and whether they are trained."""
    counts: dict[tuple[str, str, bool], int] = {}
    for leaves, trained in ((trainable, True), (frozen, False)):
        for path, leaf in leaves.items():
            key = (path.split("/")[0], str(np.dtype(leaf.dtype)), trained)
            counts[key] = counts.get(key, 0) + math.prod(leaf.shape)
    return tuple(Parameters(part, count, dtype, trained) for (part, dtype, trained), count in sorted(counts.items()))


def parameter_lines(parameters: Sequence[Parameters]) -> list[str]:
    """The same as a table."""
    return [
        f"  {one.part:20} {one.count:>15,}  {one.dtype:9} {'trained' if one.trained else 'frozen'}"
        for one in parameters
    ]
