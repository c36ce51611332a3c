"""Rotary position embedding (arXiv 2104.09864), and how it is stretched to longer rows.

Legend: B rows, T tokens, H heads, D head dimension.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length; field names as in a Hugging Face config.

    Attributes:
      rope_type: "linear" (divide positions), "dynamic" (NTK-aware: a larger base for longer rows), or "llama3"
        (stretch the low frequencies only, arXiv 2407.21783).
      factor: how far.
      low_freq_factor, high_freq_factor: "llama3" only.
      original_max_position_embeddings: of "llama3"; of the others if it is not `max_position_embeddings`.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self):
        fields = {
            "linear": ("factor",),
            "dynamic": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        if self.rope_type not in fields:
            raise ValueError(f"rope_type {self.rope_type!r} is not supported: choose from {list(fields)} or no scaling")
        if missing := [name for name in fields[self.rope_type] if not getattr(self, name)]:
            raise ValueError(f"rope_type {self.rope_type!r} needs {', '.join(missing)}")
        for name in fields[self.rope_type]:
            if not isinstance(value := getattr(self, name), int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} of rope_type {self.rope_type!r} must be a positive number, got {value!r}")

    def stretched(self, max_position_embeddings: int) -> int:
        """The longest row, of a configuration with this `max_position_embeddings`."""
        if self.rope_type == "llama3":
            return max_position_embeddings
        return int((self.original_max_position_embeddings or max_position_embeddings) * self.factor)


def rope_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None, length: int | Array, max_position_embeddings: int
) -> np.ndarray | Array:
    """Angles a token of rotary embedding, scaled if the model says so.

    Args:
      dim: D.
      theta: the base.
      length: with which the base of "dynamic" scaling grows once it exceeds `max_position_embeddings`: of rows of
        documents their static one, the same for all, so that what a document gives does not change with what is
        packed beside it; or i32[...] tokens that each row has read, as transformers does where keys are cached.

    Returns:
      f32[D / 2] radians per position, or, of "dynamic" scaling, f32[..., D / 2].
    """
    base = np.float32(theta)
    if scaling and scaling.rope_type == "dynamic":
        xp = jnp if isinstance(length, Array) else np
        stretch = scaling.factor * xp.maximum(1.0, length / max_position_embeddings) - (scaling.factor - 1)
        base = (theta * stretch ** (dim / (dim - 2))).astype(np.float32)[..., None]
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = np.float32(1) / base**exponents
    if scaling and scaling.rope_type == "linear":
        frequencies = frequencies / np.float32(scaling.factor)
    if scaling and scaling.rope_type == "llama3":
        # Turns over the trained length: those with few are stretched, with many kept, in between interpolated.
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = np.clip(keep, 0, 1).astype(np.float32)
        frequencies = frequencies * (keep + (1 - keep) / np.float32(scaling.factor))
    return frequencies.astype(np.float32)


def _half_turn(dim: int) -> np.ndarray:
    """f32[D, D] such that (first, second) @ it = (-second, first) for the halves of a head."""
    identity, zero = np.eye(dim // 2, dtype=np.float32), np.zeros((dim // 2, dim // 2), np.float32)
    return np.block([[zero, identity], [-identity, zero]])


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates each head's first half against its second half (the Hugging Face convention).

    The halves are swapped by an exact product with a signed permutation: on TPU that costs less than cutting vectors of
    128 lanes in two.

    Args:
      x: f[B, T, H, D] queries or keys.
      cos: f32[B, T, D / 2] cosines of position times frequency.
      sin: f32[B, T, D / 2].

    Returns:
      f[B, T, H, D] in the type of `x`.
    """
    turned = jnp.einsum(
        "bthd,de->bthe",
        x,
        jnp.asarray(_half_turn(x.shape[-1]), x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    cos, sin = (jnp.concatenate([part, part], axis=-1)[:, :, None] for part in (cos, sin))
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
