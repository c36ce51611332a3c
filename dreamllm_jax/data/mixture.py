"""The endless mixture of corpora: which document is record k, and what is random about it.

Row r of every step is packed from stream r; with V rows a step there are V streams, and record k belongs to stream
k mod V. Record k is a function of (seed, V, k) alone, found without walking through the records before it: a host reads
the streams of its own rows and nothing else, and any number of hosts reads the same.
"""

import functools
import sys
from collections.abc import Mapping
from typing import NamedTuple

import grain
import numpy as np

from dreamllm_jax.data.document import Document
from dreamllm_jax.data.settings import CorpusConfig
from dreamllm_jax.data.storage import Corpus

SHORT = 4096  # up to so many documents, an epoch's order is one array; above, each place in it is computed alone
_ORDER, _RECORD, _PHASE = range(3)  # what a random generator is for


class Place(NamedTuple):
    """Where a record comes from: the corpus, the number of the document in it, and the epoch."""

    corpus: str
    document: int
    epoch: int


class Mixture:
    """The endless records of a weighted mixture.

    Args:
      corpora: the stored documents by name.
      uses: how each is used, all by weights or all by epochs; the same names.
      streams: V, the rows of a step.
      shuffle: give each epoch an order of its own.
    """

    def __init__(
        self,
        corpora: Mapping[str, Corpus],
        uses: Mapping[str, CorpusConfig],
        *,
        streams: int,
        seed: int,
        shuffle: bool,
    ):
        self._names, self._corpora = tuple(uses), corpora
        self._sizes = [min(use.limit or sys.maxsize, len(corpora[name])) for name, use in uses.items()]
        self._streams, self._seed, self._shuffle = streams, seed, shuffle
        weights = [use.epochs * size or use.weight for use, size in zip(uses.values(), self._sizes, strict=True)]
        count = len(weights)
        turns = [grain.MapDataset.range(sys.maxsize).map(lambda turn, i=i: (i, turn)) for i in range(count)]
        self._turns = grain.MapDataset.mix(turns, [weight / sum(weights) for weight in weights])
        # The corpora take turns in a fixed pattern; each stream enters it at a place of its own, lest streams see
        # one corpus only for a while.
        phases = np.random.default_rng((seed, _PHASE)).integers(1000, size=streams) * (count > 1)
        self._phases = phases.tolist()
        # How many turns each corpus has had before each phase.
        before = np.eye(count, dtype=int)[[self._turns[turn][0] for turn in range(max(self._phases))]]
        self._begun = np.concatenate([np.zeros((1, count), int), before.cumsum(axis=0)])

    def place(self, record: int) -> Place:
        """Which document record k is."""
        turn, stream = divmod(record, self._streams)
        phase = self._phases[stream]
        corpus, count = self._turns[turn + phase]
        count = (count - int(self._begun[phase, corpus])) * self._streams + stream
        epoch, index = divmod(count, self._sizes[corpus])
        if self._shuffle:
            index = _shuffled(index, self._sizes[corpus], (self._seed, corpus, epoch))
        return Place(self._names[corpus], index, epoch)

    def draws(self, record: int) -> np.ndarray:
        """f64[3] uniform in [0, 1), for record k alone."""
        return np.random.default_rng((self._seed, _RECORD, record)).random(3)

    def read(self, place: Place) -> Document:
        """The document; raises whatever a damaged record leads to."""
        return self._corpora[place.corpus][place.document]


def _shuffled(index: int, size: int, seed: tuple[int, int, int]) -> int:
    """The index-th of a random order of `size`, without holding that order where it is long."""
    if size <= SHORT:
        return int(_order(size, seed)[index])
    number = int(np.random.default_rng((_ORDER, *seed)).integers(1 << 31))
    return grain.experimental.index_shuffle(index, max_index=size - 1, seed=number, rounds=4)


@functools.lru_cache(maxsize=64)
def _order(size: int, seed: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng((_ORDER, *seed)).permutation(size)
