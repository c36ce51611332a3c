"""The tensor files of PyTorch checkpoints, read tensor by tensor and written without holding a model in memory."""

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_ALIGNMENT = 64  # bytes, as numpy and torch like their arrays
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, in torch's layout.

    Attributes:
      read: gives its values; nothing is read before.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        """An array in memory."""
        return cls(array.shape, array.dtype, lambda: array)


def read_json(path: Path) -> dict:
    """Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def read_config(path: Path, parse: Callable[[dict], T]) -> T:
    """What `parse` makes of a JSON file; errors as of `read_json`, those of `parse` included."""
    settings = read_json(path)
    try:
        return parse(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def import_torch(purpose: str):
    """The torch module, or an ImportError that says what it is needed for and how to get it."""
    try:
        import torch
    except ImportError:
        raise ImportError(f"{purpose} needs PyTorch: pip install 'dreamllm_jax[torch]'") from None
    return torch


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a pickled `.bin` or `.pt` one (read as weights only, never executed).

    A pickle that holds a single tensor gives it the name "".

    Raises:
      FileNotFoundError, ValueError: naming the file; ImportError if a pickle needs torch and it is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def open_model(directory: Path, *stems: str) -> dict[str, Tensor]:
    """A model's tensors: the first found of `stem.safetensors`, `stem.bin`, or either's shards listed in an index.

    Raises:
      FileNotFoundError: if there is none of them, or a shard of the index is missing.
      ValueError: if the index and its shards do not hold the same tensors.
    """
    for suffix in (".safetensors", ".bin"):
        for stem in stems:
            index = directory / f"{stem}{suffix}.index.json"
            if index.is_file():
                return _open_shards(index)
            if (directory / f"{stem}{suffix}").is_file():
                return open_tensors(directory / f"{stem}{suffix}")
    names = " or ".join(f"{stem}.safetensors, {stem}.bin" for stem in stems)
    raise FileNotFoundError(f"{directory} has no {names}, nor an index of their shards")


def _open_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map")
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index} names the shard {shard}, which is missing")
        tensors |= open_tensors(index.parent / shard)
    if differing := sorted(tensors.keys() ^ weight_map.keys()):
        which = "lists" if differing[0] in weight_map else "does not list"
        raise ValueError(f"{index} {which} {differing[0]}, unlike its shards ({len(differing)} such tensors)")
    return tensors


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from None
    for name, (_, dtype) in kinds.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{path}: {name} is stored as {dtype}, which is not supported")

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            with safe_open(path, framework="np") as file:
                return file.get_tensor(name)

        return read

    return {name: Tensor(shape, np.dtype(_DTYPES[dtype]), reader(name)) for name, (shape, dtype) in kinds.items()}


def _open_pickle(path: Path) -> dict[str, Tensor]:
    torch = import_torch(f"reading {path}")
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: not a zip archive, which alone can be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        raise ValueError(f"{path} is refused, for it is a pickle of more than tensors: {found or error}") from None
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} is truncated or not a PyTorch file: {str(error).splitlines()[0]}") from None
    content = {"": content} if isinstance(content, torch.Tensor) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} does not hold tensors by name")
    return {name: Tensor.of(_from_torch(value)) for name, value in content.items()}


def _from_torch(tensor) -> np.ndarray:
    """A torch tensor's memory as numpy, which has no bfloat16 of its own."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


class Scratch:
    """Arrays in a file instead of in memory: what is kept is given back as a view of the mapped file.

    Use it as a context manager; the file is gone afterwards (and the views with it).
    """

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> "Scratch":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w+b", buffering=0)
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def keep(self, parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Writes arrays one after the other, converted to `dtype`; together they are one array of `shape`.

        Raises:
          OSError: if the disk is full.
        """
        start = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(start)
        for part in parts:
            data = memoryview(np.ascontiguousarray(part, dtype).reshape(-1).view(np.uint8))
            while data:
                data = data[self._file.write(data) :]
        if not np.prod(shape):
            return np.zeros(shape, dtype)
        # Copy on write: torch wants memory that could be written to.
        return np.memmap(self._path, dtype, "c", start, shape)


def write_safetensors(directory: Path, stem: str, tensors: Mapping[str, np.ndarray], max_shard_size: int) -> None:
    """Writes `stem.safetensors`, or numbered shards of at most `max_shard_size` bytes and their index.

    A tensor larger than that has a shard of its own. Names, files and index are as transformers and diffusers write.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _serialize(directory / f"{stem}.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _serialize(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / f"{stem}.safetensors.index.json", index)


def _serialize(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, {"format": "pt"})  # transformers asks for the format
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from None
    path.chmod(mode)  # the library's own is for the owner alone


def write_pickle(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict as `torch.save` does."""
    torch = import_torch(f"writing {path.name}")

    def to_torch(array: np.ndarray):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    with path.open("wb") as file:  # torch's own writer would not say why it could not write
        torch.save({name: to_torch(array) for name, array in tensors.items()}, file)


def write_json(path: Path, content: Mapping) -> None:
    """Writes an indented JSON file, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
