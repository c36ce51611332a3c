"""Where a document's tokens stand, for language models whose rotary positions have three axes.

M-RoPE (Qwen2-VL, arXiv 2409.12191): of text all three axes count on together; the tokens of an image are a grid, which
takes one step of time, and its rows and columns; what follows goes on behind the longest side of it. Dream queries
count as text. Models of one axis count tokens.

Legend: n tokens of a document, P tokens of an image; axes are time, row, column.
"""

import math
from collections.abc import Sequence

import numpy as np

AXES = 3


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of so many tokens of an image of this shape, one line if they are no such grid."""
    rows = max(1, round(math.sqrt(tokens * height / width)))
    return (1, tokens) if tokens % rows else (rows, tokens // rows)


def within_image(grid: tuple[int, int]) -> np.ndarray:
    """i32[P, 3] steps from an image's first token to each of its tokens."""
    return np.indices((1, *grid), np.int32).reshape(AXES, -1).T


def place(length: int, images: Sequence[tuple[int, tuple[int, int]]]) -> np.ndarray:
    """Positions i32[n, 3] of a document of so many tokens.

    Args:
      images: of those that are read, in their order: the index of the first token, and the grid.
    """
    found = np.empty((length, AXES), np.int32)
    token = position = 0
    for start, grid in images:
        found[token:start] = position + np.arange(start - token)[:, None]
        position, token = position + start - token, start + math.prod(grid)
        found[start:token] = position + within_image(grid)
        position += max(grid)
    found[token:] = position + np.arange(length - token)[:, None]
    return found
