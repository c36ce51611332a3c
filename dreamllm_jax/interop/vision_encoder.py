"""A vision encoder in Hugging Face's layout, alone or in a whole model, and its image processor."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.common import recognise
from dreamllm_jax.interop import files
from dreamllm_jax.interop.source import Part, Stored
from dreamllm_jax.interop.vision_language import VISION, open_part, settings_of
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers import registry
from dreamllm_jax.towers.public import reader
from dreamllm_jax.towers.registry import VisionEncoderConfig

# Of an image processor, and of a processor of text and images as transformers 5 writes it.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def open_vision_encoder(
    directory: Path, select_layer: int | None = None, joined: bool = False, stored: Stored | None = None
) -> Part:
    """The vision tower in a directory.

    Args:
      select_layer: the hidden state that is read; None for the usual one of the kind, or of the model that it lies in.
      joined: the visual projector of that model is taken too.
      stored: as of `vision_language.open_part`.

    Raises:
      FileNotFoundError, ValueError: naming the file, setting or tensor that is missing or does not fit.
    """
    config = read_vision_config(directory, select_layer, joined)
    found = open_part(directory, VISION, config.public.stems, stored)
    return found.complete(Part.of(config, found.tensors, stored.where if stored else directory))


def read_vision_config(directory: Path, select_layer: int | None = None, joined: bool = False) -> VisionEncoderConfig:
    """The vision tower's shape, from `config.json`, and the pixels it takes, from its image processor's file, if any;
    arguments and errors as of `open_vision_encoder`."""
    recognise.require(directory, "config.json")
    more = {} if select_layer is None else {"select_layer": select_layer}
    config = files.read_config(directory / "config.json", functools.partial(_vision_encoder_of, more, joined))
    for name in PROCESSORS:
        if (path := directory / name).is_file():
            return files.read_config(path, functools.partial(_with_processor, config))
    return config


def _vision_encoder_of(more: Mapping[str, Any], joined: bool, settings: Mapping[str, Any]) -> VisionEncoderConfig:
    settings, besides = settings_of(VISION, settings, joined)
    tower = reader(registry.VISION_ENCODERS, settings)
    if unknown := more.keys() - {field.name for field in dataclasses.fields(tower)}:
        raise ValueError(f"a vision encoder of kind {tower.kind!r} has no {', '.join(unknown)} to choose")
    return tower.from_public(settings, **{**besides, **more})


def _with_processor(config: VisionEncoderConfig, settings: Mapping) -> VisionEncoderConfig:
    return config.with_processor(settings.get("image_processor", settings))


def write_vision_encoder(
    directory: Path, config: DreamLLMConfig, tensors: Mapping[str, Mapping[str, np.ndarray]], max_shard_size: int
) -> None:
    """Writes a directory that the tower's public class and image processor load.

    Args:
      tensors: part of the parameter tree -> torch name -> array; `vision_encoder` at least.
    """
    tower, found = config.vision_encoder, tensors["vision_encoder"]
    form = tower.public
    settings = {"architectures": [form.torch_class], "model_type": form.types[0], **tower.to_public()}
    settings |= {"torch_dtype": str(next(iter(found.values())).dtype), "num_channels": 3}
    files.write_json(directory / "config.json", settings)
    files.write_json(directory / PROCESSORS[0], tower.processor())
    named = {form.theirs(name): tensor for name, tensor in found.items()}
    files.write_safetensors(directory, form.stems[0], named, max_shard_size)
