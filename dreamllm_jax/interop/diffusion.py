"""Stable Diffusion in diffusers' layout: the folders `unet`, `vae` and `scheduler`."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.common import recognise
from dreamllm_jax.diffusion.schedule import ScheduleConfig, schedule_config_from_diffusers, schedule_config_to_diffusers
from dreamllm_jax.interop import files
from dreamllm_jax.interop.source import Part
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.autoencoders.kl import AutoencoderConfig, autoencoder_config_from_diffusers
from dreamllm_jax.towers.image_decoders.unet import UNetConfig, unet_config_from_diffusers

SCHEDULER = "scheduler/scheduler_config.json"
_CONFIGS = "unet/config.json", "vae/config.json", SCHEDULER
STEM = "diffusion_pytorch_model"
_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_NAME = re.compile(rf"(.*\.mid_block\.attentions\.\d+)\.({'|'.join(_LEGACY)})\.(weight|bias)")


def read_diffusion_configs(directory: Path) -> tuple[UNetConfig, AutoencoderConfig, ScheduleConfig]:
    """The configurations of a Stable Diffusion directory.

    Raises:
      FileNotFoundError, ValueError: naming the file, and the setting that is not supported.
    """
    recognise.require(directory, *_CONFIGS)
    return (
        files.read_config(directory / "unet/config.json", unet_config_from_diffusers),
        files.read_config(directory / "vae/config.json", autoencoder_config_from_diffusers),
        files.read_config(directory / SCHEDULER, schedule_config_from_diffusers),
    )


def open_diffusion(directory: Path) -> tuple[Part, Part, ScheduleConfig]:
    """U-Net, autoencoder and noise schedule of a Stable Diffusion directory.

    Raises:
      FileNotFoundError, ValueError: naming the file or setting that is missing or not supported.
    """
    unet, vae, schedule = read_diffusion_configs(directory)
    return (
        Part(unet, files.open_model(directory / "unet", STEM), where=directory / "unet"),
        Part(vae, rename_legacy_attention(files.open_model(directory / "vae", STEM)), where=directory / "vae"),
        schedule,
    )


def rename_legacy_attention(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the attention weights of an old `AutoencoderKL` checkpoint the names they have today.

    Some of those checkpoints also store them as 1x1 convolutions, which `names.arrange` accepts.
    """

    def rename(name: str) -> str:
        match = _LEGACY_NAME.fullmatch(name)
        return f"{match[1]}.{_LEGACY[match[2]]}.{match[3]}" if match else name

    return {rename(name): tensor for name, tensor in tensors.items()}


def write_diffusion(
    directory: Path, config: DreamLLMConfig, tensors: Mapping[str, Mapping[str, np.ndarray]], max_shard_size: int
) -> None:
    """Writes folders that diffusers' `UNet2DConditionModel`, `AutoencoderKL` and schedulers load.

    Args:
      tensors: part of the parameter tree -> torch name -> array; `unet` and `vae` at least.
    """
    for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        settings = dataclasses.asdict(getattr(config, part))
        if settings.get("num_attention_heads", ...) is None:
            del settings["num_attention_heads"]
        files.write_json(directory / part / "config.json", {"_class_name": kind, **settings})
        files.write_safetensors(directory / part, STEM, tensors[part], max_shard_size)
    files.write_json(directory / SCHEDULER, schedule_config_to_diffusers(config.schedule))
