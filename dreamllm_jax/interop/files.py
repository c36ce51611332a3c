"""Reads the tensor files of PyTorch checkpoints as numpy arrays."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file


def read_json(path: Path) -> dict:
    """Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """One `.safetensors`, `.bin` or `.pt` file (a pickle is read as weights only, never executed).

    Raises:
      FileNotFoundError, ValueError: naming the file; ImportError if a pickle needs torch and it is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from None
    try:
        import torch
    except ImportError:
        raise ImportError(f"reading {path} needs PyTorch: pip install 'dreamllm_jax[torch]'") from None
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def read_model(directory: Path, stem: str) -> dict[str, np.ndarray]:
    """A model's tensors: `stem.safetensors`, `stem.bin` or either's shards listed in an index.

    Raises:
      FileNotFoundError: if there is none of them.
    """
    for suffix in (".safetensors", ".bin"):
        index = directory / f"{stem}{suffix}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index)["weight_map"].values()))
            return {name: tensor for shard in shards for name, tensor in read_tensors(directory / shard).items()}
        if (directory / f"{stem}{suffix}").is_file():
            return read_tensors(directory / f"{stem}{suffix}")
    raise FileNotFoundError(f"{directory} has no {stem}.safetensors, {stem}.bin or index of shards")
