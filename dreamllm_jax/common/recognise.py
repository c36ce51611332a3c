"""What stands where a model's directory is expected, and the way to what is wanted: the ends of error messages.

Nothing is read but names, small JSON files and the first bytes of large ones.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from dreamllm_jax.common.directories import is_lfs_pointer

MAX_NAMES = 10  # that a message lists
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")

_UNQUANTISED = "quantised weights are not read: give the model that it was made from, in float16, bfloat16 or float32"
# What names of tensors give away, the first that fits: pattern, what it is, the way out.
_NAMES = (
    (
        r"\.(qweight|qzeros|g_idx|qscales|weight_packed|weight_scale(_inv)?|SCB|absmax|quant_map|quant_state\b.*)$",
        f"the weights are quantised (GPTQ, AWQ, bitsandbytes or the like): {_UNQUANTISED}",
    ),
    (
        r"(^|\.)(lora_[AB]\b|lora_(up|down)\b|base_model\.)",
        "an adapter: merge it into its base model (PEFT's merge_and_unload)",
    ),
    (
        r"^(tok_embeddings|output|layers\.\d+\.(attention|feed_forward)\.w\w)\b",
        "Meta's own layout: convert it by transformers' convert_llama_weights_to_hf.py, or take the `-hf` repository",
    ),
    (
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.",
        "a Stable Diffusion in a single file: diffusers' StableDiffusionPipeline.from_single_file(FILE)"
        ".save_pretrained(DIR) makes a directory of it",
    ),
    (
        r"^(module|_orig_mod|_fsdp_wrapped_module)\.",
        "saved with its wrapper (DDP, FSDP or torch.compile): take the prefix off",
    ),
    (r"^(model\.)?language_model\.", "a multimodal model: its language model alone is needed here"),
)


def looks(path: Path) -> str:
    """The end of a message, "; it looks like ...", or nothing if nothing is recognised there."""
    found = _file(path) if path.is_file() else _directory(path) if path.is_dir() else ""
    return f"; it looks like {found}" if found else ""


def require(directory: Path, *names: str) -> None:
    """Checks that a model's directory has these files.

    Raises:
      FileNotFoundError: naming the one that is missing, and what stands there instead.
    """
    _require_there(directory)
    for name in names:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} is missing{_instead(directory)}")


def require_one(directory: Path, *names: str) -> None:
    """Checks that a model's directory has one of these files.

    Raises:
      FileNotFoundError: naming them, and what stands there instead.
    """
    _require_there(directory)
    if not any((directory / name).is_file() for name in names):
        raise FileNotFoundError(f"{directory} has no {' and no '.join(names)}{_instead(directory)}")


def _require_there(directory: Path) -> None:
    if not directory.exists():
        hub = f": is it a name on the Hugging Face Hub? `hf download {directory} --local-dir=DIR` brings it"
        raise FileNotFoundError(f"there is no {directory}{hub if _is_hub_name(directory) else ''}")


def _instead(directory: Path) -> str:
    """The end of a message that something is missing there."""
    empty = directory.is_dir() and not any(directory.iterdir())
    return "; the directory is empty" if empty else looks(directory)


def require_no_adapter(directory: Path) -> None:
    """Checks that a model is all of it.

    Raises:
      ValueError: an adapter lies beside it, with which transformers would load it.
    """
    if (file := directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{file} is of an adapter (LoRA) beside the model: merge it with PEFT's merge_and_unload and save that, or "
            "take the adapter's files away"
        )


def require_floats(settings: dict) -> None:
    """Checks that a `config.json` is not of a quantised model.

    Raises:
      ValueError: it is, and how.
    """
    for key in ("quantization_config", "compression_config"):
        if found := settings.get(key):
            method = found.get("quant_method", "") if isinstance(found, dict) else ""
            raise ValueError(f"it has a {key}{f' ({method})' if method else ''}: {_UNQUANTISED}")


def cause(names: Iterable[str]) -> str:
    """What tensors of these names are likely to be of, as the end of a message; nothing if that is not known."""
    names = list(names)
    for pattern, what in _NAMES:
        if any(re.search(pattern, name) for name in names):
            return f"likely cause: {what}"
    return ""


def listed(problems: list[str], separator: str = "\n  ") -> str:
    """At most `MAX_NAMES` of them, and how many more there are."""
    more = len(problems) - MAX_NAMES
    return separator.join(problems[:MAX_NAMES] + ([f"and {more:,} more"] if more > 0 else []))


def content_of(path: Path) -> str:
    """What a file is that has no more than another name in common with what it should be; nothing if it may be that."""
    with path.open("rb") as file:
        start = file.read(256)
    if is_lfs_pointer(start):
        return "a git-lfs pointer, not the file itself: `git lfs pull` there brings it, as does `hf download`"
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "a web page: download the file itself (`hf download`)"
    return "" if start else "empty: download it again"


def _file(path: Path) -> str:
    if found := content_of(path):
        return found
    match path.suffix:
        case ".safetensors" | ".ckpt" | ".bin" | ".pt" | ".pth":
            return (
                "a single file of weights: give a directory with config.json; of a Stable Diffusion in one file, "
                "diffusers' StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR) makes one"
            )
        case ".gguf":
            return "a llama.cpp model: only --language-model reads those"
        case ".zip" | ".tar" | ".gz" | ".tgz" | ".7z":
            return "an archive: unpack it"
    return "a file: give the directory that it is in"


def _directory(path: Path) -> str:
    names = {entry.name for entry in path.iterdir()}
    if "snapshots" in names or any(name.startswith("models--") for name in names):
        inside = sorted(path.glob("snapshots/*") if "snapshots" in names else path.glob("models--*/snapshots/*"))
        return f"a cache folder of the Hugging Face Hub: the model is in {_some(inside) or 'none of its snapshots'}"
    for name in sorted(names):
        if name.endswith((".incomplete", ".aria2", ".part", ".crdownload")):
            return f"an unfinished download ({name}): start it again"
    if "model.json" in names:
        return "a model or a run of ours: --checkpoint, or parameters.init_from, takes it"
    if path.parent.name == "checkpoints" and (path.parent.parent / "model.json").is_file():
        return f"a step of a run: give {path.parent.parent}@{path.name}"
    if "adapter_config.json" in names:
        base = _json(path / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        return f"an adapter (LoRA): merge it into {base} with PEFT's merge_and_unload and save that"
    if "params.json" in names and any(name.startswith("consolidated.") for name in names):
        return (
            "Meta's (or Mistral's) own layout: convert it by transformers' convert_llama_weights_to_hf.py, or take the "
            "repository in Hugging Face's layout (`-hf`)"
        )
    if (config := path / "config.json").is_file():
        return _configured(path, _json(config), names)
    if "model_index.json" in names or ("vae" in names and names & {"unet", "transformer"}):
        kind = _json(path / "model_index.json").get("_class_name", "diffusion")
        return f"a {kind} directory of diffusers: --image-decoder takes Stable Diffusion's and SANA's"
    if steps := sorted(name for name in names if re.fullmatch(r"(checkpoint-|global_step)\d+", name)):
        return f"a trainer's directory of checkpoints: give one of them, such as {path / steps[-1]}"
    if files := sorted(path.glob("*.gguf")):
        return f"a folder of llama.cpp models: give the file itself, {_some(files)}"
    if files := sorted(file for kind in ("ckpt", "safetensors", "pth", "bin") for file in path.glob(f"*.{kind}")):
        return f"a folder with {_some(file.name for file in files)}, but no config.json: {_weights(path, files)}"
    inside = sorted(file.parent for file in path.glob("*/config.json"))
    inside += sorted(file.parent for file in path.glob("*/model_index.json"))
    return f"a folder around the model: give {_some(inside)}" if inside else ""


def _configured(path: Path, settings: dict, names: set[str]) -> str:
    if quantised := sorted({*_QUANTISED_FILES} & names):
        return f"a quantised model ({quantised[0]}): {_UNQUANTISED}"
    try:
        require_floats(settings)
    except ValueError as error:
        return f"a quantised model, for in config.json {error}"
    for file in sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin")):
        if found := content_of(file):
            return f"a model whose {file.name} is {found}"
    shards = sorted(name for name in names if re.search(r"-\d{5}-of-\d{5}\.", name))
    if shards and not any(".index" in name for name in names):
        return f"a model in shards ({shards[0]}, ...) without their index"
    if others := sorted(names & {"flax_model.msgpack", "tf_model.h5", "model.onnx"}):
        return f"a model for another library ({', '.join(others)}): take its weights for PyTorch"
    if kind := settings.get("_class_name"):
        return f"diffusers' {kind} alone: give the folder above, which has the other parts and scheduler/"
    if kind := settings.get("model_type"):
        return f"a model of type {kind!r} in Hugging Face's layout, which `convert import` reads if it can"
    return ""


def _weights(path: Path, files: list[Path]) -> str:
    for file in files:
        if found := content_of(file):
            return f"{file.name} is {found}"
    if path.name in ("unet", "transformer", "vae", "clip"):
        return "download its config.json too"
    return (
        "weights in single files need a directory with config.json; of a Stable Diffusion, diffusers' "
        "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR) makes one"
    )


def _is_hub_name(path: Path) -> bool:
    return not path.is_absolute() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) is not None


def _some(found: Iterable) -> str:
    found = list(map(str, found))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
