"""Pictures to scenes: what is drawn is found by comparing with every thing in every place where one can be.

The arrangement and the things are those that come nearest in all; then each thing must be the nearest in its own place,
and the picture near to the scene's everywhere. One in which anything is something else, in excess, missing or not to be
told is no scene.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np
from PIL import Image

from dreamllm_jax.data.scenes.drawing import SIDE, Box, draw, places, sprite
from dreamllm_jax.data.scenes.world import COLOURS, KINDS, RELATIONS, Group, Scene, looks

THINGS = [(colour, kind) for colour in COLOURS for kind in KINDS]
# A scene's two groups have neither the colour nor the kind in common.
_DIFFERENT = np.array([[mine[0] != other[0] and mine[1] != other[1] for mine in THINGS] for other in THINGS])
# How far a picture may be off in any square of so many pixels: the root mean square of colours from 0 to 1. Of a thing
# of twelve pixels it is at least 0.29 from white.
NEAR, WINDOW = 0.15, 12


def read(picture: np.ndarray) -> Scene | None:
    """The scene that a picture u8[H, W, 3] shows as `drawing.draw` draws it, or None. Others than 48 pixels on a side
    are brought to that."""
    if picture.shape[:2] != (SIDE, SIDE):
        picture = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX))
    seen = _Seen(picture.astype(np.float32) / 255)
    candidates = [seen.beside(scene) for scene in _layouts() if scene.relation != "inside"]
    candidates += [seen.inside(scene) for scene in _layouts() if scene.relation == "inside"]
    _, layout, things = min(candidates, key=lambda candidate: candidate[0])
    return seen.accepted(layout, things)


@functools.cache
def _layouts() -> list[Scene]:
    """A scene of each arrangement; what its things are does not matter."""
    scenes = [Scene((Group(*look, COLOURS[0], KINDS[0]),)) for look in looks("", 0)]
    for relation in RELATIONS:
        for first, second in itertools.product(looks(relation, 0), looks(relation, 1)):
            groups = Group(*first, COLOURS[0], KINDS[0]), Group(*second, COLOURS[1], KINDS[1])
            scenes.append(Scene(groups, relation))
    return scenes


@functools.cache
def _drawn(side: int) -> tuple[np.ndarray, np.ndarray]:
    """All things in a square of that side: f32[things, S, S, 3] colours times cover, and f32[things, S, S, 1] cover."""
    colours, covers = zip(*(sprite(kind, colour, side) for colour, kind in THINGS), strict=True)
    cover = np.stack(covers)
    return np.stack(colours) / 255 * cover, cover


class _Seen:
    """A picture, f32[48, 48, 3] from 0 to 1, and what was found out about its squares."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        self._squares: dict[tuple[Box, int | None], np.ndarray] = {}
        self._white = np.square(1 - pixels).sum(-1)

    def errors(self, box: Box, behind: int | None = None) -> np.ndarray:
        """f32[things] sums of squares of how far each thing is from what is in a square, on white or before a large
        one."""
        if (box, behind) not in self._squares:
            left, top, side = box
            region = np.s_[top : top + side, left : left + side]
            colours, cover = _drawn(side)
            ground = 1.0
            if behind is not None:
                large, large_cover = (values[behind] for values in _drawn(SIDE))
                ground = (large + 1 - large_cover)[region]
            difference = colours + (1 - cover) * ground - self.pixels[region]
            self._squares[box, behind] = np.square(difference).sum((1, 2, 3))
        return self._squares[box, behind]

    def beside(self, layout: Scene) -> tuple[float, Scene, list[int]]:
        """The squared error of an arrangement with the nearest things in it, and which they are."""
        taken = _taken([box for boxes in places(layout) for box in boxes])
        error = float(self._white[~taken].sum())
        first, *others = (sum(self.errors(box) for box in boxes) for boxes in places(layout))
        if not others:
            return error + float(first.min()), layout, [int(first.argmin())]
        both = np.where(_DIFFERENT, first[:, None] + others[0], np.inf)
        return error + float(both.min()), layout, [int(thing) for thing in np.unravel_index(both.argmin(), both.shape)]

    def inside(self, layout: Scene) -> tuple[float, Scene, list[int]]:
        """The same of things before a large one, which is known by what is seen of it."""
        inner, _ = places(layout)
        colours, cover = _drawn(SIDE)
        around = ~_taken(inner)
        errors = np.square(colours + 1 - cover - self.pixels)[:, around].sum((1, 2))
        large = int(errors.argmin())
        before = np.where(_DIFFERENT[large], sum(self.errors(box, large) for box in inner), np.inf)
        return float(errors.min() + before.min()), layout, [int(before.argmin()), large]

    def accepted(self, layout: Scene, things: list[int]) -> Scene | None:
        """The scene, if each thing by itself is the nearest one and the whole picture is near to the scene's."""
        large = things[1] if layout.relation == "inside" else None
        squares = places(layout) if large is None else places(layout)[:1]  # the large one was found by what is around
        for thing, boxes in zip(things, squares, strict=large is None):
            if any(self.errors(box, large).argmin() != thing for box in boxes):
                return None
        groups = []
        for thing, group in zip(things, layout.groups, strict=True):
            colour, kind = THINGS[thing]
            groups.append(dataclasses.replace(group, colour=colour, kind=kind))
        scene = dataclasses.replace(layout, groups=tuple(groups))
        return scene if _farthest(self.pixels, draw(scene).astype(np.float32) / 255) <= NEAR else None


def _farthest(picture: np.ndarray, other: np.ndarray) -> float:
    """The greatest root mean square of two pictures' difference over a square of `WINDOW` pixels."""
    sums = np.pad(np.square(picture - other).sum(-1), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    windows = sums[WINDOW:, WINDOW:] - sums[:-WINDOW, WINDOW:] - sums[WINDOW:, :-WINDOW] + sums[:-WINDOW, :-WINDOW]
    return math.sqrt(windows.max() / (3 * WINDOW**2))


def _taken(boxes: list[Box]) -> np.ndarray:
    """bool[48, 48]: the squares."""
    taken = np.zeros((SIDE, SIDE), bool)
    for left, top, side in boxes:
        taken[top : top + side, left : left + side] = True
    return taken
