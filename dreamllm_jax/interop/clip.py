"""CLIP in Hugging Face's layout: a whole `CLIPModel` or its vision tower alone."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dreamllm_jax.interop import files
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.source import Part
from dreamllm_jax.models.clip import MEAN, STD, ClipVisionConfig, clip_config_from_hf
from dreamllm_jax.models.dreamllm import DreamLLMConfig

# What a CLIP checkpoint holds beside the vision tower.
_OTHERS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
_BUFFER = "embeddings.position_ids"
PREFIX = "vision_model."


def open_clip(directory: Path, select_layer: int = -2) -> Part:
    """The vision tower of a CLIP directory.

    Raises:
      FileNotFoundError, ValueError: naming the file, setting or tensor that is missing or does not fit.
    """
    return clip_part(read_clip_config(directory, select_layer), files.open_model(directory, "model", "pytorch_model"))


def read_clip_config(directory: Path, select_layer: int = -2) -> ClipVisionConfig:
    """The shape of the vision tower, from `config.json`; errors as of `open_clip`."""
    return files.read_config(directory / "config.json", lambda settings: clip_config_from_hf(settings, select_layer))


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
    settings = {name: value for name, value in dataclasses.asdict(config.clip).items() if name != "select_layer"}
    settings |= {"torch_dtype": str(tensors["clip"]["pre_layrnorm.weight"].dtype), "num_channels": 3}
    files.write_json(
        directory / "config.json",
        {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **settings},
    )
    size = config.clip.image_size
    files.write_json(
        directory / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
        },
    )
    named = {PREFIX + name: tensor for name, tensor in tensors["clip"].items()}
    files.write_safetensors(directory, "model", named, max_shard_size)
