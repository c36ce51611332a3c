"""Checkpoints of the original program (RunpeiDong/DreamLLM), and of its fork over Qwen2.5 (FolSpark/DreamLLM-Qwen2.5).

The language model is stored as Hugging Face's; its plugins have a file each (`save_model` of `modeling_plugins.py` in
`omni/models/dreamllm` and `dreamllm_sdxl`): `dream_embedding.bin`, `clip_vision_embedding.bin`,
`stable_diffusion_head.bin` or `stable_diffusion_xl_head.bin`, or, in older checkpoints, only queries and projectors in
`dream_queries.pt`, `clip_vision_model_projector.pt`, `unet_projector.pt`. The towers' shapes are those of the
directories that `config.json` refers to, and so are their weights where no plugin file holds them.

The fork (`dreamllm_qwen`, `dreamllm_qwen_sd3`, `dreamllm_qwen2`) has `stable_diffusion3_head.bin`, calls some plugins
otherwise in `config.json`, and takes Qwen's tokens for what it can. Its `intern_vit_embedding.bin`
is InternViT's, with a norm before the projector. It is read, and not written.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamllm_jax.common import recognise
from dreamllm_jax.data.vocabulary import ADDED_TOKENS, SpecialTokens
from dreamllm_jax.interop import files
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.image_decoder import open_image_decoder, read_decoder_config
from dreamllm_jax.interop.language_model import language_model_part
from dreamllm_jax.interop.source import IMAGE_DECODER, Part, Source, config_of, join, split
from dreamllm_jax.interop.vision_encoder import open_vision_encoder, read_vision_config
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.connectors.projector import ProjectorConfig
from dreamllm_jax.towers.language_models.llama import LlamaConfig
from dreamllm_jax.towers.language_models.qwen2 import Qwen2Config

_logger = logging.getLogger(__name__)

VISION, QUERIES, HEAD = "clip_vision_embedding", "dream_embedding", "stable_diffusion_head"
_OLD = {VISION: "clip_vision_model_projector.pt", QUERIES: "dream_queries.pt", HEAD: "unet_projector.pt"}
NORM, QUERIES_NAME = "post_layernorm.", "dream_queries"
OUR_POOLED = "pooled_projector."  # the way to a pooled vector in our connector


@dataclasses.dataclass(frozen=True)
class Sight:
    """How a vision encoder is stored.

    Attributes:
      stem: of its file.
      place: the setting that names its directory.
      tower: how the names begin of its tensors.
      norm: what the norm beside the projector is to our projector, `NORM` to the file.
    """

    stem: str
    place: str
    tower: str
    norm: str = NORM

    @property
    def parts(self) -> dict[str, str]:
        """What its file holds: beginnings of its names -> parts of ours."""
        return {self.tower: "vision_encoder", "projector.": "visual_projector"}


# By the kind of vision encoder; the second is the fork's.
SIGHTS = {
    "clip": Sight(VISION, "clip_vision_model_name_or_path", "clip_vision_model."),
    "intern_vit": Sight("intern_vit_embedding", "intern_vit_model_name_or_path", "vision_model.", "pre_layernorm."),
}


@dataclasses.dataclass(frozen=True)
class Head:
    """How an image decoder is stored.

    Attributes:
      stem: of its file.
      target: its class in `omni.models`, if it can be written.
      pooled: how the names begin of the way to a pooled vector.
    """

    stem: str
    target: str = ""
    pooled: str = ""


# By the kind of image decoder.
HEADS = {
    "stable_diffusion": Head("stable_diffusion_head", "dreamllm.modeling_plugins.StableDiffusionHead"),
    "stable_diffusion_xl": Head(
        "stable_diffusion_xl_head",
        "dreamllm_sdxl.modeling_plugins.StableDiffusionXLHead",
        "global_projector.projector.",
    ),
    "stable_diffusion_3": Head("stable_diffusion3_head", pooled="pooled_projector.projector."),
}
_RENAMED = {"vision_encoder": VISION, "stable_diffusion3_head": HEAD}  # plugins of the fork
# Its tokens in the place of the original's.
_QWEN_TOKENS = {
    "<s>": "<|im_start|>",
    "</s>": "<|im_end|>",
    "[PAD]": "<|endoftext|>",
    "<im_patch>": "<|image_pad|>",
    "<im_start>": "<|vision_start|>",
    "<im_end>": "<|vision_end|>",
}


def head_of(decoder: Any) -> Head:
    """How an image decoder is stored; ValueError if neither program has it."""
    if decoder.kind not in HEADS:
        raise ValueError(f"the original program has no head for an image decoder of kind {decoder.kind!r}")
    return HEADS[decoder.kind]


def head_parts(decoder: Any) -> dict[str, str]:
    """What a head's file holds, as `Sight.parts`."""
    denoiser = f"{decoder.denoiser.public.folder}."
    return {"vae.": f"{IMAGE_DECODER}/autoencoder", denoiser: f"{IMAGE_DECODER}/denoiser", "projector.": "connector"}


def plugins_of(settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The settings of a checkpoint's plugins, by the names that the original has for them."""
    return {_RENAMED.get(name, name): plugin for name, plugin in settings.get("plugins_init_kwargs", {}).items()}


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
        places = [self.directory, *places_of(self.directory, self.plugins[name].get("pretrained_model_name_or_path"))]
        new, old = f"{stem or name}.bin", _OLD[name]
        found = [next((place / file for place in places if (place / file).is_file()), None) for file in (new, old)]
        if not any(found):
            raise FileNotFoundError(f"{self.directory} has neither {new} nor {old}")
        return tuple(found)


# Towers that a checkpoint refers to: the plugin, the settings of which one names the directory, and files of which one
# is there.
_TOWERS = {
    "vision_encoder": (VISION, tuple(sight.place for sight in SIGHTS.values()), ("config.json",)),
    "image_decoder": (HEAD, ("diffusion_name_or_path",), ("unet/config.json", "transformer/config.json")),
}


def tower_directory(directory: Path, plugins: Mapping[str, Mapping], tower: str, given: Path | None = None) -> Path:
    """The directory of a checkpoint's "vision_encoder" or "image_decoder": the one that is given, or else what
    config.json names.

    Raises:
      FileNotFoundError: there is none.
    """
    plugin, keys, inside = _TOWERS[tower]
    key = next((key for key in keys if key in plugins.get(plugin, {})), keys[0])
    name = plugins.get(plugin, {}).get(key)
    candidates = [given] if given else places_of(directory, name)
    for candidate in candidates:
        if any((candidate / file).is_file() for file in inside):
            return candidate
    raise FileNotFoundError(
        f"{directory}/config.json refers to {name!r} ({key}), and no {' and no '.join(inside)} is found in "
        f"{', '.join(map(str, candidates)) or 'any directory'}: name the directory with --{tower.replace('_', '-')}"
    )


def places_of(directory: Path, name: str | None) -> list[Path]:
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
    plugins = plugins_of(settings)
    if missing := [name for name in (VISION, QUERIES, HEAD) if name not in plugins]:
        raise ValueError(f"{directory}/config.json: plugins_init_kwargs has no {', '.join(missing)}")
    towers = {tower: tower_directory(directory, plugins, tower, given.get(tower)) for tower in _TOWERS}
    return _Layout(directory, settings, plugins, **towers)


def _config(layout: _Layout) -> DreamLLMConfig:
    """The model described by a checkpoint's `config.json` and the towers' configurations it refers to."""
    vision, head, queries = (layout.plugins[name] for name in (VISION, HEAD, QUERIES))
    layer, in_squares = vision.get("select_layer"), SIGHTS["intern_vit"].place in vision
    encoder = read_vision_config(layout.vision_encoder, None if in_squares and layer == -1 else layer)
    if encoder.kind != ("intern_vit" if in_squares else "clip"):
        raise ValueError(f"{layout.directory}/config.json: {layout.vision_encoder} is of kind {encoder.kind!r}")
    if in_squares:
        encoder = dataclasses.replace(encoder, max_tiles=1)  # the fork sees a picture as one
    decoder = read_decoder_config(layout.image_decoder)
    of_fork = ".dreamllm_qwen" in queries.get("_target_", "")
    try:
        return DreamLLMConfig(
            language_model=Qwen2Config.from_public({**layout.settings, "model_type": "qwen2"})
            if of_fork
            else LlamaConfig.from_public(layout.settings),
            vision_encoder=encoder,
            image_decoder=decoder,
            visual_projector=_projector(
                VISION,
                vision,
                pre_layernorm=in_squares,
                post_layernorm=vision.get("use_additional_post_layernorm", False),
                layer_norm_eps=encoder.layer_norm_eps,
            ),
            connector=_projector(HEAD, head, **_biases(layout, decoder)),
            num_queries=queries.get("num_dream_queries", 64),
            special_tokens=_special_tokens(
                layout.settings.get("special_tokens2ids_dict", {}), _QWEN_TOKENS if of_fork else {}
            ),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{layout.directory}/config.json: {error}") from None


def _projector(plugin: str, settings: Mapping[str, Any], **more) -> ProjectorConfig:
    kind = settings.get("projector_type", "linear")
    if kind not in ("linear", "mlp", "conv"):
        raise ValueError(f"projector_type {kind!r} of {plugin} is not supported: only linear, mlp and conv are")
    return ProjectorConfig(kind=kind, depth=settings.get("projector_depth", 1), **more)


def _biases(layout: _Layout, decoder: Any) -> dict[str, Any]:
    """Which of its ways have biases; if one is to a pooled vector, the head's file alone says so."""
    if not decoder.pooled_width:
        return {}
    head = head_of(decoder)
    path, _ = layout.plugin(HEAD, head.stem)
    biases = [name for name in files.open_tensors(path) if name.endswith(".bias")] if path else []
    found = {"pooled_bias": any(name.startswith(head.pooled) for name in biases)}
    return found | ({"bias": True} if any(name.startswith("projector.") for name in biases) else {})


def _special_tokens(ids: Mapping[str, Any], called: Mapping[str, str]) -> SpecialTokens:
    """Of the ids in a `config.json`, where tokens may be called otherwise: ours -> theirs."""
    ids = {**ids, **ids.get("additional_special_tokens", {})}
    names = {token: called.get(token, token) for token in ("<s>", "</s>", *ADDED_TOKENS)}
    if missing := [token for token in names.values() if token not in ids]:
        raise ValueError(f"special_tokens2ids_dict has no {', '.join(missing)}")
    found = {token: ids[name] for token, name in names.items()}
    return SpecialTokens.of(found["<s>"], found["</s>"], found)


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
    sight = SIGHTS[config.vision_encoder.kind]
    path, old = layout.plugin(VISION, sight.stem)
    if path:
        found = split(files.open_tensors(path), {**sight.parts, NORM: NORM}, path.name)
        encoder = Part.of(config.vision_encoder, found["vision_encoder"])
        projector = found["visual_projector"] | {sight.norm + name: tensor for name, tensor in found[NORM].items()}
    else:
        encoder = open_vision_encoder(layout.vision_encoder, config.vision_encoder.select_layer)
        projector = files.open_tensors(old)
    return {"vision_encoder": encoder.tensors, "visual_projector": projector}, encoder.left_out


def _head(layout: _Layout, config: DreamLLMConfig) -> dict[str, dict[str, Tensor]]:
    head, parts = head_of(config.image_decoder), head_parts(config.image_decoder)
    path, old = layout.plugin(HEAD, head.stem)
    if path:
        found = split(files.open_tensors(path), parts | ({head.pooled: OUR_POOLED} if head.pooled else {}), path.name)
        pooled = {OUR_POOLED + name: tensor for name, tensor in found.pop(OUR_POOLED, {}).items()}
        connector = found.pop("connector") | pooled
        towers = {part: Part.of(config_of(config, part), tensors) for part, tensors in found.items()}
        return {"connector": connector, **{part: tower.tensors for part, tower in towers.items()}}
    _, towers = open_image_decoder(layout.image_decoder)
    return {"connector": files.open_tensors(old), **{part: tower.tensors for part, tower in towers.items()}}
