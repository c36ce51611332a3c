"""Documents on disk: a TFDS data set of array_record shards for each corpus, written and read without TensorFlow.

DIR/dataset.json          what it was made from, written last
DIR/tokenizer/            the tokenizer that goes with it
DIR/<corpus>/1.0.0/...    one TFDS data set for each corpus
DIR/<corpus>/names.json   what its documents were called where they came from, if that was kept
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grain
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from dreamllm_jax.common.directories import building, make_folder, read_json, write_whole
from dreamllm_jax.data.document import Document, from_record, to_record, with_stored
from dreamllm_jax.data.stored import Stored
from dreamllm_jax.data.tokenizer import FOLDER as TOKENIZER
from dreamllm_jax.data.tokenizer import Tokenizer, load_tokenizer

VERSION = "1.0.0"
SUMMARY = "dataset.json"
NAMES = "names.json"
SPLIT = "train"
SHARD_BYTES = 256 << 20
KEPT_BYTES = 64 << 20
READERS = 32  # documents that `in_order` reads at once

T = TypeVar("T")


def features() -> tfds.features.FeaturesDict:
    """The stored record; images stay as the encoded bytes they came in."""
    return tfds.features.FeaturesDict(
        {
            "kind": tfds.features.Text(),
            "segments": tfds.features.Sequence(
                {"role": tfds.features.Text(), "text": tfds.features.Text(), "is_image": np.int64}
            ),
            "images": tfds.features.Sequence(tfds.features.Image()),
        }
    )


class _EncodedImages(tfds.decode.SkipDecoding):
    """Hands on the encoded bytes: TFDS decodes palette, 16-bit, CMYK and rotated pictures wrongly."""

    decode_batch_example_np = list


@dataclasses.dataclass(frozen=True)
class Shard:
    """A written file of records."""

    path: epath.Path
    records: int
    size: int


class ShardWriter:
    """Writes documents to the files that `name` gives for 0, 1, ..., each of about `SHARD_BYTES`."""

    def __init__(self, name: Callable[[int], Path]):
        self._name, self._features, self._writer = name, features(), None
        self.shards: list[Shard] = []

    def write(self, document: Document) -> None:
        if self._writer is None or self.shards[-1].size >= SHARD_BYTES:
            self.close()
            path = self._name(len(self.shards))
            # One record a chunk, so that reading a record at random decompresses nothing else.
            self._writer = ArrayRecordWriter(str(path), "group_size:1")
            self.shards.append(Shard(epath.Path(path), 0, 0))
        record = self._features.serialize_example(self._features.encode_example(to_record(document)))
        self._writer.write(record)
        last = self.shards[-1]
        self.shards[-1] = dataclasses.replace(last, records=last.records + 1, size=last.size + len(record))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def write_dataset(
    directory: str | os.PathLike,
    corpora: Mapping[str, Iterable[Document]],
    tokenizer: Tokenizer | None = None,
    settings: Mapping[str, Any] | None = None,
    held_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a whole data set, which appears only when it is whole.

    Args:
      corpora: its documents, by the name of their corpus.
      tokenizer: the one that goes with it.
      settings: what it is made from.
      held_out: those of its corpora that are learnt only where they are named.

    Returns:
      The summary stored with it: settings, corpora with their counts of documents and images, vocab_size.

    Raises:
      FileExistsError: there is something at `directory`.
      ValueError: a corpus has no documents.
    """
    summary: dict[str, Any] = {"settings": dict(settings or {})}
    if held_out:
        summary["held_out"] = list(held_out)
    with building(directory) as folder:
        if tokenizer:
            tokenizer.save(folder / TOKENIZER)
            summary["vocab_size"] = tokenizer.vocab_size
        summary["corpora"] = {name: _write_corpus(folder, name, documents) for name, documents in corpora.items()}
        write_summary(folder, summary)
    return summary


def _write_corpus(directory: Path, name: str, documents: Iterable[Document]) -> dict[str, int]:
    target = directory / name / VERSION
    target.mkdir(parents=True)
    writer = ShardWriter(lambda index: target / f"part-{index:05d}")
    images = 0
    for document in documents:
        writer.write(document)
        images += len(document.images)
    writer.close()
    finish_corpus(target, name, writer.shards)
    return {"documents": sum(shard.records for shard in writer.shards), "images": images}


def finish_corpus(target: os.PathLike, name: str, shards: Sequence[Shard]) -> None:
    """Gives shards in the directory `target` the names that TFDS knows, and describes them as TFDS does.

    Doing it again after it was interrupted does the rest.

    Raises:
      ValueError: there are no shards.
    """
    if not shards:
        raise ValueError(f"the corpus {name!r} has no documents")
    target = epath.Path(target)
    template = tfds.core.ShardedFileTemplate(
        data_dir=target, dataset_name=name, split=SPLIT, filetype_suffix="array_record"
    )
    make_folder(target)
    for index, shard in enumerate(shards):
        named = template.sharded_filepath(shard_index=index, num_shards=len(shards))
        if shard.path.exists():
            shard.path.replace(named)
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[shard.records for shard in shards],
        num_bytes=sum(shard.size for shard in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=target, features=features(), split_infos=[split], version=VERSION, check_data=False
    )


class Corpus:
    """Random access to the documents of one stored corpus; a small one is kept in memory once read.

    Args:
      stored: shape and type of what is to come with each image, by name (see `data.stored`).
    """

    def __init__(
        self, directory: str | os.PathLike, name: str, stored: Mapping[str, tuple[tuple[int, ...], str]] | None = None
    ):
        path = epath.Path(directory) / name / VERSION
        if not (path / "dataset_info.json").exists():
            summary = read_summary(directory)
            raise FileNotFoundError(
                f"no corpus {name!r} in {directory}; it has {', '.join(sorted(summary['corpora']))}"
            )
        builder = tfds.builder_from_directory(path)
        self._source = builder.as_data_source(split=SPLIT, decoders={"images": _EncodedImages()})
        self._stored = {
            what: Stored(directory, name, what, shape, dtype, len(self._source))
            for what, (shape, dtype) in (stored or {}).items()
        }
        small = builder.info.dataset_size <= KEPT_BYTES and not self._stored
        self._kept: dict[int, Document] | None = {} if small else None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Document:
        if self._kept is None:
            return self._read(index)
        if index not in self._kept:
            self._kept[index] = self._read(index)
        return self._kept[index]

    def first(self, count: int) -> Iterator[tuple[int, Document]]:
        """Of the first so many documents those that can be read, with their numbers."""

        def read(index: int) -> tuple[int, Document] | None:
            try:
                return index, self[index]
            except Exception:  # whatever a damaged record leads the reader's native code to
                return None

        return in_order(read, range(min(count, len(self))))

    def _read(self, index: int) -> Document:
        document = from_record(self._source[index])
        return with_stored(document, {name: stored[index] for name, stored in self._stored.items()})


def in_order(read: Callable[[int], T | None], numbers: Sequence[int]) -> Iterator[T]:
    """What `read` gives for each of the numbers, in their order and without None, some being read ahead by threads."""
    options = grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=READERS)
    return iter(grain.MapDataset.source(numbers).map(read).to_iter_dataset(options))


def write_summary(directory: epath.PathLike, summary: Mapping[str, Any]) -> None:
    """Writes `dataset.json`, which marks the data set as whole."""
    write_whole(epath.Path(directory) / SUMMARY, json.dumps(summary, indent=2, sort_keys=True) + "\n")


def add_corpus(directory: epath.PathLike, name: str, summary: Mapping[str, Any]) -> None:
    """Adds a corpus to the data set's summary, which is made if there is none."""
    path = epath.Path(directory) / SUMMARY
    whole = json.loads(path.read_text()) if path.exists() else {"settings": {}, "corpora": {}}
    whole["corpora"][name] = dict(summary)
    write_summary(directory, whole)


def write_names(corpus: epath.Path, names: Sequence[str]) -> None:
    """Keeps what the documents of a corpus in this directory were called where they came from, in their order."""
    write_whole(corpus / NAMES, json.dumps(names) + "\n")


def read_names(directory: str | os.PathLike, corpus: str) -> list[str]:
    """What `write_names` kept.

    Raises:
      FileNotFoundError: nothing was.
    """
    path = epath.Path(directory) / corpus / NAMES
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the documents of {corpus!r} do not know their files; import the corpus as folder"
        )
    return read_json(path)


def open_tokenizer(directory: str | os.PathLike, other: str = "") -> Tokenizer:
    """The tokenizer of a data set, or the one that `other` names (see `load_tokenizer`).

    Raises:
      FileNotFoundError: the data set is missing or has no tokenizer.
    """
    if other:
        return load_tokenizer(other)
    read_summary(directory)
    own = epath.Path(directory) / TOKENIZER
    if not own.exists():
        raise FileNotFoundError(f"{directory} has no tokenizer of its own: give --tokenizer (config.data.tokenizer)")
    return load_tokenizer(own)


def read_summary(directory: str | os.PathLike) -> dict[str, Any]:
    """What a data set was made from and holds.

    Raises:
      FileNotFoundError, ValueError: it is missing or was never finished, or damaged; the message says how to make it.
    """
    path = epath.Path(directory) / SUMMARY
    if not path.exists():
        raise FileNotFoundError(
            f"no data set in {directory} ({SUMMARY} is missing); make one with: "
            f"python -m dreamllm_jax.data prepare openmoji --to={directory}"
        )
    summary = read_json(path)
    if not isinstance(summary, dict) or not isinstance(summary.get("corpora"), dict):
        raise ValueError(f"{path} is not of a data set: it has no `corpora`")
    return summary


def learnt(directory: str | os.PathLike) -> list[str]:
    """The corpora of a data set, but those that are held out: what is taken where none are named. Errors as above."""
    summary = read_summary(directory)
    return sorted(set(summary["corpora"]) - set(summary.get("held_out", ())))
