"""Stored corpora to batches, one stream for all hosts.

For each corpus: shuffle, repeat, encode (record k's randomness is a function of the seed and k), pack. The corpora's
rows are mixed by weight; each step takes the next `rows_per_step` of them, and host i of n decodes the i-th n-th part.
Every host therefore walks the whole stream of encoded rows and decodes its own images only: what a step trains on does
not depend on the number of hosts, and any host's saved state continues the stream on any number of hosts.
"""

import collections
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from etils import epath

from dreamllm_jax.batch import Batch
from dreamllm_jax.data import packing, storage, tokenizer
from dreamllm_jax.data.document import Document
from dreamllm_jax.data.tokens import MODES, Mode, RowShape, encode_document

__all__ = ["CorpusConfig", "DataConfig", "Loader", "RowShape", "data_tokenizer", "encode_batch", "make_loader"]


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """How a corpus is used.

    Attributes:
      mode: joint, comprehension or creation.
      weight: its share of the rows, relative to the others'.
      learn_dream_start: in conversations, learn the decision to paint too.
    """

    mode: Mode = "joint"
    weight: float = 1.0
    learn_dream_start: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; known are {', '.join(MODES)}")
        if not self.weight > 0:
            raise ValueError(f"the weight of a corpus must be positive, got {self.weight}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
      path: the data set's directory, as `python -m dreamllm_jax.data prepare` leaves it; or what a training run is to
        prepare by itself: openmoji, photographs, or a folder of pictures with captions.
      pairs: how many captioned pictures to prepare then; 0 for 24 of openmoji and photographs, or all of a folder.
      tokenizer: a SentencePiece model, a tokenizer.json or a directory; empty for the data set's own.
      corpora: which of its corpora, and how; empty for all of them.
      packing_bins: rows kept open while packing.
      workers: processes that read ahead; 0 reads in the training process.
      flip: probability of mirroring the pictures of a document that only paints.
      shuffle: shuffle the documents anew in each epoch.
      pack: put several documents in a row.
    """

    path: str
    pairs: int = 0
    tokenizer: str = ""
    corpora: Mapping[str, CorpusConfig] = dataclasses.field(default_factory=dict)
    packing_bins: int = 16
    workers: int = 0
    flip: float = 0.0
    shuffle: bool = True
    pack: bool = True

    def __post_init__(self):
        if self.packing_bins < 1:
            raise ValueError(f"packing_bins must be at least 1, got {self.packing_bins}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability, got {self.flip}")


def data_tokenizer(config: DataConfig) -> tokenizer.Tokenizer:
    """The tokenizer that a configuration asks for."""
    if config.tokenizer:
        return tokenizer.load_tokenizer(config.tokenizer)
    storage.read_summary(config.path)
    return tokenizer.load_tokenizer(epath.Path(config.path) / tokenizer.FOLDER)


def make_loader(
    config: DataConfig,
    shape: RowShape,
    text_tokenizer: tokenizer.Tokenizer,
    *,
    rows_per_step: int,
    seed: int,
    mine: slice = slice(None),
) -> "Loader":
    """An endless iterator over batches of NumPy arrays.

    Args:
      mine: the rows of each step that this host feeds; the whole stream is the same, whatever a host takes of it.

    Raises:
      FileNotFoundError: the data set or one of the corpora is not there.
      ValueError: the rows have no room for a corpus's documents.
    """
    summary = storage.read_summary(config.path)
    corpora = dict(config.corpora) or {name: CorpusConfig() for name in sorted(summary["corpora"])}
    streams = {}
    for index, (name, corpus) in enumerate(corpora.items()):
        documents = storage.Corpus(config.path, name)
        encode = _Encode(text_tokenizer, shape, corpus, config.flip)
        encode.check(name, documents[0])
        streams[name] = _rows(documents, encode, config, shape, seed=seed + index)
    if len(streams) == 1:
        (rows,) = streams.values()
    else:
        rows = grain.IterDataset.mix(list(streams.values()), weights=[corpus.weight for corpus in corpora.values()])
    batches = rows.batch(rows_per_step, drop_remainder=True, batch_fn=_Slice(mine))
    batches = batches.map(_Decode(shape, text_tokenizer.special.pad))
    if config.workers:
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=2),
            worker_init_fn=_start_worker,
        )
    settings = dataclasses.asdict(dataclasses.replace(config, path="", pairs=0, tokenizer=""))
    settings |= {"corpora": {name: dataclasses.asdict(corpus) for name, corpus in corpora.items()}}
    settings |= {"documents": {name: summary["corpora"][name] for name in corpora}}
    settings |= {"shape": dataclasses.asdict(shape), "vocab_size": text_tokenizer.vocab_size, "seed": seed}
    return Loader(iter(batches), shape, settings)


def encode_batch(
    documents: Sequence[Document],
    text_tokenizer: tokenizer.Tokenizer,
    shape: RowShape,
    mode: Mode = "joint",
    *,
    draw: float = 0.0,
    learn_dream_start: bool = False,
    complete: bool = True,
) -> Batch:
    """The documents as a batch, one a row; see `encode_document` for the arguments.

    Raises:
      ImageError: an image cannot be decoded.
    """
    options = {"draw": draw, "learn_dream_start": learn_dream_start, "complete": complete}
    rows = [
        packing.single_row(encode_document(document, text_tokenizer, shape, mode, **options), shape)
        for document in documents
    ]
    return packing.to_batch(rows, shape, packing.Pixels(shape), text_tokenizer.special.pad, strict=True)[0]


class Loader(grain.DatasetIterator):
    """Iterates over batches; its state can be saved with `grain.checkpoint.CheckpointSave`.

    Attributes:
      totals: what this host has been given since the start: rows, documents, tokens, see and dream (images), and
        `dropped_<reason>` for images that could not be decoded.
    """

    def __init__(self, iterator: grain.DatasetIterator, shape: RowShape, settings: Mapping[str, Any]):
        super().__init__(iterator)
        self._iterator, self._shape, self._settings = iterator, shape, settings
        self.totals: collections.Counter[str] = collections.Counter()

    def __next__(self) -> Batch:
        batch, held = next(self._iterator)
        self.totals.update(held)
        return batch

    def fill(self) -> dict[str, float]:
        """The share of tokens, see slots and dream slots that were used so far."""
        rows, shape = max(self.totals["rows"], 1), self._shape
        rooms = {"tokens": shape.length, "see": shape.see_slots, "dream": shape.dream_slots}
        return {name: self.totals[name] / (rows * room) for name, room in rooms.items() if room}

    def get_state(self) -> dict[str, Any]:
        return {"settings": self._settings, "iterator": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a saved state.

        Raises:
          ValueError: it was saved under other settings of the data, with which the stream is another one.
        """
        for name, value in self._settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"the saved data state has {name}={state['settings'].get(name)!r}, this run has {value!r}: "
                    "continue with the same data settings or start anew"
                )
        self._iterator.set_state(state["iterator"])


def _rows(
    documents: storage.Corpus, encode: "_Encode", config: DataConfig, shape: RowShape, seed: int
) -> grain.IterDataset:
    records = grain.MapDataset.range(sys.maxsize).map(_Endless(documents, seed, config.shuffle))
    threads = 0 if documents.in_memory else 4
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=32 if threads else 0)
    stream = records.map(encode).to_iter_dataset(options)
    return packing.pack(stream, shape, config.packing_bins if config.pack else 0, seed)


class _Endless:
    """Record k of the endless stream: a document and a generator that is a function of the seed and k alone.

    Each epoch has its own permutation. (`MapDataset.shuffle` does the same without memory, but needs milliseconds for
    each record of a small data set.)
    """

    def __init__(self, documents: storage.Corpus, seed: int, shuffle: bool):
        self._documents, self._seed, self._shuffle = documents, seed, shuffle
        self._order = -1, np.arange(len(documents))  # an epoch and its permutation

    def __call__(self, index: int) -> tuple[Document, np.random.Generator]:
        epoch, place = divmod(int(index), len(self._documents))
        if self._shuffle:
            known, order = self._order
            if epoch != known:
                order = np.random.default_rng((self._seed, 0, epoch)).permutation(len(self._documents))
                self._order = epoch, order
            place = int(order[place])
        return self._documents[place], np.random.default_rng((self._seed, 1, index))


@dataclasses.dataclass(frozen=True)
class _Encode:
    """Document to features; None for one that would teach nothing or does not fit."""

    tokenizer: tokenizer.Tokenizer
    shape: RowShape
    corpus: CorpusConfig
    flip: float

    def __call__(self, record: tuple[Document, np.random.Generator]) -> dict[str, np.ndarray] | None:
        document, generator = record
        draw, flip = generator.random(2)
        try:
            encoded = self._encode(document, draw)
        except ValueError:
            return None
        if not encoded.learns:
            return None
        return packing.to_features(encoded, flip=not encoded.see and flip < self.flip)

    def check(self, name: str, document: Document) -> None:
        """Raises ValueError if a typical document of the corpus cannot be encoded."""
        for draw in (0.0, 0.5):
            try:
                learns = self._encode(document, draw).learns
            except ValueError as error:
                raise ValueError(f"corpus {name!r} in mode {self.corpus.mode!r}: {error}") from None
            if not learns:
                raise ValueError(
                    f"corpus {name!r} in mode {self.corpus.mode!r}: a row of {self.shape.length} tokens, "
                    f"{self.shape.see_slots} see and {self.shape.dream_slots} dream slots leaves nothing to learn of "
                    "its first document"
                )

    def _encode(self, document: Document, draw: float):
        return encode_document(
            document,
            self.tokenizer,
            self.shape,
            self.corpus.mode,
            draw=draw,
            learn_dream_start=self.corpus.learn_dream_start,
        )


@dataclasses.dataclass(frozen=True)
class _Slice:
    """Keeps one host's rows of a step."""

    rows: slice

    def __call__(self, rows: Sequence[packing.Row]) -> Sequence[packing.Row]:
        return rows[self.rows]


class _Decode:
    """Rows to a batch and what it holds."""

    def __init__(self, shape: RowShape, pad: int):
        self._shape, self._pixels, self._pad = shape, packing.Pixels(shape), pad

    def __call__(self, rows: Sequence[packing.Row]) -> tuple[Batch, dict[str, int]]:
        return packing.to_batch(rows, self._shape, self._pixels, self._pad)


def _start_worker(index: int, count: int) -> None:
    del index, count
    os.environ["JAX_PLATFORMS"] = "cpu"
