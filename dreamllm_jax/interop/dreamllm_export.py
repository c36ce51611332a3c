"""Writes a model as the original program (RunpeiDong/DreamLLM) stores it; `dreamllm.py` reads it and has the names."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.data.vocabulary import ADDED_TOKENS
from dreamllm_jax.interop import files
from dreamllm_jax.interop.dreamllm import (
    HEAD,
    HEADS,
    NORM,
    OUR_POOLED,
    QUERIES,
    QUERIES_NAME,
    SIGHTS,
    VISION,
    Head,
    head_of,
    head_parts,
)
from dreamllm_jax.interop.image_decoder import write_image_decoder
from dreamllm_jax.interop.language_model import hf_settings, hf_tensors, write_hf
from dreamllm_jax.interop.source import config_of
from dreamllm_jax.interop.vision_encoder import write_vision_encoder
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.connectors.projector import ProjectorConfig


def write_dreamllm(
    directory: Path,
    config: DreamLLMConfig,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    max_shard_size: int,
    location: str = "",
) -> None:
    """Writes what the original's `DreamLLMForCausalMLM.from_pretrained` and its plugins load, tokenizer excepted.

    Args:
      tensors: part of the parameter tree -> torch name -> array.
      location: where the directory will be used. The original looks for the towers at the paths that `config.json`
        names, relative ones from where it is started: they are named as folders of `location`.

    Raises:
      ValueError: naming a setting that the original program does not know.
    """
    require_expressible(config)
    llama, found = config.language_model, tensors["language_model"]
    settings = hf_settings(llama, config.special_tokens, str(found["embed_tokens.weight"].dtype))
    del settings["mlp_bias"], settings["head_dim"]
    if llama.rope_scaling is not None:
        settings["rope_scaling"] = {"type": llama.rope_scaling.rope_type, "factor": llama.rope_scaling.factor}
    settings = {"architectures": ["DreamLLMForCausalMLM"], "model_type": "dreamllm", **settings}
    settings |= _plugin_settings(config, location)
    unscaled = dataclasses.replace(llama, rope_scaling=None)
    buffers = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": unscaled.rope_frequencies(1)
        for layer in range(llama.num_hidden_layers)
    }
    write_hf(directory, settings, hf_tensors(llama, found) | buffers, max_shard_size)

    (queries,) = tensors["dream_queries"].values()
    files.write_pickle(directory / f"{QUERIES}.bin", {QUERIES_NAME: queries[None]})
    head = head_of(config.image_decoder)
    for stem, parts in ((VISION, SIGHTS["clip"].parts), (head.stem, head_parts(config.image_decoder))):
        named = {
            _name_in_plugin(prefix, config_of(config, part), name, head): tensor
            for prefix, part in parts.items()
            for name, tensor in tensors[part].items()
        }
        files.write_pickle(directory / f"{stem}.bin", named)

    write_vision_encoder(directory / "clip", config, tensors, max_shard_size)
    write_image_decoder(directory / "diffusion", config, tensors, max_shard_size)


def _name_in_plugin(prefix: str, tower: Any, name: str, head: Head) -> str:
    if isinstance(tower, ProjectorConfig):
        if name.startswith(OUR_POOLED):
            return head.pooled + name.removeprefix(OUR_POOLED)
        return name if name.startswith(NORM) else prefix + name
    return prefix + tower.public.theirs(name)


def require_expressible(config: DreamLLMConfig) -> None:
    """Raises ValueError naming a setting that the original program does not know."""
    llama, encoder, projector = config.language_model, config.vision_encoder, config.visual_projector
    special = config.special_tokens
    kinds = {
        "language_model": (llama, ("llama",)),
        "vision_encoder": (encoder, ("clip",)),
        "visual_projector": (projector, ("linear", "mlp", "conv")),
        "connector": (config.connector, ("linear", "mlp", "conv")),
        "image_decoder": (config.image_decoder, tuple(kind for kind, head in HEADS.items() if head.target)),
    }
    problems = [f"{role} of kind {tower.kind!r}" for role, (tower, known) in kinds.items() if tower.kind not in known]
    if not problems:
        scaling, pooled = llama.rope_scaling, config.image_decoder.pooled_width > 0
        checks = {
            "language_model.mlp_bias": llama.mlp_bias,
            f"language_model.head_dim={llama.head_dim}": llama.head_dim * llama.num_attention_heads
            != llama.hidden_size,
            "language_model.rope_scaling of type llama3": scaling and scaling.rope_type not in ("linear", "dynamic"),
            "visual_projector.bias=False": projector.bias is False,
            "connector.bias": config.connector.bias,
            "visual_projector.pre_layernorm": projector.pre_layernorm,
            "connector.pre_layernorm": config.connector.pre_layernorm,
            "connector.post_layernorm": config.connector.post_layernorm,
            "connector of kind 'conv' for a pooled vector": pooled and config.connector.kind == "conv",
            "dream queries that are drawn anew": config.dream_queries.redrawn,
            "documents without <s>, or images without marks around them": None in dataclasses.astuple(special),
            "visual_projector.layer_norm_eps other than vision_encoder.layer_norm_eps": projector.post_layernorm
            and projector.layer_norm_eps != encoder.layer_norm_eps,
        }
        problems = [name for name, problem in checks.items() if problem]
    if problems:
        raise ValueError(f"the original program has no {problems[0]}: export with --format=hf or diffusers")


def _plugin_settings(config: DreamLLMConfig, location: str) -> dict[str, Any]:
    bos, eos, *added = dataclasses.astuple(config.special_tokens)
    ids = dict(zip(ADDED_TOKENS, added, strict=True))

    def plugin(kind: str, **settings) -> dict[str, Any]:
        return {
            "_target_": f"omni.models.{kind}",
            "embed_hidden_size": config.language_model.hidden_size,
            "pretrained_model_name_or_path": None,
            **settings,
        }

    def projector(chosen: ProjectorConfig) -> dict[str, Any]:
        return {"projector_type": chosen.kind, "projector_depth": chosen.depth, "freeze_projector": False}

    width = config.image_decoder.pooled_width
    pooled = {"global_condition_hidden_size": width} if width else {}

    return {
        "plugins_init_kwargs": {
            VISION: plugin(
                "dreamllm.modeling_plugins.CLIPVisionEmbedding",
                clip_vision_model_name_or_path=str(Path(location, "clip")),
                select_layer=config.vision_encoder.select_layer,
                use_additional_post_layernorm=config.visual_projector.post_layernorm,
                freeze_clip_vision_model=True,
                freeze_embedding_layers=True,
                local_files_only=True,
                **projector(config.visual_projector),
            ),
            QUERIES: plugin(
                "dreamllm.modeling_plugins.DreamEmbedding",
                num_dream_queries=config.num_queries,
                freeze_dream_queries=False,
            ),
            HEAD: plugin(
                head_of(config.image_decoder).target,
                diffusion_name_or_path=str(Path(location, "diffusion")),
                freeze_unet=True,
                freeze_vae=True,
                local_files_only=True,
                **projector(config.connector),
                **pooled,
            ),
        },
        "plugins_type": {VISION: "embedding", QUERIES: "embedding", HEAD: "head"},
        "special_tokens2ids_dict": {
            "<s>": bos,
            "</s>": eos,
            "[PAD]": ids.pop("[PAD]"),
            "additional_special_tokens": ids,
        },
        "loss_weight_lm": 1.0,
        "loss_weight_vm": 10.0,
        "loss_scale_schedule": "none",
    }
