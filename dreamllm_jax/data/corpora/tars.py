"""Tar files of samples, as WebDataset has them: consecutive members with the same name up to the first dot.

Read with the standard library as a stream, into memory and nowhere else: nothing is extracted, links are not followed,
pickled members (which could run code when read) are refused.
"""

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath

from etils import epath

from dreamllm_jax.data.corpora.records import Dropped, is_inside

SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
PICKLES = ("pkl", "pickle", "pyd", "pt", "pth", "npy", "npz")
LARGEST = 256 << 20  # bytes of a member


def samples(path: epath.Path) -> Iterator[dict[str, bytes] | Dropped]:
    """The samples of a tar: what follows the first dot of a member's name, in lower case, to its contents."""
    name, sample = "", {}
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            if not member.isfile():
                if not member.isdir():
                    yield Dropped("link")
                continue
            if not is_inside(member.name):
                yield Dropped("outside")
                continue
            if member.size > LARGEST:
                yield Dropped("too_large")
                continue
            whole = PurePosixPath(member.name)
            stem, _, extension = whole.name.partition(".")
            if stem.startswith("__") or not extension:  # __index__ and the like
                continue
            if str(whole.with_name(stem)) != name:
                if sample:
                    yield sample
                name, sample = str(whole.with_name(stem)), {}
            extension = extension.lower()
            if extension.rsplit(".", 1)[-1] in PICKLES:
                yield Dropped("pickle")
                continue
            contents = tar.extractfile(member)
            sample[extension] = contents.read() if contents else b""
    if sample:
        yield sample
