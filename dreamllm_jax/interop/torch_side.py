"""What a comparison is made with: the torch modules of whatever a directory, or a file, holds."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamllm_jax.interop import (
    dreamllm_modules,
    metaquery,
    query_modules,
    torch_modules,
    unilip_modules,
    vision_language_modules,
)
from dreamllm_jax.interop.dreamllm import plugins_of, tower_directory
from dreamllm_jax.interop.files import read_config
from dreamllm_jax.interop.vision_language import UNILIP, layout_of
from dreamllm_jax.model import DreamLLMConfig

if TYPE_CHECKING:
    from torch import nn

Params = Callable[[str], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class TorchSide:
    """Torch's side of a comparison, and ours as far as it can be compared with that.

    Attributes:
      config, params: our model and the parameters of its parts, as of `verify.compare`.
      loaders: part -> what loads its torch module.
      scheduler: where the scheduler's file may be; None for none.
    """

    config: DreamLLMConfig
    params: Params
    loaders: Mapping[str, Callable[[], "nn.Module"]]
    scheduler: Path | None = None


def torch_side(config: DreamLLMConfig, params: Params, path: Path, towers: Mapping[str, Path | None]) -> TorchSide:
    """Torch's side of a comparison with what stands at a path; arguments and errors as of `verify.compare`."""
    settings = _settings(path)
    kind = settings.get("model_type")
    if kind == "dreamllm":
        loaders = dreamllm_modules.loaders(config, path, settings, towers)
        plugins, role = plugins_of(settings), "image_decoder"
        try:
            place = tower_directory(path, plugins, role, towers.get(role))
        except FileNotFoundError:
            return TorchSide(config, params, loaders)
        return TorchSide(config, params, loaders, place / config.image_decoder.public_scheduler)
    if given := [f"--{name.replace('_', '-')}" for name, where in towers.items() if where]:
        raise ValueError(f"{path} is no checkpoint of the original program: leave out {', '.join(given)}")
    if kind == metaquery.MODEL_TYPE or query_modules.file_of(path):
        loaders = query_modules.loaders(config, path)
        return TorchSide(*_headless(config, params) if kind else (config, params), loaders)
    if layout_of(settings):
        tokens = vision_language_modules.common_tokens(config, settings)
        config, params = vision_language_modules.cut(config, params, tokens)
        modules = unilip_modules if kind == UNILIP else vision_language_modules
        return TorchSide(config, params, modules.loaders(config, path, settings))
    loaders = torch_modules.loaders(config, path, settings)
    return TorchSide(config, params, loaders, path / config.image_decoder.public_scheduler)


def _settings(path: Path) -> Mapping[str, Any]:
    """Of its config.json; none if it has none."""
    path = path / "config.json"
    return read_config(path, dict) if path.is_file() else {}


def _headless(config: DreamLLMConfig, params: Params) -> tuple[DreamLLMConfig, Params]:
    """A model whose output matrix is its embedding, for a file that has no other."""
    language = dataclasses.replace(config.language_model, tie_word_embeddings=True)

    def without(part: str) -> Mapping[str, Any]:
        return {name: leaf for name, leaf in params(part).items() if name != "lm_head"}

    return dataclasses.replace(config, language_model=language), without
