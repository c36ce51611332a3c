"""Which weights a stored array was made by: a few numbers of each, and the settings beside them."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dreamllm_jax.common.configuration import differences, flat
from dreamllm_jax.data import stored
from dreamllm_jax.model import DreamLLMConfig

ROLES = {"moments": "image_decoder", "features": "vision_encoder"}  # whose tower makes each of the stored arrays
# Settings of towers that do not change what is stored, which is not scaled yet.
_IDLE = ("initializer_range", "sample_size", "scaling_factor", "shift_factor")
_TOLERANCE = 0.01  # of marks, as a share of the norm: ten times what rounding to bfloat16 does


def _depends(config: DreamLLMConfig, name: str) -> tuple[str, ...]:
    """How the paths begin of the parameters that a kind of stored array depends on."""
    role = ROLES[name]
    return tuple(f"{role}/{path}" for path in getattr(config, role).stored_depends)


def require_frozen(config: DreamLLMConfig, stored: Iterable[str], trained: Iterable[str]) -> None:
    """Raises ValueError, naming it, if a trained parameter's tower is replaced by what it made: see `data.stored`."""
    for name in stored:
        if path := next((path for path in trained if path.startswith(_depends(config, name))), None):
            raise ValueError(f"{path} is trained: leave {name} out of data.stored, or freeze the tower")


def marks(config: DreamLLMConfig, name: str, leaves: Mapping[str, jax.Array]) -> dict[str, tuple[float, float]]:
    """Tells apart the weights behind a kind of stored array: of each, its product with a fixed array of random signs,
    and its norm. Every change moves the product, by a share of the norm that is that of the change."""
    found = {path: _mark(x) for path, x in leaves.items() if path.startswith(_depends(config, name))}
    return {path: (float(product), float(norm)) for path, (product, norm) in found.items()}


@jax.jit  # of one weight: many have the same shape, and a program of all is compiled for long
def _mark(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    signs = jax.random.rademacher(jax.random.key(0), x.shape, jnp.float32)
    return jnp.sum(x * signs), jnp.sqrt(jnp.sum(jnp.square(x)))


def settings_of(config: DreamLLMConfig, name: str) -> dict[str, Any]:
    """The settings of its tower that a kind of stored array depends on, by dotted path, as JSON gives them back."""
    return json.loads(json.dumps(_that_count(flat(getattr(config, ROLES[name]).stored_settings))))


def _that_count(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in settings.items() if path.rpartition(".")[2] not in _IDLE}


def require_same_towers(
    directory: str | os.PathLike, corpus: str, name: str, config: DreamLLMConfig, leaves: Mapping[str, jax.Array]
) -> None:
    """Checks that what is stored of a corpus was made by this model's tower.

    Raises:
      ValueError: it was made by another's.
    """
    found = stored.read_description(stored.folder(directory, corpus, name))
    ours = marks(config, name, leaves)
    changed = [
        f"{ROLES[name]}.{key} is {there!r}, and here {here!r}"
        for key, (there, here) in differences(_that_count(found.tower), settings_of(config, name)).items()
    ]
    moved = found.weights.keys() != ours.keys() or any(
        abs(product - ours[path][0]) > _TOLERANCE * norm for path, (product, norm) in found.weights.items()
    )
    if changed or moved:
        difference = changed[0] if changed else "weights differ from this run's"
        raise ValueError(
            f"the stored {name} of corpus {corpus!r} were made by {found.model}, whose {difference}: leave {name} out "
            f"of data.stored, or remove {stored.folder(directory, corpus, name)} and compute them with this model"
        )
