"""Where the patches of an image stand in Qwen2.5-VL's vision tower: what depends on its size alone.

Patches are read feature by feature (of `unit` x `unit` patches, row by row), and features window by window.

Legend: N images, h x w features, P of them, U patches in each, T = P U, G windows, M features of a whole window,
H heads, D head dimension.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dreamllm_jax.layers.attention import attend
from dreamllm_jax.layers.rope import rope_frequencies

THETA = 10_000.0  # base of the rotations


def smart_resize(height: int, width: int, multiple: int, least: int, most: int) -> tuple[int, int]:
    """The size in which a picture of so many pixels is read: about its shape, sides that are multiples, and between
    `least` and `most` pixels (transformers' `Qwen2VLImageProcessor`)."""
    sides = tuple(round(side / multiple) * multiple for side in (height, width))
    if math.prod(sides) > most:
        shrink = math.sqrt(height * width / most)
        sides = tuple(max(multiple, math.floor(side / shrink / multiple) * multiple) for side in (height, width))
    elif math.prod(sides) < least:
        grow = math.sqrt(least / (height * width))
        sides = tuple(math.ceil(side * grow / multiple) * multiple for side in (height, width))
    return sides


def windows(grid: tuple[int, int], side: int) -> np.ndarray:
    """i32[G, M]: the features of each window, -1 where those at the border lack some.

    Args:
      grid: (h, w).
      side: features along a window.
    """
    rows, columns = (-(-length // side) for length in grid)
    padded = np.full((rows * side, columns * side), -1, np.int32)
    padded[: grid[0], : grid[1]] = np.arange(math.prod(grid)).reshape(grid)
    return padded.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(rows * columns, side**2)


def rotations(grid: tuple[int, int], order: np.ndarray, unit: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines f32[T, D / 2] of the patches: the first half of the angles are of their rows, the others of
    their columns.

    Args:
      order: i32[P] features as they are read.
      dim: D.
    """
    features, patches = np.divmod(order, grid[1]), np.divmod(np.arange(unit**2), unit)
    places = ((feature[:, None] * unit + patch).reshape(-1) for feature, patch in zip(features, patches, strict=True))
    frequencies = rope_frequencies(dim // 2, THETA, None, 1, 1)
    angles = np.concatenate([place[:, None].astype(np.float32) * frequencies for place in places], axis=1)
    return np.cos(angles), np.sin(angles)


def attend_within(q: jax.Array, k: jax.Array, v: jax.Array, windows: np.ndarray) -> jax.Array:
    """Attention within windows.

    Args:
      q, k, v: f[N, T, H, D], window after window.
      windows: bool[G, M U] which places of a whole window have a patch, T in all.

    Returns:
      f[N, T, H, D].
    """
    slots = np.where(windows, np.cumsum(windows).reshape(windows.shape) - 1, 0)

    def apart(x: jax.Array) -> jax.Array:
        return x[:, slots].reshape(-1, slots.shape[1], *x.shape[2:])

    segments = None if windows.all() else jnp.tile(jnp.asarray(windows, jnp.int32), (len(q), 1))
    out = attend(apart(q), apart(k), apart(v), q_segments=segments, k_segments=segments, causal=False)
    return out.reshape(len(q), -1, *q.shape[2:])[:, np.flatnonzero(windows)]
