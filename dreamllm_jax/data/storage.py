"""Documents on disk: a TFDS data set of array_record shards for each corpus, written and read without TensorFlow.

DIR/dataset.json          what it was made from, written last
DIR/tokenizer/            the tokenizer that goes with it
DIR/<corpus>/1.0.0/...    one TFDS data set for each corpus
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from dreamllm_jax.data.document import Document, from_record, to_record

VERSION = "1.0.0"
SUMMARY = "dataset.json"
SPLIT = "train"
SHARD_BYTES = 256 << 20
KEPT_BYTES = 64 << 20


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


def write_corpus(directory: Path, name: str, documents: Iterable[Document]) -> dict[str, int]:
    """Writes one corpus as `directory/name/1.0.0`.

    Returns:
      How many documents and images were written.

    Raises:
      ValueError: there was not a single document.
    """
    target = Path(directory) / name / VERSION
    target.mkdir(parents=True)
    spec = features()
    shards: list[tuple[Path, int, int]] = []  # file, records, bytes
    images = 0
    writer = None
    for document in documents:
        if writer is None or shards[-1][2] >= SHARD_BYTES:
            if writer is not None:
                writer.close()
            path = target / f"part-{len(shards):05d}"
            # One record a chunk, so that reading a record at random decompresses nothing else.
            writer = ArrayRecordWriter(str(path), "group_size:1")
            shards.append((path, 0, 0))
        record = spec.serialize_example(spec.encode_example(to_record(document)))
        writer.write(record)
        path, records, size = shards[-1]
        shards[-1] = (path, records + 1, size + len(record))
        images += len(document.images)
    if writer is None:
        raise ValueError(f"the corpus {name!r} has no documents")
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(target), dataset_name=name, split=SPLIT, filetype_suffix="array_record"
    )
    for index, (path, _, _) in enumerate(shards):
        path.rename(template.sharded_filepath(shard_index=index, num_shards=len(shards)))
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[records for _, records, _ in shards],
        num_bytes=sum(size for _, _, size in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=target, features=spec, split_infos=[split], version=VERSION, check_data=False
    )
    return {"documents": sum(records for _, records, _ in shards), "images": images}


class Corpus:
    """Random access to the documents of one stored corpus; a small one is kept in memory once read."""

    def __init__(self, directory: str | os.PathLike, name: str):
        path = epath.Path(directory) / name / VERSION
        if not (path / "dataset_info.json").exists():
            summary = read_summary(directory)
            raise FileNotFoundError(
                f"no corpus {name!r} in {directory}; it has {', '.join(sorted(summary['corpora']))}"
            )
        builder = tfds.builder_from_directory(path)
        self._source = builder.as_data_source(split=SPLIT, decoders={"images": _EncodedImages()})
        self._kept: dict[int, Document] | None = {} if builder.info.dataset_size <= KEPT_BYTES else None

    def __len__(self) -> int:
        return len(self._source)

    @property
    def in_memory(self) -> bool:
        return self._kept is not None

    def __getitem__(self, index: int) -> Document:
        if self._kept is None:
            return from_record(self._source[index])
        if index not in self._kept:
            self._kept[index] = from_record(self._source[index])
        return self._kept[index]


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    """Writes `dataset.json`, which marks the data set as whole."""
    (Path(directory) / SUMMARY).write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n")


def read_summary(directory: str | os.PathLike) -> dict[str, Any]:
    """What a data set was made from and holds.

    Raises:
      FileNotFoundError: it is missing or was never finished; the message says how to make it.
    """
    path = epath.Path(directory) / SUMMARY
    if not path.exists():
        raise FileNotFoundError(
            f"no data set in {directory} ({SUMMARY} is missing); make one with: "
            f"python -m dreamllm_jax.data prepare openmoji --to={directory}"
        )
    return json.loads(path.read_text())
