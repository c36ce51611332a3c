"""Reads checkpoints of the original program (RunpeiDong/DreamLLM)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.diffusion.schedule import schedule_config_from_diffusers
from dreamllm_jax.interop.files import read_json, read_model, read_tensors
from dreamllm_jax.interop.names import from_torch
from dreamllm_jax.models.clip import clip_config_from_hf
from dreamllm_jax.models.dreamllm import DreamLLMConfig
from dreamllm_jax.models.llama import llama_config_from_hf
from dreamllm_jax.models.projectors import ProjectorConfig
from dreamllm_jax.models.unet import unet_config_from_diffusers
from dreamllm_jax.models.vae import autoencoder_config_from_diffusers
from dreamllm_jax.vocabulary import SpecialTokens


def read_config(directory: Path, config: Mapping[str, Any] | None = None) -> DreamLLMConfig:
    """The model described by a checkpoint's `config.json` and the towers' configurations it refers to.

    Args:
      directory: the checkpoint; towers named by relative paths are looked for inside it.
      config: in place of the directory's `config.json`.

    Raises:
      FileNotFoundError, ValueError: naming the file or the setting that is missing or not supported.
    """
    config = read_json(directory / "config.json") if config is None else config
    if config.get("model_type") != "dreamllm":
        raise ValueError(f"{directory}/config.json has model_type {config.get('model_type')!r}, expected 'dreamllm'")
    plugins = config["plugins_init_kwargs"]
    vision, head = plugins["clip_vision_embedding"], plugins["stable_diffusion_head"]
    diffusion = directory / head["diffusion_name_or_path"]
    clip = clip_config_from_hf(read_json(directory / vision["clip_vision_model_name_or_path"] / "config.json"))
    clip = dataclasses.replace(clip, select_layer=vision["select_layer"])
    return DreamLLMConfig(
        llama=llama_config_from_hf(config),
        clip=clip,
        vae=autoencoder_config_from_diffusers(read_json(diffusion / "vae" / "config.json")),
        unet=unet_config_from_diffusers(read_json(diffusion / "unet" / "config.json")),
        schedule=schedule_config_from_diffusers(read_json(diffusion / "scheduler" / "scheduler_config.json")),
        visual_projector=ProjectorConfig(
            kind=vision["projector_type"],
            depth=vision["projector_depth"],
            post_layernorm=vision["use_additional_post_layernorm"],
            layer_norm_eps=clip.layer_norm_eps,
        ),
        condition_projector=ProjectorConfig(kind=head["projector_type"], depth=head["projector_depth"]),
        num_queries=plugins["dream_embedding"]["num_dream_queries"],
        special_tokens=_special_tokens(config["special_tokens2ids_dict"]),
    )


def _special_tokens(ids: Mapping[str, Any]) -> SpecialTokens:
    ids = {**ids, **ids["additional_special_tokens"]}
    added = {f.name: ids[f"<{f.name}>"] for f in dataclasses.fields(SpecialTokens) if f"<{f.name}>" in ids}
    return SpecialTokens(bos=ids["<s>"], eos=ids["</s>"], pad=ids["[PAD]"], **added)


def require_same_model(directory: Path, model: DreamLLMConfig) -> None:
    """Checks that a checkpoint is of `model`: what no tensor's shape shows (token ids, heads, bases, layers) included.

    Raises:
      ValueError: naming the first setting in which they differ.
    """
    _require_same(dataclasses.asdict(read_config(directory)), dataclasses.asdict(model), "config.model", directory)


# How a model is computed or was begun, not what it is.
_FREE = ("dtype", "remat", "initializer_range", "sample_size")


def _require_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: str, directory: Path) -> None:
    for name in [name for name in ours if name not in _FREE]:
        if isinstance(ours[name], Mapping) and isinstance(theirs.get(name), Mapping):
            _require_same(theirs[name], ours[name], f"{path}.{name}", directory)
        elif theirs.get(name) != ours[name]:
            raise ValueError(f"{path}.{name} is {ours[name]!r}, but {directory} has {theirs.get(name)!r}")


def read_params(directory: Path, template: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's parameters as our tree of numpy arrays.

    Args:
      template: shapes of the parameter tree of `read_config(directory)`.

    Raises:
      FileNotFoundError, ValueError: naming every tensor that is missing, unexpected or wrongly shaped.
    """
    llm = read_model(directory, "pytorch_model" if (directory / "pytorch_model.bin").is_file() else "model")
    vision = read_tensors(directory / "clip_vision_embedding.bin")
    head = read_tensors(directory / "stable_diffusion_head.bin")
    queries = read_tensors(directory / "dream_embedding.bin")

    def part(name: str, tensors: Mapping[str, np.ndarray]) -> dict:
        if not template.get(name):  # a part without parameters
            return {}
        try:
            return from_torch(template[name], tensors)
        except ValueError as error:
            raise ValueError(f"{directory}, {name}: {error}") from None

    return {
        "llama": part("llama", {n.removeprefix("model."): t for n, t in llm.items() if "rotary_emb.inv_freq" not in n}),
        "clip": part("clip", _under(vision, "clip_vision_model.vision_model.", drop="embeddings.position_ids")),
        "visual_projector": part(
            "visual_projector", {**_under(vision, "projector."), **_under(vision, "post_layernorm.", "post_layernorm.")}
        ),
        "queries": part("queries", {name: tensor[0] for name, tensor in queries.items()}),
        "condition_projector": part("condition_projector", _under(head, "projector.")),
        "vae": part("vae", _under(head, "vae.")),
        "unet": part("unet", _under(head, "unet.")),
    }


def _under(tensors: Mapping[str, np.ndarray], prefix: str, new: str = "", drop: str = "") -> dict[str, np.ndarray]:
    names = ((name, name.removeprefix(prefix)) for name in tensors if name.startswith(prefix))
    return {new + short: tensors[name] for name, short in names if short != drop}
