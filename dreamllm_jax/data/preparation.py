"""Captioned pictures to a data set that can be trained on: documents of all kinds, and a tokenizer."""

import os
from pathlib import Path
from typing import Any

from dreamllm_jax.common.directories import is_remote
from dreamllm_jax.data import storage, tokenizer
from dreamllm_jax.data.corpora import compose, folder, openmoji, photographs
from dreamllm_jax.data.document import Document
from dreamllm_jax.data.scenes import documents as scenes
from dreamllm_jax.data.scenes.drawing import SIDE
from dreamllm_jax.data.templates import VICUNA_SYSTEM

SOURCES = {"openmoji": 24, "photographs": 24, "scenes": scenes.DEFAULT}  # how many pairs, if that is not said


def prepare(
    source: str | os.PathLike,
    to: str | os.PathLike,
    *,
    pairs: int = 0,
    size: int = 0,
    vocab_size: int = 512,
    text_tokenizer: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """Makes a data set in the directory `to`, or finds that the same one is there already.

    Args:
      source: openmoji, photographs, scenes (a small world, see `scenes.documents`), or a folder of pictures with
        captions (see `corpora.folder`).
      to: directory of the data set; it appears only when it is whole.
      pairs: how many captioned pictures; 0 for as many as `SOURCES` says, or all of a folder.
      size: pixels on the shorter side of a stored picture, at most, of scenes exactly; 0 for 64, of scenes 48.
      vocab_size: ids of the tokenizer trained on the source's texts, special tokens included.
      text_tokenizer: a tokenizer to use instead (see `load_tokenizer`).
      seed: of which scenes there are, and of what is composed with what.

    Returns:
      The summary stored with it: settings, corpora with their counts of documents and images, vocab_size.

    Raises:
      FileExistsError: `to` holds something else, or a data set made with other settings.
      FileNotFoundError, ModuleNotFoundError, ValueError: what is wrong with the source, in one line.
    """
    if pairs < 0 or size < 0:
        raise ValueError(f"pairs and size must be positive, got {pairs} and {size}")
    if is_remote(to):
        raise ValueError(f"a data set is made in a local directory and then copied to {to}")
    settings: dict[str, Any] = {
        "source": str(source),
        "pairs": pairs or SOURCES.get(str(source), 0),
        "size": size or (SIDE if source == "scenes" else 64),
        "tokenizer": vocab_size,
    }
    if seed:
        settings["seed"] = seed
    chosen = tokenizer.load_tokenizer(text_tokenizer) if text_tokenizer else None
    if chosen:
        settings["tokenizer"] = chosen.fingerprint  # not its place, which is the run's own: that may be moved
    if source not in SOURCES:
        source = Path(source).absolute()
        settings |= {"source": str(source), "content": folder.fingerprint(source)}
    if (Path(to) / storage.SUMMARY).is_file():
        summary = storage.read_summary(to)
        if summary["settings"] != settings:
            known = summary["settings"]
            changed = [name for name in {**settings, **known} if known.get(name) != settings.get(name)]
            raise FileExistsError(
                f"{to} holds a data set made with another {' and '.join(changed)}; "
                "choose another directory or remove it"
            )
        return summary
    corpora, texts = _compose(source, settings["pairs"], settings["size"], seed)
    chosen = chosen or tokenizer.train_tokenizer(texts, vocab_size)
    return storage.write_dataset(to, corpora, chosen, settings, sorted({scenes.HELD_OUT} & corpora.keys()))


def _compose(
    source: str | os.PathLike, pairs: int, size: int, seed: int
) -> tuple[dict[str, list[Document]], list[str]]:
    """The corpora of a source, and what a tokenizer of it should be trained on."""
    if source == "scenes":
        corpora = scenes.compose(pairs, size, seed)
        return corpora, scenes.texts(corpora)
    drawn = {"openmoji": openmoji.pairs, "photographs": photographs.pairs}.get(str(source))
    captioned = list(drawn(pairs, size) if drawn else folder.pairs(source, pairs, size))
    names = openmoji.names().values() if source == "openmoji" else ()
    return compose.compose(captioned, seed), _training_texts([*(text for _, text in captioned), *names])


def _training_texts(captions: list[str]) -> list[str]:
    """The captions and the sentences they stand in, these as often as training will meet them: in every document."""
    phrases = [VICUNA_SYSTEM, "USER: ASSISTANT:", compose.ANSWER, *compose.QUESTIONS, "Here are"]
    phrases += [phrase.format("") for phrase in (*compose.REQUESTS, compose.INSTRUCTION)]
    return [*captions, *(f"{caption}." for caption in captions), *phrases * max(len(captions), 100)]
