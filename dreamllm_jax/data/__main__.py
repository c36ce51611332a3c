"""python -m dreamllm_jax.data prepare SOURCE --to=DIR

SOURCE is openmoji, photographs, or a folder of pictures with captions.jsonl or captions.csv.
"""

import sys
import time

from absl import app, flags

from dreamllm_jax.data.preparation import prepare

_TO = flags.DEFINE_string("to", None, "Directory of the data set to make.", required=True)
_PAIRS = flags.DEFINE_integer("pairs", 0, "Captioned pictures to take; 0: 24, or all of a folder.", lower_bound=0)
_SIZE = flags.DEFINE_integer("size", 64, "Pixels on the shorter side of a stored picture, at most.", lower_bound=1)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 512, "Ids of the tokenizer that is trained.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "Tokenizer to use instead: a .model, a tokenizer.json, a directory.")


def main(arguments: list[str]) -> None:
    if len(arguments) != 3 or arguments[1] != "prepare":
        raise app.UsageError("the command is: prepare SOURCE --to=DIR")
    started = time.monotonic()
    try:
        summary = prepare(
            arguments[2],
            _TO.value,
            pairs=_PAIRS.value,
            size=_SIZE.value,
            vocab_size=_VOCAB_SIZE.value,
            text_tokenizer=_TOKENIZER.value,
        )
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    for name, counts in sorted(summary["corpora"].items()):
        print(f"{name:15} {counts['documents']:8,} documents {counts['images']:8,} images")
    print(f"{_TO.value}: {summary['vocab_size']} token ids, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    app.run(main)
