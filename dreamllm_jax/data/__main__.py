"""Makes data sets, and what belongs to them:

python -m dreamllm_jax.data prepare SOURCE --to=DIR                     a small set of all kinds of documents
python -m dreamllm_jax.data import FORMAT SOURCE --to=DIR --name=NAME   a corpus from a public layout
python -m dreamllm_jax.data sample DIR --name=NAME --to=PAGE.html       documents as the model will see them
python -m dreamllm_jax.data precompute DIR --checkpoint=MODEL           what the frozen image towers make of the images
python -m dreamllm_jax.data rows --config=FILE.py --tokenizer=DIR       how full rows get, and which to choose
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import numpy as np
from absl.flags import argparse_flags
from etils import epath

from dreamllm_jax import command_line
from dreamllm_jax.command_line import finite, not_negative, positive, share
from dreamllm_jax.data import sheet, storage, stored
from dreamllm_jax.data.batch import RowShape, SlotGroup
from dreamllm_jax.data.corpora.conversations import Llava
from dreamllm_jax.data.corpora.edits import Edit
from dreamllm_jax.data.corpora.interleaved import InstructInterleaved, Mmc4, Obelics
from dreamllm_jax.data.corpora.openmoji import OpenMoji
from dreamllm_jax.data.corpora.pairs import Folder, ImagePairs, WebDataset
from dreamllm_jax.data.corpora.plain import PlainText
from dreamllm_jax.data.corpora.records import Format
from dreamllm_jax.data.corpora.tfds_sets import Tfds
from dreamllm_jax.data.importing import Options, import_corpus
from dreamllm_jax.data.preparation import SOURCES, prepare
from dreamllm_jax.data.prompting import PUBLISHED
from dreamllm_jax.data.tokenizer import FOLDER, load_tokenizer
from dreamllm_jax.data.tokens import MODES
from dreamllm_jax.experiment import recipes
from dreamllm_jax.experiment.experiment import read_experiment
from dreamllm_jax.parallel import distributed
from dreamllm_jax.planning import rows

FORMATS: dict[str, type[Format]] = {
    "webdataset": WebDataset,
    "folder": Folder,
    "image_pairs": ImagePairs,
    "edit": Edit,
    "mmc4": Mmc4,
    "obelics": Obelics,
    "instruct_interleaved": InstructInterleaved,
    "llava": Llava,
    "text": PlainText,
    "tfds": Tfds,
    "openmoji": OpenMoji,
}


def parser() -> argparse_flags.ArgumentParser:
    """The commands and their flags."""
    top = argparse_flags.ArgumentParser(
        prog="python -m dreamllm_jax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser("prepare", help="a small set of all kinds of documents, and a tokenizer")
    add.set_defaults(main=_prepare)
    add.add_argument("source", help=f"{', '.join(SOURCES)}, or a folder with captions.jsonl or captions.csv")
    add.add_argument("--to", required=True, help="directory of the data set to make")
    add.add_argument(
        "--pairs",
        type=not_negative,
        default=0,
        help=f"how many to take; 0: all of a folder, {', '.join(f'{n} of {source}' for source, n in SOURCES.items())}",
    )
    add.add_argument(
        "--size",
        type=not_negative,
        default=0,
        help="pixels on the shorter side of a stored picture, at most; 0: 64, of scenes, which are drawn so large, 48",
    )
    add.add_argument("--seed", type=not_negative, default=0, help="of which scenes are drawn, and of what is composed")
    add.add_argument("--vocab_size", type=positive, default=512, help="ids of the tokenizer that is trained")
    add.add_argument("--tokenizer", default="", help="to use instead: a .model, a tokenizer.json, a directory")

    page = argparse.ArgumentParser(add_help=False)
    page.add_argument("--mode", choices=MODES, default="joint", help="of the page's documents")
    page.add_argument("--prompting", choices=PUBLISHED, help="whose words ask for images on the page; else none do")
    page.add_argument("--length", type=positive, default=2048, help="tokens in a row of the page")
    page.add_argument("--slots", type=not_negative, default=8, help="images to see and to paint in a row of the page")

    formats = commands.add_parser("import", help="a corpus from a public layout").add_subparsers(
        required=True, metavar="FORMAT"
    )
    for name, kind in FORMATS.items():
        add = formats.add_parser(name, help=kind.__doc__.splitlines()[0], description=kind.__doc__, parents=[page])
        add.set_defaults(main=_import, kind=kind)
        settings = {field.name: field for cls in (Options, kind) for field in dataclasses.fields(cls)}
        source = settings.pop("source").default
        optional = {} if source is dataclasses.MISSING else {"nargs": "?", "default": source}
        add.add_argument("source", help="file or directory to see", **optional)
        for field in settings.values():
            if told := field.metadata.get("help"):
                kind = finite if isinstance(field.default, float) else type(field.default)
                add.add_argument(f"--{field.name}", type=kind, default=field.default, help=told)
        add.add_argument("--to", required=True, help="directory of the data set; others of its corpora stay")
        add.add_argument("--name", required=True, help="of the corpus in the data set")
        add.add_argument("--workers", type=not_negative, default=0, help="processes; 0: one for each core")
        add.add_argument("--beam", default="", help="instead, options of Beam, as '--runner=DataflowRunner ...'")
        add.add_argument("--max_bad", type=share, default=0.5, help="largest share of records that may be unusable")
        add.add_argument("--sample", type=not_negative, default=0, help="also write DIR/NAME.html with so many")

    add = commands.add_parser("sample", help="a page of documents as the model will see them", parents=[page])
    add.set_defaults(main=_sample)
    add.add_argument("directory", help="a data set")
    add.add_argument("--name", required=True, help="one of its corpora")
    add.add_argument("--to", required=True, help="the HTML file to write")
    add.add_argument("--count", type=positive, default=32, help="how many documents")
    add.add_argument("--tokenizer", default="", help="a .model, a tokenizer.json, a directory; else the data set's own")

    add = commands.add_parser("precompute", help="what the frozen image towers make of a data set's images")
    add.set_defaults(main=_precompute)
    add.add_argument("directory", help="a data set")
    add.add_argument("--checkpoint", required=True, help="the model: an imported one, or the directory of a run")
    add.add_argument("--names", nargs="+", choices=stored.NAMES, default=["moments"], help="what to compute")
    add.add_argument("--corpora", nargs="+", default=[], help="of which corpora; default all that are not held out")
    add.add_argument(
        "--size",
        type=positive,
        default=512,
        help="pixels on a side of the painted images, which are squares: rows.dream_size",
    )
    add.add_argument("--dtype", choices=stored.DTYPES, default="bfloat16", help="type to store: data.stored_dtype")
    add.add_argument("--batch", type=positive, default=32, help="images at once on each device")
    add.add_argument(
        "--latents",
        default="",
        help="take moments from here, IMAGE_FILE.pt as OpenUni's script leaves them; one of --corpora",
    )
    distributed.add_flags(add)

    add = commands.add_parser("rows", help="how full a recipe's rows get of pictures to paint, and which to choose")
    add.set_defaults(main=_rows)
    add.add_argument("--config", required=True, help="the recipe: FILE.py[:ARGUMENT]")
    add.add_argument("--tokenizer", required=True, help="of its language model: a tokenizer.json, a directory")
    add.add_argument(
        "--captions", nargs="+", choices=rows.CAPTIONS, default=list(rows.CAPTIONS), help="whose lengths; default all"
    )
    add.add_argument("--corpus", default="", help="instead, those of this corpus: DIR/NAME of a data set")
    add.add_argument("--reads", type=not_negative, default=0, help="pictures that each document reads: 1 for edits")
    add.add_argument("--longest", type=positive, default=4096, help="tokens in a row, at most")
    return top


def _prepare(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    summary = prepare(
        arguments.source,
        arguments.to,
        pairs=arguments.pairs,
        size=arguments.size,
        vocab_size=arguments.vocab_size,
        text_tokenizer=arguments.tokenizer,
        seed=arguments.seed,
    )
    for name, counts in sorted(summary["corpora"].items()):
        print(f"{name:15} {counts['documents']:8,} documents {counts['images']:8,} images")
    print(f"{arguments.to}: {summary['vocab_size']} token ids, {time.monotonic() - started:.1f} s")


def _import(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    if arguments.sample and not arguments.tokenizer and not (epath.Path(arguments.to) / FOLDER).exists():
        raise ValueError(f"--sample={arguments.sample} shows tokens: give --tokenizer as well")

    def read(cls: type) -> Any:
        names = [field.name for field in dataclasses.fields(cls) if hasattr(arguments, field.name)]
        return cls(**{name: getattr(arguments, name) for name in names})

    summary = import_corpus(
        read(arguments.kind),
        arguments.to,
        arguments.name,
        read(Options),
        workers=arguments.workers,
        beam=arguments.beam,
        max_bad=arguments.max_bad,
    )
    counted = ", ".join(f"{summary[what]:,} {what}" for what in ("documents", "images", "tokens") if summary[what])
    print(f"{arguments.to}/{arguments.name}: {counted}, {time.monotonic() - began:.1f} s")
    for reason, count in summary["dropped"].items():
        print(f"  dropped {reason:15} {count:8,}  {', '.join(summary['examples'][reason])}")
    if arguments.sample:
        arguments.directory, arguments.count = arguments.to, arguments.sample
        arguments.to = f"{arguments.to}/{arguments.name}.html"
        _sample(arguments)


def _sample(arguments: argparse.Namespace) -> None:
    see, dream = SlotGroup(arguments.slots, 256, 224, 224), SlotGroup(arguments.slots, 64, 512, 512)  # as published
    shape = RowShape(arguments.length, (see,), (dream,))
    sheet.write_sheet(
        arguments.directory,
        arguments.name,
        arguments.to,
        arguments.count,
        shape,
        arguments.mode,
        arguments.tokenizer,
        PUBLISHED.get(arguments.prompting),
    )
    print(arguments.to)


def _precompute(arguments: argparse.Namespace) -> None:
    from dreamllm_jax.runs.load import load_model
    from dreamllm_jax.runs.precompute import precompute

    distributed.start(arguments.coordinator, arguments.num_processes, arguments.process_id, arguments.timeout)
    corpora = arguments.corpora or storage.learnt(arguments.directory)
    if arguments.latents and (len(corpora) != 1 or arguments.names != ["moments"]):
        raise ValueError(f"--latents={arguments.latents} are the moments of one corpus: name it with --corpora")
    model, params, _ = load_model(arguments.checkpoint)
    for corpus in corpora:
        for name in arguments.names:
            computed = precompute(
                arguments.directory,
                corpus,
                name,
                model,
                params,
                made_by=arguments.checkpoint,
                size=arguments.size,
                dtype=arguments.dtype,
                batch=arguments.batch,
                latents=arguments.latents,
            )
            everyone = distributed.gather(computed)  # and nobody leaves before the others are done
            if jax.process_index() == 0:
                print(f"{corpus} {name}: {sum(everyone):,} documents computed")


def _rows(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(arguments.tokenizer)
    lengths = {name: rows.captions(name) for name in arguments.captions}
    if arguments.corpus:
        place = epath.Path(arguments.corpus)
        texts = [text.text for _, one in storage.Corpus(place.parent, place.name).first(8192) for text in one.texts]
        lengths = {place.name: np.array([len(tokenizer.encode_text(text)) for text in texts])}
    file, _, argument = arguments.config.partition(":")
    experiment = read_experiment(recipes.load(file, argument).to_dict())
    for line in rows.report(experiment, tokenizer, lengths, arguments.longest, arguments.reads):
        print(line)


if __name__ == "__main__":
    command_line.run_commands(parser())
