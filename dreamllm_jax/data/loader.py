"""Stored corpora to batches, one stream for all hosts.

Each row of a step has a stream of records of its own (`mixture`), of which it is packed (`packing`); a host reads the
streams of the rows that it feeds. What a step trains on therefore depends on the seed and on the rows of a step alone:
not on the number of hosts, of threads, or of times that the run was taken up again.

Two kinds of threads make them. Readers wait for the storage, many at a time, on behalf of all streams; workers compute:
they tokenise what was read, pack it and decode its images. A document counts when its stream takes it, however long ago
it was read.
"""

import collections
import concurrent.futures
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from dreamllm_jax.data import storage
from dreamllm_jax.data.batch import Batch, RowShape, empty_batch
from dreamllm_jax.data.document import Document
from dreamllm_jax.data.mixture import Mixture, Place
from dreamllm_jax.data.packing import Get, Item, Need, NothingFits, RowStream
from dreamllm_jax.data.prompting import Prompting
from dreamllm_jax.data.readers import Readers
from dreamllm_jax.data.rows import Counts, Crop, Pixels, fill_row
from dreamllm_jax.data.settings import CorpusConfig, DataConfig
from dreamllm_jax.data.templates import TemplateError
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.data.tokens import encode_document
from dreamllm_jax.data.writing import Encoded

_logger = logging.getLogger(__name__)
ENOUGH = 200  # documents after which too large a share of bad ones ends the run
AHEAD = 2  # batches made in advance
_TRIED = 8  # first records of a corpus, of which one must be of use
# Settings that change nothing in what a step trains on.
_ASIDE = ("path", "pairs", "tokenizer", "workers", "readers", "max_bad")
# Each document is counted as one of them.
READ = ("documents", "dropped_record", "dropped_template", "dropped_room", "dropped_empty", "dropped_changed")


class Loader:
    """An endless iterator over batches of NumPy arrays, the next ones being made by threads meanwhile.

    Args:
      config: what is read.
      shape: of the rows; what is stored of images is read where it says so.
      tokenizer: see `storage.open_tokenizer`.
      see, dream: what makes pixels of images that are read and of those that are painted: see `rows.Pixels`.
      rows_per_step: rows of a step on all hosts.
      seed: of everything random.
      prompting: how the model is asked to paint, if it is in words of its own.
      mine: the rows of each step that this host feeds, all if not given; the whole stream is the same, whatever a host
        takes of it.

    Attributes:
      totals: what this host has been given since the start, by corpus and kind: documents, tokens, see and dream
        (images), and `dropped_<reason>` for documents that were left out: record (unreadable), room (too little of
        it), empty (nothing to learn), changed (it waited when a state was saved, and is another one now), or why an
        image could not be decoded.
      records: of the last batch, the numbers of the records in each of this host's rows.

    Raises:
      FileNotFoundError: the data set, one of the corpora or what was stored of it is not there.
      ValueError: the rows have no room for a corpus's documents.
    """

    def __init__(
        self,
        config: DataConfig,
        shape: RowShape,
        tokenizer: Tokenizer,
        see: Crop,
        dream: Crop,
        *,
        rows_per_step: int,
        seed: int,
        prompting: Prompting | None = None,
        mine: Sequence[int] | None = None,
    ):
        self._config, self._shape, self._tokenizer, self._prompting = config, shape, tokenizer, prompting
        summary = storage.read_summary(config.path)["corpora"]
        self._uses = dict(config.corpora) or {name: CorpusConfig() for name in storage.learnt(config.path)}
        groups = {"moments": shape.dream, "features": shape.see}
        arrays = {name: (g.stored, g.dtype) for name, each in groups.items() for g in each if g.stored}
        corpora = {name: storage.Corpus(config.path, name, arrays) for name in self._uses}
        self._mixture = Mixture(corpora, self._uses, streams=rows_per_step, seed=seed, shuffle=config.shuffle)
        for name, corpus in corpora.items():
            self._require_use(name, [document for _, document in corpus.first(_TRIED)])
        # All that the stream depends on, as JSON gives it back.
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _ASIDE}
        settings |= {"corpora": _chosen({name: dataclasses.asdict(use) for name, use in self._uses.items()})}
        settings |= {"documents": {name: summary[name] for name in self._uses}, "shape": _room_of(shape)}
        settings |= {"prompting": None if prompting is None else dataclasses.asdict(prompting)}
        settings |= {"vocab_size": tokenizer.vocab_size, "seed": seed, "rows_per_step": rows_per_step}
        self._settings = json.loads(json.dumps(settings))
        window = config.window if config.pack else 1
        self._streams = {
            row: RowStream(self._begin, shape, first=row, step=rows_per_step, window=window)
            for row in (range(rows_per_step) if mine is None else mine)
        }
        self._pixels = Pixels(shape, see, dream)
        self._rows = 0
        self.totals: Counts = collections.Counter()
        self.records: list[list[int]] = []
        self._left_out: collections.deque[tuple[str, str]] = collections.deque()  # by threads, since the last batch
        self._state = self._stream_states()
        self._start()

    def _require_use(self, name: str, documents: Sequence[Document]) -> None:
        """Raises ValueError if none of the first documents of the corpus can be read, or learned from."""
        if not documents:
            raise ValueError(f"the first {_TRIED} records of corpus {name!r} in {self._config.path} cannot be read")
        where = f"corpus {name!r} in mode {self._uses[name].mode!r}"
        for draw in (0.0, 0.5):
            room = f"{self._shape.length} tokens, {self._shape.see_slots} see and {self._shape.dream_slots} dream slots"
            problem = f"a row of {room} leaves nothing to learn of its first documents"
            for document in documents:
                try:
                    if self._encode(name, document, draw, 0.0).learns:
                        break
                except ValueError as error:
                    problem = str(error)
            else:
                raise ValueError(f"{where}: {problem}")

    def _start(self) -> None:
        """The threads; nothing is begun yet."""

        threads = self._config.workers
        self._ahead: collections.deque[concurrent.futures.Future] = collections.deque()
        self._maker = concurrent.futures.ThreadPoolExecutor(1) if threads else None
        self._workers = concurrent.futures.ThreadPoolExecutor(threads) if threads else None
        self._readers = Readers(self._config.readers) if threads else None

    def _stop(self) -> None:
        """Ends the threads, each after what it is just doing; a read that hangs is left to itself."""
        if self._readers is not None:
            pools = self._maker, self._workers
            for pool in pools:
                pool.shutdown(wait=False, cancel_futures=True)
            self._readers.close()
            for pool in pools:
                pool.shutdown()

    def _begin(self, record: int, need: Need | None = None) -> Get:
        """See `packing.Begin`."""
        if self._readers is None:
            return lambda: self._item(record, need, *self._read(record))
        reading = self._readers.submit(lambda: self._read(record))
        return lambda: self._item(record, need, *reading.result())

    def _read(self, record: int) -> tuple[Place, Document | None]:
        """Where a record comes from, and its document; None if it cannot be read."""
        place = self._mixture.place(record)
        try:
            return place, self._mixture.read(place)
        except Exception:  # the reader's native code raises whatever a damaged record leads it to
            return place, None

    def _item(self, record: int, need: Need | None, place: Place, document: Document | None) -> Item | None:
        """A record as an item; None, and counted, if it is of no use."""

        def leave_out(reason: str) -> None:
            self._left_out.append((place.corpus, f"dropped_{reason}"))

        if document is None:
            return leave_out("record")
        draw, flip, drop = self._mixture.draws(record)
        try:
            encoded = self._encode(place.corpus, document, draw, drop)
        except TemplateError:
            return leave_out("template")
        except ValueError:
            return leave_out("room")
        if document.blank or not encoded.learns:
            return leave_out("empty")
        item = Item(record, place.corpus, encoded, flip=not encoded.see and bool(flip < self._config.flip))
        return item if need in (None, item.need(self._shape)) else leave_out("changed")

    def _encode(self, corpus: str, document: Document, draw: float, drop: float) -> Encoded:
        """A document of a corpus, by its uniform draws."""
        use = self._uses[corpus]
        return encode_document(
            document,
            self._tokenizer,
            self._shape,
            use.mode,
            draw=draw,
            template=use.template,
            learn_dream_start=use.learn_dream_start,
            see_first=use.see_first,
            prompting=self._prompting,
            drop=use.dropped(drop),
        )

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._maker is None:
            made = self._make()
        else:
            self._make_ahead()
            made = self._ahead.popleft().result()
        batch, counts, self.records, self._state = made
        self.totals.update(counts)
        self._rows += len(batch.tokens)
        self._require_good()
        return batch

    def _make_ahead(self) -> None:
        while self._maker is not None and len(self._ahead) <= AHEAD:
            self._ahead.append(self._maker.submit(self._make))

    def _make(self) -> tuple[Batch, Counts, list[list[int]], dict[str, list]]:
        batch = empty_batch(len(self._streams), self._shape, self._tokenizer.special.pad)

        def make_row(index: int, stream: RowStream) -> tuple[Counts, list[int]]:
            row = next(stream)
            return fill_row(batch, index, row, self._pixels), [item.record for item in row]

        for stream in self._streams.values():
            stream.read_ahead()
        each = map if self._workers is None else self._workers.map
        counts: Counts = collections.Counter()
        records = []
        try:
            for held, taken in each(make_row, range(len(self._streams)), self._streams.values()):
                counts.update(held)
                records.append(taken)
        except NothingFits as error:
            reasons = collections.Counter(f"{corpus}: {_reason(what)}" for corpus, what in self._left_out)
            raise ValueError(f"{error} ({', '.join(f'{what} {n}' for what, n in reasons.items())})") from None
        counts.update(self._left_out.popleft() for _ in range(len(self._left_out)))
        return batch, counts, records, self._stream_states()

    def documents(self, records: Sequence[Sequence[int]]) -> dict[str, list[str]]:
        """The documents in rows of `records`, as corpus/number, by the rows' numbers in the global batch."""
        places = ([self._mixture.place(record) for record in row] for row in records)
        named = ([f"{place.corpus}/{place.document}" for place in row] for row in places)
        return dict(zip(map(str, self._streams), named, strict=True))

    def _stream_states(self) -> dict[str, list]:
        return {str(row): stream.state for row, stream in self._streams.items()}

    def _require_good(self) -> None:
        """Raises ValueError if more than the permitted share of documents had to be left out."""
        counts = self.counts()
        dropped = {name: {what: n for what, n in held.items() if _reason(what)} for name, held in counts.items()}
        bad = {name: sum(held.values()) for name, held in dropped.items()}
        read = {name: sum(held.get(what, 0) for what in READ) for name, held in counts.items()}
        # What waits in the windows was read as well: at first it is most of it.
        total = sum(read.values()) + sum(len(waiting) for _, *waiting in self._state.values())
        if total < ENOUGH or sum(bad.values()) <= self._config.max_bad * total:
            return
        worst = max(bad, key=lambda name: bad[name] / max(read[name], 1))
        reasons = ", ".join(f"{_reason(what)} {n}" for what, n in dropped[worst].items())
        raise ValueError(
            f"{sum(bad.values())} of {total} documents had to be left out, more than data.max_bad="
            f"{self._config.max_bad} allows; the worst corpus is {worst!r} with {bad[worst]} of {read[worst]} "
            f"({reasons})"
        )

    def counts(self) -> dict[str, dict[str, int]]:
        """`totals` by corpus."""
        return {
            name: {what: count for (corpus, what), count in sorted(self.totals.items()) if corpus == name}
            for name in self._uses
        }

    def fill(self) -> dict[str, float]:
        """The share of tokens, see slots and dream slots that were used so far."""
        shape = self._shape
        rooms = {"tokens": shape.length, "see": shape.see_slots, "dream": shape.dream_slots}
        used: collections.Counter[str] = collections.Counter()
        for (_, what), count in self.totals.items():
            used[what] += count
        return {name: used[name] / (max(self._rows, 1) * room) for name, room in rooms.items() if room}

    def get_state(self) -> dict[str, Any]:
        """Where the stream is after the last batch that was handed out.

        `streams` holds this host's part: the next record and those that wait, with what each of them needs, by row (see
        `RowStream.state`). The parts of all hosts together continue the run on any number of hosts.
        """
        totals = [[*key, count] for key, count in sorted(self.totals.items())]
        return {"settings": self._settings, "streams": self._state, "totals": totals, "rows": self._rows}

    def set_state(self, state: Mapping[str, Any], accept_changes: bool = False) -> None:
        """Continues from a saved state, of which each host takes its own rows, and the first what was counted.

        The next batches are being made when it returns.

        Args:
          accept_changes: it may have been saved under other settings of the data: the new stream then begins with the
            records after all those that were read.

        Raises:
          ValueError: it was saved under other settings of the data, with which the stream is another one.
        """
        before = {**state["settings"], "corpora": _chosen(state["settings"]["corpora"])}
        changed = [
            f"{name}={saved!r}, this run has {value!r}"
            for name, value in self._settings.items()
            if (saved := before.get(name)) != value
        ]
        if any(isinstance(waiting, int) for _, *each in state["streams"].values() for waiting in each):
            changed.append("the form of an earlier version of this program")
        if changed and not accept_changes:
            raise ValueError(
                f"the saved data state has {'; '.join(changed)}: continue with the same data settings and program, "
                "start anew, or accept it with --config.checkpoint.accept_changes=True"
            )
        self._stop()
        self._start()
        if changed:
            _logger.warning("the data's settings are other ones than before: %s", "; ".join(changed))
            read = max(first for first, *_ in state["streams"].values())
            for stream in self._streams.values():
                stream.skip(read)
        else:
            for row, stream in self._streams.items():
                stream.state = state["streams"][str(row)]
        self._left_out.clear()
        self._state = self._stream_states()
        first = 0 in self._streams
        self.totals = collections.Counter({(corpus, what): n for corpus, what, n in state["totals"]} if first else {})
        self._rows = state["rows"] if first else 0
        self._make_ahead()

    def close(self) -> None:
        """Ends the threads; what they have not begun is left undone, and a read that hangs is not waited for long."""
        self._stop()


def _room_of(shape: RowShape) -> dict[str, Any]:
    """What the stream depends on of the rows' shape: all but whether pictures have their sizes beside them."""
    return dataclasses.asdict(shape, dict_factory=lambda items: {name: x for name, x in items if name != "sizes"})


def joined_states(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of the whole stream from those of all hosts' loaders."""
    totals: Counts = collections.Counter()
    own = list({next(iter(part["streams"])): part for part in parts}.values())  # several may feed the same rows
    for part in own:
        totals.update({(corpus, what): count for corpus, what, count in part["totals"]})
    return {
        "settings": parts[0]["settings"],
        "streams": {row: state for part in own for row, state in part["streams"].items()},
        "totals": [[*key, count] for key, count in sorted(totals.items())],
        "rows": sum(part["rows"] for part in own),
    }


def _chosen(corpora: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What of the uses of corpora is not as if nothing were said: settings that came later change no stream."""
    defaults = dataclasses.asdict(CorpusConfig())
    return {
        name: {key: value for key, value in use.items() if value != defaults.get(key)} for name, use in corpora.items()
    }


def _reason(what: str) -> str:
    """Why documents were left out, of what is counted; empty if it counts something else."""
    return what.removeprefix("dropped_") if what.startswith("dropped_") else ""
