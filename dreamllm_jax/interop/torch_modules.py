"""PyTorch's side of a comparison: the public classes of transformers and diffusers, every tensor accounted for.

They are read by the libraries' own loaders and not by ours, which are what is being checked.
"""

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamllm_jax.common.recognise import looks
from dreamllm_jax.interop.files import find_model, open_model, read_json, require_beside
from dreamllm_jax.interop.image_decoder import public_parts
from dreamllm_jax.interop.source import IMAGE_DECODER
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.public import PublicForm

if TYPE_CHECKING:
    from torch import nn


def loaders(
    config: DreamLLMConfig, directory: Path, settings: Mapping[str, Any]
) -> dict[str, Callable[[], "nn.Module"]]:
    """Part -> what loads its torch module; the parts that the directory has.

    Args:
      settings: of the directory's config.json, empty if it has none.

    Raises:
      ValueError: the directory is in none of the formats. A loader raises it for a tensor that is missing, unexpected
        or wrongly shaped.
    """
    found: dict[str, Callable[[], nn.Module]] = {}
    language, vision = config.language_model.public, config.vision_encoder.public
    parts = {f"{IMAGE_DECODER}/{part}": tower.public for part, tower in public_parts(config.image_decoder).items()}
    if settings.get("model_type") == language.types[0]:
        found["language_model"] = functools.partial(pretrained, language, directory)
    if parts and all(_is_there(directory, form) for form in parts.values()):
        parts |= {"vision_encoder": vision} if _is_there(directory, vision) else {}
        found |= {part: functools.partial(pretrained, form, directory / form.folder) for part, form in parts.items()}
    if not found:
        folders = " and ".join(f"{form.folder}/config.json" for form in parts.values())
        raise ValueError(
            f"{directory} is no model in PyTorch's formats: it has neither a config.json of model_type "
            f"{language.types[0]!r} or 'dreamllm' nor {folders}{looks(directory)}"
        )
    return found


def _is_there(directory: Path, form: PublicForm) -> bool:
    return (directory / form.folder / "config.json").is_file()


def public_class(form: PublicForm) -> type:
    """The class of transformers or diffusers."""
    return getattr(importlib.import_module(form.library), form.torch_class)


def pretrained(form: PublicForm, folder: Path, **more: Any) -> "nn.Module":
    """A public class's own loader, which by itself only warns of tensors that do not fit and follows an index anywhere.

    Raises:
      ValueError: a model of another class of diffusers, or naming tensors that are missing, unexpected or wrongly
        shaped.
    """
    found = read_json(folder / "config.json").get("_class_name", form.torch_class)
    if form.library == "diffusers" and found != form.torch_class:
        raise ValueError(f"{folder} holds a {found}, not a {form.torch_class}")
    path, variant = find_model(folder, *form.stems)
    if path.suffix == ".json":
        require_beside(path)
    module, info = public_class(form).from_pretrained(
        folder,
        variant=variant or None,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        local_files_only=True,
        **_as_stored(form, folder),
        **more,
    )
    missing, unexpected, mismatched = (info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    unexpected = [name for name in unexpected if form.ours(name) is not None]
    require_same_tensors(folder, missing, unexpected, mismatched)
    return module


def _as_stored(form: PublicForm, folder: Path) -> dict[str, Any]:
    """How a library is told to keep the type that tensors are stored in."""
    if form.library == "transformers":
        return {"dtype": "auto", "attn_implementation": "eager"}
    import torch

    kinds = {str(tensor.dtype) for tensor in open_model(folder, *form.stems).values()}
    # Unless it is told the type, diffusers converts to float32.
    dtype = functools.reduce(torch.promote_types, (getattr(torch, kind) for kind in kinds))
    return {"torch_dtype": dtype, "low_cpu_mem_usage": False}


def require_same_tensors(file: Path, missing: Iterable, unexpected: Iterable, shapes: Iterable) -> None:
    """Checks what a loader reports.

    Args:
      missing, unexpected: names.
      shapes: (name, shape there, shape wanted).

    Raises:
      ValueError: naming the first of them.
    """
    problems = [f"missing {name}" for name in sorted(missing)]
    problems += [f"unexpected {name}" for name in sorted(unexpected)]
    problems += [f"{name} is {tuple(got)}, expected {tuple(want)}" for name, got, want in sorted(shapes) if got != want]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{file.name}: {', '.join(problems[:3])}{more}")
