"""Directories by their whole names, and files and directories that are there whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

_SPARE_BYTES = 64 << 20  # for what is small and not counted
_POINTER = b"version https://git-lfs.github.com/spec/"
NO_POINTER = "is a pointer of git-lfs instead of the file: fetch it with git lfs pull"


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it lies in a bucket (gs://), where nothing can be appended to or renamed cheaply."""
    return "://" in str(path)


def absolute(path: str | os.PathLike) -> epath.Path:
    """The path from the root; epath's own `absolute` puts the working directory before gs:// too."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).absolute()


def expanded(path: str) -> str:
    """A path as a shell gives it: `~` at its beginning is the home directory."""
    return os.path.expanduser(path) if path.startswith("~") else path


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file begins as what a clone without git-lfs leaves in the place of a large one."""
    return content.startswith(_POINTER)


def read_text(path: str | os.PathLike) -> str:
    """All of a file of text, without the mark that may stand before it; its lines end in LF.

    Raises:
      FileNotFoundError, ValueError: it is not there, is a pointer of git-lfs, or is not UTF-8.
    """
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{path} is missing")
    content = file.read_bytes()
    if is_lfs_pointer(content):
        raise ValueError(f"{path} {NO_POINTER}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    if "\0" in text:
        raise ValueError(f"{path} is not UTF-8 but, it seems, UTF-16, or no text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds; errors as of `read_text`, and ValueError naming the file if it is not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, perhaps cut off: {error}") from None


def make_folder(path: str | os.PathLike) -> None:
    """Makes a directory, and those above it; in a bucket, which has none without files, by a file `.folder` in it.

    Without, nothing can be renamed to a name in it.
    """
    path = epath.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        (path / ".folder").write_text("")


@contextlib.contextmanager
def local_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """The directory itself; of one in a bucket, a temporary one whose files are copied there if the block ends well.

    For what can write local files only.
    """
    if not is_remote(directory):
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for file in epath.Path(folder).iterdir():
            file.copy(epath.Path(directory) / file.name, overwrite=True)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file that has its old or its new content whenever the process is killed, as objects in buckets have."""
    path = epath.Path(path)
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def remove_unfinished(directory: str | os.PathLike) -> None:
    """Removes what killed processes left of files that `write_whole` was writing there; nobody may be writing now."""
    if not is_remote(directory):
        for path in Path(directory).glob(".*"):
            if path.suffix[1:].isdigit():
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def building(directory: str | os.PathLike) -> Iterator[Path]:
    """A temporary directory beside `directory` that takes its name only if the block ends well.

    What a killed program left behind is removed by the next one that builds the same directory.

    Raises:
      FileExistsError: `directory` is there already and holds something.
    """
    target = Path(directory).absolute()
    require_free(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.building")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_free(directory: str | os.PathLike) -> None:
    """Raises FileExistsError if something stands at `directory`; an empty directory does not count."""
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{directory} exists already; choose another name or remove it")


def require_room(directory: str | os.PathLike, size: int, purpose: str) -> None:
    """Raises OSError if the disk where `directory` is, or is to be, has less than `size` bytes free."""
    target = Path(directory).absolute()
    existing = next(parent for parent in [target, *target.parents] if parent.exists())
    free, needed = shutil.disk_usage(existing).free, size + _SPARE_BYTES
    if free < needed:
        raise OSError(f"{directory} needs {needed / 2**30:.2f} GiB {purpose}; free are {free / 2**30:.2f} GiB")
