"""Makes a data set that can be trained on:

python -m dreamllm_jax.data prepare SOURCE --to=DIR
"""

import argparse
import time

from absl.flags import argparse_flags

from dreamllm_jax import command_line
from dreamllm_jax.data.preparation import prepare


def parser() -> argparse_flags.ArgumentParser:
    """The commands and their flags."""
    top = argparse_flags.ArgumentParser(
        prog="python -m dreamllm_jax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = top.add_subparsers(required=True, metavar="prepare").add_parser("prepare", help="pictures -> documents")
    add.set_defaults(main=_prepare)
    add.add_argument("source", help="openmoji, photographs, or a folder with captions.jsonl or captions.csv")
    add.add_argument("--to", required=True, help="directory of the data set to make")
    add.add_argument("--pairs", type=int, default=0, help="captioned pictures to take; 0: 24, or all of a folder")
    add.add_argument("--size", type=int, default=64, help="pixels on the shorter side of a stored picture, at most")
    add.add_argument("--vocab_size", type=int, default=512, help="ids of the tokenizer that is trained")
    add.add_argument("--tokenizer", default="", help="to use instead: a .model, a tokenizer.json, a directory")
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
    )
    for name, counts in sorted(summary["corpora"].items()):
        print(f"{name:15} {counts['documents']:8,} documents {counts['images']:8,} images")
    print(f"{arguments.to}: {summary['vocab_size']} token ids, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    command_line.run_commands(parser())
