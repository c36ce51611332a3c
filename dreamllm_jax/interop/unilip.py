"""Checkpoints of UniLIP (arXiv 2507.23278; nnnth/UniLIP): an InternVL3 with queries, a connector, SANA and the decoder
of an autoencoder.

`config.json` is transformers' for InternVL, with the counts of queries and of the connector's layers, and the names of
directories that its program reads: the shapes of SANA and of the autoencoder's decoder stand in SANA's alone. The
vision tower's tensors are named as in InternVL's own layout, the rest as their classes have them.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.data.prompting import PUBLISHED as PROMPTINGS
from dreamllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from dreamllm_jax.data.vocabulary import PaintMarks
from dreamllm_jax.interop import files, internvl
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.image_decoder import read_decoder_config
from dreamllm_jax.interop.language_model import hf_settings, hf_tensors, open_language_model, write_hf
from dreamllm_jax.interop.source import IMAGE_DECODER, Part, Source, join, split
from dreamllm_jax.interop.vision_encoder import open_vision_encoder
from dreamllm_jax.interop.vision_language import STEMS, UNILIP, open_visual_projector
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.autoencoders.unilip import UnilipAutoencoderConfig
from dreamllm_jax.towers.connectors.projector import ProjectorConfig
from dreamllm_jax.towers.connectors.transformer import TransformerConfig
from dreamllm_jax.towers.image_decoders.sana import SanaConfig
from dreamllm_jax.towers.language_models.qwen2 import Qwen2Config
from dreamllm_jax.towers.vision_encoders.intern_vit import InternVitConfig

_TOKENIZERS = ("tokenizer.json", "vocab.json")
# What of InternVL's begins and ends an image that is read; the queries follow the first, and nothing follows them.
_MARKS = PaintMarks("<img>", "</img>")
DENOISER, AUTOENCODER = f"{IMAGE_DECODER}/denoiser", f"{IMAGE_DECODER}/autoencoder"
QUERIES = "model.latent_queries"
# How the names of tensors begin: those of the connector are in two places.
PREFIXES = {
    "layers": "model.llm_connector.",
    "projector": "model.projector.",
    "denoiser": "model.dit.",
    "autoencoder": "model.vae_decoder.",
}
FOLDER = "image_decoder"  # of an export, with the settings of SANA's parts
_VISUAL_PROJECTOR = ProjectorConfig("mlp", depth=2, pre_layernorm=True)
_VISUAL = {"pre_layernorm.": "0.", "projector.0.": "1.", "projector.2.": "3."}
# Directories that the program reads, by the language model's width.
_HUB = {
    896: ("OpenGVLab/InternVL3-1B", "Efficient-Large-Model/Sana_600M_512px_diffusers"),
    1536: ("OpenGVLab/InternVL3-2B", "Efficient-Large-Model/Sana_1600M_512px_diffusers"),
}
_DECODER_HUB = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"


def open_unilip(
    directory: Path,
    vision_language: Path | None = None,
    image_decoder: Path | None = None,
    tokenizer: Path | None = None,
) -> tuple[Source, Tokenizer]:
    """A checkpoint of UniLIP, and its tokenizer.

    Args:
      vision_language: InternVL's directory, of which the tokenizer alone is read, where the one that config.json names
        is not found.
      image_decoder: SANA's, of which the settings alone are read, likewise.
      tokenizer: if not theirs.

    Raises:
      FileNotFoundError, ValueError: naming every file, setting or tensor that is missing, unexpected or does not fit.
    """
    settings = files.read_config(directory / "config.json", _checked)
    language, vision = open_language_model(directory), open_vision_encoder(directory, joined=True)
    projector = open_visual_projector(directory)
    own = {name: tensor for name, tensor in files.open_model(directory, *STEMS).items() if name.startswith("model.")}
    found = split(own, {QUERIES: QUERIES, **{prefix: part for part, prefix in PREFIXES.items()}}, str(directory))
    queries = {"weight": _first(*found[QUERIES].values())} if found[QUERIES] else {}
    connector = found["layers"] | {f"projector.{name}": tensor for name, tensor in found["projector"].items()}
    place = _sana(directory, settings, image_decoder)
    sana = read_decoder_config(place)
    if not isinstance(sana, SanaConfig):
        raise ValueError(f"{place} holds an image decoder of kind {sana.kind!r}, not SANA")
    read = load_tokenizer(tokenizer or vision_language or _tokenizer(directory, settings), painting=_MARKS)
    if read.vocab_size > language.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {read.vocab_size} ids, the language model of {directory} {language.config.vocab_size} "
            "rows: give its own with --tokenizer"
        )
    seen = dataclasses.replace(vision.config, max_tiles=1)  # a picture is seen as one
    try:
        config = DreamLLMConfig(
            language_model=language.config,
            vision_encoder=seen,
            image_decoder=_decoder(sana, settings, language.config.width, seen),
            visual_projector=projector.config,
            connector=_connector(language.config, settings["connect_layer"]),
            num_queries=settings["n_query"],
            special_tokens=read.special,
            prompting=PROMPTINGS["unilip"],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory}/config.json: {error}") from None
    denoiser = Part.of(config.image_decoder.denoiser, found["denoiser"], directory)
    parts = {
        **{"language_model": language.tensors, "vision_encoder": vision.tensors, "visual_projector": projector.tensors},
        **{"dream_queries": queries, "connector": connector},
        **{DENOISER: denoiser.tensors, AUTOENCODER: found["autoencoder"]},
    }
    return join(config, parts, where=dict.fromkeys(parts, directory)), read


def _checked(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    if settings.get("model_type") != UNILIP:
        raise ValueError(f"model_type is {settings.get('model_type')!r}, expected {UNILIP!r}")
    if missing := [name for name in ("n_query", "connect_layer", "unilip_factor") if name not in settings]:
        raise ValueError(f"it has no {', '.join(missing)}")
    return settings


def _first(tensor: Tensor) -> Tensor:
    """Without the batch axis that the queries are stored with."""
    if len(tensor.shape) != 3 or tensor.shape[0] != 1:
        return tensor
    return dataclasses.replace(tensor, shape=tensor.shape[1:], read=lambda: tensor.read()[0])


def _places(directory: Path, name: str | None) -> list[Path]:
    """Where something may be that config.json names: in the checkpoint, there, beside the checkpoint."""
    if not name:
        return []
    return [directory / name, Path(name), directory.parent / name, directory.parent / Path(name).name]


def _sana(directory: Path, settings: Mapping[str, Any], given: Path | None = None) -> Path:
    """The directory with the settings of SANA and the autoencoder: the one given, or else one in or beside the
    checkpoint.

    Raises:
      FileNotFoundError: there is none.
    """
    name = settings.get("dit_path")
    places = [given] if given else [directory / FOLDER, *_places(directory, name)]
    if found := next((place for place in places if (place / "transformer/config.json").is_file()), None):
        return found
    raise FileNotFoundError(
        f"{directory}/config.json refers to {name!r} (dit_path), and no transformer/config.json is found in "
        f"{', '.join(map(str, places))}: name SANA's directory with --image-decoder"
    )


def _tokenizer(directory: Path, settings: Mapping[str, Any]) -> Path:
    """The directory of its tokenizer.

    Raises:
      FileNotFoundError: there is none.
    """
    name = settings.get("mllm_path")
    places = [directory, *_places(directory, name)]
    if found := next((place for place in places if any((place / file).is_file() for file in _TOKENIZERS)), None):
        return found
    raise FileNotFoundError(
        f"{directory}/config.json refers to {name!r} (mllm_path), and no {' and no '.join(_TOKENIZERS)} is found in "
        f"{', '.join(map(str, places))}: name InternVL's directory with --vision-language"
    )


def _interpolation_scale(sample_size: int) -> float:
    """Of a SANA whose file says null, by diffusers up to 0.32."""
    return float(max(sample_size // 64, 1))


def _decoder(sana: SanaConfig, settings: Mapping[str, Any], width: int, vision: InternVitConfig) -> SanaConfig:
    """The image decoder: SANA, told positions as diffusers 0.32 does it, and the autoencoder of features."""
    size = sana.denoiser.sample_size
    scale = sana.denoiser.interpolation_scale or _interpolation_scale(size)
    denoiser = dataclasses.replace(sana.denoiser, interpolation_scale=scale, narrow_positions=True)
    autoencoder = UnilipAutoencoderConfig(
        feature_width=width,
        decoder=sana.autoencoder,
        downscale=vision.image_size // math.isqrt(vision.num_patches),
        scaling_factor=settings["unilip_factor"],
    )
    flow = dataclasses.replace(sana.flow, density="logit_normal")
    return dataclasses.replace(sana, denoiser=denoiser, autoencoder=autoencoder, flow=flow)


def _connector(language: Qwen2Config, layers: int) -> TransformerConfig:
    """Layers as the language model's, over the prompt too."""
    if language.kind != "qwen2" or language.rope_scaling is not None:
        raise ValueError(
            "UniLIP's connector has layers of a Qwen2 without rope_scaling, as its language model has; this one is of "
            f"kind {language.kind!r}"
        )
    own = {
        "num_hidden_layers": layers,
        "intermediate_size": language.intermediate_size,
        "head_dim": language.head_dim,
        "num_key_value_heads": language.num_key_value_heads,
        "norm_eps": language.rms_norm_eps,
        "rope_theta": language.rope_theta,
    }
    return TransformerConfig(**TransformerConfig.PUBLISHED["unilip-1b"] | own)


def require_expressible(config: DreamLLMConfig) -> None:
    """Raises ValueError, naming it, for what the program does not know."""
    decoder, language, vision = config.image_decoder, config.language_model, config.vision_encoder
    for name, got, wanted in (
        ("language_model.kind", language.kind, "qwen2"),
        ("vision_encoder.kind", vision.kind, "intern_vit"),
        ("vision_encoder.max_tiles", getattr(vision, "max_tiles", 1), 1),
        ("visual_projector", config.visual_projector, _VISUAL_PROJECTOR),
        ("image_decoder.kind", decoder.kind, "sana"),
        ("image_decoder.autoencoder.kind", decoder.autoencoder.kind, "unilip"),
        ("image_decoder.autoencoder.blocks", getattr(decoder.autoencoder, "blocks", 3), 3),
        ("image_decoder.denoiser.narrow_positions", getattr(decoder.denoiser, "narrow_positions", True), True),
    ):
        if got != wanted:
            raise ValueError(f"UniLIP's program does not know {name}={got!r}: only {wanted!r}")
    layers = getattr(config.connector, "num_hidden_layers", 1)
    wanted = _connector(language, layers)
    free = {name: getattr(config.connector, name, None) for name in ("prompt_tokens", "copied", "initializer_range")}
    if dataclasses.replace(wanted, **free) != config.connector:
        raise ValueError(f"UniLIP's program does not know connector={config.connector}: only {wanted}")


def write_unilip(
    directory: Path, config: DreamLLMConfig, tensors: Mapping[str, Mapping[str, np.ndarray]], max_shard_size: int
) -> None:
    """Writes what the program's `UniLIP_InternVLForCausalLM.from_pretrained` loads, tokenizer excepted.

    Of the directories that config.json names, the program takes SANA's shape, and weights that it then replaces: they
    are called as on the Hub where the model is as large as a published one. What is needed to read the checkpoint here
    stands in the folder `image_decoder`.

    Args:
      tensors: part of the parameter tree -> torch name -> array.

    Raises:
      ValueError: naming what the program does not know.
    """
    require_expressible(config)
    language, decoder = config.language_model, config.image_decoder
    dtype = str(tensors["language_model"]["embed_tokens.weight"].dtype)
    shared = hf_settings(language, config.special_tokens, dtype)
    ids = {name: shared[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = config.vision_encoder
    settings = {
        "architectures": ["UniLIP_InternVLForCausalLM"],
        "model_type": UNILIP,
        "connect_layer": config.connector.num_hidden_layers,
        "n_query": config.num_queries,
        "unilip_factor": decoder.autoencoder.scaling_factor,
        "downsample_ratio": 1 / vision.downsample,
        "image_seq_length": vision.num_patches,
        "image_token_id": config.special_tokens.im_patch,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": language.tie_word_embeddings,
        "text_config": {"model_type": language.public.types[0], **shared},
        "vision_config": {"model_type": vision.public.types[0], **vision.to_public()},
        "torch_dtype": dtype,
        **_paths(language.width),
        **ids,
    }
    write_hf(directory, settings, _named(config, tensors), max_shard_size)
    denoiser = decoder.denoiser.to_public()
    if denoiser["interpolation_scale"] == _interpolation_scale(decoder.denoiser.sample_size):
        denoiser["interpolation_scale"] = None
    for tower, found in ((decoder.denoiser, denoiser), (decoder.autoencoder.decoder, None)):
        form, found = tower.public, found or tower.to_public()
        files.write_json(directory / FOLDER / form.folder / "config.json", {"_class_name": form.torch_class, **found})
    files.write_json(directory / FOLDER / decoder.public_scheduler, decoder.to_public_scheduler())


def _paths(width: int) -> dict[str, str]:
    """Names of the directories that the program reads."""
    if width not in _HUB:
        return {"dit_path": FOLDER, "vae_path": f"{FOLDER}/vae"}
    model, sana = _HUB[width]
    return {"mllm_path": model, "mllm_hf_path": f"{model}-hf", "dit_path": sana, "vae_path": _DECODER_HUB}


def _named(config: DreamLLMConfig, tensors: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All tensors by the program's names."""
    found = {f"language_model.{n}": x for n, x in hf_tensors(config.language_model, tensors["language_model"]).items()}
    seen = internvl.as_published(tensors["vision_encoder"])
    found |= {f"vision_tower.{name}": x for name, x in seen.items()}
    for ours, theirs in _VISUAL.items():
        own = {name.removeprefix(ours): x for name, x in tensors["visual_projector"].items() if name.startswith(ours)}
        found |= {f"multi_modal_projector.{theirs}{name}": x for name, x in own.items()}
    found[QUERIES] = tensors["dream_queries"]["weight"][None]
    for name, x in tensors["connector"].items():
        found[f"model.{name}" if name.startswith("projector.") else PREFIXES["layers"] + name] = x
    for part, prefix in ((DENOISER, PREFIXES["denoiser"]), (AUTOENCODER, PREFIXES["autoencoder"])):
        found |= {prefix + name: x for name, x in tensors[part].items()}
    return found
