"""What the frozen towers made of a corpus's images, kept beside its documents.

DIR/<corpus>/stored/<name>/stored.json           shape and type of an image's array, which model makes it, all there?
DIR/<corpus>/stored/<name>/part-*.array_record   a record for each document: the arrays of its images, one after another

`name` is moments (the autoencoder's output, of images to paint) or features (the vision encoder's, of images to see).
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from dreamllm_jax.common.directories import local_folder, read_json, write_whole

NAMES = ("moments", "features")
DTYPES = ("bfloat16", "float32")
PART = 1024  # documents in a file
_DESCRIPTION = "stored.json"


@dataclasses.dataclass(frozen=True)
class Description:
    """What is stored, or being computed.

    Attributes:
      shape, dtype: of each image's array.
      documents: of the corpus.
      model: its name, for messages.
      tower: the settings of its tower, as JSON knows them.
      weights: marks of the tower's arrays, by path (see `checkpoints.marks`).
      complete: whether all documents are there.
    """

    shape: tuple[int, ...]
    dtype: str
    documents: int
    model: str
    tower: Mapping[str, Any]
    weights: Mapping[str, tuple[float, float]]
    complete: bool = False


def folder(directory: str | os.PathLike, corpus: str, name: str) -> epath.Path:
    """Where a corpus's arrays lie."""
    return epath.Path(directory) / corpus / "stored" / name


def parts(directory: epath.Path, documents: int) -> dict[epath.Path, range]:
    """The files in a corpus's directory, and which of so many documents each of them holds."""
    count = -(-documents // PART)
    files = [directory / f"part-{part:05d}-of-{count:05d}.array_record" for part in range(count)]
    return {file: range(documents)[part * PART : (part + 1) * PART] for part, file in enumerate(files)}


def write_part(path: epath.Path, documents: Iterable[np.ndarray]) -> None:
    """Writes one file, which appears only when it is whole; `documents` are arrays [images, ...]."""
    with local_folder(path.parent) as folder:  # array_record writes to local files only
        unfinished = folder / f".{path.name}"
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")
        for arrays in documents:
            writer.write(np.ascontiguousarray(arrays).tobytes())
        writer.close()
        unfinished.rename(folder / path.name)


def write_description(directory: epath.Path, description: Description) -> None:
    """Written before anything is computed, and again, `complete`, when everything is there."""
    write_whole(directory / _DESCRIPTION, json.dumps(dataclasses.asdict(description), indent=2) + "\n")


def read_description(directory: epath.Path) -> Description | None:
    """What is stored, complete or not; None if nothing is.

    Raises:
      ValueError: another version of this package has written it.
    """
    path = directory / _DESCRIPTION
    if not path.exists():
        return None
    fields = read_json(path)
    if fields.keys() != {field.name for field in dataclasses.fields(Description)}:
        raise ValueError(f"{path} is of another version of this program: remove {directory} and compute it again")
    return Description(**{**fields, "shape": tuple(fields["shape"])})


class Stored:
    """Random access to the arrays of a corpus's documents.

    Raises:
      FileNotFoundError: they were not computed, or not to the end.
      ValueError: they are of another shape, type or number of documents than asked for.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        corpus: str,
        name: str,
        shape: Sequence[int],
        dtype: str,
        documents: int,
    ):
        path = folder(directory, corpus, name)
        found = read_description(path)
        remedy = f"python -m dreamllm_jax.data precompute {directory} --checkpoint=MODEL"
        if found is None or not found.complete:
            raise FileNotFoundError(
                f"the corpus {corpus!r} in {directory} has no stored {name}; compute them: {remedy}"
            )
        for what, there, wanted in (
            ("shape", found.shape, tuple(shape)),
            ("type", found.dtype, dtype),
            ("number of documents", found.documents, documents),
        ):
            if there != wanted:
                raise ValueError(
                    f"the stored {name} of corpus {corpus!r} have the {what} {there}, this run needs {wanted}; remove "
                    f"{path} and compute them again: {remedy}"
                )
        self._source = ArrayRecordDataSource([os.fspath(part) for part in parts(path, documents)])
        self._shape, self._dtype = found.shape, jnp.dtype(found.dtype)

    def __getitem__(self, document: int) -> np.ndarray:
        """[images, ...], in the order of the document's images."""
        arrays = np.frombuffer(self._source[document], self._dtype)
        if arrays.size % math.prod(self._shape):
            raise ValueError(f"a stored record of {arrays.size} numbers is not made of arrays {self._shape}")
        return arrays.reshape(-1, *self._shape)
