"""Where a patch is, told by sinusoids (Vaswani et al., arXiv 1706.03762) in two dimensions.

Legend: T patches, line by line.
"""

import numpy as np


def line_table(length: int, base: int, width: int, interpolation_scale: float = 1.0) -> np.ndarray:
    """Sinusoids of so many places in a line, f32[length, width] (diffusers' `get_1d_sincos_pos_embed_from_grid`).

    Args:
      base: how many there are in images of the size that the model was made for, over which the line is stretched.
    """
    places = np.arange(length, dtype=np.float32) / np.float32(length / base) / np.float32(interpolation_scale)
    angles = np.outer(places, 10_000.0 ** (-np.arange(width // 2) / (width / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def position_table(size: tuple[int, int], base: int, width: int, interpolation_scale: float = 1.0) -> np.ndarray:
    """Sinusoids of columns and, after them, of rows, f32[T, width] (diffusers' `get_2d_sincos_pos_embed`).

    Args:
      size: rows and columns of patches.
      base: as of `line_table`, of both.
    """
    rows, columns = (line_table(length, base, width // 2, interpolation_scale) for length in size)
    both = np.broadcast_arrays(columns[None], rows[:, None])
    return np.concatenate(both, axis=-1).reshape(-1, width)
