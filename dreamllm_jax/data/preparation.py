"""Captioned pictures to a data set that can be trained on: documents of all kinds, and a tokenizer."""

import os
from pathlib import Path
from typing import Any

from dreamllm_jax.common.directories import is_remote
from dreamllm_jax.data import storage, tokenizer
from dreamllm_jax.data.corpora import compose, folder, openmoji, photographs
from dreamllm_jax.data.templates import VICUNA_SYSTEM

SOURCES = {"openmoji": openmoji, "photographs": photographs}
DEFAULT_PAIRS = 24


def prepare(
    source: str | os.PathLike,
    to: str | os.PathLike,
    *,
    pairs: int = 0,
    size: int = 64,
    vocab_size: int = 512,
    text_tokenizer: str = "",
) -> dict[str, Any]:
    """Makes a data set in the directory `to`, or finds that the same one is there already.

    Args:
      source: openmoji, photographs, or a folder of pictures with captions (see `corpora.folder`).
      to: directory of the data set; it appears only when it is whole.
      pairs: how many captioned pictures; 0 for 24 of openmoji and photographs, or all of a folder.
      size: pixels on the shorter side of a stored picture, at most.
      vocab_size: ids of the tokenizer trained on the source's texts, special tokens included.
      text_tokenizer: a tokenizer to use instead (see `load_tokenizer`).

    Returns:
      The summary stored with it: settings, corpora with their counts of documents and images, vocab_size.

    Raises:
      FileExistsError: `to` holds something else, or a data set made with other settings.
      FileNotFoundError, ModuleNotFoundError, ValueError: what is wrong with the source, in one line.
    """
    if pairs < 0 or size < 1:
        raise ValueError(f"pairs and size must be positive, got {pairs} and {size}")
    if is_remote(to):
        raise ValueError(f"a data set is made in a local directory and then copied to {to}")
    settings: dict[str, Any] = {
        "source": str(source),
        "pairs": pairs or (DEFAULT_PAIRS if source in SOURCES else 0),
        "size": size,
        "tokenizer": vocab_size,
    }
    chosen = tokenizer.load_tokenizer(text_tokenizer) if text_tokenizer else None
    if chosen:
        settings["tokenizer"] = chosen.fingerprint  # not its place, which is the run's own: that may be moved
    if source not in SOURCES:
        source = Path(source).absolute()
        settings |= {"source": str(source), "content": folder.fingerprint(source)}
    if (Path(to) / storage.SUMMARY).is_file():
        summary = storage.read_summary(to)
        if summary["settings"] != settings:
            changed = [k for k in settings if summary["settings"].get(k) != settings[k]]
            raise FileExistsError(
                f"{to} holds a data set made with another {' and '.join(changed)}; "
                "choose another directory or remove it"
            )
        return summary
    if source in SOURCES:
        captioned = list(SOURCES[source].pairs(settings["pairs"], size))
    else:
        captioned = list(folder.pairs(source, pairs, size))
    if not chosen:
        names = openmoji.names().values() if source == "openmoji" else ()
        chosen = tokenizer.train_tokenizer(_training_texts([*(text for _, text in captioned), *names]), vocab_size)
    return storage.write_dataset(to, compose.compose(captioned), chosen, settings)


def _training_texts(captions: list[str]) -> list[str]:
    """The captions and the sentences they stand in, these as often as training will meet them: in every document."""
    phrases = [VICUNA_SYSTEM, "USER: ASSISTANT:", compose.ANSWER, *compose.QUESTIONS, "Here are"]
    phrases += [phrase.format("") for phrase in (*compose.REQUESTS, compose.INSTRUCTION)]
    return [*captions, *(f"{caption}." for caption in captions), *phrases * max(len(captions), 100)]
