"""Prompts: how documents begin, as a batch of rows whose sizes come in few steps, so that little is compiled."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dreamllm_jax.data.batch import Batch, RowShape, empty_batch
from dreamllm_jax.data.document import Document, Image, Segment, Text
from dreamllm_jax.data.packing import Item
from dreamllm_jax.data.rows import Pixels, fill_row
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.data.tokens import Encoded, encode_document
from dreamllm_jax.model import DreamLLMConfig


@dataclasses.dataclass(frozen=True)
class Written(Text):
    """Text that a model wrote, with the very tokens: tokenising the text again may give others."""

    tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Painted(Image):
    """An image that a model painted, and then read."""


def bucket(size: int, least: int = 1) -> int:
    """The next power of two, at least `least`; 0 stays 0."""
    return 0 if size == 0 else max(least, 1 << (size - 1).bit_length())


def encode_prompts(
    prompts: Sequence[Sequence[Segment]], tokenizer: Tokenizer, config: DreamLLMConfig, template: str = ""
) -> Batch:
    """The beginnings of documents as a batch, one a row.

    Args:
      prompts: segments in order. What a model wrote and painted before stands there as it wrote it.
      template: name of a conversation's template: then the prompts are turns, the user's where no role is given, and
        the assistant's is open. What was said before is tokenised as training does.

    Raises:
      ImageError: an image cannot be decoded.
      ValueError: an unknown template, or a conversation without a user.
    """
    encoded = [
        _conversation(p, tokenizer, config, template) if template else _open(p, tokenizer, config) for p in prompts
    ]
    shape = dataclasses.replace(
        _shape(config),
        length=bucket(max(len(one.tokens) for one in encoded), 32),
        see_slots=bucket(max(len(one.see) for one in encoded)),
        dream_slots=bucket(max(len(one.dream_slots) for one in encoded)),
    )
    batch, pixels = empty_batch(len(prompts), shape, tokenizer.special.pad), Pixels(shape)
    for index, one in enumerate(encoded):
        fill_row(batch, index, [Item(index, "", dataclasses.replace(one, dream_slots=np.zeros(0, int)))], pixels, True)
        batch.dream_slots[index, : len(one.dream_slots)] = one.dream_slots
    return batch.replace(dream_images=None)


def require_fits(config: DreamLLMConfig, batch: Batch, new: int, allowed: int | None = None) -> int:
    """Tokens of the longest prompt and `new` ones after it.

    Args:
      allowed: a limit below the model's own, None for none.

    Raises:
      ValueError: the model was not trained on so long documents, or they are longer than is allowed.
    """
    prompt, most = int((batch.segment_ids > 0).sum(axis=1).max()), config.llama.max_length
    limit, whose = (most, "the model can read") if allowed is None or most <= allowed else (allowed, "are allowed here")
    if prompt + new > limit:
        raise ValueError(
            f"{prompt} tokens of a prompt and up to {new} new ones (images included) exceed the {limit} that {whose}: "
            "shorten the prompt, or allow fewer tokens or images"
        )
    return prompt + new


def _shape(config: DreamLLMConfig) -> RowShape:
    """Room for anything; of painted images nothing but their queries is needed."""
    return RowShape(1 << 20, 1 << 10, 1 << 10, config.clip.num_patches, config.num_queries, config.clip.image_size, 1)


def _conversation(segments: Sequence[Segment], tokenizer: Tokenizer, config: DreamLLMConfig, template: str) -> Encoded:
    turns = tuple(dataclasses.replace(segment, role=segment.role or "user") for segment in segments)
    document = Document("conversation", turns)
    return encode_document(document, tokenizer, _shape(config), template=template, complete=False)


def _open(segments: Sequence[Segment], tokenizer: Tokenizer, config: DreamLLMConfig) -> Encoded:
    ids = tokenizer.special
    tokens, see, see_slots, dream_slots = [ids.bos], [], [], []
    for segment in segments:
        if isinstance(segment, Written):
            tokens += segment.tokens
        elif isinstance(segment, Text):
            tokens += tokenizer.encode_text(segment.text)
        else:
            if isinstance(segment, Painted):
                dream_slots.append(len(tokens) + 1)
                tokens += [ids.dream_start, *[ids.im_patch] * config.num_queries, ids.dream_end]
            see.append(segment)
            see_slots.append(len(tokens) + 1)
            tokens += [ids.im_start, *[ids.im_patch] * config.clip.num_patches, ids.im_end]
    weights = np.zeros(len(tokens), np.float32)
    return Encoded(
        np.array(tokens, np.int32), weights, tuple(see), np.array(see_slots, int), (), np.array(dream_slots, int)
    )
