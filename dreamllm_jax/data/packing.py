"""Which documents share a row.

Documents wait, encoded, in a window; a row takes the longest waiting one and then every other that still fits, in the
order of their waiting: first fit within the budgets of a row, its tokens, its images to see and its images to paint.
Images are not decoded yet, which keeps the window small.

Reading is begun as early as it is known what to see: as soon as a row has left the window, the documents that come in
its place are being read, so that those that wait and those that come are together never more than the window. What
waited when a state was saved is known by what it needs, and is read for the row that takes it.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from dreamllm_jax.data.batch import RowShape
from dreamllm_jax.data.writing import Encoded

MISSES = 1000  # records in a row that may be left out


class NothingFits(ValueError):
    """So many records one after the other were left out that no row will ever be filled."""


Need = tuple[int, ...]  # what a document needs of a row: see `RowShape.room`


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

    def need(self, shape: RowShape) -> Need:
        """What it needs of a row of this shape."""
        see, dream = (
            [sum(placed.group == group for placed in images) for group in range(len(groups))]
            for images, groups in ((self.encoded.see, shape.see), (self.encoded.dream, shape.dream))
        )
        return len(self.encoded.tokens), *see, *dream


Get = Callable[[], Item | None]


class Begin(Protocol):
    """Begins to see a record, which needed `need` when it was read before, if it was.

    What it returns waits for it and gives its item, or None if it is left out.
    """

    def __call__(self, record: int, need: Need | None = None) -> Get: ...


@dataclasses.dataclass
class _Waiting:
    """A document that waits; `get` gives its item, once reading it has begun."""

    record: int
    need: Need
    get: Get | None = None


class RowStream:
    """An endless stream of rows, each a list of items; row n is the same wherever the stream is taken up again.

    Args:
      begin: how records are read.
      first, step: the records of this stream are first, first + step, first + 2 step, ...
      window: how many documents wait; 1 gives each document a row of its own.
    """

    def __init__(self, begin: Begin, shape: RowShape, *, first: int, step: int, window: int):
        self._begin, self._shape, self._window = begin, shape, window
        self._next, self._step = first, step
        self._waiting: list[_Waiting] = []
        self._coming: collections.deque[Get] = collections.deque()  # of the next records, in their order

    def __next__(self) -> list[Item]:
        row: list[Item] = []
        while not row:  # what waited when a state was saved may have become unreadable
            self._fill()
            taken, self._waiting = self._split()
            gets = [waiting.get or self._begin(waiting.record, waiting.need) for waiting in taken]
            self.read_ahead()
            row = [item for get in gets if (item := get()) is not None]
        return row

    def _fill(self) -> None:
        missed = 0
        while len(self._waiting) < self._window:
            self._read_next()
            item = self._coming.popleft()()
            self._next += self._step
            if item is not None:
                self._waiting.append(_Waiting(item.record, item.need(self._shape), lambda item=item: item))
            missed = missed + 1 if item is None else 0
            if missed == MISSES:
                raise NothingFits(f"{MISSES} documents one after the other had to be left out")

    def _split(self) -> tuple[list[_Waiting], list[_Waiting]]:
        """Of the documents that wait, those that the next row takes and the others."""
        room = list(self._shape.room)
        taken: list[_Waiting] = []
        left: list[_Waiting] = []
        for waiting in self._waiting:
            if all(n <= r for n, r in zip(waiting.need, room, strict=True)):
                room = [r - n for n, r in zip(waiting.need, room, strict=True)]
                taken.append(waiting)
            else:
                left.append(waiting)
        return taken, left

    def read_ahead(self) -> None:
        """Begins to see what the window lacks, and what the next row takes of a saved state."""
        # What comes into the window later changes nothing in what a row takes of those that wait before it.
        for waiting in self._split()[0]:
            waiting.get = waiting.get or self._begin(waiting.record, waiting.need)
        self._read_next()

    def _read_next(self) -> None:
        while len(self._waiting) + len(self._coming) < self._window:
            self._coming.append(self._begin(self._next + len(self._coming) * self._step))

    @property
    def state(self) -> list[Any]:
        """All there is to know, however far is read ahead: the record to take next; of each document that waits, its
        record and what it needs."""
        return [self._next, *([waiting.record, *waiting.need] for waiting in self._waiting)]

    @state.setter
    def state(self, state: list[Any]) -> None:
        self._next = state[0]
        self._waiting = [_Waiting(record, tuple(need)) for record, *need in state[1:]]
        self._coming.clear()

    def skip(self, record: int) -> None:
        """Goes on with the first of its records from this one on; none waits any more."""
        self._waiting.clear()
        self._coming.clear()
        self._next = record + (self._next - record) % self._step
