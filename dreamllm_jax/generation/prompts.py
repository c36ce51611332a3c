"""Prompts: how documents begin, as a batch of rows whose sizes come in few steps, so that little is compiled."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dreamllm_jax.data import images
from dreamllm_jax.data.batch import Batch, RowShape, SlotGroup, Slots, empty_batch
from dreamllm_jax.data.document import Document, Image, Segment, Text
from dreamllm_jax.data.packing import Item
from dreamllm_jax.data.rows import Pixels, fill_row
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.data.tokens import encode_asked, encode_document
from dreamllm_jax.data.writing import Encoded, Placed
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
    prompts: Sequence[Sequence[Segment]],
    tokenizer: Tokenizer,
    config: DreamLLMConfig,
    template: str = "",
    asked: bool = False,
) -> Batch:
    """The beginnings of documents as a batch, one a row.

    Args:
      prompts: segments in order. What a model wrote and painted before stands there as it wrote it.
      template: name of a conversation's template: then the prompts are turns, the user's where no role is given, and
        the assistant's is open. What was said before is tokenised as training does.
      asked: an image is to be painted: a model that is asked in words of its own (`config.prompting`) is so, by the
        prompt's images and its texts, as one; by the words for neither caption nor instruction if it has no text.

    Raises:
      ImageError: an image cannot be decoded.
      ValueError: an unknown template, or a conversation without a user.
    """
    pictures = [segment for prompt in prompts for segment in prompt if isinstance(segment, Image)]
    sizes = sorted({_fitting(config, picture) for picture in pictures})
    if asked and config.prompting is not None:
        encoded = [_asked(p, tokenizer, config, sizes) for p in prompts]
    elif template:
        encoded = [_conversation(p, tokenizer, config, sizes, template) for p in prompts]
    else:
        encoded = [_open(p, tokenizer, config, sizes) for p in prompts]
    see = [max(sum(placed.group == group for placed in one.see) for one in encoded) for group in range(len(sizes))]
    dream = max(len(one.dream) for one in encoded)
    length = bucket(max(1, *(len(one.tokens) for one in encoded)), 32)
    shape = _shape(config, dict(zip(sizes, map(bucket, see), strict=True)), bucket(dream), length)
    batch = empty_batch(len(prompts), dataclasses.replace(shape, dream=()), tokenizer.special.pad)
    pixels = Pixels(shape, config.vision_encoder.preprocess, config.image_decoder.preprocess)
    at = [np.full((len(prompts), group.slots), -1, np.int32) for group in shape.dream]
    for index, one in enumerate(encoded):
        fill_row(batch, index, [Item(index, "", dataclasses.replace(one, dream=()))], pixels, True)
        for slot, placed in enumerate(one.dream):  # of painted images nothing but their queries is needed
            at[placed.group][index, slot] = placed.at
    return batch.replace(dream=tuple(Slots(slots, None) for slots in at))


def require_fits(config: DreamLLMConfig, batch: Batch, new: int, allowed: int | None = None) -> int:
    """Tokens of the longest prompt and `new` ones after it.

    Args:
      allowed: a limit below the model's own, None for none.

    Raises:
      ValueError: the model was not trained on so long documents, or they are longer than is allowed.
    """
    prompt, most = int((batch.segment_ids > 0).sum(axis=1).max()), config.language_model.max_length
    limit, whose = (most, "the model can read") if allowed is None or most <= allowed else (allowed, "are allowed here")
    if prompt + new > limit:
        raise ValueError(
            f"{prompt} tokens of a prompt and up to {new} new ones (images included) exceed the {limit} that {whose}: "
            "shorten the prompt, or allow fewer tokens or images"
        )
    return prompt + new


_MANY = 1 << 10  # images


def _fitting(config: DreamLLMConfig, image: Image) -> tuple[int, int]:
    """Height and width as which the vision encoder sees an image."""
    return config.vision_encoder.fitting(*images.size_of(image.data))


def _shape(
    config: DreamLLMConfig, see: Mapping[tuple[int, int], int], dream: int = _MANY, length: int = 1 << 20
) -> RowShape:
    """Room for so many images of each size to see, and to paint; for as many tokens as there may be, unless told."""
    encoder = config.vision_encoder
    groups = (
        SlotGroup(slots, encoder.tokens(*size), *size, pixels=encoder.pixels_shape(*size))
        for size, slots in see.items()
        if slots
    )
    queries = (SlotGroup(dream, config.num_queries, 1, 1),) if dream else ()
    return RowShape(length, tuple(groups), queries, config.language_model.position_axes)


def _conversation(
    segments: Sequence[Segment],
    tokenizer: Tokenizer,
    config: DreamLLMConfig,
    sizes: Sequence[tuple[int, int]],
    template: str,
) -> Encoded:
    turns = tuple(dataclasses.replace(segment, role=segment.role or "user") for segment in segments)
    document, shape = Document("conversation", turns), _shape(config, dict.fromkeys(sizes, _MANY))
    given = {"template": template, "complete": False, "seen_in": lambda image: sizes.index(_fitting(config, image))}
    return encode_document(document, tokenizer, shape, **given)


def _asked(
    segments: Sequence[Segment], tokenizer: Tokenizer, config: DreamLLMConfig, sizes: Sequence[tuple[int, int]]
) -> Encoded:
    texts = [segment.text for segment in segments if isinstance(segment, Text)]
    return encode_asked(
        " ".join(texts) if texts else None,
        [segment for segment in segments if isinstance(segment, Image)],
        tokenizer,
        _shape(config, dict.fromkeys(sizes, _MANY)),
        config.prompting,
        lambda image: sizes.index(_fitting(config, image)),
    )


def _open(
    segments: Sequence[Segment], tokenizer: Tokenizer, config: DreamLLMConfig, sizes: Sequence[tuple[int, int]]
) -> Encoded:
    ids = tokenizer.special
    tokens, see, dream = [*ids.begin], [], []
    for segment in segments:
        if isinstance(segment, Written):
            tokens += segment.tokens
        elif isinstance(segment, Text):
            tokens += tokenizer.encode_text(segment.text)
        else:
            if isinstance(segment, Painted):
                dream.append(Placed(segment, len(tokens) + 1))
                tokens += ids.painted(config.num_queries)
            size = _fitting(config, segment)
            see.append(Placed(segment, len(tokens) + len(ids.before_patches), sizes.index(size)))
            tokens += ids.seen(config.vision_encoder.tokens(*size))
    return Encoded(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), tuple(see), tuple(dream))
