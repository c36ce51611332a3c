"""Checkpoints from PyTorch to ours and back:

python -m dreamllm_jax.convert import --language-model=DIR --vision-encoder=DIR --image-decoder=DIR --to=DIR
python -m dreamllm_jax.convert import --vision-language=DIR --image-decoder=DIR --to=DIR
python -m dreamllm_jax.convert import --dreamllm=DIR --to=DIR
python -m dreamllm_jax.convert import --openuni=FILE --vision-language=DIR --image-decoder=DIR --to=DIR
python -m dreamllm_jax.convert import --metaquery=DIR --to=DIR
python -m dreamllm_jax.convert export --checkpoint=DIR[@STEP] --format=dreamllm --to=DIR
python -m dreamllm_jax.convert verify --checkpoint=DIR[@STEP] --torch=DIR
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from absl.flags import argparse_flags

from dreamllm_jax import command_line
from dreamllm_jax.checkpoints import saved
from dreamllm_jax.common.former_names import PARTS as FORMER_NAMES
from dreamllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from dreamllm_jax.data.vocabulary import OUR_MARKS, ImageMarks
from dreamllm_jax.interop import verify
from dreamllm_jax.interop.assemble import assemble
from dreamllm_jax.interop.conversion import DTYPES, FORMATS, export_model, import_model
from dreamllm_jax.interop.dreamllm import open_dreamllm
from dreamllm_jax.interop.image_decoder import open_image_decoder
from dreamllm_jax.interop.language_model import open_language_model
from dreamllm_jax.interop.metaquery import open_metaquery
from dreamllm_jax.interop.openuni import open_openuni
from dreamllm_jax.interop.source import PARTS, Source
from dreamllm_jax.interop.vision_encoder import open_vision_encoder
from dreamllm_jax.interop.vision_language import open_visual_projector
from dreamllm_jax.towers.connectors.projector import IdentityConfig, ProjectorConfig
from dreamllm_jax.towers.connectors.transformer import TransformerConfig

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TOWERS = ("language_model", "vision_encoder", "image_decoder")
_LAYERS = TransformerConfig.PUBLISHED
_NAMED = ("vision_language", "image_decoder")  # the towers of those that paint by queries
_WHOLES = ("openuni", "metaquery", "dreamllm")  # checkpoints of programs
# What a model that sees has of its own.
_SEEING = (*_TOWERS[:2], "select_layer", "visual_projector", "visual_layernorm")

# What is begun when towers are joined, by flag: the defaults.
_FRESH = {
    "num_queries": 64,
    "select_layer": None,
    "visual_projector": ProjectorConfig("linear"),
    "connector": ProjectorConfig("linear"),
    "visual_layernorm": False,
    "new_tokens": "normal",
    "image_marks": None,
    "seed": 0,
}


def parser() -> argparse_flags.ArgumentParser:
    """The commands and their flags."""
    top = argparse_flags.ArgumentParser(
        prog="python -m dreamllm_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="import|export|verify")

    add = commands.add_parser("import", help="PyTorch checkpoints -> a checkpoint of ours")
    add.set_defaults(main=_import, **_FRESH)
    add.add_argument("--to", required=True, help="directory to write, local or gs://")
    add.add_argument("--language-model", type=Path, help="such as Vicuna: a Hugging Face directory, or a .gguf file")
    add.add_argument(
        "--vision-encoder", type=Path, help="such as CLIP, whole or its vision tower: likewise a directory"
    )
    add.add_argument(
        "--vision-language", type=Path, help="such as LLaVA, instead of the two: a directory with both, and a projector"
    )
    add.add_argument("--image-decoder", type=Path, help="Stable Diffusion or SANA: a diffusers directory")
    add.add_argument("--dreamllm", type=Path, help="a checkpoint of the original program, instead of the three")
    add.add_argument("--openuni", type=Path, metavar="FILE", help="OpenUni's: its .pth; the towers' shapes beside it")
    add.add_argument("--connector-heads", type=command_line.positive, help="of OpenUni's connector, if not 64 wide")
    add.add_argument("--metaquery", type=Path, help="MetaQuery's: a directory, which names those of its towers")
    add.add_argument("--tokenizer", type=Path, help="tokenizer, if not the one beside the language model")
    add.add_argument(
        "--dtype",
        type=_dtypes,
        default={},
        metavar="TYPE|PART:TYPE,...",
        help="storage type of everything, or of parts such as language_model:float32; default: as it is stored",
    )
    _refuse_former_names(add, "llama", "clip", "diffusion", "condition_projector")
    add = add.add_argument_group("what is not in the three towers; not with --dreamllm")
    add.add_argument("--num-queries", type=command_line.positive, help="dream queries")
    add.add_argument("--select-layer", type=int, help="hidden state of the vision encoder that is read")
    add.add_argument(
        "--visual-projector",
        type=lambda text: IdentityConfig() if text == IdentityConfig.kind else _projector(text),
        metavar="linear|mlp:DEPTH|conv|identity",
        help="from the vision encoder to the language model",
    )
    add.add_argument(
        "--connector",
        type=lambda text: TransformerConfig(**_LAYERS[text]) if text in _LAYERS else _projector(text),
        metavar=f"linear|mlp:DEPTH|conv|{'|'.join(_LAYERS)}",
        help="from the language model to the image decoder",
    )
    add.add_argument("--visual-layernorm", action="store_true", help="a LayerNorm after the visual projector")
    add.add_argument("--new-tokens", choices=("normal", "mean"), help="embeddings of new tokens")
    add.add_argument(
        "--image-marks",
        type=_marks,
        metavar="ours|START,PATCH,END",
        help="tokens of the tokenizer around and at an image that is read; default: those made for it, else ours",
    )
    add.add_argument("--seed", type=command_line.seed_number, help="of what begins at random")

    add = commands.add_parser("export", help="a checkpoint of ours -> PyTorch's formats")
    add.set_defaults(main=_export)
    add.add_argument("--checkpoint", required=True, metavar="DIR[@STEP]", help="imported model or run's directory")
    add.add_argument(
        "--format", required=True, choices=(*FORMATS, "all"), help="all that can express it: a folder for each"
    )
    add.add_argument("--to", required=True, help="local directory to write")
    add.add_argument("--dtype", choices=tuple(DTYPES), default="", help="type of all tensors; default: as stored")
    add.add_argument("--max-shard-size", type=_bytes, default=_bytes("5GB"), help="of one file, such as 5GB")
    for name in _NAMED:
        add.add_argument(_flag(name), metavar="NAME", help="of metaquery: by which its program will look for it")
    add.add_argument("--location", default="", help="where dreamllm's folder will be used, if not at --to")
    add.add_argument("--no-check", dest="check", action="store_false", help="do not compare with torch afterwards")

    add = commands.add_parser("verify", help="compare a checkpoint of ours with a PyTorch directory")
    add.set_defaults(main=_verify)
    add.add_argument("--checkpoint", required=True, metavar="DIR[@STEP]", help="imported model or run's directory")
    add.add_argument(
        "--torch", required=True, type=Path, help="directory in one of the formats of export, or OpenUni's file"
    )
    add.add_argument("--vision-encoder", type=Path, help="of dreamllm: its directory, if not where config.json says")
    add.add_argument("--image-decoder", type=Path, help="of dreamllm: the diffusers directory, likewise")
    _refuse_former_names(add, "clip", "diffusion")
    return top


class _Renamed(argparse.Action):
    """A flag as it was called before."""

    def __call__(self, parser, namespace, values, option_string=None):
        sys.exit(f"error: {option_string} is called {self.dest} now")


def _refuse_former_names(parser: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        flag, now = (_flag(text) for text in (name, FORMER_NAMES[name]))
        parser.add_argument(
            flag, action=_Renamed, dest=now, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def _dtypes(text: str) -> dict[str, str]:
    chosen = {}
    for item in text.split(","):
        part, _, dtype = item.rpartition(":")
        if part in FORMER_NAMES:
            raise argparse.ArgumentTypeError(f"{part!r} is called {FORMER_NAMES[part]} now")
        parts = [name for name in PARTS if not part or f"{name}/".startswith(f"{part}/")]
        if dtype not in DTYPES or not parts:
            raise argparse.ArgumentTypeError(
                f"{item!r} is not PART:TYPE; parts are {', '.join(PARTS)}, types {', '.join(DTYPES)}"
            )
        chosen |= dict.fromkeys(parts, dtype)
    return chosen


def _projector(text: str) -> ProjectorConfig:
    kind, _, depth = text.partition(":")
    try:
        return ProjectorConfig(kind, int(depth or (2 if kind == "mlp" else 1)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _marks(text: str) -> ImageMarks:
    if text == "ours":
        return OUR_MARKS
    start, patch, end = text.split(",") if text.count(",") == 2 else ("", "", "")
    if not patch:
        raise argparse.ArgumentTypeError(f"{text!r} is not START,PATCH,END; START and END may be empty")
    return ImageMarks(start or None, patch, end or None)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*([KMG]?I?B?)", text.upper())
    if not match or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def _import(arguments: argparse.Namespace) -> None:
    if wholes := [name for name in _WHOLES if getattr(arguments, name) is not None]:
        tower = "vision_language" if wholes[0] == "dreamllm" else "vision_encoder"  # that it does not ask for
        _require_left_out(arguments, wholes[0], (*wholes[1:], "language_model", tower, *_FRESH))
    if arguments.connector_heads and not arguments.openuni:
        raise ValueError("--connector-heads is of --openuni: leave it out")
    if arguments.openuni or arguments.metaquery:
        source, tokenizer = _of_queries(arguments)
        return import_model(source, tokenizer, arguments.to, arguments.dtype)
    towers = {_flag(name): getattr(arguments, name) for name in _TOWERS}
    if arguments.vision_language is not None:
        _require_left_out(arguments, "vision_language", _SEEING)
        towers |= dict.fromkeys(map(_flag, _TOWERS[:2]), arguments.vision_language)
    missing = [flag for flag, value in towers.items() if value is None]
    if arguments.dreamllm is None and missing:
        raise ValueError(f"give {', '.join(missing)} as well, or --dreamllm=DIR")
    source, tokenizer = _assembled(arguments) if arguments.dreamllm is None else _original(arguments)
    import_model(source, tokenizer, arguments.to, arguments.dtype)


def _of_queries(arguments: argparse.Namespace) -> tuple[Source, Tokenizer]:
    places = {name: getattr(arguments, name) for name in _NAMED}
    missing = [_flag(name) for name, place in places.items() if place is None]
    if arguments.metaquery:
        return open_metaquery(arguments.metaquery, **places, tokenizer=arguments.tokenizer)
    if missing:
        raise ValueError(f"give {', '.join(missing)} as well: --openuni has not the shapes of its towers")
    return open_openuni(arguments.openuni, **places, heads=arguments.connector_heads, tokenizer=arguments.tokenizer)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _require_left_out(arguments: argparse.Namespace, whole: str, names: Iterable[str]) -> None:
    """Refuses flags for what a model brings along itself."""
    given = [_flag(name) for name in names if getattr(arguments, name) != _FRESH.get(name)]
    if given:
        raise ValueError(f"{_flag(whole)} has its own: leave out {', '.join(given)}")


def _assembled(arguments: argparse.Namespace) -> tuple[Source, Tokenizer]:
    whole = arguments.vision_language
    visual = open_visual_projector(whole) if whole else arguments.visual_projector
    language_model = open_language_model(whole or arguments.language_model)
    vision_encoder = open_vision_encoder(whole or arguments.vision_encoder, arguments.select_layer, joined=bool(whole))
    image_decoder = open_image_decoder(arguments.image_decoder)
    tokenizer = load_tokenizer(arguments.tokenizer or whole or arguments.language_model, arguments.image_marks)
    if tokenizer.marks != OUR_MARKS:
        print(
            f"images are read as {' '.join(tokenizer.marks.tokens)}, which the tokenizer has for them", file=sys.stderr
        )
    _tell_of_rows(language_model.config.vocab_size, tokenizer)
    if isinstance(visual, ProjectorConfig):
        eps = getattr(vision_encoder.config, "layer_norm_eps", visual.layer_norm_eps)
        visual = dataclasses.replace(visual, post_layernorm=arguments.visual_layernorm, layer_norm_eps=eps)
    elif arguments.visual_layernorm:
        raise ValueError(f"a visual projector of kind {visual.kind!r} has no norm: leave out --visual-layernorm")
    source = assemble(
        language_model,
        vision_encoder,
        image_decoder,
        special_tokens=tokenizer.special,
        vocab_size=tokenizer.vocab_size,
        new_tokens=tokenizer.new_tokens,
        init=arguments.new_tokens,
        num_queries=arguments.num_queries,
        visual_projector=visual,
        connector=arguments.connector,
        seed=arguments.seed,
    )
    return source, tokenizer


def _tell_of_rows(rows: int, tokenizer: Tokenizer) -> None:
    """Tells which rows of the language model begin anew though they were there, and which tokens it had none for."""
    taken = [index for index in tokenizer.new_tokens if index < rows]
    without = [index for index in range(rows, tokenizer.vocab_size) if index not in tokenizer.new_tokens]
    for ids, what in (
        (taken, "rows of the language model are of no token of its tokenizer, and begin anew"),
        (without, "tokens of the tokenizer have no rows in the language model, where they begin at random"),
    ):
        if ids:
            names = ", ".join(f"{tokenizer.fast.id_to_token(index)} {index}" for index in ids[:10])
            print(f"warning: {len(ids)} {what}: {names}{', ...' if len(ids) > 10 else ''}", file=sys.stderr)


def _original(arguments: argparse.Namespace) -> tuple[Source, Tokenizer | None]:
    source = open_dreamllm(arguments.dreamllm, **{name: getattr(arguments, name) for name in _TOWERS[1:]})
    try:
        tokenizer = load_tokenizer(arguments.tokenizer or arguments.dreamllm)
    except FileNotFoundError as error:
        if arguments.tokenizer:
            raise
        print(f"warning: {error}: the checkpoint has no tokenizer; --tokenizer gives it one", file=sys.stderr)
        return source, None
    config, padding = source.config, tokenizer.special.pad
    if padding < config.language_model.vocab_size:  # no token sees it: it need not be the checkpoint's
        padded = dataclasses.replace(config.special_tokens, pad=padding)
        source = dataclasses.replace(source, config=dataclasses.replace(config, special_tokens=padded))
    if tokenizer.special != source.config.special_tokens:
        raise ValueError(
            f"the tokenizer's special tokens are {tokenizer.special}, those of {arguments.dreamllm}/config.json "
            f"{config.special_tokens}"
        )
    return source, tokenizer


def _export(arguments: argparse.Namespace) -> None:
    formats = None if arguments.format == "all" else (arguments.format,)
    passed = export_model(
        saved.find(arguments.checkpoint).merged(),
        arguments.to,
        formats,
        arguments.dtype,
        arguments.max_shard_size,
        arguments.location,
        arguments.check,
        {name: getattr(arguments, name) for name in _NAMED},
    )
    if not passed:
        sys.exit(f"error: {arguments.to} was written, but does not compute the same: see the table above")


def _verify(arguments: argparse.Namespace) -> None:
    checkpoint = saved.find(arguments.checkpoint).merged()
    towers = {name: getattr(arguments, name) for name in _TOWERS[1:]}
    differences = verify.compare(checkpoint.config, checkpoint.part, arguments.torch, towers=towers)
    print(verify.table(differences))
    if not all(difference.passed for difference in differences):
        sys.exit(f"error: {arguments.checkpoint} and {arguments.torch} do not compute the same")


if __name__ == "__main__":
    command_line.run_commands(parser())
