"""What tests of importing share: pictures of one colour, a corpus that is imported and read, and how it is compared."""

import io
import tarfile
from pathlib import Path

import numpy as np

from dreamllm_jax.data import storage
from dreamllm_jax.data.__main__ import parser
from dreamllm_jax.data.document import Image, Text
from dreamllm_jax.data.images import decode
from tests.data.conftest import PLAIN


def run(*arguments) -> None:
    parsed = parser().parse_args([str(argument) for argument in arguments])
    parsed.main(parsed)


def bring(layout: str, source, to, *flags) -> list[list[tuple[str, str]]]:
    """Imports a corpus in this process, and reads it."""
    run("import", layout, source, "--to", to, "--name=it", "--workers=1", *flags)
    return read(to)


def read(directory, name="it") -> list[list[tuple[str, str]]]:
    """Each document as (role, text) and (role, [colour]) in order."""
    corpus = storage.Corpus(directory, name)
    return [
        [(s.role, s.text if isinstance(s, Text) else f"[{seen(s)}]") for s in corpus[i].segments]
        for i in range(len(corpus))
    ]


def seen(image: Image) -> str:
    pixel = np.asarray(decode(image.data)).mean((0, 1))
    return min(PLAIN, key=lambda name: np.abs(np.array(PLAIN[name]) - pixel).sum())


def summary(directory, name="it") -> dict:
    return storage.read_summary(directory)["corpora"][name]


def plain(*texts) -> list[tuple[str, str]]:
    return [("", text) for text in texts]


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
