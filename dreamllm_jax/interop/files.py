"""The tensor files of PyTorch checkpoints, read tensor by tensor and written without holding a model in memory."""

import dataclasses
import json
import logging
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dreamllm_jax.common import recognise

_logger = logging.getLogger(__name__)

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
STATE = "state_dict"  # where trainers' pickles have the model
_ALIGNMENT = 64  # bytes, as numpy and torch like their arrays
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, in torch's layout.

    Attributes:
      read: gives its values; nothing is read before.
      where: its file and its name there, for messages; empty for one in memory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    where: str = ""

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        """An array in memory."""
        return cls(array.shape, array.dtype, lambda: array)

    def split(self, count: int) -> "list[Tensor]":
        """So many equal parts of it along its first axis.

        Raises:
          ValueError: it has none.
        """
        if count == 1:
            return [self]
        if not self.shape or self.shape[0] % count:
            raise ValueError(f"{self.where or 'a tensor'} is of shape {self.shape}, which has no {count} equal parts")
        size = self.shape[0] // count
        return [self.rows(at * size, (at + 1) * size) for at in range(count)]

    def rows(self, start: int, stop: int) -> "Tensor":
        """The part of it from one index of its first axis to before another."""
        return dataclasses.replace(self, shape=(stop - start, *self.shape[1:]), read=lambda: self.read()[start:stop])


def read_json(path: Path) -> dict:
    """Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if found := recognise.content_of(path):
            raise ValueError(f"{path} is {found}") from None
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def read_config(path: Path, parse: Callable[[dict], T]) -> T:
    """What `parse` makes of a model's JSON file; errors as of `read_json`, those of `parse` included, and ValueError if
    the model is quantised."""
    settings = read_json(path)
    try:
        recognise.require_floats(settings)
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

    A pickle that holds a single tensor gives it the name ""; of a trainer's, `state_dict` is read.

    Raises:
      FileNotFoundError, ValueError: naming the file; ImportError if a pickle needs torch and it is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if found := recognise.content_of(path):
        raise ValueError(f"{path} is {found}")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def open_model(directory: Path, *stems: str) -> dict[str, Tensor]:
    """A model's tensors, from the file or index that `find_model` finds.

    Raises:
      FileNotFoundError: if there is none, or a shard of the index is missing.
      ValueError: if the index and its shards do not hold the same tensors, or a shard is not beside its index.
    """
    path, variant = find_model(directory, *stems)
    if variant:
        _logger.info("%s: its variant %r is read, for there is no other", path, variant)
    return _open_shards(path) if path.suffix == ".json" else open_tensors(path)


def find_model(directory: Path, *stems: str) -> tuple[Path, str]:
    """The file of a model's tensors, or the index of its shards, and which variant of the model that is.

    Names are those of transformers and diffusers, of which `stem.safetensors` is taken before `stem.bin`, and either
    before variants such as `stem.fp16.safetensors`, whose index is `stem.safetensors.index.fp16.json` or, in older
    checkpoints, `stem.fp16.safetensors.index.json`.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if there are several variants and nothing else, or both a whole file and an index of shards.
    """
    found: dict[str, Path] = {}
    for suffix in (".safetensors", ".bin"):
        for stem in stems:
            name = re.compile(rf"{re.escape(stem)}(?:\.(\w+))?{re.escape(suffix)}(?P<index>\.index(?:\.(\w+))?\.json)?")
            matches = [match for path in sorted(directory.glob(f"{stem}*")) if (match := name.fullmatch(path.name))]
            those: dict[str, Path] = {}
            for match in matches:
                variant, path = match[1] or match[3] or "", directory / match[0]
                if path.is_file() and not (match[1] and match[3]):
                    if variant in those:
                        raise ValueError(f"{those[variant]} and {path.name} are two models: take one of them away")
                    those[variant] = path
            found = those | found
    if len(found) > 1 and "" not in found:
        raise ValueError(
            f"{directory} has the variants {', '.join(sorted(found))} of the model and none that is the model itself: "
            "leave only the one that is meant there"
        )
    for variant in sorted(found):  # the model itself is before its variants
        return found[variant], variant
    names = " or ".join(f"{stem}.safetensors, {stem}.bin" for stem in stems)
    raise FileNotFoundError(
        f"{directory} has no {names}, nor an index of their shards ({stems[0]}.safetensors.index.json), nor "
        f"one variant of them ({stems[0]}.fp16.safetensors){recognise.looks(directory)}"
    )


def require_beside(index: Path) -> dict[str, str]:
    """The `weight_map` of an index, tensor name -> name of its shard.

    Raises:
      ValueError: there is none, or a shard would be read from elsewhere than beside the index.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not shard or re.search(r"[/\\\0]", shard) or shard in (".", ".."):
            raise ValueError(
                f"{index} is refused: it names the shard {shard!r}, and shards are files beside their index"
            )
    return weight_map


def _open_shards(index: Path) -> dict[str, Tensor]:
    weight_map = require_beside(index)
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

    return {
        name: Tensor(shape, np.dtype(_DTYPES[dtype]), reader(name), f"{path}: {name}")
        for name, (shape, dtype) in kinds.items()
    }


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
    if isinstance(content, Mapping) and isinstance(content.get(STATE), Mapping):
        content = content[STATE]
    content = {"": content} if isinstance(content, torch.Tensor) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} does not hold tensors by name")
    tensors = {}
    for name, value in content.items():
        try:
            array = _from_torch(value)
        except (TypeError, RuntimeError):
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {name} is stored as {kind}, which is not supported") from None
        tensors[name] = dataclasses.replace(Tensor.of(array), where=f"{path}: {name}")
    return tensors


def refuse(problems: list[str], where: Path) -> None:
    """Raises ValueError listing tensors that do not fit, if there are any."""
    if problems:
        raise ValueError(f"{where}: {len(problems):,} tensors do not fit:\n  {recognise.listed(problems)}")


def is_float(dtype: np.dtype) -> bool:
    """Whether arrays of this type are weights as they are computed with."""
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def require_finite(array: np.ndarray, where: str) -> np.ndarray:
    """The array.

    Raises:
      ValueError: it has values that are not finite.
    """
    if is_float(array.dtype) and not (finite := np.isfinite(array)).all():
        raise ValueError(
            f"{where} has {array.size - np.count_nonzero(finite):,} values of {array.size:,} that are not finite "
            "(NaN or infinite): the file is damaged, or its training has diverged"
        )
    return array


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

    def keep(self, parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype, name: str = "") -> np.ndarray:
        """Writes arrays one after the other, converted to `dtype`; together they are one array of `shape`.

        Args:
          name: for messages.

        Raises:
          OSError: if the disk is full.
          ValueError: values that `dtype` cannot hold.
        """
        start = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(start)
        for part in parts:
            with np.errstate(over="ignore"):  # told by name
                converted = np.ascontiguousarray(part, dtype)
            if part.dtype != dtype and not np.isfinite(converted).all():
                raise ValueError(f"{name} has values that {dtype} cannot hold: choose a --dtype of bfloat16 or float32")
            data = memoryview(converted.reshape(-1).view(np.uint8))
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


def write_pickle(path: Path, tensors: Mapping[str, np.ndarray], key: str = "") -> None:
    """Writes a state dict as `torch.save` does, itself or as the one entry of a dict."""
    torch = import_torch(f"writing {path.name}")

    def to_torch(array: np.ndarray):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    with path.open("wb") as file:  # torch's own writer would not say why it could not write
        state = {name: to_torch(array) for name, array in tensors.items()}
        torch.save({key: state} if key else state, file)


def write_json(path: Path, content: Mapping) -> None:
    """Writes an indented JSON file, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
