"""What checkpoints of OpenUni and MetaQuery have in common: a vision-language model and an image decoder stand in one
file with what was learned between them, each under a prefix.

Where a file leaves out a tower, because it was not trained, that is read from its own directory.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.common import recognise
from dreamllm_jax.data.prompting import Prompting
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.interop import files, internvl
from dreamllm_jax.interop.assemble import left_out
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.image_decoder import open_image_decoder, public_parts
from dreamllm_jax.interop.language_model import hf_tensors, open_language_model
from dreamllm_jax.interop.source import IMAGE_DECODER, Part, Source, Stored, join
from dreamllm_jax.interop.vision_encoder import open_vision_encoder
from dreamllm_jax.interop.vision_language import LANGUAGE, PROJECTOR, VISION, open_visual_projector
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.connectors.transformer import TransformerConfig

BACKBONE, QUERIES, CONNECTOR = "backbone", "dream_queries", "connector"
DENOISER, AUTOENCODER = f"{IMAGE_DECODER}/denoiser", f"{IMAGE_DECODER}/autoencoder"

# Layouts of vision-language models (`vision_language.LAYOUTS`) by the kinds of vision encoder and visual projector.
_LAYOUTS = {
    ("intern_vit", "mlp"): "internvl_chat",
    ("siglip", "newline"): "llava_onevision",
    ("qwen25_vl", "identity"): "qwen2_5_vl",
}
# How the programs store them: part, how names of its public class (of the projector: of ours) begin, and what stands
# there instead.
_WRITTEN = {
    "internvl_chat": (
        (LANGUAGE, "", "language_model."),
        (VISION, "", "vision_model."),
        (PROJECTOR, "pre_layernorm.", "mlp1.0."),
        (PROJECTOR, "projector.0.", "mlp1.1."),
        (PROJECTOR, "projector.2.", "mlp1.3."),
    ),
    "llava_onevision": (
        (LANGUAGE, "", "language_model."),
        (VISION, "", "vision_tower."),
        (PROJECTOR, "projector.0.", "multi_modal_projector.linear_1."),
        (PROJECTOR, "projector.2.", "multi_modal_projector.linear_2."),
        (PROJECTOR, "", ""),
    ),
    "qwen2_5_vl": ((LANGUAGE, "", ""), (VISION, "", "visual.")),
}


@dataclasses.dataclass(frozen=True)
class Towers:
    """What stands at the two ends.

    Attributes:
      parts: by their paths in the model.
      image_decoder: its configuration.
    """

    parts: dict[str, Part]
    image_decoder: Any

    @property
    def language_model(self) -> Part:
        return self.parts[LANGUAGE]


def layout_name(config: DreamLLMConfig) -> str:
    """The layout that the vision-language model in ours has; empty for none that either program knows."""
    return _LAYOUTS.get((config.vision_encoder.kind, config.visual_projector.kind), "")


def grouped(
    tensors: Mapping[str, Tensor], prefixes: Mapping[str, str], where: Path
) -> tuple[dict[str, Stored], dict[str, Tensor]]:
    """The towers in a file, and what else it has.

    Args:
      prefixes: `BACKBONE` or the path of a part -> how its names begin.
    """
    towers: dict[str, dict[str, Tensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        tower = next((tower for tower, prefix in prefixes.items() if name.startswith(prefix)), None)
        (others if tower is None else towers.setdefault(tower, {}))[name] = tensor
    return {tower: Stored(found, prefixes[tower], where) for tower, found in towers.items()}, others


def open_towers(
    vision_language: Path, image_decoder: Path, stored: Mapping[str, Stored], types: Sequence[str]
) -> Towers:
    """The towers' shapes from their directories, and their tensors from there or where they are `stored`.

    Args:
      types: the `model_type`s, of which the vision-language model must have one.

    Raises:
      FileNotFoundError, ValueError: naming the file, setting or tensor that is missing or does not fit.
    """
    recognise.require(vision_language, "config.json")
    if (kind := files.read_json(vision_language / "config.json").get("model_type")) not in types:
        raise ValueError(f"{vision_language} is of model_type {kind!r}: the checkpoint is of one of {', '.join(types)}")
    backbone = stored.get(BACKBONE)
    visual = open_visual_projector(vision_language, backbone)
    language = open_language_model(vision_language, backbone)
    vision = open_vision_encoder(vision_language, joined=True, stored=backbone)
    decoder, parts = open_image_decoder(image_decoder, stored)
    return Towers({LANGUAGE: language, VISION: vision, PROJECTOR: visual, **parts}, decoder)


def joined(
    towers: Towers,
    connector: tuple[TransformerConfig, Mapping[str, Tensor]],
    queries: Tensor,
    tokenizer: Tokenizer,
    prompting: Prompting,
    where: Path,
) -> Source:
    """The model of its towers and what was learned between them.

    Raises:
      ValueError: listing what is missing, unexpected or wrongly shaped in a part, or naming what does not go together.
    """
    parts = towers.parts
    rows = towers.language_model.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the language model {rows} rows: give its own by --tokenizer"
        )
    try:
        config = DreamLLMConfig(
            language_model=towers.language_model.config,
            vision_encoder=parts[VISION].config,
            image_decoder=towers.image_decoder,
            visual_projector=parts[PROJECTOR].config,
            connector=connector[0],
            num_queries=queries.shape[0],
            special_tokens=tokenizer.special,
            prompting=prompting,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    tensors = {name: part.tensors for name, part in parts.items()}
    tensors |= {CONNECTOR: connector[1], QUERIES: {"weight": queries}}
    places = {CONNECTOR: where, QUERIES: where} | {name: part.where for name, part in parts.items()}
    return join(config, tensors, left_out(parts[name] for name in (LANGUAGE, VISION, PROJECTOR)), places)


def to_ours(tensors: Mapping[str, Tensor], names: Mapping[str, str], where: Path) -> dict[str, Tensor]:
    """A connector's tensors by our names.

    Args:
      names: how names begin there -> how they do here.

    Raises:
      ValueError: listing those that begin otherwise.
    """
    found, unexpected = {}, []
    for name, tensor in tensors.items():
        begin = next((begin for begin in names if name.startswith(begin)), None)
        if begin is None:
            unexpected.append(f"unexpected {name} {tensor.shape}")
        else:
            found[names[begin] + name.removeprefix(begin)] = tensor
    files.refuse(unexpected, where)
    return found


def to_theirs(tensors: Mapping[str, np.ndarray], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The inverse of `to_ours`."""
    found = {}
    for name, tensor in tensors.items():
        begin = max((begin for begin in names if name.startswith(names[begin])), key=lambda begin: len(names[begin]))
        found[begin + name.removeprefix(names[begin])] = tensor
    return found


def layers_of(names: Mapping[str, Any], prefix: str) -> int:
    """How many layers there are, counted from 0, whose tensors' names begin so."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def tower_tensors(
    config: DreamLLMConfig, tensors: Mapping[str, Mapping[str, np.ndarray]], prefixes: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """The towers' tensors by the names that they have in a program's file; the inverse of `grouped` and `open_towers`.

    Args:
      tensors: part of the parameter tree -> torch name -> array.
    """
    layout = layout_name(config)
    vision = {config.vision_encoder.public.theirs(name): tensor for name, tensor in tensors[VISION].items()}
    parts = {
        LANGUAGE: hf_tensors(config.language_model, tensors[LANGUAGE]),
        VISION: internvl.as_published(vision) if layout == "internvl_chat" else vision,
        PROJECTOR: tensors.get(PROJECTOR, {}),
    }
    found = {}
    for part, theirs in parts.items():
        for name, tensor in theirs.items():
            begin, instead = next((b, i) for p, b, i in _WRITTEN[layout] if p == part and name.startswith(b))
            found[prefixes[BACKBONE] + instead + name.removeprefix(begin)] = tensor
    for part, tower in public_parts(config.image_decoder).items():
        path = f"{IMAGE_DECODER}/{part}"
        found |= {prefixes[path] + tower.public.theirs(name): tensor for name, tensor in tensors[path].items()}
    return found
