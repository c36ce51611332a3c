"""A picture as tiles of one size, for vision encoders that see nothing else (InternVL, arXiv 2404.16821, section 3).

The picture is squeezed to so many tiles beside and above each other, and cut; beside more than one tile stands all of
it, squeezed to a single one. (`dynamic_preprocess` of InternVL, `GotOcr2ImageProcessor` of transformers.)
"""

import functools

import numpy as np
from PIL import Image

from dreamllm_jax.data.images import nearest


@functools.cache
def _grids(side: int, most: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of everything that can be made of at most so many tiles."""
    columns = range(1, most + 1)
    return tuple((side * row, side * column) for column in columns for row in range(1, most // column + 1))


def fitting(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """Height and width of what a picture of this width and height is squeezed to: of at most so many tiles, and next in
    shape (`data.images.nearest`)."""
    grids = _grids(side, most)
    return grids[nearest((width, height), grids, cropped=False)]


def count(height: int, width: int, side: int) -> int:
    """How many tiles a picture of so many pixels is seen as, the whole of it included.

    Raises:
      ValueError: it is not made of whole tiles.
    """
    if height < 1 or width < 1 or height % side or width % side:
        raise ValueError(
            f"images are seen in tiles of {side} x {side} pixels, which {height} x {width} are not made of"
        )
    tiles = (height // side) * (width // side)
    return tiles + (tiles > 1)


def cut(image: Image.Image, height: int, width: int, side: int) -> np.ndarray:
    """The tiles of a picture squeezed to so many pixels, row by row, and all of it as the last.

    Returns:
      u8[tiles, side, side, 3]; of a single tile u8[side, side, 3].

    Raises:
      ValueError: see `count`.
    """
    tiles = count(height, width, side)
    whole = _squeezed(image, side, side)[None]
    if tiles == 1:
        return whole[0]
    rows, columns = height // side, width // side
    grid = _squeezed(image, height, width).reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return np.concatenate([grid.reshape(-1, side, side, 3), whole])


def _squeezed(image: Image.Image, height: int, width: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
