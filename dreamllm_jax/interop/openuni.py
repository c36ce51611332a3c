"""Checkpoints of OpenUni (arXiv 2505.23661, wusize/OpenUni): InternVL3, learned queries, a connector, and SANA.

Its program saves one pickle, the model's whole state or what was trained of it (`OpenUniInternVL3SANAHF` of
`src/models/openuni`): `meta_queries`, `connector.*`, `projector.*`, and perhaps `lmm.*`, `transformer.*`, `vae.*`,
which it loads over the towers in their own directories.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dreamllm_jax.data.prompting import PUBLISHED
from dreamllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from dreamllm_jax.data.vocabulary import PaintMarks
from dreamllm_jax.interop import files
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.query_models import (
    AUTOENCODER,
    BACKBONE,
    CONNECTOR,
    DENOISER,
    QUERIES,
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
from dreamllm_jax.interop.vision_language import VISION
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.connectors.transformer import TransformerConfig

FILE = "openuni.pth"
PREFIXES = {BACKBONE: "lmm.", DENOISER: "transformer.", AUTOENCODER: "vae."}
HEAD_DIM = 64  # of the connector's heads, as published
META_QUERIES = "meta_queries"
_LAYERS = "connector.layers."
# What of InternVL's begins and ends an image that is read; its queries follow the first, and nothing follows them.
_MARKS = PaintMarks("<img>", "</img>")
# Placement of the projectors -> how names begin there, and in our connector.
PLACEMENTS = {
    "enc_proj": {"connector.": "", "projector.": "projector."},
    "proj_enc": {"connector.": "", "projector.": "input_projector."},
    "proj_enc_proj": {"connector.": "", "projector.0.": "input_projector.", "projector.1.": "projector."},
}


def open_openuni(
    file: Path, vision_language: Path, image_decoder: Path, heads: int | None = None, tokenizer: Path | None = None
) -> tuple[Source, Tokenizer]:
    """A checkpoint, and its tokenizer.

    Args:
      vision_language, image_decoder: directories of the towers: their shapes, and what the file has not.
      heads: of the connector, which no shape tells; None for heads of `HEAD_DIM` channels.
      tokenizer: if not the one beside the vision-language model.

    Raises:
      FileNotFoundError, ValueError: naming the file, setting or tensor that is missing, unexpected or wrongly shaped.
      ImportError: PyTorch is not installed.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a directory: OpenUni's checkpoint is one file, such as {FILE}")
    stored, own = grouped(files.open_tensors(file), PREFIXES, file)
    queries = own.pop(META_QUERIES, None)
    if queries is None or len(queries.shape) != 2:
        raise ValueError(f"{file} has no {META_QUERIES}: it is no checkpoint of OpenUni")
    types = (
        ("internvl_chat",) if BACKBONE in stored else ("internvl_chat", "internvl")
    )  # the file has the former's names
    towers = open_towers(vision_language, image_decoder, stored, types)
    squeezed = dataclasses.replace(towers.parts[VISION].config, max_tiles=1)  # it sees a picture as one tile
    towers.parts[VISION] = dataclasses.replace(towers.parts[VISION], config=squeezed)
    width = towers.language_model.config.width
    if queries.shape[1] != width:
        raise ValueError(
            f"{file}: {META_QUERIES} are {queries.shape[1]} wide, the language model of {vision_language} {width}: it "
            "was trained with another"
        )
    found = _connector(own, width, heads, file)
    words = load_tokenizer(tokenizer or vision_language, painting=_MARKS)
    return joined(towers, found, queries, words, PUBLISHED["openuni"], file), words


def _connector(
    tensors: Mapping[str, Tensor], width: int, heads: int | None, file: Path
) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """The connector's settings, from the shapes of its tensors, and these by our names."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise ValueError(f"{file} has no {name}: it is not all of a checkpoint of OpenUni")
        return tensors[name].shape

    inner, own = shape(f"{_LAYERS}0.mlp.fc1.weight")
    placement = _placement(tensors, shape, width, own)
    head_dim, rest = divmod(own, heads) if heads else (HEAD_DIM, own % HEAD_DIM)
    if rest:
        unit = f"{heads} heads" if heads else f"{HEAD_DIM} channels a head: say how many it has by --connector-heads"
        raise ValueError(f"{file}: the connector is {own} wide, which is no multiple of {unit}")
    settings = TransformerConfig(
        layer="siglip",
        num_hidden_layers=layers_of(tensors, _LAYERS),
        hidden_size=None if placement == "enc_proj" else own,
        intermediate_size=inner,
        head_dim=head_dim,
        depth=int(placement != "proj_enc"),
    )
    return settings, to_ours(tensors, PLACEMENTS[placement], file)


def _placement(tensors: Mapping[str, Tensor], shape, width: int, own: int) -> str:
    """Where projectors stand, `proj_type`. One between equal widths may be either; the published one follows."""
    if "projector.0.weight" in tensors or "projector.1.weight" in tensors:
        return "proj_enc_proj"
    _, inputs = shape("projector.weight")
    return "enc_proj" if (own, inputs) == (width, width) else "proj_enc"


def placement_of(connector: TransformerConfig) -> str:
    """Where a connector's projectors stand, `proj_type`."""
    if connector.hidden_size is None:
        return "enc_proj"
    return "proj_enc_proj" if connector.depth else "proj_enc"


def require(config: DreamLLMConfig) -> None:
    """Raises ValueError naming what OpenUni's program does not know."""
    decoder, connector, plain = config.image_decoder, config.connector, TransformerConfig()
    problems = {
        f"vision encoder of kind {config.vision_encoder.kind!r}": layout_name(config) != "internvl_chat",
        f"image decoder of kind {decoder.kind!r}": decoder.kind != "sana",
        f"connector of kind {connector.kind!r}": connector.kind != "transformer",
    }
    if not any(problems.values()):
        known = ("layer", "num_hidden_layers", "hidden_size", "intermediate_size", "head_dim", "depth")
        known += ("initializer_range",)
        problems = {
            f"language model of kind {config.language_model.kind!r}": config.language_model.kind != "qwen2",
            "connector.layer other than 'siglip'": connector.layer != "siglip",
            "connector.depth over 1": connector.depth > 1 or (connector.hidden_size is None and connector.depth == 0),
            **{
                f"connector.{field.name}": getattr(connector, field.name) != getattr(plain, field.name)
                for field in dataclasses.fields(connector)
                if field.name not in known
            },
        }
    for name, problem in problems.items():
        if problem:
            raise ValueError(f"OpenUni's program has no {name}: export with --format=hf or diffusers")


def write(directory: Path, config: DreamLLMConfig, tensors: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes the file that its program loads, with all towers in it.

    Args:
      tensors: part of the parameter tree -> torch name -> array.

    Raises:
      ValueError: as of `require`.
    """
    require(config)
    (queries,) = tensors[QUERIES].values()
    found = {META_QUERIES: queries} | tower_tensors(config, tensors, PREFIXES)
    found |= to_theirs(tensors[CONNECTOR], PLACEMENTS[placement_of(config.connector)])
    head, embedding = (
        f"{PREFIXES[BACKBONE]}language_model.{name}.weight" for name in ("lm_head", "model.embed_tokens")
    )
    found.setdefault(head, found[embedding])  # a state has both, tied or not
    files.write_pickle(directory / FILE, found, files.STATE)
