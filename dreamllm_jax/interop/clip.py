"""CLIP in Hugging Face's layout: a whole `CLIPModel` or its vision tower alone."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.common import recognise
from dreamllm_jax.interop import files
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.source import Part
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.vision_encoders.clip import NOT_IN_HF, ClipVisionConfig, clip_config_from_hf

# What a CLIP checkpoint holds beside the vision tower.
_OTHERS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
_BUFFER = "embeddings.position_ids"
PREFIX = "vision_model."
# Of a CLIPImageProcessor, and of a CLIPProcessor as transformers 5 writes it.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_NORMALISATION = ("image_mean", "image_std")


def open_clip(directory: Path, select_layer: int = -2) -> Part:
    """The vision tower of a CLIP directory.

    Raises:
      FileNotFoundError, ValueError: naming the file, setting or tensor that is missing or does not fit.
    """
    part = clip_part(read_clip_config(directory, select_layer), files.open_model(directory, "model", "pytorch_model"))
    return dataclasses.replace(part, where=directory)


def read_clip_config(directory: Path, select_layer: int = -2) -> ClipVisionConfig:
    """The vision tower's shape, from `config.json`, and the pixels it takes, from its image processor's file, if any;
    errors as of `open_clip`."""
    recognise.require(directory, "config.json")
    config = files.read_config(directory / "config.json", lambda settings: clip_config_from_hf(settings, select_layer))
    for name in PROCESSORS:
        if (path := directory / name).is_file():
            found = files.read_config(path, lambda settings: _normalisation(settings, config))
            return dataclasses.replace(config, **found)
    return config


def _normalisation(settings: Mapping[str, Any], config: ClipVisionConfig) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of a `CLIPImageProcessor`, perhaps inside of a `CLIPProcessor`.

    Raises:
      ValueError: it makes other pixels of an image than we do.
    """
    settings = settings.get("image_processor", settings)
    for name, ours in _processor(config).items():
        size = config.image_size
        same = (ours, None, *((size,) if name in ("size", "crop_size") else ()))  # sizes were plain numbers once
        if name not in _NORMALISATION and settings.get(name) not in same:
            raise ValueError(f"{name} = {settings[name]!r} is not supported: only {ours!r} is")
    return {name: tuple(settings[name]) for name in _NORMALISATION if settings.get(name)}


def clip_part(config: ClipVisionConfig, tensors: Mapping[str, Tensor]) -> Part:
    """The tensors of a `CLIPModel` or `CLIPVisionModel` as our part; the text tower and projections are left out."""
    names = {name: name.removeprefix(PREFIX) for name in tensors}
    left_out = tuple(name for name in names if name.startswith(_OTHERS) or names[name] == _BUFFER)
    return Part(config, {new: tensors[old] for old, new in names.items() if old not in left_out}, left_out)


def write_clip(
    directory: Path, config: DreamLLMConfig, tensors: Mapping[str, Mapping[str, np.ndarray]], max_shard_size: int
) -> None:
    """Writes a directory that `CLIPVisionModel` and `CLIPImageProcessor` load.

    Args:
      tensors: part of the parameter tree -> torch name -> array; `clip` at least.
    """
    settings = {name: value for name, value in dataclasses.asdict(config.clip).items() if name not in NOT_IN_HF}
    settings |= {"torch_dtype": str(tensors["clip"]["pre_layrnorm.weight"].dtype), "num_channels": 3}
    files.write_json(
        directory / "config.json",
        {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **settings},
    )
    files.write_json(
        directory / PROCESSORS[0], {"image_processor_type": "CLIPImageProcessor", **_processor(config.clip)}
    )
    named = {PREFIX + name: tensor for name, tensor in tensors["clip"].items()}
    files.write_safetensors(directory, "model", named, max_shard_size)


def _processor(config: ClipVisionConfig) -> dict[str, Any]:
    """The settings of the `CLIPImageProcessor` that makes the same pixels as `data.images.clip_pixels` and we."""
    size = config.image_size
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **{name: list(getattr(config, name)) for name in _NORMALISATION},
    }
