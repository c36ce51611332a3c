"""Tar files of samples, as WebDataset has them: consecutive members with the same name up to the first dot.

Read with the standard library as a stream, into memory and nowhere else: nothing is extracted, links are not followed,
pickled members (which could run code when read) are refused. Several tars behind each other are read as one.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO

import pyarrow as pa
from etils import epath

from dreamllm_jax.common.directories import is_lfs_pointer
from dreamllm_jax.data.corpora.records import Dropped, inside, is_hidden

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
PICKLES = ("pkl", "pickle", "pyd", "pt", "pth", "npy", "npz")
LARGEST = 256 << 20  # bytes of a member
_DECOMPRESSORS = {  # by the signs with which files begin
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(file, "zstd"),
}


class _Member(tarfile.TarInfo):
    """A member of an archive that must not break off: tarfile takes a damaged or missing header for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            tar.ended = True
            raise
        except tarfile.EmptyHeaderError:
            if not getattr(tar, "ended", False):
                raise tarfile.ReadError("it breaks off between two members") from None
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it breaks off, or is no tar: {error}") from None
        tar.ended = False
        return member


def is_tar(path: epath.PathLike) -> bool:
    """Whether a file has the name of a tar."""
    return str(path).lower().endswith(SUFFIXES)


@contextlib.contextmanager
def open_tar(file: IO[bytes], mode: str) -> Iterator[tarfile.TarFile]:
    """A tar, uncompressed, to be read as a stream (`r|`) or at any place (`r:`).

    Raises:
      tarfile.ReadError: also later, where a member is damaged or the end is missing.
    """
    # Zeros end a tar; what follows them may be another.
    with tarfile.open(fileobj=file, mode=mode, tarinfo=_Member, ignore_zeros=True) as tar:
        yield tar


def samples(path: epath.Path) -> Iterator[dict[str, bytes] | Dropped]:
    """The samples of a tar: what follows the first dot of a member's name, in lower case, to its contents.

    Samples of the same name in a row cannot be told apart: each is `Dropped`.

    Raises:
      OSError, EOFError, ValueError, tarfile.TarError and what decompression raises: it is damaged. Whole samples before
        the damage are given first.
    """
    name, sample, times = "", {}, {}

    def finished() -> Iterator[dict[str, bytes] | Dropped]:
        again = max(times.values(), default=0)
        if again > 1:
            yield from [Dropped("duplicate")] * again
        elif sample:
            yield sample

    with path.open("rb") as file:
        head = file.read(64)
        file.seek(0)
        if is_lfs_pointer(head):
            yield Dropped("lfs_pointer")
            return
        opener = next((opener for sign, opener in _DECOMPRESSORS.items() if head.startswith(sign)), None)
        with open_tar(_Pieces(opener(file)) if opener else file, "r|") as tar:
            members = iter(tar)
            while True:
                try:
                    member = next(members, None)
                except Exception:
                    yield from finished()
                    raise
                if member is None:
                    break
                file_name = inside(member.name)
                if not member.isfile():
                    if not member.isdir():
                        yield Dropped("link")
                    continue
                if file_name is None:
                    yield Dropped("outside")
                    continue
                if is_hidden(file_name):
                    continue
                if member.size > LARGEST:
                    yield Dropped("too_large")
                    continue
                whole = PurePosixPath(file_name)
                stem, _, extension = whole.name.partition(".")
                if stem.startswith("__") or not extension:  # __index__ and the like
                    continue
                if str(whole.with_name(stem)) != name:
                    yield from finished()
                    name, sample, times = str(whole.with_name(stem)), {}, {}
                extension = extension.lower()
                if extension.rsplit(".", 1)[-1] in PICKLES:
                    yield Dropped("pickle")
                    continue
                contents = tar.extractfile(member)
                sample[extension] = contents.read() if contents else b""
                times[extension] = times.get(extension, 0) + 1
    yield from finished()


class _Pieces(io.RawIOBase):
    """What a decompressor gives, a piece at a time: of a cut file everything, before it is told that it is cut."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        piece = self._file.read1(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)
