"""Checkpoints of the original program (RunpeiDong/DreamLLM).

The language model is stored as Hugging Face's; its plugins have a file each (`save_model` of `modeling_plugins.py` in
`omni/models/dreamllm` and `dreamllm_sdxl`): `dream_embedding.bin`, `clip_vision_embedding.bin`,
`stable_diffusion_head.bin` or `stable_diffusion_xl_head.bin`, or, in older checkpoints, only queries and projectors in
`dream_queries.pt`, `clip_vision_model_projector.pt`, `unet_projector.pt`. The towers' shapes are those of the
directories that `config.json` refers to, and so are their weights where no plugin file holds them.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.common import recognise
from dreamllm_jax.data.vocabulary import ADDED_TOKENS, SpecialTokens
from dreamllm_jax.interop import files
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.image_decoder import open_image_decoder, read_decoder_config, write_image_decoder
from dreamllm_jax.interop.language_model import hf_settings, hf_tensors, language_model_part, write_hf
from dreamllm_jax.interop.source import Part, Source, config_of, join, split
from dreamllm_jax.interop.vision_encoder import open_vision_encoder, read_vision_config, write_vision_encoder
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.connectors.projector import ProjectorConfig
from dreamllm_jax.towers.language_models.llama import LlamaConfig

_logger = logging.getLogger(__name__)

VISION, QUERIES, HEAD = "clip_vision_embedding", "dream_embedding", "stable_diffusion_head"
_OLD = {VISION: "clip_vision_model_projector.pt", QUERIES: "dream_queries.pt", HEAD: "unet_projector.pt"}
# What a plugin's file holds: beginnings of its names -> parts of ours. A projector's norm stands beside it.
VISION_PARTS = {"clip_vision_model.": "vision_encoder", "projector.": "visual_projector"}
HEAD_PARTS = {"vae.": "image_decoder/autoencoder", "unet.": "image_decoder/denoiser", "projector.": "connector"}
NORM, QUERIES_NAME = "post_layernorm.", "dream_queries"
# The head of each kind of image decoder: its file, and its class in `omni.models`.
HEADS = {
    "stable_diffusion": ("stable_diffusion_head", "dreamllm.modeling_plugins.StableDiffusionHead"),
    "stable_diffusion_xl": ("stable_diffusion_xl_head", "dreamllm_sdxl.modeling_plugins.StableDiffusionXLHead"),
}
# The way to a pooled vector, in a head's file and in our connector.
POOLED, OUR_POOLED = "global_projector.projector.", "pooled_projector."


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where a checkpoint keeps what; `plugins` are the settings of `plugins_init_kwargs`."""

    directory: Path
    settings: Mapping[str, Any]
    plugins: Mapping[str, Mapping[str, Any]]
    vision_encoder: Path
    image_decoder: Path

    def plugin(self, name: str, stem: str = "") -> tuple[Path | None, Path | None]:
        """A plugin's file, called as it is or so, and that of older checkpoints: in this one itself, else where its
        settings name another."""
        places = [self.directory, *_places(self.directory, self.plugins[name].get("pretrained_model_name_or_path"))]
        new, old = f"{stem or name}.bin", _OLD[name]
        found = [next((place / file for place in places if (place / file).is_file()), None) for file in (new, old)]
        if not any(found):
            raise FileNotFoundError(f"{self.directory} has neither {new} nor {old}")
        return tuple(found)


# Towers that a checkpoint refers to: the plugin and its setting that name the directory, and a file inside of it.
_TOWERS = {
    "vision_encoder": (VISION, "clip_vision_model_name_or_path", "config.json"),
    "image_decoder": (HEAD, "diffusion_name_or_path", "unet/config.json"),
}


def tower_directory(directory: Path, plugins: Mapping[str, Mapping], tower: str, given: Path | None = None) -> Path:
    """The directory of a checkpoint's "vision_encoder" or "image_decoder": the one that is given, or else what
    config.json names.

    Raises:
      FileNotFoundError: there is none.
    """
    plugin, key, inside = _TOWERS[tower]
    name = plugins.get(plugin, {}).get(key)
    candidates = [given] if given else _places(directory, name)
    for candidate in candidates:
        if (candidate / inside).is_file():
            return candidate
    raise FileNotFoundError(
        f"{directory}/config.json refers to {name!r} ({key}), and no {inside} is found in "
        f"{', '.join(map(str, candidates)) or 'any directory'}: name the directory with --{tower.replace('_', '-')}"
    )


def _places(directory: Path, name: str | None) -> list[Path]:
    """Where something may be that a configuration refers to by name: in the checkpoint, at that path, beside it.

    In the checkpoint comes first, whatever the path: it may name where the checkpoint was before.
    """
    if not name:
        return []
    return [directory / Path(name).name, directory / name, Path(name), directory.parent / Path(name).name]


def _layout(directory: Path, given: Mapping[str, Path | None]) -> _Layout:
    recognise.require(directory, "config.json")
    settings = files.read_config(directory / "config.json", dict)
    if settings.get("model_type") != "dreamllm":
        raise ValueError(f"{directory}/config.json has model_type {settings.get('model_type')!r}, expected 'dreamllm'")
    plugins = settings.get("plugins_init_kwargs", {})
    if missing := [name for name in (VISION, QUERIES, HEAD) if name not in plugins]:
        raise ValueError(f"{directory}/config.json: plugins_init_kwargs has no {', '.join(missing)}")

    towers = {tower: tower_directory(directory, plugins, tower, given.get(tower)) for tower in _TOWERS}
    return _Layout(directory, settings, plugins, **towers)


def _config(layout: _Layout) -> DreamLLMConfig:
    """The model described by a checkpoint's `config.json` and the towers' configurations it refers to."""
    vision, head, queries = (layout.plugins[name] for name in (VISION, HEAD, QUERIES))
    encoder = read_vision_config(layout.vision_encoder, vision.get("select_layer"))
    decoder = read_decoder_config(layout.image_decoder)
    try:
        return DreamLLMConfig(
            language_model=LlamaConfig.from_public(layout.settings),
            vision_encoder=encoder,
            image_decoder=decoder,
            visual_projector=_projector(
                VISION,
                vision,
                post_layernorm=vision.get("use_additional_post_layernorm", False),
                layer_norm_eps=encoder.layer_norm_eps,
            ),
            connector=_projector(HEAD, head, **_pooled(layout, decoder)),
            num_queries=queries.get("num_dream_queries", 64),
            special_tokens=_special_tokens(layout.settings.get("special_tokens2ids_dict", {})),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{layout.directory}/config.json: {error}") from None


def _projector(plugin: str, settings: Mapping[str, Any], **more) -> ProjectorConfig:
    kind = settings.get("projector_type", "linear")
    if kind not in ("linear", "mlp", "conv"):
        raise ValueError(f"projector_type {kind!r} of {plugin} is not supported: only linear, mlp and conv are")
    return ProjectorConfig(kind=kind, depth=settings.get("projector_depth", 1), **more)


def _pooled(layout: _Layout, decoder: Any) -> dict[str, Any]:
    """The settings of the way to a pooled vector, of which the head's file alone says whether it has biases."""
    if not decoder.pooled_width:
        return {}
    path, _ = layout.plugin(HEAD, _head_file(decoder))
    names = [name for name in files.open_tensors(path) if name.startswith(POOLED)] if path else []
    return {"pooled_bias": any(name.endswith(".bias") for name in names)}


def _head_file(decoder: Any) -> str:
    if decoder.kind not in HEADS:
        raise ValueError(f"the original program has no head for an image decoder of kind {decoder.kind!r}")
    return HEADS[decoder.kind][0]


def _special_tokens(ids: Mapping[str, Any]) -> SpecialTokens:
    ids = {**ids, **ids.get("additional_special_tokens", {})}
    if missing := [token for token in ("<s>", "</s>", *ADDED_TOKENS) if token not in ids]:
        raise ValueError(f"special_tokens2ids_dict has no {', '.join(missing)}")
    return SpecialTokens.of(ids["<s>"], ids["</s>"], ids)


def open_dreamllm(directory: Path, vision_encoder: Path | None = None, image_decoder: Path | None = None) -> Source:
    """A checkpoint of the original program.

    Args:
      vision_encoder, image_decoder: directories of the towers, where those that `config.json` names are not found.

    Raises:
      FileNotFoundError, ValueError: naming every file or tensor that is missing, unexpected or wrongly shaped;
        ImportError without PyTorch, for the plugin files are pickles.
    """
    layout = _layout(directory, {"vision_encoder": vision_encoder, "image_decoder": image_decoder})
    config = _config(layout)
    stems = config.language_model.public.stems
    language = language_model_part(config.language_model, files.open_model(directory, *stems), directory)
    vision, left_out = _vision(layout, config)
    parts = {
        "language_model": language.tensors,
        "dream_queries": _queries(layout),
        **vision,
        **_head(layout, config),
    }
    try:
        source = join(config, parts, language.left_out + left_out)
    except ValueError as error:
        raise ValueError(f"{directory} and its config.json: {error}") from None
    return dataclasses.replace(source, tokenizer=directory)


def _queries(layout: _Layout) -> dict[str, Tensor]:
    new, old = layout.plugin(QUERIES)
    if old and new:
        _logger.warning("%s is taken before %s, as the original program does", old, new)

    def first(tensor: Tensor) -> Tensor:
        """Without the batch axis that they are stored with."""
        if len(tensor.shape) != 3 or tensor.shape[0] != 1:
            return tensor
        return dataclasses.replace(tensor, shape=tensor.shape[1:], read=lambda: tensor.read()[0])

    # In the old file stands the parameter itself, which has no name.
    found = {name or QUERIES_NAME: first(tensor) for name, tensor in files.open_tensors(old or new).items()}
    return {"weight" if name == QUERIES_NAME else name: tensor for name, tensor in found.items()}


def _vision(layout: _Layout, config: DreamLLMConfig) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    path, old = layout.plugin(VISION)
    if path:
        found = split(files.open_tensors(path), {**VISION_PARTS, NORM: NORM}, path.name)
        encoder = Part.of(config.vision_encoder, found["vision_encoder"])
        projector = found["visual_projector"] | {NORM + name: tensor for name, tensor in found[NORM].items()}
    else:
        encoder = open_vision_encoder(layout.vision_encoder, config.vision_encoder.select_layer)
        projector = files.open_tensors(old)
    return {"vision_encoder": encoder.tensors, "visual_projector": projector}, encoder.left_out


def _head(layout: _Layout, config: DreamLLMConfig) -> dict[str, dict[str, Tensor]]:
    path, old = layout.plugin(HEAD, _head_file(config.image_decoder))
    if path:
        found = split(files.open_tensors(path), {**HEAD_PARTS, POOLED: POOLED}, path.name)
        pooled = {OUR_POOLED + name: tensor for name, tensor in found.pop(POOLED).items()}
        connector = found.pop("connector") | pooled
        towers = {part: Part.of(config_of(config, part), tensors) for part, tensors in found.items()}
        return {"connector": connector, **{part: tower.tensors for part, tower in towers.items()}}
    _, towers = open_image_decoder(layout.image_decoder)
    return {"connector": files.open_tensors(old), **{part: tower.tensors for part, tower in towers.items()}}


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
    for plugin, parts in ((VISION, VISION_PARTS), (HEAD, HEAD_PARTS)):
        named = {
            _name_in_plugin(prefix, config_of(config, part), name): tensor
            for prefix, part in parts.items()
            for name, tensor in tensors[part].items()
        }
        file = HEADS[config.image_decoder.kind][0] if plugin == HEAD else plugin
        files.write_pickle(directory / f"{file}.bin", named)

    write_vision_encoder(directory / "clip", config, tensors, max_shard_size)
    write_image_decoder(directory / "diffusion", config, tensors, max_shard_size)


def _name_in_plugin(prefix: str, tower: Any, name: str) -> str:
    if isinstance(tower, ProjectorConfig):
        if name.startswith(OUR_POOLED):
            return POOLED + name.removeprefix(OUR_POOLED)
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
        "image_decoder": (config.image_decoder, tuple(HEADS)),
    }
    problems = [f"{role} of kind {tower.kind!r}" for role, (tower, known) in kinds.items() if tower.kind not in known]
    if not problems:
        scaling, pooled = llama.rope_scaling, config.image_decoder.pooled_width > 0
        checks = {
            "language_model.mlp_bias": llama.mlp_bias,
            f"language_model.head_dim={llama.head_dim}": llama.head_dim * llama.num_attention_heads
            != llama.hidden_size,
            "language_model.rope_scaling of type llama3": scaling and scaling.rope_type not in ("linear", "dynamic"),
            "visual_projector.pre_layernorm": projector.pre_layernorm,
            "connector.pre_layernorm": config.connector.pre_layernorm,
            "connector.post_layernorm": config.connector.post_layernorm,
            "connector of kind 'conv' for a pooled vector": pooled and config.connector.kind == "conv",
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
                HEADS[config.image_decoder.kind][1],
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
