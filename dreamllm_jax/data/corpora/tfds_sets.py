"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dreamllm_jax.data.corpora.records import Format, Part, Record, local, read_image, read_text, setting, under

PART = 4096  # records


@dataclasses.dataclass(frozen=True)
class Tfds(Format):
    """A prepared TFDS data set (array_record); pairs if it has images, otherwise texts."""

    text: str = setting("text", "feature with the text; of a class label its name")
    image: str = setting("", "feature with the image")
    split: str = setting("train", "split to read")

    def parts(self) -> list[Part]:
        info = _builder(self.source).info
        if self.split not in info.splits:
            raise ValueError(f"{self.source} has no split {self.split!r}; it has {', '.join(info.splits)}")
        for feature in filter(None, (self.text, self.image)):
            if feature not in info.features:
                raise ValueError(f"{self.source} has no feature {feature!r}; it has {', '.join(sorted(info.features))}")
        count = info.splits[self.split].num_examples
        return [Part(self.source, start, min(start + PART, count)) for start in range(0, count, PART)]

    def rows(self, part: Part) -> Iterator[Mapping[str, Any]]:
        source = _source(self.source, self.split)
        return (source[index] for index in range(part.start, part.stop))

    def record(self, row: Mapping[str, Any], part: Part) -> Record:
        text, feature = row[self.text], _builder(self.source).info.features[self.text]
        if isinstance(feature, tfds.features.ClassLabel):
            text = feature.int2str(text)
        text = read_text(text.tolist() if isinstance(text, np.ndarray) else text)
        return Record("pair", (text, read_image("", row[self.image]))) if self.image else Record("text", (text,))


@functools.cache
def _builder(source: str) -> tfds.core.DatasetBuilder:
    path = local(source)
    versions = [path] if (path / "dataset_info.json").exists() else under(path, ["dataset_info.json"])
    if len(versions) != 1:
        raise FileNotFoundError(
            f"{source} has {len(versions)} data sets of TFDS; name the directory of dataset_info.json"
        )
    builder = tfds.builder_from_directory(path if versions[0] == path else versions[0].parent)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{source} is stored as {builder.info.file_format.value}, which needs TensorFlow; prepare it anew with "
            "tfds build --file_format=array_record"
        )
    return builder


@functools.cache
def _source(source: str, split: str):
    builder = _builder(source)
    images = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
    return builder.as_data_source(split=split, decoders={name: tfds.decode.SkipDecoding() for name in images})
