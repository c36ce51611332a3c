"""Which documents share a row.

Documents wait, encoded, in a window; a row takes the longest waiting one and then every other that still fits, in the
order of their waiting: first fit within the budgets of a row, its tokens, its images to read and its images to paint.
Images are not decoded yet, which keeps the window small.
"""

import collections
import dataclasses
from collections.abc import Callable

from dreamllm_jax.batch import RowShape
from dreamllm_jax.data.tokens import Encoded

MISSES = 1000  # records in a row that may be left out


class NothingFits(ValueError):
    """So many records one after the other were left out that no row will ever be filled."""


@dataclasses.dataclass(frozen=True)
class Item:
    """An encoded document on its way into a row.

    Attributes:
      record: its number in the mixture.
      corpus: the name of its corpus, for counting.
      flip: mirror the images it paints.
    """

    record: int
    corpus: str
    encoded: Encoded
    flip: bool = False


class RowStream:
    """An endless stream of rows, each a list of items; row n is the same wherever the stream is taken up again.

    Args:
      read: an item by the number of its record; None for a record that is left out.
      first, step: the records of this stream are first, first + step, first + 2 step, ...
      window: how many documents wait; 1 gives each document a row of its own.
    """

    def __init__(self, read: Callable[[int], Item | None], shape: RowShape, *, first: int, step: int, window: int):
        self._read, self._shape, self._window = read, shape, window
        self._next, self._step = first, step
        self._waiting: collections.deque[Item] = collections.deque()

    def __next__(self) -> list[Item]:
        missed = 0
        while len(self._waiting) < self._window:
            item = self._read(self._next)
            self._next += self._step
            if item is not None:
                self._waiting.append(item)
            missed = missed + 1 if item is None else 0
            if missed == MISSES:
                raise NothingFits(f"{MISSES} documents one after the other had to be left out")
        room = [self._shape.length, self._shape.see_slots, self._shape.dream_slots]
        taken, left = [], collections.deque()
        for item in self._waiting:
            need = len(item.encoded.tokens), len(item.encoded.see), len(item.encoded.dream)
            if all(n <= r for n, r in zip(need, room, strict=True)):
                room = [r - n for n, r in zip(need, room, strict=True)]
                taken.append(item)
            else:
                left.append(item)
        self._waiting = left
        return taken

    @property
    def state(self) -> list[int]:
        """The record to read next and the records that wait, all there is to know."""
        return [self._next, *(item.record for item in self._waiting)]

    @state.setter
    def state(self, state: list[int]) -> None:
        self._next = state[0]
        items = (self._read(record) for record in state[1:])
        self._waiting = collections.deque(item for item in items if item is not None)

    def skip(self, record: int) -> None:
        """Goes on with the first of its records from this one on; none waits any more."""
        self._waiting.clear()
        self._next += max(-(-(record - self._next) // self._step), 0) * self._step
