"""An image decoder in diffusers' layout: a folder for each of its parts, and the scheduler's file.

What kind of decoder it is say its parts: the `_class_name` of each one's config.json.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dreamllm_jax.common import recognise
from dreamllm_jax.interop import files
from dreamllm_jax.interop.source import IMAGE_DECODER, Part, Stored
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers import registry
from dreamllm_jax.towers.public import reader
from dreamllm_jax.towers.registry import ImageDecoderConfig


def read_decoder_config(directory: Path) -> ImageDecoderConfig:
    """The configuration of the decoder in a directory of diffusers.

    Raises:
      FileNotFoundError, ValueError: naming the file, and the setting that is not supported.
    """
    cls = _kind_of(directory)
    places = {part: _config_of(classes) for part, classes in cls.public_parts.items()}
    recognise.require(directory, *places.values(), cls.public_scheduler)
    parts = {
        part: files.read_config(directory / place, lambda settings, part=part: _read(cls.public_parts[part], settings))
        for part, place in places.items()
    }
    return files.read_config(directory / cls.public_scheduler, lambda settings: cls.from_public(parts, settings))


def _read(classes: tuple[type, ...], settings: dict[str, Any]) -> Any:
    return reader(classes, settings).from_public(settings)


def _config_of(classes: Sequence[type]) -> str:
    return f"{classes[0].public.folder}/config.json"


def _kind_of(directory: Path) -> type:
    """The kind of decoder in a directory: that of its denoiser, and of several such the one whose other parts stand
    there too. What does not say its class may be any.

    Raises:
      FileNotFoundError: there is no denoiser.
      ValueError: it is of no known kind, naming what was found and what is known.
    """
    known = [cls for cls in registry.IMAGE_DECODERS if cls.public_parts]
    denoisers = dict.fromkeys(_config_of(cls.public_parts["denoiser"]) for cls in known)
    there = [place for place in denoisers if (directory / place).is_file()]
    if len(there) != 1:
        recognise.require_one(directory, *denoisers)
        raise ValueError(f"{directory} has {' and '.join(there)}, which are two image decoders: take one of them away")

    def fits(classes: Sequence[type]) -> bool:
        name = _class_name(directory / _config_of(classes))
        return name is None or any(name in part.public.names for part in classes)

    of = [
        cls for cls in known if _config_of(cls.public_parts["denoiser"]) in there and fits(cls.public_parts["denoiser"])
    ]
    if not of:
        name = _class_name(directory / there[0])
        named = (part.public for cls in known for part in cls.public_parts["denoiser"])
        kinds = ", ".join(dict.fromkeys(f"{form.torch_class} in {form.folder}/" for form in named))
        raise ValueError(
            f"{directory} is no image decoder of a known kind: it has {name} in {Path(there[0]).parent}/; known are "
            f"{kinds}"
        )

    def describes(cls: type) -> bool:
        parts = {part: _settings(directory / _config_of(classes)) for part, classes in cls.public_parts.items()}
        return all(map(fits, cls.public_parts.values())) and cls.describes(parts)

    return next(filter(describes, of), of[0])


def _class_name(file: Path) -> str | None:
    """What a part's config.json says that it is of; None if nothing is said."""
    return _settings(file).get("_class_name")


def _settings(file: Path) -> dict[str, Any]:
    """What stands in a part's config.json; nothing if there is none that can be read."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def open_image_decoder(
    directory: Path, stored: Mapping[str, Stored] = MappingProxyType({})
) -> tuple[ImageDecoderConfig, dict[str, Part]]:
    """The decoder in a directory of diffusers, and its parts by their paths in the model.

    Args:
      stored: by these paths, what is taken for the tensors in the directory.

    Raises:
      FileNotFoundError, ValueError: naming the file or setting that is missing or not supported.
    """
    config, found = read_decoder_config(directory), {}
    for part, tower in public_parts(config).items():
        path = f"{IMAGE_DECODER}/{part}"
        if path in stored:
            found[path] = Part.of(tower, stored[path].named(), stored[path].where)
        else:
            found[path] = Part.open(tower, directory / tower.public.folder)
    return config, found


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
