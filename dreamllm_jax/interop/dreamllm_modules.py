"""PyTorch's side of a comparison with a checkpoint of the original program: its plugins' modules, put together as they
were stored."""

import dataclasses
import functools
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dreamllm_jax.interop.dreamllm import (
    NORM,
    QUERIES,
    QUERIES_NAME,
    SIGHTS,
    head_of,
    head_parts,
    plugins_of,
    tower_directory,
)
from dreamllm_jax.interop.source import config_of
from dreamllm_jax.interop.torch_modules import pretrained, public_class, require_same_tensors
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.connectors.projector import ProjectorConfig

if TYPE_CHECKING:
    from torch import nn

_logger = logging.getLogger(__name__)


def loaders(
    config: DreamLLMConfig, directory: Path, settings: Mapping[str, Any], towers: Mapping[str, Path | None]
) -> dict[str, Callable[[], "nn.Module"]]:
    """Part -> what loads its torch module; arguments and errors as of `torch_modules.loaders`.

    Args:
      towers: "vision_encoder" and "image_decoder": the directories with their shapes, where they are not those that the
        checkpoint's config.json names.
    """
    import torch
    from torch import nn

    width, referred = config.language_model.width, plugins_of(settings)
    stored, parts_of_head = head_of(config.image_decoder), head_parts(config.image_decoder)
    tower, sight = config.vision_encoder, SIGHTS[config.vision_encoder.kind]

    def place(tower: str) -> Path:
        return tower_directory(directory, referred, tower, towers.get(tower))

    def language_model() -> nn.Module:
        form = config.language_model.public
        names = {field.name for field in dataclasses.fields(config.language_model)}
        names |= {"hidden_act", "rope_parameters", "torch_dtype", "dtype"}
        shape = public_class(form).config_class(**{name: settings[name] for name in names & settings.keys()})
        return pretrained(form, directory, config=shape)

    def vision() -> dict[str, nn.Module]:
        cls, chosen = public_class(tower.public), config.visual_projector
        if tower.kind == "clip":
            shape = cls.config_class.from_pretrained(place("vision_encoder"), local_files_only=True)
        else:  # whose directory is not of transformers' class
            shape = cls.config_class(**tower.to_public())
        shape._attn_implementation = "eager"
        projector = _projector(chosen, tower.width, width, bias=chosen.bias is not False)
        modules = {"vision_encoder": cls(shape), "visual_projector": projector}
        norm = nn.LayerNorm(tower.width if chosen.pre_layernorm else width, shape.layer_norm_eps)
        there = chosen.pre_layernorm or chosen.post_layernorm
        _fill(directory / f"{sight.stem}.bin", config, sight.parts, modules, {NORM: norm} if there else {})
        ways = [norm, projector] if chosen.pre_layernorm else [projector, norm]
        return {**modules, "visual_projector": nn.Sequential(*ways) if there else projector}

    def queries() -> nn.Module:
        table = nn.ParameterDict({QUERIES_NAME: torch.zeros(1, config.num_queries, width)})
        _fill(directory / f"{QUERIES}.bin", config, {}, {}, {"": table})
        return table

    def head() -> dict[str, nn.Module]:
        where, modules = place("image_decoder"), {}
        with torch.device("meta"):  # not initialised, for every tensor comes from the file
            for part in parts_of_head.values():
                if part != "connector":
                    form = config_of(config, part).public
                    cls = public_class(form)
                    modules[part] = cls.from_config(cls.load_config(where / form.folder))
            chosen, pooled = config.connector, config.image_decoder.pooled_width
            condition = config.image_decoder.condition_width
            modules["connector"] = _projector(chosen, width, condition, bias=bool(chosen.bias))
            more = {}
            if pooled:
                more = {stored.pooled: _projector(chosen, width, pooled, bias=chosen.pooled_bias).projector}
        _fill(directory / f"{stored.stem}.bin", config, parts_of_head, modules, more)
        return {**modules, "connector": _connector(modules["connector"], *more.values())}

    found = {"language_model": language_model}
    plugins = {sight.stem, QUERIES, stored.stem}
    there = {plugin for plugin in plugins if (directory / f"{plugin}.bin").is_file()}
    for plugin in sorted(plugins - there):
        _logger.warning("%s has no %s.bin: what it would hold is not compared", directory, plugin)
    for plugin, load, parts in ((sight.stem, vision, sight.parts), (stored.stem, head, parts_of_head)):
        if plugin in there:
            found |= {part: functools.partial(_only, load, part) for part in parts.values()}
    if len(there) == 3:
        return found | {"dream_queries": queries}
    return {part: load for part, load in found.items() if part not in ("visual_projector", "connector")}


def _only(load: Callable[[], Mapping[str, "nn.Module"]], part: str) -> "nn.Module":
    return load()[part]


def _connector(sequence: "nn.Module", pooled: "nn.Module | None" = None) -> "nn.Module":
    """What gives the parts of a condition, as `towers.condition.Condition` names them, from hidden states."""
    from torch import nn

    class Connector(nn.Module):
        def __init__(self):
            super().__init__()
            self.sequence, self.pooled = sequence, pooled

        def forward(self, hidden):
            found = {"sequence": self.sequence(hidden)}
            return found if self.pooled is None else {**found, "pooled": self.pooled(hidden.mean(1))}

    return Connector()


def _projector(chosen: ProjectorConfig, width_in: int, width_out: int, bias: bool) -> "nn.Module":
    from torch import nn

    if chosen.kind == "conv":
        convolution = nn.Conv2d(width_in, width_out, 3, padding=1)
        convolution.register_forward_pre_hook(lambda _, x: x[0].mT.unflatten(2, (math.isqrt(x[0].shape[1]), -1)))
        convolution.register_forward_hook(lambda _, __, x: x.flatten(2).mT)
        return nn.Sequential(OrderedDict(projector=convolution))
    layers = [nn.Linear(width_in, width_out, bias)]
    for _ in range(1, chosen.depth):
        layers += [nn.GELU(), nn.Linear(width_out, width_out, bias)]
    return nn.Sequential(OrderedDict(projector=layers[0] if chosen.kind == "linear" else nn.Sequential(*layers)))


def _fill(
    file: Path,
    config: DreamLLMConfig,
    prefixes: Mapping[str, str],
    modules: Mapping[str, "nn.Module"],
    more: Mapping[str, "nn.Module"] = MappingProxyType({}),
) -> None:
    """Gives modules the tensors of a plugin's file, as they are stored.

    Args:
      prefixes: of the file's names -> part.
      modules: by part.
      more: other modules, by prefix.
    """
    import torch

    def named(name: str, tensor: "torch.Tensor") -> dict[str, "torch.Tensor"]:
        """As the public classes have it today; nothing of what is nothing of theirs."""
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        form = getattr(config_of(config, prefixes[prefix]), "public", None) if prefix else None
        ours = form.ours(name.removeprefix(prefix)) if form else None
        parts = () if ours is None else form.parts(ours)
        found = zip(parts, tensor.chunk(len(parts)), strict=True) if parts else ()
        return {name: tensor} if form is None else {prefix + part: piece for part, piece in found}

    stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    tensors = {ours: part for name, tensor in stored.items() for ours, part in named(name, tensor).items()}
    filled = {prefix: modules[part] for prefix, part in prefixes.items()} | more
    own = {prefix + name: x for prefix, module in filled.items() for name, x in module.state_dict().items()}
    shapes = [(name, tensors[name].shape, own[name].shape) for name in own.keys() & tensors.keys()]
    require_same_tensors(file, own.keys() - tensors.keys(), tensors.keys() - own.keys(), shapes)
    for prefix, module in filled.items():
        names = {prefix + name: name for name in module.state_dict()}
        module.load_state_dict({names[name]: tensors[name] for name in names}, assign=True)
