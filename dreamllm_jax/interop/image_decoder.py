"""An image decoder in diffusers' layout: a folder for each of its parts, and the scheduler's file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.common import recognise
from dreamllm_jax.interop import files
from dreamllm_jax.interop.source import IMAGE_DECODER, Part
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers import registry
from dreamllm_jax.towers.public import reader
from dreamllm_jax.towers.registry import ImageDecoderConfig


def read_decoder_config(directory: Path) -> ImageDecoderConfig:
    """The configuration of the decoder in a directory of diffusers.

    Raises:
      FileNotFoundError, ValueError: naming the file, and the setting that is not supported.
    """
    cls = next((cls for cls in registry.IMAGE_DECODERS if _is_of(cls, directory)), registry.IMAGE_DECODERS[0])
    places = {part: f"{classes[0].public.folder}/config.json" for part, classes in cls.public_parts.items()}
    recognise.require(directory, *places.values(), cls.public_scheduler)
    parts = {
        part: files.read_config(directory / place, lambda settings, part=part: _read(cls.public_parts[part], settings))
        for part, place in places.items()
    }
    return files.read_config(directory / cls.public_scheduler, lambda settings: cls.from_public(parts, settings))


def _read(classes: tuple[type, ...], settings: dict[str, Any]) -> Any:
    return reader(classes, settings).from_public(settings)


def _is_of(cls: type, directory: Path) -> bool:
    """Whether a directory's parts say that they are of this kind of decoder."""
    parts = {}
    for part, classes in cls.public_parts.items():
        try:
            parts[part] = json.loads((directory / classes[0].public.folder / "config.json").read_text())
            name = parts[part].get("_class_name")
        except (OSError, ValueError, AttributeError):
            return False
        if not any(name in part.public.names for part in classes):
            return False
    return bool(parts) and cls.describes(parts)


def open_image_decoder(directory: Path) -> tuple[ImageDecoderConfig, dict[str, Part]]:
    """The decoder in a directory of diffusers, and its parts by their paths in the model.

    Raises:
      FileNotFoundError, ValueError: naming the file or setting that is missing or not supported.
    """
    config = read_decoder_config(directory)
    return config, {
        f"{IMAGE_DECODER}/{part}": Part.open(tower, directory / tower.public.folder)
        for part, tower in public_parts(config).items()
    }


def public_parts(config: ImageDecoderConfig) -> dict[str, Any]:
    """The parts of a decoder that have a public form: name -> configuration."""
    parts = {part: getattr(config, part) for part in config.public_parts}
    return {part: tower for part, tower in parts.items() if tower.public is not None}


def write_image_decoder(
    directory: Path, config: DreamLLMConfig, tensors: Mapping[str, Mapping[str, np.ndarray]], max_shard_size: int
) -> None:
    """Writes folders that the public classes of the decoder's parts, and schedulers, load.

    Args:
      tensors: part of the parameter tree -> torch name -> array; those of the image decoder at least.
    """
    decoder = config.image_decoder
    for part, tower in public_parts(decoder).items():
        form = tower.public
        settings = {"_class_name": form.torch_class, **tower.to_public()}
        files.write_json(directory / form.folder / "config.json", settings)
        named = {form.theirs(name): tensor for name, tensor in tensors[f"{IMAGE_DECODER}/{part}"].items()}
        files.write_safetensors(directory / form.folder, form.stems[0], named, max_shard_size)
    files.write_json(directory / decoder.public_scheduler, decoder.to_public_scheduler())
