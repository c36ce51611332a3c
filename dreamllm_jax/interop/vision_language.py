"""Whole vision-language models in Hugging Face's layouts: which parts of ours lie in one directory, and where.

A layout is a row of `LAYOUTS`. Each part is opened as if it lay alone: `open_language_model` and `open_vision_encoder`
take theirs, `open_visual_projector` the third.

LLaVA is arXiv 2304.08485 and 2310.03744, LLaVA-OneVision 2408.03326, InternVL3 2504.10479, Qwen2.5-VL 2502.13923,
UniLIP 2507.23278.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dreamllm_jax.common import recognise
from dreamllm_jax.interop import files, internvl
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.source import Part, Stored
from dreamllm_jax.towers.connectors.newline import NewlineConfig
from dreamllm_jax.towers.connectors.projector import IdentityConfig, ProjectorConfig
from dreamllm_jax.towers.public import require_supported
from dreamllm_jax.towers.registry import VisualProjectorConfig

LANGUAGE, VISION, PROJECTOR = "language_model", "vision_encoder", "visual_projector"
STEMS = ("model", "pytorch_model")  # of the files of tensors
UNILIP = "unilip_internvl"
Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How models of some `model_type`s are stored.

    Attributes:
      types: these.
      torch_class: their class of transformers.
      groups: part -> the group of config.json that has its settings, as its own config.json would; "" for all of it.
      names: (beginning of a tensor's name, a regular expression; part; what stands there instead), of all generations:
        the first that fits says whose it is, and how the part's public class (of the projector: ours) names it.
      beside: regular expression, from the beginning of a name, of tensors that are nothing of ours.
      seeing: what the vision encoder's `from_public` is told besides its settings, from the whole config.json; a
        ValueError for what is not supported.
      joined: settings of it that are true if the visual projector comes along.
      projecting: the visual projector, likewise.
      towers: where the public class has the language model and the vision encoder.
      project: what the public class, given our part's features, makes of them by its projector.
      converted: of a layout that the public class does not read: its config.json as the class's, and its tensors (of
        torch) by name as the class names them.
      shared: settings of the language model that may stand outside of its group.
    """

    types: tuple[str, ...]
    torch_class: str
    groups: Mapping[str, str]
    names: tuple[tuple[str, str, str], ...]
    seeing: Callable[[Settings], dict[str, Any]]
    projecting: Callable[[Settings], VisualProjectorConfig]
    towers: Mapping[str, str]
    project: Callable[[Any, Any], Any]
    converted: Callable[[Settings, Mapping[str, Any]], tuple[dict[str, Any], dict[str, Any]]] | None = None
    joined: tuple[str, ...] = ()
    beside: str = r"(?!)"
    shared: tuple[str, ...] = ("tie_word_embeddings",)

    def settings(self, part: str, settings: Settings) -> Settings:
        """What would be the config.json of the part alone.

        Raises:
          ValueError: there is no such group.
        """
        group = self.groups[part]
        if not group:
            return settings
        found = settings.get(group)
        if not isinstance(found, Mapping):
            raise ValueError(
                f"it has no {group}: {settings['model_type']} is read as transformers stores it (`-hf` repositories), "
                "not in the layout of the program that trained it"
            )
        more = self.shared if part == LANGUAGE else ()
        return {name: settings[name] for name in more if name in settings} | dict(found)

    def owner(self, name: str) -> tuple[str, str] | None:
        """The part that a tensor is of and its name there; None for what is nothing of ours.

        Raises:
          ValueError: no name of this layout is like it.
        """
        if re.match(self.beside, name):
            return None
        for pattern, part, instead in self.names:
            if match := re.match(pattern, name):
                return part, instead + name[match.end() :]
        raise ValueError(name)


def _layer(settings: Settings, otherwise: int) -> int:
    layer = settings.get("vision_feature_layer", otherwise)
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer = {layer!r} is not supported: only a single layer is")
    return layer


def _llava_seeing(settings: Settings, strategy: str, layer: int) -> dict[str, Any]:
    require_supported(settings, {"vision_feature_select_strategy": strategy})
    return {"select_layer": _layer(settings, layer)}


def _llava_projecting(settings: Settings, projector: VisualProjectorConfig) -> VisualProjectorConfig:
    require_supported(settings, {"projector_hidden_act": "gelu", "multimodal_projector_bias": True})
    return projector


def _onevision_project(model: Any, features: Any) -> Any:
    """A picture of one tile, whose features are those of the whole."""
    vision = model.config.vision_config
    states = features[:, : (vision.image_size // vision.patch_size) ** 2]
    twice = [one.expand(2, -1, -1) for one in model.model.multi_modal_projector(states)]
    packed, _ = model.model.pack_image_features(
        twice, [[vision.image_size] * 2] * len(twice), image_newline=model.model.image_newline
    )
    found = features.new_empty(len(packed), *packed[0].shape)
    for index, one in enumerate(packed):
        found[index] = one
    return found


# transformers up to 4.51 (and 5, which writes the same names, but for the vision tower's own), then 4.52 and later.
_LLAVA_NAMES = (
    (r"language_model\.(?=model\.|lm_head\.)", LANGUAGE, ""),
    (r"model\.language_model\.", LANGUAGE, "model."),
    (r"(?=lm_head\.)", LANGUAGE, ""),
    (r"(model\.)?vision_tower\.", VISION, ""),
    (r"(model\.)?multi_modal_projector\.linear_1\.", PROJECTOR, "projector.0."),
    (r"(model\.)?multi_modal_projector\.linear_2\.", PROJECTOR, "projector.2."),
)
_LLAVA_GROUPS = MappingProxyType({LANGUAGE: "text_config", VISION: "vision_config"})
_LLAVA_TOWERS = MappingProxyType({LANGUAGE: "model.language_model", VISION: "model.vision_tower"})


def _internvl_projecting(settings: Settings) -> ProjectorConfig:
    require_supported(settings, {"projector_hidden_act": "gelu"})
    return ProjectorConfig("mlp", depth=2, pre_layernorm=True)


def _sequential(name: str) -> tuple[tuple[str, str, str], ...]:
    """InternVL's projector where it is a Sequential."""
    places = {0: "pre_layernorm.", 1: "projector.0.", 3: "projector.2."}
    return tuple((rf"{name}\.{index}\.", PROJECTOR, ours) for index, ours in places.items())


_INTERNVL = Layout(
    types=("internvl",),
    torch_class="InternVLForConditionalGeneration",
    groups=MappingProxyType({LANGUAGE: "text_config", VISION: ""}),
    names=(*_LLAVA_NAMES, (r"(model\.)?multi_modal_projector\.layer_norm\.", PROJECTOR, "pre_layernorm.")),
    seeing=lambda _: {},
    projecting=_internvl_projecting,
    towers=_LLAVA_TOWERS,
    project=lambda model, states: model.model.multi_modal_projector(states),
)

LAYOUTS = (
    Layout(
        types=("llava",),
        torch_class="LlavaForConditionalGeneration",
        groups=_LLAVA_GROUPS,
        names=_LLAVA_NAMES,
        seeing=functools.partial(_llava_seeing, strategy="default", layer=-2),
        projecting=functools.partial(_llava_projecting, projector=ProjectorConfig("mlp", depth=2)),
        towers=_LLAVA_TOWERS,
        project=lambda model, states: model.model.multi_modal_projector(states),
    ),
    _INTERNVL,
    dataclasses.replace(
        _INTERNVL,
        types=("internvl_chat",),
        groups=MappingProxyType({LANGUAGE: "llm_config", VISION: ""}),
        names=(
            (r"language_model\.", LANGUAGE, ""),
            (r"vision_model\.", VISION, ""),
            *_sequential(r"mlp1"),
        ),
        converted=internvl.converted,
    ),
    dataclasses.replace(
        _INTERNVL,
        types=(UNILIP,),  # which paints too; see `unilip.py`
        names=(
            (r"language_model\.(?=model\.|lm_head\.)", LANGUAGE, ""),
            (r"vision_tower\.", VISION, ""),
            *_sequential(r"multi_modal_projector"),
        ),
        converted=internvl.converted,
        beside=r"model\.(latent_queries$|llm_connector\.|projector\.|dit\.|vae_decoder\.)",
    ),
    Layout(
        types=("llava_onevision",),
        torch_class="LlavaOnevisionForConditionalGeneration",
        groups=_LLAVA_GROUPS,
        names=(*_LLAVA_NAMES, (r"(model\.)?image_newline$", PROJECTOR, "image_newline")),
        seeing=functools.partial(_llava_seeing, strategy="full", layer=-1),
        joined=("packed",),
        projecting=functools.partial(_llava_projecting, projector=NewlineConfig()),
        towers=_LLAVA_TOWERS,
        project=_onevision_project,
    ),
    Layout(
        types=("qwen2_5_vl",),
        torch_class="Qwen2_5_VLForConditionalGeneration",
        groups=MappingProxyType({LANGUAGE: "", VISION: ""}),  # both read the whole of it, of either generation
        names=(
            (r"(model\.)?visual\.", VISION, ""),
            (r"model\.language_model\.", LANGUAGE, "model."),
            (r"(?=model\.|lm_head\.)", LANGUAGE, ""),
        ),
        seeing=lambda _: {},
        projecting=lambda _: IdentityConfig(),
        towers=MappingProxyType({LANGUAGE: "model.language_model", VISION: "model.visual"}),
        project=lambda _, states: states,
    ),
)


def layout_of(settings: Settings) -> Layout | None:
    """The layout that a config.json is of; None for that of a single tower."""
    return next((layout for layout in LAYOUTS if settings.get("model_type") in layout.types), None)


@dataclasses.dataclass(frozen=True)
class Found:
    """A part's tensors in a directory.

    Attributes:
      tensors: as the part's public class names them.
      places: the same names -> those in the directory.
      others: of what else lies there.
    """

    tensors: dict[str, Tensor]
    places: Mapping[str, str]
    others: tuple[str, ...] = ()

    def complete(self, part: Part) -> Part:
        """The part made of the tensors, knowing what it left out by the names in the directory."""
        return dataclasses.replace(part, left_out=(*(self.places[name] for name in part.left_out), *self.others))


def open_part(directory: Path, part: str, stems: Sequence[str] = STEMS, stored: Stored | None = None) -> Found:
    """A part's tensors in its own directory or in a vision-language model's.

    Args:
      stems: of the files in its own.
      stored: what is taken for the tensors in a vision-language model's directory.

    Raises:
      FileNotFoundError, ValueError: as of `files.open_model`, or listing tensors that the layout does not know.
    """
    layout = layout_of(files.read_json(directory / "config.json"))
    if layout is None:
        tensors = files.open_model(directory, *stems)
        return Found(tensors, {name: name for name in tensors})
    found, places, others, unexpected = {}, {}, [], []
    stored = stored or Stored(files.open_model(directory, *STEMS), "", directory)
    for name, tensor in stored.tensors.items():
        try:
            owner = layout.owner(name.removeprefix(stored.prefix))
        except ValueError:
            unexpected.append(f"unexpected {name} {tensor.shape}")
            continue
        if owner and owner[0] == part:
            found[owner[1]], places[owner[1]] = tensor, name
        else:
            others.append(name)
    files.refuse(unexpected, stored.where)
    return Found(found, places, tuple(others))


def settings_of(part: str, settings: Settings, joined: bool = False) -> tuple[Settings, dict[str, Any]]:
    """The settings of a tower, from its own config.json or a vision-language model's, and what this says besides.

    Args:
      joined: the visual projector comes along.

    Raises:
      ValueError: naming what is missing or not supported.
    """
    layout = layout_of(settings)
    if layout is None:
        return settings, {}
    besides = layout.seeing(settings) if part == VISION else {}
    return layout.settings(part, settings), besides | dict.fromkeys(layout.joined if joined else (), True)


def open_visual_projector(directory: Path, stored: Stored | None = None) -> Part:
    """The visual projector of a vision-language model; `stored` as of `open_part`.

    Raises:
      FileNotFoundError, ValueError: it is no such model; or naming a setting or tensors that do not fit.
    """
    recognise.require(directory, "config.json")
    config = files.read_config(directory / "config.json", _projector_of)
    found = open_part(directory, PROJECTOR, stored=stored)
    return found.complete(Part(config, found.tensors, where=stored.where if stored else directory))


def _projector_of(settings: Settings) -> VisualProjectorConfig:
    layout = layout_of(settings)
    if layout is None:
        known = tuple(kind for layout in LAYOUTS for kind in layout.types)
        raise ValueError(
            f"model_type {settings.get('model_type')!r} is of no vision-language model that is supported: expected one "
            f"of {known}"
        )
    return layout.projecting(settings)
