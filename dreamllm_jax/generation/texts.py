"""Texts for prompts of any lengths, with images among them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dreamllm_jax.data.chat_template import ends_of
from dreamllm_jax.data.document import Segment
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.generation.beams import search
from dreamllm_jax.generation.text import STRETCH, Sampling, begin, write
from dreamllm_jax.model import DreamLLM


def generate_texts(
    model: DreamLLM,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Segment]],
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    beams: int = 1,
    length_penalty: float = 1.0,
    template: str = "",
) -> list[str]:
    """Continues every prompt until `</s>` or its turn's end, in one batch.

    Each depends on itself and its seed alone, up to rounding.

    Args:
      prompts: how the documents begin, or the turns of conversations.
      sampling: how tokens are chosen; None for the most probable ones.
      stop: strings that end a text, which is given without them.
      beams: search for the most probable text with so many; then nothing is drawn, and stop strings only cut.
      template: of conversations, see `prompts.encode_prompts`.

    Raises:
      ValueError: a prompt too long for the model, or settings that exclude each other.
      ImageError: an image cannot be decoded.
    """
    if beams > 1 and sampling is not None:
        raise ValueError("beams search for the most probable text: nothing is drawn, so leave the sampling out")
    if beams < 1 or max_tokens < 1:
        raise ValueError(f"beams and max_tokens must be positive, got {beams} and {max_tokens}")
    eos = ends_of(template, tokenizer)
    reading = begin(model, params, tokenizer, prompts, max_tokens, template)
    if beams > 1:
        tokens, count, _ = jax.device_get(search(model, params, reading, beams, max_tokens, eos, length_penalty))
        return [_text(tokenizer, row[:n].tolist(), stop)[0] for row, n in zip(tokens, count, strict=True)]

    written: list[list[int]] = [[] for _ in prompts]
    texts, active = [""] * len(prompts), np.ones(len(prompts), bool)
    while active.any():
        tokens, count, reading = write(model, params, reading, STRETCH, eos, sampling, jnp.asarray(active))
        tokens, count = jax.device_get((tokens, count))
        for row in np.flatnonzero(active):
            written[row] = [*written[row], *tokens[row, : count[row]].tolist()][:max_tokens]
            texts[row], stopped = _text(tokenizer, written[row], stop)
            active[row] = not stopped and len(written[row]) < max_tokens and written[row][-1] not in eos
    return texts


def _text(tokenizer: Tokenizer, tokens: list[int], stop: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop string, and whether there was one."""
    text = tokenizer.decode(tokens)
    found = [at for at in (text.find(string) for string in stop) if at >= 0]
    return text[: min(found, default=None)].strip(), bool(found)
