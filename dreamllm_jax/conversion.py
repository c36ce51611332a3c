"""Checkpoints from PyTorch to ours and back, one tensor in memory at a time."""

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from etils import epath
from tqdm import tqdm

from dreamllm_jax import __version__
from dreamllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from dreamllm_jax.directories import building, require_free
from dreamllm_jax.interop import verify
from dreamllm_jax.interop.clip import write_clip
from dreamllm_jax.interop.diffusion import DiffusionConfigs, write_diffusion
from dreamllm_jax.interop.dreamllm import require_expressible, write_dreamllm
from dreamllm_jax.interop.files import Scratch, import_torch
from dreamllm_jax.interop.llama import write_llama
from dreamllm_jax.interop.names import torch_tensors
from dreamllm_jax.interop.source import Source
from dreamllm_jax.models.vae import AutoencoderConfig
from dreamllm_jax.training.saved import CONFIG_FILE, MODEL, SavedModel, write_description, write_params

_logger = logging.getLogger(__name__)

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
PARTS = {
    "dreamllm": ("llama", "queries", "clip", "visual_projector", "vae", "unet", "condition_projector"),
    "hf": ("llama",),
    "diffusers": ("clip", "vae", "unet"),
}
_GROUP_BYTES = 256 << 20  # parameters that are read from our checkpoint together, unless one alone is larger
_SPARE_BYTES = 64 << 20


def import_model(source: Source, tokenizer: Tokenizer | None, to: str, dtypes: Mapping[str, str]) -> None:
    """Writes a model read from PyTorch as a checkpoint of ours, whole or not at all.

    Args:
      tokenizer: None for a checkpoint that came without.
      to: local directory or gs://.
      dtypes: part of the parameter tree -> type to store it in; parts that are not named stay as they are.

    Raises:
      FileExistsError: there is something at `to`.
      OSError: the disk is too small, before anything is written.
    """
    types = {
        path: np.dtype(DTYPES.get(dtypes.get(_part(path), ""), leaf.dtype)) for path, leaf in source.leaves.items()
    }
    size = sum(int(np.prod(leaf.shape)) * types[path].itemsize for path, leaf in source.leaves.items())
    if remote := "://" in to:
        if epath.Path(to).exists():
            raise FileExistsError(f"{to} exists already; choose another name or remove it")
        scratch_folder = Path(tempfile.gettempdir())
        _require_room(scratch_folder, size, "to gather the tensors")
    else:
        require_free(to)
        _require_room(Path(to), 2 * size, "for the checkpoint, half of it while importing")

    def write(directory: epath.Path, folder: Path) -> None:
        with Scratch(folder / ".scratch") as scratch, _progress(size, "importing") as progress:
            arrays = {}
            for path, leaf in source.leaves.items():
                parts = _counted(leaf.parts(), types[path].itemsize, progress)
                arrays[path] = scratch.keep(parts, leaf.shape, types[path])
            progress.set_description("writing")
            write_params(directory, arrays)
        write_description(directory, source.config, tokenizer)

    if remote:
        with tempfile.TemporaryDirectory(dir=scratch_folder) as folder:
            write(epath.Path(to), Path(folder))
    else:
        with building(to) as folder:
            write(epath.Path(folder), folder)
    count = sum(int(np.prod(leaf.shape)) for leaf in source.leaves.values())
    _logger.info("%s: %s parameters, %.2f GiB", to, f"{count:,}", size / 2**30)
    if source.left_out:
        groups = sorted({name.split(".")[0] for name in source.left_out})
        _logger.info("left out, for DreamLLM has no use for them: %d tensors of %s", len(source.left_out), groups)


def export_model(
    saved: SavedModel,
    to: Path,
    formats: Sequence[str],
    dtype: str = "",
    max_shard_size: int = 5 * 10**9,
    location: str = "",
    check: bool = True,
) -> bool:
    """Writes a checkpoint of ours in PyTorch's formats, whole or not at all, and checks what was written.

    Args:
      to: the directory; of several formats, each has a folder of its name in it.
      formats: of `PARTS`.
      dtype: type of all tensors; empty to keep each as it is stored.
      location: where the export will be used if not at `to` (see `write_dreamllm`).
      check: compare with torch (`interop.verify`), and tell the figures in the model card.

    Returns:
      Whether every comparison passed (or none was made).

    Raises:
      FileExistsError, OSError, ImportError, ValueError: before anything is written: a target that exists, a disk that
        is too small, a format that needs torch, a model that the format cannot express.
    """
    config = saved.config
    require_free(to)
    if "://" in str(to):
        raise ValueError(f"PyTorch's files are written to a local directory, which can then be copied to {to}")
    if "dreamllm" in formats:
        import_torch("--format=dreamllm")
        require_expressible(config)
    if set(formats) & {"dreamllm", "diffusers"} and not isinstance(config.vae, AutoencoderConfig):
        raise ValueError("a model that paints pixels without an autoencoder has no PyTorch format: only --format=hf")
    tokenizer = load_tokenizer(saved.tokenizer) if saved.tokenizer.exists() else None
    parts = {part for kind in formats for part in PARTS[kind]}
    leaves = {path: leaf for path, leaf in saved.leaves().items() if _part(path) in parts}
    types = {path: np.dtype(DTYPES[dtype] if dtype else leaf.dtype) for path, leaf in leaves.items()}
    sizes = {path: int(np.prod(leaf.shape)) * types[path].itemsize for path, leaf in leaves.items()}
    _require_room(to, _export_size(sizes, formats), "for the export, part of it while exporting")

    with building(to) as directory:
        with Scratch(directory / ".scratch") as scratch:
            tensors: dict[str, dict[str, np.ndarray]] = {part: {} for part in parts}
            for path, name, tensor in _torch_tensors(saved, sizes):
                part = _part(path)
                tensors[part][name] = scratch.keep([tensor], tensor.shape, types[path])
            diffusion = DiffusionConfigs(config.unet, config.vae, config.schedule)
            for kind in formats:
                folder = directory if len(formats) == 1 else directory / kind
                folder.mkdir(exist_ok=True)
                if kind == "hf":
                    write_llama(folder, config.llama, config.special_tokens, tensors["llama"], max_shard_size)
                elif kind == "diffusers":
                    write_diffusion(folder, diffusion, tensors["unet"], tensors["vae"], max_shard_size)
                    write_clip(folder / "clip", config.clip, tensors["clip"], max_shard_size)
                else:
                    place = Path(location or to.absolute(), *folder.relative_to(directory).parts)
                    write_dreamllm(folder, config, tensors, max_shard_size, str(place))
                if tokenizer is not None and kind != "diffusers":
                    tokenizer.save(folder)
        passed = True
        for kind in formats:
            folder = directory if len(formats) == 1 else directory / kind
            differences = _check(saved, folder) if check else None
            passed = passed and all(difference.passed for difference in differences or ())
            (folder / "README.md").write_text(_card(saved, kind, differences))
    return passed


def _part(path: str) -> str:
    return path.split("/")[0]


def _torch_tensors(saved: SavedModel, sizes: Mapping[str, int]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(path, torch name, tensor) of the parameters in `sizes`, read a group at a time."""
    groups: list[list[str]] = [[]]
    for path, size in sizes.items():
        if sum(sizes[other] for other in groups[-1]) + size > _GROUP_BYTES:
            groups.append([])
        groups[-1].append(path)
    with _progress(sum(sizes.values()), "exporting") as progress:
        for group in groups:
            arrays = saved.read(group)
            while arrays:  # popped, so that nothing of one group is kept while the next is read
                path, array = arrays.popitem()
                for name, tensor in torch_tensors(path.split("/", 1)[1], array):
                    yield path, name, tensor
                    progress.update(tensor.size * sizes[path] // array.size)
                del array, tensor


def _export_size(sizes: Mapping[str, int], formats: Sequence[str]) -> int:
    """Bytes of all files and of the scratch file; `dreamllm` holds the towers twice."""
    size = dict.fromkeys({_part(path) for path in sizes}, 0)
    for path, count in sizes.items():
        size[_part(path)] += count
    files = sum(size[part] for kind in formats for part in PARTS[kind])
    towers = sum(size[part] for part in PARTS["diffusers"]) if "dreamllm" in formats else 0
    return sum(size.values()) + files + towers


def _require_room(folder: Path, size: int, purpose: str) -> None:
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size + _SPARE_BYTES:
        raise OSError(
            f"{folder} needs {(size + _SPARE_BYTES) / 2**30:.2f} GiB {purpose}; free are {free / 2**30:.2f} GiB"
        )


def _progress(size: int, description: str) -> tqdm:
    every = 1 if sys.stderr.isatty() else 30
    return tqdm(total=size, desc=description, unit="B", unit_scale=True, unit_divisor=1024, mininterval=every)


def _counted(parts: Iterable[np.ndarray], itemsize: int, progress: tqdm) -> Iterator[np.ndarray]:
    for part in parts:
        yield part
        progress.update(part.size * itemsize)


def _check(saved: SavedModel, folder: Path) -> list[verify.Difference] | None:
    try:
        import_torch("checking the export")
    except ImportError as error:
        _logger.warning("not checked: %s", error)
        return None
    differences = verify.compare(saved.config, saved.part, folder)
    print(verify.table(differences))
    return differences


_LOADING = {
    "dreamllm": """from transformers import LlamaTokenizer
from omni.models.dreamllm.modeling_dreamllm import DreamLLMForCausalMLM

tokenizer = LlamaTokenizer.from_pretrained(path, padding_side="right")
model = DreamLLMForCausalMLM.from_pretrained(path, tokenizer=tokenizer, reset_plugin_model_name_or_path=True)""",
    "hf": """from transformers import AutoTokenizer, LlamaForCausalLM

tokenizer = AutoTokenizer.from_pretrained(path)
model = LlamaForCausalLM.from_pretrained(path)""",
    "diffusers": """from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPVisionModel

unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet")
vae = AutoencoderKL.from_pretrained(path, subfolder="vae")
scheduler = DDIMScheduler.from_pretrained(path, subfolder="scheduler")
image_encoder = CLIPVisionModel.from_pretrained(path + "/clip")""",
}
_WHAT = {
    "dreamllm": "A DreamLLM in the format of the [original program](https://github.com/RunpeiDong/DreamLLM)",
    "hf": "The language model of a DreamLLM",
    "diffusers": "The diffusion model and the image encoder of a DreamLLM",
}


def _card(saved: SavedModel, kind: str, differences: list[verify.Difference] | None) -> str:
    """The model card of an export."""
    run = saved.directory / CONFIG_FILE
    trained = f"trained for {saved.step:,} steps" if saved.step else "as imported, not trained further"
    checked = (
        "Not compared with PyTorch when it was written; `python -m dreamllm_jax.convert verify` does."
        if differences is None
        else f"Differences between JAX and PyTorch on the same inputs:\n\n```\n{verify.table(differences)}\n```"
    )
    settings = json.loads((run if run.exists() else saved.directory / MODEL).read_text())
    return f"""---
library_name: {"diffusers" if kind == "diffusers" else "transformers"}
tags: [dreamllm]
---

# DreamLLM

{_WHAT[kind]} ([arXiv 2309.11499](https://arxiv.org/abs/2309.11499)), {trained}, written by dreamllm_jax {__version__}.

```python
{_LOADING[kind]}
```

## Checked

{checked}

## Configuration

```json
{json.dumps(settings, indent=2)}
```
"""
