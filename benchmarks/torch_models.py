"""The towers in PyTorch's classes, with random weights, for the benchmarks that compare with it."""

import dataclasses

import diffusers
import torch
import transformers

from dreamllm_jax.towers.image_decoders.unet import UNetConfig
from dreamllm_jax.towers.language_models.llama import LlamaConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def llama(config: LlamaConfig) -> transformers.LlamaForCausalLM:
    settings = {name: value for name, value in config.to_public().items() if name not in ("rope_theta", "rope_scaling")}
    with torch.device(DEVICE):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, attn_implementation="sdpa"))


def unet(config: UNetConfig) -> diffusers.UNet2DConditionModel:
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "kind"}
    with torch.device(DEVICE):
        return diffusers.UNet2DConditionModel(**settings)


def wait() -> None:
    """Until the device has computed everything."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
