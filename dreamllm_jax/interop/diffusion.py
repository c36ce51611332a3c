"""Stable Diffusion in diffusers' layout: the folders `unet`, `vae` and `scheduler`."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dreamllm_jax.diffusion.schedule import ScheduleConfig, schedule_config_from_diffusers
from dreamllm_jax.interop import files
from dreamllm_jax.interop.source import Part
from dreamllm_jax.models.unet import UNetConfig, unet_config_from_diffusers
from dreamllm_jax.models.vae import AutoencoderConfig, autoencoder_config_from_diffusers

_STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")
# What Stable Diffusion's own scheduler files say beside what training needs: how to sample.
_SAMPLING = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_NAME = re.compile(rf"(.*\.mid_block\.attentions\.\d+)\.({'|'.join(_LEGACY)})\.(weight|bias)")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DiffusionConfigs:
    """The settings of the three folders."""

    unet: UNetConfig
    vae: AutoencoderConfig
    schedule: ScheduleConfig


def read_diffusion_configs(directory: Path) -> DiffusionConfigs:
    """The configurations of a Stable Diffusion directory.

    Raises:
      FileNotFoundError, ValueError: naming the file, and the setting that is not supported.
    """

    def read(file: str, parse) -> Any:
        try:
            return parse(files.read_json(directory / file))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{directory / file}: {error}") from None

    return DiffusionConfigs(
        unet=read("unet/config.json", unet_config_from_diffusers),
        vae=read("vae/config.json", autoencoder_config_from_diffusers),
        schedule=read("scheduler/scheduler_config.json", schedule_config_from_diffusers),
    )


def open_diffusion(directory: Path) -> tuple[Part, Part, ScheduleConfig]:
    """U-Net, autoencoder and noise schedule of a Stable Diffusion directory.

    Raises:
      FileNotFoundError, ValueError: naming the file or setting that is missing or not supported.
    """
    configs = read_diffusion_configs(directory)
    unet = Part(configs.unet, files.open_model(directory / "unet", *_STEMS))
    vae = Part(configs.vae, rename_legacy_attention(files.open_model(directory / "vae", *_STEMS)))
    return unet, vae, configs.schedule


def rename_legacy_attention(tensors: Mapping[str, T]) -> dict[str, T]:
    """Gives the attention weights of an old `AutoencoderKL` checkpoint the names they have today.

    Some of those checkpoints also store them as 1x1 convolutions, which `names.arrange` accepts.
    """

    def rename(name: str) -> str:
        match = _LEGACY_NAME.fullmatch(name)
        return f"{match[1]}.{_LEGACY[match[2]]}.{match[3]}" if match else name

    return {rename(name): tensor for name, tensor in tensors.items()}


def write_diffusion_configs(directory: Path, configs: DiffusionConfigs) -> None:
    """Writes the configuration files of the three folders."""
    for name, kind, config in (
        ("unet", "UNet2DConditionModel", configs.unet),
        ("vae", "AutoencoderKL", configs.vae),
    ):
        settings = dataclasses.asdict(config)
        if settings.get("num_attention_heads", ...) is None:
            del settings["num_attention_heads"]
        files.write_json(directory / name / "config.json", {"_class_name": kind, **settings})
    files.write_json(
        directory / "scheduler" / "scheduler_config.json",
        {"_class_name": "PNDMScheduler", **_SAMPLING, **dataclasses.asdict(configs.schedule)},
    )


def write_diffusion(
    directory: Path,
    configs: DiffusionConfigs,
    unet: Mapping[str, np.ndarray],
    vae: Mapping[str, np.ndarray],
    max_shard_size: int,
) -> None:
    """Writes folders that diffusers' `UNet2DConditionModel`, `AutoencoderKL` and schedulers load."""
    write_diffusion_configs(directory, configs)
    files.write_safetensors(directory / "unet", _STEMS[0], unet, max_shard_size)
    files.write_safetensors(directory / "vae", _STEMS[0], vae, max_shard_size)
