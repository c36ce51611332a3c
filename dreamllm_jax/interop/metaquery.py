"""Checkpoints of MetaQuery (arXiv 2504.06256, facebookresearch/metaquery): a LLaVA-OneVision or a Qwen2.5-VL, queries
that are rows of its vocabulary, a connector, and SANA or Stable Diffusion 1.5.

Its trainer saves `config.json` and the whole state but for the output matrix: `model.mllm_backbone.*`,
`model.transformer.*`, `model.connector.{0,1,3,4}.*`, `vae.*`. After the backbone's own rows, to which the tokenizer is
padded, the embedding has `<begin_of_img>`, `<end_of_img>` and the queries.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from dreamllm_jax.common import recognise
from dreamllm_jax.data.prompting import PUBLISHED, Prompting
from dreamllm_jax.data.tokenizer import FILE, Tokenizer, load_tokenizer
from dreamllm_jax.data.vocabulary import PaintMarks
from dreamllm_jax.interop import files
from dreamllm_jax.interop.dreamllm import places_of
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.language_model import EMBEDDING, HEAD, grow, open_language_model
from dreamllm_jax.interop.query_models import (
    AUTOENCODER,
    BACKBONE,
    CONNECTOR,
    DENOISER,
    QUERIES,
    Towers,
    grouped,
    joined,
    layers_of,
    layout_name,
    open_towers,
    to_ours,
    to_theirs,
    tower_tensors,
)
from dreamllm_jax.interop.source import Source
from dreamllm_jax.interop.vision_language import LANGUAGE, STEMS, VISION
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.connectors.transformer import TransformerConfig

MODEL_TYPE = "metaquery"
PREFIXES = {BACKBONE: "model.mllm_backbone.", DENOISER: "model.transformer.", AUTOENCODER: "vae."}
MARKS = PaintMarks("<begin_of_img>", "<end_of_img>")
# How names of the connector begin there, a Sequential around an encoder, and in ours.
CONNECTOR_NAMES = {
    "model.connector.0.": "",
    "model.connector.1.": "projector.0.",
    "model.connector.3.": "projector.2.",
    "model.connector.4.": "projector.3.",
}
_LAYERS = "model.connector.0.layers."
# What the scale of the norm at the end begins with, and which loss its program has for an image decoder.
_DECODERS = {"sana": (math.sqrt(5.5), "flow"), "stable_diffusion": (1.0, "diff")}
# By layout: the template of conversations.
_TEMPLATES = {"llava_onevision": "llava_onevision", "qwen2_5_vl": "qwen2"}
_PIXELS = (256 * 28 * 28, 1280 * 28 * 28)  # of pictures for Qwen2.5-VL
_IDS = ("diffusion_model_id", "vae_id", "noise_scheduler_id", "scheduler_id")  # of the image decoder's parts


def open_metaquery(
    directory: Path,
    vision_language: Path | None = None,
    image_decoder: Path | None = None,
    tokenizer: Path | None = None,
) -> tuple[Source, Tokenizer]:
    """A checkpoint, and its tokenizer.

    Args:
      vision_language, image_decoder: directories of the towers, where those that `config.json` names are not found.
      tokenizer: if not the one beside the checkpoint or the vision-language model.

    Raises:
      FileNotFoundError, ValueError: naming the file, setting or tensor that is missing, unexpected or wrongly shaped.
    """
    recognise.require(directory, "config.json")
    settings = files.read_config(directory / "config.json", dict)
    if settings.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{directory}/config.json has model_type {settings.get('model_type')!r}, not {MODEL_TYPE!r}")
    vision_language = vision_language or _found(directory, settings, "mllm_id", "vision_language", "config.json")
    image_decoder = image_decoder or _decoder_directory(directory, settings)
    stored, own = grouped(files.open_model(directory, *STEMS), PREFIXES, directory)
    towers = open_towers(vision_language, image_decoder, stored, tuple(_TEMPLATES))
    towers, queries, rows = _without_queries(towers, settings, vision_language)
    words = _tokenizer(tokenizer or (directory if (directory / FILE).is_file() else vision_language), rows)
    connector = _connector(own, towers, directory)
    return joined(towers, connector, queries, words, _prompting(settings, towers), directory), words


def _found(directory: Path, settings: Mapping[str, Any], key: str, flag: str, *inside: str) -> Path:
    """The directory that config.json names."""
    candidates = places_of(directory, settings.get(key))
    for candidate in candidates:
        if any((candidate / file).is_file() for file in inside):
            return candidate
    raise FileNotFoundError(
        f"{directory}/config.json refers to {settings.get(key)!r} ({key}), and no {' and no '.join(inside)} is found "
        f"in {', '.join(map(str, candidates)) or 'any directory'}: name the directory with --{flag.replace('_', '-')}"
    )


def _decoder_directory(directory: Path, settings: Mapping[str, Any]) -> Path:
    """The one directory of all parts of the image decoder."""
    named = {key: settings[key] for key in _IDS if settings.get(key)}
    if len(set(named.values())) > 1:
        told = ", ".join(f"{key} {name}" for key, name in named.items())
        raise ValueError(
            f"{directory}/config.json takes the image decoder from several directories ({told}): put their folders "
            "into one, and name it with --image-decoder"
        )
    return _found(directory, settings, _IDS[0], "image_decoder", "transformer/config.json", "unet/config.json")


def _without_queries(towers: Towers, settings: Mapping[str, Any], vision_language: Path) -> tuple[Towers, Tensor, int]:
    """The towers with a vocabulary that ends with the two marks; the queries, its last rows; and the rows before."""
    language, count = towers.language_model, settings.get("num_metaqueries", 64)
    rows, tensors = language.config.vocab_size, dict(language.tensors)
    if EMBEDDING not in tensors:
        raise ValueError(f"{language.where} has no embedding of its language model: it is not all of a checkpoint")
    embedding = tensors[EMBEDDING]
    if count < 1 or embedding.shape[0] != rows + len(MARKS) + count:
        raise ValueError(
            f"{language.where}: the embedding has {embedding.shape[0]} rows, which are not the {rows} of "
            f"{vision_language}, {len(MARKS)} marks and {count} queries (num_metaqueries): is it the model that it was "
            "trained with?"
        )
    kept = rows + len(MARKS)
    tensors[EMBEDDING] = embedding.rows(0, kept)
    if not language.config.tie_word_embeddings:  # its program leaves the output matrix aside
        whole = open_language_model(vision_language)
        tensors[HEAD] = grow(whole, kept, range(rows, kept), "mean", 0).tensors[HEAD]
    config = dataclasses.replace(language.config, vocab_size=kept)
    parts = towers.parts | {LANGUAGE: dataclasses.replace(language, config=config, tensors=tensors)}
    vision = parts[VISION].config
    if vision.kind == "qwen25_vl" and vision.min_pixels <= _PIXELS[0] and _PIXELS[1] <= vision.max_pixels:
        vision = dataclasses.replace(vision, min_pixels=_PIXELS[0], max_pixels=_PIXELS[1])
        parts[VISION] = dataclasses.replace(parts[VISION], config=vision)
    return dataclasses.replace(towers, parts=parts), embedding.rows(kept, kept + count), rows


def _tokenizer(path: Path, rows: int) -> Tokenizer:
    """The tokenizer with the ids that MetaQuery gives: `<pad_token_i>` up to the backbone's rows, then the two marks.

    The queries' tokens, which follow there, are none here.
    """
    plain = load_tokenizer(path)
    size = plain.vocab_size - len(plain.new_tokens)
    added = {f"<pad_token_{i}>": size + i for i in range(rows - size)} if size <= rows else {}
    words = load_tokenizer(path, painting=MARKS, added=added | {mark: rows + i for i, mark in enumerate(MARKS)})
    kept = rows + len(MARKS)
    if words.vocab_size > kept:
        content = json.loads(words.fast.to_str())
        beyond = [token["content"] for token in content["added_tokens"] if token["id"] >= kept]
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < kept]
        fast = FastTokenizer.from_str(json.dumps(content))
        if set(beyond) != {f"<img{i}>" for i in range(len(beyond))}:
            raise ValueError(
                f"{path}: the tokenizer has {words.vocab_size} ids, MetaQuery's has {kept} but for queries"
            )
        words = Tokenizer(fast, words.names, (), None, words.legacy, words.marks, words.chat_template, MARKS)
    return words


def _connector(
    tensors: Mapping[str, Tensor], towers: Towers, directory: Path
) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """The connector's settings, from the shapes of its tensors, and these by our names."""
    first = f"{_LAYERS}0.mlp.gate_proj.weight"
    if first not in tensors:
        raise ValueError(f"{directory} has no {first}: it is not all of a checkpoint of MetaQuery")
    if towers.image_decoder.kind not in _DECODERS:
        raise ValueError(f"MetaQuery has no image decoder of kind {towers.image_decoder.kind!r}")
    scale, _ = _DECODERS[towers.image_decoder.kind]
    settings = dataclasses.replace(
        TransformerConfig(**TransformerConfig.PUBLISHED["metaquery"]),
        num_hidden_layers=layers_of(tensors, _LAYERS),
        intermediate_size=tensors[first].shape[0],
        output_scale=scale,
    )
    return settings, to_ours(tensors, CONNECTOR_NAMES, directory)


def _prompting(settings: Mapping[str, Any], towers: Towers) -> Prompting:
    published = PUBLISHED["metaquery"]
    return dataclasses.replace(
        published,
        template=_TEMPLATES["qwen2_5_vl" if towers.parts[VISION].config.kind == "qwen25_vl" else "llava_onevision"],
        system=settings.get("system_prompt", published.system) or "",
        max_tokens=settings.get("max_input_text_tokens", published.max_tokens),
    )


def require(config: DreamLLMConfig) -> None:
    """Raises ValueError naming what MetaQuery's program does not know."""
    language, connector, decoder = config.language_model, config.connector, config.image_decoder
    layout, published = layout_name(config), TransformerConfig(**TransformerConfig.PUBLISHED["metaquery"])
    marks = (config.special_tokens.dream_start, config.special_tokens.dream_end)
    problems = {
        f"vision encoder of kind {config.vision_encoder.kind!r} with such a visual projector": layout not in _TEMPLATES,
        f"image decoder of kind {decoder.kind!r}": decoder.kind not in _DECODERS,
        f"connector of kind {connector.kind!r}": connector.kind != published.kind,
    }
    if not any(problems.values()):
        width, inner = language.width, connector.intermediate_size or 4 * language.width
        free = ("num_hidden_layers", "intermediate_size", "output_scale", "initializer_range")
        problems = {
            f"connector.intermediate_size={inner}, but four times the language model's width": inner != 4 * width,
            "connector without a norm at the end": connector.output_scale is None,
            **{
                f"connector.{field.name}": getattr(connector, field.name) != getattr(published, field.name)
                for field in dataclasses.fields(connector)
                if field.name not in free
            },
            f"image that begins otherwise than with the last but one of {language.vocab_size} tokens": marks
            != (language.vocab_size - 2, language.vocab_size - 1),
        }
    for name, problem in problems.items():
        if problem:
            raise ValueError(f"MetaQuery's program has no {name}: export with --format=hf or diffusers")


def write(
    directory: Path,
    config: DreamLLMConfig,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    max_shard_size: int,
    names: Mapping[str, str | None],
) -> None:
    """Writes what its `MetaQuery.from_pretrained` loads.

    Args:
      tensors: part of the parameter tree -> torch name -> array.
      names: see `names_of`.

    Raises:
      ValueError: as of `require` and `names_of`.
    """
    require(config)
    found = tower_tensors(config, tensors, PREFIXES)
    (queries,) = tensors[QUERIES].values()
    for name in [name for name in found if name.endswith("embed_tokens.weight")]:
        found[name] = np.concatenate([found[name], queries.astype(found[name].dtype)])
    for name in [name for name in found if name.startswith(PREFIXES[BACKBONE]) and name.endswith(HEAD)]:
        del found[name]
    found |= to_theirs(tensors[CONNECTOR], CONNECTOR_NAMES)
    dtype = str(tensors[CONNECTOR]["projector.0.weight"].dtype)
    files.write_json(directory / "config.json", _settings(config, names_of(config, names)) | {"torch_dtype": dtype})
    files.write_safetensors(directory, "model", found, max_shard_size)


def names_of(config: DreamLLMConfig, given: Mapping[str, str | None]) -> dict[str, str]:
    """The names by which the original program will look for the towers, which tell it what they are.

    Args:
      given: "vision_language" and "image_decoder": names, if not those of the published models of their kind.

    Raises:
      ValueError: a name that it would not know.
    """
    qwen, sana = layout_name(config) == "qwen2_5_vl", config.image_decoder.kind == "sana"
    large = config.language_model.width >= 3584
    published = {
        ("vision_language", True): f"Qwen/Qwen2.5-VL-{'7B' if large else '3B'}-Instruct",
        ("vision_language", False): f"llava-hf/llava-onevision-qwen2-{'7b' if large else '0.5b'}-ov-hf",
        ("image_decoder", True): "Efficient-Large-Model/Sana_1600M_512px_diffusers",
        ("image_decoder", False): "stable-diffusion-v1-5/stable-diffusion-v1-5",
    }
    kinds = {"vision_language": qwen, "image_decoder": sana}
    found = {role: given.get(role) or published[role, kind] for role, kind in kinds.items()}
    known = {
        "vision_language": (qwen, "Qwen2.5-VL") if qwen else (False, "Qwen"),
        "image_decoder": (True, "Sana" if sana else "stable-diffusion-v1-5"),
    }
    for role, (wanted, word) in known.items():
        if (word in found[role]) != wanted:
            raise ValueError(
                f"--{role.replace('_', '-')}={found[role]}: MetaQuery's program tells what it loads by its name, in "
                f"which {word!r} must {'stand' if wanted else 'not stand'}"
            )
    return found


def _settings(config: DreamLLMConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """Of a `config.json`."""
    decoder = config.image_decoder
    size = decoder.default_size
    prompting = config.prompting or PUBLISHED["metaquery"]
    _, loss = _DECODERS[decoder.kind]
    language = "model.mllm_backbone" + (".language_model" if layout_name(config) == "llava_onevision" else "")
    frozen = ["vae", "model.mllm_backbone", *(() if loss == "flow" else ("model.transformer",))]
    return {
        "architectures": ["MetaQuery"],
        "model_type": MODEL_TYPE,
        "mllm_id": names["vision_language"],
        **dict.fromkeys(_IDS, names["image_decoder"]),
        "num_metaqueries": config.num_queries,
        "connector_num_hidden_layers": config.connector.num_hidden_layers,
        "max_input_text_tokens": prompting.max_tokens,
        "system_prompt": prompting.system or None,
        "loss_type": loss,
        "in_channels": decoder.denoiser.in_channels,
        "input_size": decoder.latent_shape(size, size)[0],
        "vae_downsample_f": decoder.autoencoder.downscale,
        "modules_to_freeze": frozen,
        "modules_to_unfreeze": [f"{language}.model.embed_tokens"],
        "_gradient_checkpointing": True,
    }
