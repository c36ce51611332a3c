"""Checkpoints from PyTorch to ours and back, one tensor in memory at a time."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np
from etils import epath
from tqdm import tqdm

from dreamllm_jax.checkpoints.saved import SavedModel, write_description, write_params
from dreamllm_jax.common.directories import building, is_remote, require_free, require_room
from dreamllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from dreamllm_jax.data.vocabulary import OUR_MARKS
from dreamllm_jax.interop import metaquery, openuni, verify
from dreamllm_jax.interop.dreamllm_export import require_expressible, write_dreamllm
from dreamllm_jax.interop.files import Scratch, import_torch
from dreamllm_jax.interop.image_decoder import write_image_decoder
from dreamllm_jax.interop.language_model import write_language_model
from dreamllm_jax.interop.model_card import model_card
from dreamllm_jax.interop.names import torch_tensors
from dreamllm_jax.interop.source import IMAGE_DECODER, PARTS, Source, config_of, split_path
from dreamllm_jax.interop.unilip import require_expressible as require_unilip
from dreamllm_jax.interop.unilip import write_unilip
from dreamllm_jax.interop.vision_encoder import write_vision_encoder
from dreamllm_jax.model import DreamLLMConfig

_logger = logging.getLogger(__name__)

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Format -> the parts of the model that it has.
FORMATS = {
    "dreamllm": PARTS,
    "openuni": PARTS,
    "metaquery": PARTS,
    "unilip": PARTS,
    "hf": ("language_model",),
    "diffusers": ("vision_encoder", *(part for part in PARTS if part.startswith(f"{IMAGE_DECODER}/"))),
}
_GROUP_BYTES = 256 << 20  # parameters that are read from our checkpoint together, unless one alone is larger


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
    if remote := is_remote(to):
        if epath.Path(to).exists():
            raise FileExistsError(f"{to} exists already; choose another name or remove it")
        scratch_folder = Path(tempfile.gettempdir())
        require_room(scratch_folder, size, "to gather the tensors")
    else:
        require_free(to)
        require_room(Path(to), 2 * size, "for the checkpoint, half of it while importing")

    def write(directory: epath.Path, folder: Path) -> None:
        with Scratch(folder / ".scratch") as scratch, _progress(size, "importing") as progress:
            arrays = {}
            for path, leaf in source.leaves.items():
                parts = _counted(leaf.parts(), types[path].itemsize, progress)
                arrays[path] = scratch.keep(parts, leaf.shape, types[path], path)
            progress.set_description("writing")
            write_params(directory, arrays)
        write_description(directory, source.config, tokenizer)

    if remote:
        with tempfile.TemporaryDirectory(dir=scratch_folder) as folder:
            write(epath.Path(to), Path(folder))
    else:
        with _naming_a_full_disk(to), building(to) as folder:
            write(epath.Path(folder), folder)
    count = sum(int(np.prod(leaf.shape)) for leaf in source.leaves.values())
    _logger.info("%s: %s parameters, %.2f GiB", to, f"{count:,}", size / 2**30)
    if source.left_out:
        groups = sorted({name.split(".")[0] for name in source.left_out})
        _logger.info("left out, for DreamLLM has no use for them: %d tensors of %s", len(source.left_out), groups)


def export_model(
    saved: SavedModel,
    to: str | os.PathLike,
    formats: Sequence[str] | None,
    dtype: str = "",
    max_shard_size: int = 5 * 10**9,
    location: str = "",
    check: bool = True,
    names: Mapping[str, str | None] = MappingProxyType({}),
) -> bool:
    """Writes a checkpoint of ours in PyTorch's formats, whole or not at all, and checks what was written.

    Args:
      to: the directory; of several formats, each has a folder of its name in it.
      formats: of `FORMATS`; None for all that can express the model, each in its folder.
      dtype: type of all tensors; empty to keep each as it is stored.
      location: where the export will be used if not at `to` (see `write_dreamllm`).
      names: of towers, as which metaquery's program will look for them (see `metaquery.names_of`).
      check: compare with torch (`interop.verify`), and tell the figures in the model card.

    Returns:
      Whether every comparison passed (or none was made).

    Raises:
      FileExistsError, OSError, ImportError, ValueError: before anything is written: a target that exists, a disk that
        is too small, a format that needs torch, a model that the format cannot express.
    """
    if is_remote(to):
        raise ValueError(f"PyTorch's files are written to a local directory, which can then be copied to {to}")
    to = Path(to)
    require_free(to)
    tokenizer = load_tokenizer(saved.tokenizer) if saved.tokenizer.exists() else None
    apart = formats is None or len(formats) > 1
    if formats is not None and "metaquery" not in formats and any(names.values()):
        raise ValueError("--vision-language and --image-decoder are of --format=metaquery: leave them out")
    if formats is None:
        formats = _expressible(saved.config, tokenizer, names)
    else:
        for kind in formats:
            _require_expressible(saved.config, tokenizer, kind, names)
    _warn_of_tokenizer(tokenizer, formats)
    parts = {part for kind in formats for part in FORMATS[kind]}
    leaves = {path: leaf for path, leaf in saved.leaves().items() if _part(path) in parts}
    leaves = dict(sorted(leaves.items(), key=lambda item: PARTS.index(_part(item[0]))))
    types = {path: np.dtype(DTYPES[dtype] if dtype else leaf.dtype) for path, leaf in leaves.items()}
    sizes = {path: int(np.prod(leaf.shape)) * types[path].itemsize for path, leaf in leaves.items()}
    require_room(to, _export_size(sizes, formats), "for the export, part of it while exporting")

    passed = True
    with _naming_a_full_disk(to), building(to) as directory:
        folders = {kind: directory / kind if apart else directory for kind in formats}
        with Scratch(directory / ".scratch") as scratch:
            tensors: dict[str, dict[str, np.ndarray]] = {part: {} for part in parts}
            for path, name, tensor in _torch_tensors(saved, sizes):
                tensors[_part(path)][name] = scratch.keep([tensor], tensor.shape, types[path], name)
                del tensor  # a view, which would keep its parameter while the next is read
            for kind, folder in folders.items():
                folder.mkdir(exist_ok=True)
                place = Path(location or to.absolute(), *folder.relative_to(directory).parts)
                if kind == "hf":
                    write_language_model(folder, saved.config, tensors, max_shard_size)
                elif kind == "diffusers":
                    write_image_decoder(folder, saved.config, tensors, max_shard_size)
                    place = folder / saved.config.vision_encoder.public.folder
                    write_vision_encoder(place, saved.config, tensors, max_shard_size)
                elif kind == "openuni":
                    openuni.write(folder, saved.config, tensors)
                elif kind == "metaquery":
                    metaquery.write(folder, saved.config, tensors, max_shard_size, names)
                elif kind == "unilip":
                    write_unilip(folder, saved.config, tensors, max_shard_size)
                else:
                    write_dreamllm(folder, saved.config, tensors, max_shard_size, str(place))
                if tokenizer is not None and kind not in ("diffusers", "openuni"):
                    tokenizer.save(folder)
        for kind, folder in folders.items():
            differences = _check(saved, folder) if check else None
            passed = passed and all(difference.passed for difference in differences or ())
            (folder / "README.md").write_text(model_card(saved, kind, differences))
    return passed


def _expressible(config: DreamLLMConfig, tokenizer: Tokenizer | None, names: Mapping[str, str | None]) -> list[str]:
    """The formats that can express the model; tells why others cannot."""
    found = []
    for kind in FORMATS:
        try:
            _require_expressible(config, tokenizer, kind, names)
            found.append(kind)
        except ValueError as error:
            _logger.warning("no %s: %s", kind, str(error).partition(": ")[0])
    return found


def _require_expressible(
    config: DreamLLMConfig, tokenizer: Tokenizer | None, kind: str, names: Mapping[str, str | None]
) -> None:
    if kind not in ("hf", "diffusers"):  # whose parts are written one by one
        config.image_decoder.to_public_scheduler()  # of a process that their programs do not know
    if kind == "openuni":
        import_torch("--format=openuni")
        openuni.require(config)
    if kind == "metaquery":
        metaquery.require(config)
        metaquery.names_of(config, names)
    if kind == "unilip":
        return require_unilip(config)
    if kind == "dreamllm":
        import_torch("--format=dreamllm")
        require_expressible(config)
        if tokenizer is not None and tokenizer.marks != OUR_MARKS:
            raise ValueError(
                f"the original program does not mark images by {', '.join(tokenizer.marks.tokens)}: "
                "export with --format=hf or diffusers"
            )
    for part in FORMATS[kind]:
        tower = config_of(config, part)
        if not hasattr(tower, "public"):
            continue
        if tower.public is None:
            name = part.replace("/", ".")
            raise ValueError(f"{name} of kind {tower.kind!r} has no PyTorch format: only --format=hf")
        tower.to_public()


def _warn_of_tokenizer(tokenizer: Tokenizer | None, formats: Sequence[str]) -> None:
    """Warns of what an export lacks."""
    if tokenizer is None:
        _logger.warning("the checkpoint has no tokenizer, and neither has the export")
    elif "dreamllm" in formats and tokenizer.sentencepiece_model is None:
        _logger.warning(
            "the tokenizer is not SentencePiece's: the original program's scripts miss their tokenizer.model"
        )


def _part(path: str) -> str:
    return split_path(path)[0]


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
                for name, tensor in torch_tensors(split_path(path)[1], array):
                    yield path, name, tensor
                    progress.update(tensor.size * sizes[path] // array.size)
                del array, tensor


def _export_size(sizes: Mapping[str, int], formats: Sequence[str]) -> int:
    """Bytes of all files and of the scratch file; `dreamllm` holds the towers of `diffusers` twice."""
    written = [part for kind in formats for part in FORMATS[kind]]
    written += FORMATS["diffusers"] if "dreamllm" in formats else ()
    return sum(size * (1 + written.count(_part(path))) for path, size in sizes.items())


@contextlib.contextmanager
def _naming_a_full_disk(to: str | Path) -> Iterator[None]:
    """The libraries that write have as many ways to say so; some say it only in the error's context."""
    try:
        yield
    except Exception as error:
        chain = [error]
        while chain[-1].__context__ is not None:
            chain.append(chain[-1].__context__)
        if not any("No space left on device" in str(link) for link in chain):
            raise
        raise OSError(
            f"the disk of {to} is full; nothing was kept there: free some space, or choose another --to"
        ) from error


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
