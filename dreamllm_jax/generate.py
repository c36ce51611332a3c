"""Writes texts, paints images, tells stories:

python -m dreamllm_jax.generate text --checkpoint=DIR --to=out "Once upon a time"
python -m dreamllm_jax.generate image --checkpoint=DIR --to=out --guidance=7.5 "a red fox in the snow"
python -m dreamllm_jax.generate document --checkpoint=DIR --to=out --prompts=openings.jsonl
python -m dreamllm_jax.generate serve --checkpoint=DIR
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
from absl.flags import argparse_flags
from jax.sharding import Mesh
from tqdm import tqdm

from dreamllm_jax import command_line
from dreamllm_jax.command_line import add_guidance_interval, finite, not_negative, positive, seed_number
from dreamllm_jax.common.directories import read_text
from dreamllm_jax.data import images, lines
from dreamllm_jax.data.corpora import media
from dreamllm_jax.data.document import Image, Segment, Text
from dreamllm_jax.data.templates import NAMES
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.diffusion import samplers
from dreamllm_jax.generation.documents import generate_documents, load_document, png, save_document
from dreamllm_jax.generation.images import generate_images, require_interval, require_sampler, require_size
from dreamllm_jax.generation.prompts import Painted
from dreamllm_jax.generation.results import INDEX, Results
from dreamllm_jax.generation.text import Sampling
from dreamllm_jax.generation.texts import generate_texts
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, use
from dreamllm_jax.runs.load import load_model

HERE = "<image>"
Loaded = tuple[DreamLLM, dict, Tokenizer]
Prompts = Sequence[Sequence[Segment]]
Made = list[list[Segment]]  # what follows each prompt


def main(arguments: argparse.Namespace) -> None:
    begun = _begun(arguments)
    words = arguments.prompt or ([""] if begun and not arguments.prompts else [])  # nothing more need be said
    prompts = [[*begun, *prompt] for prompt in load_prompts(words, arguments.prompts, arguments.image)]
    if vars(arguments).get("template") and [] in prompts:
        raise ValueError(f"prompt {prompts.index([]) + 1} is empty: with --template it is a user's turn, with words")
    prompts = [prompt for prompt in prompts for _ in range(getattr(arguments, "images", 1))]
    if arguments.command != "image":
        _sampling(arguments, [0])  # which settings it refuses is told at once
    mesh, devices = _mesh(arguments)
    loaded = load_model(arguments.checkpoint, mesh, devices, vars(arguments).get("template", ""))
    if arguments.command != "text":
        painting = _painting(arguments)
        require_size(loaded[0], painting["size"])
        require_sampler(loaded[0], painting["sampler"])
        require_interval(painting["guidance_interval"])
    apart = ("main", "make", "continue", "prompt", "prompts", "image", "to", "batch", "seed", "fsdp", "tensor")
    settings = {name: value for name, value in vars(arguments).items() if name not in apart}
    with (
        use(mesh, devices),
        Results(arguments.to, settings) as results,
        tqdm(total=len(prompts), unit=arguments.command) as progress,
    ):
        for start in range(0, len(prompts), arguments.batch):
            given = prompts[start : start + arguments.batch]
            seeds = range(arguments.seed + start, arguments.seed + start + len(given))
            made = arguments.make(arguments, loaded, given, seeds)
            for prompt, seed, result in zip(given, seeds, made, strict=True):
                name = results.add(prompt, result, seed)
                if arguments.command == "document":
                    save_document([*prompt, *result], Path(arguments.to) / name)
                progress.update()
    print(Path(arguments.to) / INDEX)


def write(arguments: argparse.Namespace, loaded: Loaded, prompts: Prompts, seeds: Sequence[int]) -> Made:
    """A text for each prompt."""
    settings = _chosen(arguments, "max_tokens", "stop", "beams", "length_penalty", "template")
    texts = generate_texts(*loaded, prompts, sampling=_sampling(arguments, seeds), **settings)
    tqdm.write("\n".join(texts))
    return [[Text(text)] for text in texts]


def paint(arguments: argparse.Namespace, loaded: Loaded, prompts: Prompts, seeds: Sequence[int]) -> Made:
    """An image for each prompt."""
    negative = [Text(arguments.negative)] if arguments.negative else []
    settings = _chosen(arguments, "image_guidance") | _painting(arguments)
    pixels = generate_images(*loaded, prompts, seeds=seeds, negative=negative, **settings)
    return [[Painted(png(picture))] for picture in pixels]


def tell(arguments: argparse.Namespace, loaded: Loaded, prompts: Prompts, seeds: Sequence[int]) -> Made:
    """How a document that begins with each prompt goes on."""
    documents: Made = [[] for _ in prompts]
    settings = _chosen(arguments, "max_tokens", "max_images", "template") | _painting(arguments)
    events = generate_documents(*loaded, prompts, seeds=seeds, sampling=_sampling(arguments, seeds), **settings)
    for event in tqdm(events, unit="part", leave=False):
        if event.complete:
            documents[event.row].append(event.segment)
    return documents


def serve(arguments: argparse.Namespace) -> None:
    try:
        from dreamllm_jax.serving import server
    except ModuleNotFoundError as error:
        raise ImportError(f"the chat page needs {error.name}: pip install 'dreamllm_jax[serve]'") from None
    with server.listen(arguments.host, arguments.port) as listening:
        mesh, devices = _mesh(arguments)
        model, params, tokenizer = load_model(arguments.checkpoint, mesh, devices, arguments.template)
        require_sampler(model, samplers.SamplerConfig(arguments.sampler))
        painting = {"size": require_size(model, arguments.size), "sampler": arguments.sampler}
        within = functools.partial(use, mesh, devices)
        reply = server.make_reply(model, params, tokenizer, template=arguments.template, within=within, **painting)
        about = {"checkpoint": arguments.checkpoint, "template": arguments.template}
        app = server.make_app(reply, tokenizer.vocab_size, **about, names=[arguments.host])
        host, port = listening.getsockname()[:2]
        print(f"http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
        server.run(app, listening)


def _mesh(arguments: argparse.Namespace) -> tuple[Mesh, ShardingConfig]:
    """The devices over which the model is split, as --fsdp and --tensor say.

    Raises:
      ValueError: there are fewer.
    """
    devices, wanted = ShardingConfig(fsdp=arguments.fsdp, tensor=arguments.tensor), arguments.fsdp * arguments.tensor
    if wanted > jax.device_count():
        raise ValueError(
            f"--fsdp={arguments.fsdp} and --tensor={arguments.tensor} need {wanted} devices, there are "
            f"{jax.device_count()}"
        )
    return make_mesh(devices, jax.devices()[:wanted]), devices


def _begun(arguments: argparse.Namespace) -> list[Segment]:
    """The document that is to be continued.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is to be taken for turns.
    """
    directory = vars(arguments).get("continue")
    if not directory:
        return []
    if arguments.template:
        raise ValueError("--continue goes on with a document, not with turns: leave --template out")
    return load_document(directory)


def _chosen(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def _sampling(arguments: argparse.Namespace, seeds: Sequence[int]) -> Sampling | None:
    """None where the most probable tokens are asked for.

    Raises:
      ValueError: a setting out of its range.
    """
    sampling = Sampling.of(seeds, **_chosen(arguments, "temperature", "top_k", "top_p", "repetition_penalty"))
    return None if arguments.temperature == 0 and arguments.repetition_penalty == 1 else sampling


def _painting(arguments: argparse.Namespace) -> dict[str, Any]:
    sampler = samplers.SamplerConfig(
        arguments.sampler,
        arguments.steps,
        arguments.timestep_spacing,
        use_karras_sigmas=arguments.use_karras_sigmas,
        eta=arguments.eta,
    )
    return {"sampler": sampler, **_chosen(arguments, "size", "guidance", "rescale", "guidance_interval")}


def load_prompts(words: Sequence[str], file: str, pictures: Sequence[str]) -> list[list[Segment]]:
    """The prompts given as words, or in a file: one a line, or JSON lines of `prompt` and `images`; `-` is the input.

    Args:
      pictures: files of images that every prompt of `words` has, where it says `<image>`, or before it.

    Raises:
      ValueError, FileNotFoundError: no prompt, a line that is not as described, or an image that is not there.
    """
    if bool(words) == bool(file):
        raise ValueError("give prompts either as words or in a file (--prompts=FILE, - for standard input)")
    if words:
        return [_segments(word, pictures, Path()) for word in words]
    if pictures:
        raise ValueError("--image is of prompts that are given as words; in a file, JSON lines name their `images`")
    kind = lines.kind(file)
    if kind == ".json":
        raise ValueError(f"{file}: prompts are one a line, or JSON lines (.jsonl) of `prompt` and `images`")
    try:
        text = sys.stdin.read() if file == "-" else read_text(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"the input is not UTF-8: {error}") from None
    prompts = []
    try:
        for number, item in lines.read(text, kind, "prompt"):
            item = {"prompt": item} if isinstance(item, str) else item
            words, named = item["prompt"], item.get("images") or []
            others = {name: value for name, value in item.items() if name != "images"}
            unknown = media.tells(others, media.IMAGES) or media.tells(others, media.OTHERS)
            if unknown or not isinstance(words, str) or not isinstance(named, list):
                raise TypeError(f"line {number} has {item}")
            prompts.append(_segments(words, named, Path(file).parent))
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{file} is not lines of {{"prompt": "...", "images": ["..."]}}: {error}') from error
    if not prompts:
        raise ValueError(f"{file} has no prompts")
    return prompts


def _segments(text: str, pictures: Sequence[str], folder: Path) -> list[Segment]:
    if not lines.is_whole(text):
        raise ValueError(f"the prompt {text!r} has halves of characters, which no tokenizer reads")
    parts = text.split(HERE)
    if len(parts) == 1 and pictures:
        parts = [*[""] * len(pictures), text]
    if len(parts) != len(pictures) + 1:
        raise ValueError(f"{text!r} has {len(parts) - 1} {HERE} for {len(pictures)} images")
    segments: list[Segment] = []
    for part, picture in zip(parts, [*pictures, None], strict=True):
        if part:
            segments.append(Text(part))
        if picture is not None:
            if not (folder / picture).is_file():
                raise FileNotFoundError(f"the image {folder / picture} is missing")
            images.decode_named(data := (folder / picture).read_bytes(), folder / picture)
            segments.append(Image(data))
    return segments


def _port(text: str) -> int:
    if not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, got {text}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be pixels, 512 or 512x768 (height x width), got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def make_parser() -> argparse_flags.ArgumentParser:
    parser = argparse_flags.ArgumentParser(prog="python -m dreamllm_jax.generate", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    checkpoint, template, painting = (argparse.ArgumentParser(add_help=False) for _ in range(3))  # of several commands
    checkpoint.add_argument(
        "--checkpoint", required=True, help="a run or an imported model: DIR, DIR@STEP, DIR@average"
    )
    checkpoint.add_argument(
        "--fsdp", type=positive, default=1, help="devices over which weights, and a batch's results, are split"
    )
    checkpoint.add_argument("--tensor", type=positive, default=1, help="devices over which each layer is split")
    template.add_argument("--template", default="", choices=["", *NAMES], help="prompts are a user's turns")
    painting.add_argument("--size", type=_size, help="pixels, 512 or 512x768 (height x width)")
    known = get_args(samplers.Name)
    painting.add_argument("--sampler", choices=known, help="if not given, the image decoder's own")
    for command, make, parents, what in (
        ("text", write, [checkpoint, template], "texts that go on with prompts, or answer them"),
        ("image", paint, [checkpoint, painting], "pictures for prompts"),
        ("document", tell, [checkpoint, template, painting], "texts with pictures in them"),
    ):
        add = commands.add_parser(command, parents=parents, help=what)
        add.set_defaults(main=main, make=make)
        add.add_argument("prompt", nargs="*", help=f"prompts; {HERE} stands for an image")
        add.add_argument("--prompts", default="", help="a file of prompts, one a line or JSON lines; - for the input")
        add.add_argument("--image", action="append", default=[], help="an image of the prompts; may be repeated")
        add.add_argument("--to", required=True, help="a new directory for the results")
        add.add_argument("--seed", type=seed_number, default=0, help="of the first result; the next have the next ones")
        add.add_argument("--batch", type=positive, default=8, help="results at a time")
        if template in parents:
            add.add_argument("--max_tokens", type=positive, default=256, help="of a result; %(default)s if not given")
            add.add_argument("--temperature", type=finite, default=0.0, help="0, the default: the most probable tokens")
            add.add_argument(
                "--top_k", type=not_negative, default=0, help="only so many of the most probable tokens; 0: all"
            )
            add.add_argument("--top_p", type=finite, default=1.0, help="of the most probable, this share; 1: all")
            add.add_argument(
                "--repetition_penalty", type=finite, default=1.0, help="of tokens that were there; 1: none"
            )
        if painting in parents:
            add.add_argument("--steps", type=positive, default=50, help="of denoising; %(default)s if not given")
            spacings = get_args(samplers.Spacing)
            add.add_argument(
                "--timestep_spacing", default="trailing", choices=spacings, help="%(default)s if not given"
            )
            add.add_argument("--use_karras_sigmas", action="store_true", help="noise levels of Karras et al. 2022")
            add.add_argument("--eta", type=finite, default=0.0, help="fresh noise of ddim, from 0 to 1; 0 if not given")
            add.add_argument("--guidance", type=finite, default=3.5, help="1 for none; %(default)s if not given")
            add.add_argument("--rescale", type=finite, default=0.0, help="of guided predictions, from 0, none, to 1")
            add_guidance_interval(add)
        if command == "text":
            add.add_argument("--stop", action="append", default=[], help="a string that ends a text; may be repeated")
            add.add_argument("--beams", type=positive, default=1, help="of beam search; 1: none")
            add.add_argument("--length_penalty", type=finite, default=1.0, help="of beams: above 1 for longer texts")
        elif command == "image":
            add.add_argument("--negative", default="", help="what is not to be painted")
            add.add_argument(
                "--image_guidance", type=finite, default=1.0, help="by the images of prompts that are edits; 1 for none"
            )
            add.add_argument("--images", type=positive, default=1, help="images of each prompt")
        else:
            add.add_argument(
                "--max_images", type=not_negative, default=4, help="of a document; %(default)s if not given"
            )
            add.add_argument("--continue", default="", help="a document saved before: each prompt goes on with it")
    add = commands.add_parser("serve", parents=[checkpoint, template, painting], help="a chat page in the browser")
    add.set_defaults(main=serve)
    add.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for whoever can reach this machine; no password")
    add.add_argument("--port", type=_port, default=8000, help="0 for a free one")
    return parser


if __name__ == "__main__":
    command_line.run_commands(make_parser())
