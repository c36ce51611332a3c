"""PyTorch's side of a comparison: the public classes of transformers and diffusers, every tensor accounted for.

They are read by the libraries' own loaders and not by ours, which are what is being checked.
"""

import dataclasses
import functools
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dreamllm_jax.common.recognise import looks
from dreamllm_jax.interop.diffusion import SCHEDULER, STEM
from dreamllm_jax.interop.dreamllm import HEAD, QUERIES, VISION, tower_directory
from dreamllm_jax.interop.files import find_model, open_model, read_config, require_beside
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.connectors.projector import ProjectorConfig

if TYPE_CHECKING:
    from torch import nn

_logger = logging.getLogger(__name__)


def loaders(
    config: DreamLLMConfig, directory: Path, towers: Mapping[str, Path | None]
) -> dict[str, Callable[[], "nn.Module"]]:
    """Part -> what loads its torch module; the parts that the directory has.

    Args:
      towers: "clip" and "diffusion", of a checkpoint of the original program: the directories with their shapes, where
        they are not those that its config.json names.

    Raises:
      ValueError: the directory is in none of the formats. A loader raises it for a tensor that is missing, unexpected
        or wrongly shaped.
    """
    path, found = directory / "config.json", {}
    settings = read_config(path, dict) if path.is_file() else {}
    if settings.get("model_type") == "dreamllm":
        return _dreamllm(config, directory, settings, towers)
    if given := [f"--{name}" for name, place in towers.items() if place]:
        raise ValueError(f"{directory} is no checkpoint of the original program: leave out {', '.join(given)}")
    if settings.get("model_type") == "llama":
        found["llama"] = functools.partial(_llama, directory)
    if all((directory / part / "config.json").is_file() for part in ("unet", "vae")):
        found |= {part: functools.partial(_diffusers, part, directory / part) for part in ("unet", "vae")}
        if (directory / "clip" / "config.json").is_file():
            found["clip"] = functools.partial(_clip, directory / "clip")
    if not found:
        raise ValueError(
            f"{directory} is no model in PyTorch's formats: it has neither a config.json of model_type 'llama' or "
            f"'dreamllm' nor unet/config.json and vae/config.json{looks(directory)}"
        )
    return found


def scheduler_file(directory: Path, towers: Mapping[str, Path | None]) -> Path | None:
    """The `scheduler_config.json` that a directory has or, a checkpoint of the original program, refers to, if any."""
    path, place = directory / "config.json", directory
    settings = read_config(path, dict) if path.is_file() else {}
    if settings.get("model_type") == "dreamllm":
        try:
            plugins = settings.get("plugins_init_kwargs", {})
            place = tower_directory(directory, plugins, "diffusion", towers.get("diffusion"))
        except FileNotFoundError:
            return None
    return place / SCHEDULER if (place / SCHEDULER).is_file() else None


def _llama(directory: Path, **more) -> "nn.Module":
    from transformers import LlamaForCausalLM

    return _pretrained(
        LlamaForCausalLM, directory, "model", "pytorch_model", dtype="auto", attn_implementation="eager", **more
    )


def _clip(folder: Path) -> "nn.Module":
    from transformers import CLIPVisionModel

    return _pretrained(CLIPVisionModel, folder, "model", "pytorch_model", dtype="auto", attn_implementation="eager")


def _diffusers(part: str, folder: Path) -> "nn.Module":
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kinds = {str(tensor.dtype) for tensor in open_model(folder, STEM).values()}
    # Unless it is told the type, diffusers converts to float32.
    dtype = functools.reduce(torch.promote_types, (getattr(torch, kind) for kind in kinds))
    cls = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    return _pretrained(cls, folder, STEM, torch_dtype=dtype, low_cpu_mem_usage=False)


def _pretrained(cls: type, folder: Path, *stems: str, **more) -> "nn.Module":
    """A public class's own loader, which by itself only warns of tensors that do not fit and follows an index anywhere.

    Args:
      stems: how the file of tensors is called.
    """
    path, variant = find_model(folder, *stems)
    if path.suffix == ".json":
        require_beside(path)
    module, info = cls.from_pretrained(
        folder,
        variant=variant or None,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        local_files_only=True,
        **more,
    )
    _require_same_tensors(folder, *(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")))
    return module


# What may stand in a file beside parameters: buffers that are computed, and the rest of a whole CLIP.
_BESIDE = re.compile(r".*\b(rotary_emb\.inv_freq|position_ids)$|(text_model|(text|visual)_projection|logit_scale)\b")


def _require_same_tensors(file: Path, missing: Iterable, unexpected: Iterable, shapes: Iterable) -> None:
    problems = [f"missing {name}" for name in sorted(missing)]
    problems += [f"unexpected {name}" for name in sorted(unexpected) if not _BESIDE.match(name)]
    problems += [f"{name} is {tuple(got)}, expected {tuple(want)}" for name, got, want in sorted(shapes) if got != want]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{file.name}: {', '.join(problems[:3])}{more}")


def _dreamllm(
    config: DreamLLMConfig, directory: Path, settings: Mapping, towers: Mapping[str, Path | None]
) -> dict[str, Callable[[], "nn.Module"]]:
    """Loaders of a checkpoint of the original program: the plugins' modules are put together as they were stored."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import nn
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

    plugins, width = settings.get("plugins_init_kwargs", {}), config.llama.hidden_size

    def projector(chosen: ProjectorConfig, width_in: int, width_out: int, bias: bool) -> nn.Module:
        if chosen.kind == "conv":
            convolution = nn.Conv2d(width_in, width_out, 3, padding=1)
            convolution.register_forward_pre_hook(lambda _, x: x[0].mT.unflatten(2, (math.isqrt(x[0].shape[1]), -1)))
            convolution.register_forward_hook(lambda _, __, x: x.flatten(2).mT)
            return nn.Sequential(OrderedDict(projector=convolution))
        layers = [nn.Linear(width_in, width_out, bias)]
        for _ in range(1, chosen.depth):
            layers += [nn.GELU(), nn.Linear(width_out, width_out, bias)]
        return nn.Sequential(OrderedDict(projector=layers[0] if chosen.kind == "linear" else nn.Sequential(*layers)))

    def fill(plugin: str, module: nn.Module) -> nn.Module:
        file = directory / f"{plugin}.bin"
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        tensors = {name.replace(".vision_model.", "."): x for name, x in tensors.items() if not _BESIDE.match(name)}
        own = module.state_dict()
        shapes = [(name, tensors[name].shape, own[name].shape) for name in own.keys() & tensors.keys()]
        _require_same_tensors(file, own.keys() - tensors.keys(), tensors.keys() - own.keys(), shapes)
        module.load_state_dict(tensors, assign=True)  # as they are stored
        return module

    def llama() -> nn.Module:
        names = {field.name for field in dataclasses.fields(config.llama)}
        names |= {"hidden_act", "rope_parameters", "torch_dtype", "dtype"}
        return _llama(directory, config=LlamaConfig(**{name: settings[name] for name in names & settings.keys()}))

    def vision() -> dict[str, nn.Module]:
        where = tower_directory(directory, plugins, "clip", towers.get("clip"))
        clip = CLIPVisionConfig.from_pretrained(where, local_files_only=True, attn_implementation="eager")
        modules = {"projector": projector(config.visual_projector, config.clip.hidden_size, width, bias=True)}
        if config.visual_projector.post_layernorm:
            modules["post_layernorm"] = nn.LayerNorm(width, clip.layer_norm_eps)
        filled = fill(VISION, nn.ModuleDict({"clip_vision_model": CLIPVisionModel(clip), **modules}))
        clip, *rest = filled.values()
        return {"clip": clip, "visual_projector": nn.Sequential(*rest)}

    def queries() -> nn.Module:
        return fill(QUERIES, nn.ParameterDict({"dream_queries": torch.zeros(1, config.num_queries, width)}))

    def head() -> dict[str, nn.Module]:
        where = tower_directory(directory, plugins, "diffusion", towers.get("diffusion"))
        with torch.device("meta"):  # not initialised, for every tensor comes from the file
            modules = {
                "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(where / "unet")),
                "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(where / "vae")),
                "projector": projector(config.condition_projector, width, config.unet.cross_attention_dim, bias=False),
            }
        filled = fill(HEAD, nn.ModuleDict(modules))
        return {"unet": filled["unet"], "vae": filled["vae"], "condition_projector": filled["projector"]}

    found = {"llama": llama}
    there = {plugin for plugin in (VISION, QUERIES, HEAD) if (directory / f"{plugin}.bin").is_file()}
    for plugin in sorted({VISION, QUERIES, HEAD} - there):
        _logger.warning("%s has no %s.bin: what it would hold is not compared", directory, plugin)
    if VISION in there:
        found["clip"] = lambda: vision()["clip"]
    if HEAD in there:
        found |= {"unet": lambda: head()["unet"], "vae": lambda: head()["vae"]}
    if len(there) == 3:
        found["visual_projector"] = lambda: vision()["visual_projector"]
        found["condition_projector"] = lambda: head()["condition_projector"]
        found["queries"] = queries
    return found
