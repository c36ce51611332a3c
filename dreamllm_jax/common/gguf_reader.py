"""Opens llama.cpp's models (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): weights and tokenizer alike."""

import os
from pathlib import Path
from typing import Any


def open_gguf_reader(path: str | os.PathLike):
    """The gguf package's reader of a file.

    Raises:
      FileNotFoundError, ValueError: naming the file; ImportError if the gguf package is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError(f"reading {path} needs the gguf package: pip install 'dreamllm_jax[gguf]'") from None
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is truncated or not a GGUF file: {error}") from None


def field(reader: Any, name: str, default: Any = None) -> Any:
    """The value of one of the file's fields."""
    found = reader.fields.get(name)
    return default if found is None else found.contents()
