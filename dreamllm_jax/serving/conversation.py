"""What the chat page sends and is told, as JSON. Whatever comes in is checked here.

A conversation is the list of its segments: `{"role": "user", "text": ...}`, `{"role": "user", "image": base64}`, and
with the role assistant what the model wrote, which has its `tokens` too, and painted.
"""

import base64
from typing import Any

from dreamllm_jax.data import images
from dreamllm_jax.data.document import Image, Segment, Text
from dreamllm_jax.data.lines import is_whole
from dreamllm_jax.generation.documents import Event
from dreamllm_jax.generation.prompts import Painted, Written

MAX_BYTES = 32 << 20  # of a request
MAX_SEGMENTS, MAX_IMAGES, MAX_CHARACTERS = 200, 16, 20_000  # of a conversation
MAX_TOKENS = 16_384  # of a conversation and its reply, pictures included, if the model can read so many
KEPT_SIZE = 512  # pixels on the shorter side of a picture that was sent

# What the page lets people choose of a reply: least, most and default; whole numbers where these are.
SETTINGS = {
    "temperature": (0.0, 2.0, 0.0),  # of drawing tokens; 0 takes the most probable ones
    "top_p": (0.05, 1.0, 1.0),
    "guidance": (1.0, 20.0, 3.5),  # of painting
    "guidance_from": (0.0, 1.0, 0.0),  # shares of the timesteps, 0 the picture and 1 the noise, between which there is
    "guidance_to": (0.0, 1.0, 1.0),
    "steps": (1, 250, 50),
    "seed": (0, 999_999_999, 0),  # of all draws
    "max_tokens": (1, 2048, 128),
    "max_images": (0, 8, 2),
}


def read_settings(given: Any) -> dict[str, Any]:
    """The settings of a request; what it leaves out has its default.

    Raises:
      ValueError: an unknown one, a value of the wrong type or beyond its limits, or no interval of guidance.
    """
    if not isinstance(given, dict) or not given.keys() <= SETTINGS.keys():
        raise ValueError(f"the settings are {', '.join(SETTINGS)}; got {given!r:.200}")
    for name, value in given.items():
        least, most, default = SETTINGS[name]
        whole = type(default) is int
        if type(value) not in ((int,) if whole else (int, float)) or not least <= value <= most:
            raise ValueError(f"{name} must be a {'whole ' * whole}number from {least} to {most}, got {value!r}")
    chosen = {name: default for name, (*_, default) in SETTINGS.items()} | given
    if (low := chosen["guidance_from"]) > (high := chosen["guidance_to"]):
        raise ValueError(f"guidance_from must not be more than guidance_to, got {low} and {high}")
    return chosen


def read_conversation(given: Any, vocab_size: int) -> list[Segment]:
    """The segments of a request's conversation.

    Raises:
      ValueError: not a conversation, or one beyond the limits.
      ImageError: one of its pictures cannot be used.
    """
    if not isinstance(given, list) or not given:
        raise ValueError("there is nothing to reply to: write something")
    segments = [_segment(item, vocab_size) for item in given[: MAX_SEGMENTS + 1]]
    pictures = sum(isinstance(segment, Image) for segment in segments)
    characters = sum(len(segment.text) for segment in segments if isinstance(segment, Text))
    tokens = sum(len(segment.tokens) for segment in segments if isinstance(segment, Written))
    for count, most, name in (
        (len(segments), MAX_SEGMENTS, "parts"),
        (pictures, MAX_IMAGES, "pictures"),
        (characters, MAX_CHARACTERS, "characters"),
        (tokens, MAX_TOKENS, "tokens"),
    ):
        if count > most:
            raise ValueError(f"the conversation has more than {most} {name}: begin a new one")
    if not all(is_whole(segment.text) for segment in segments if isinstance(segment, Text)):
        raise ValueError("a text has halves of characters, which no tokenizer reads")
    for segment in segments:
        if isinstance(segment, Image):
            images.decode(segment.data, KEPT_SIZE)
    return segments


def _segment(item: Any, vocab_size: int) -> Segment:
    match item:
        case {"role": "user", "text": str(text)}:
            return Text(text, "user")
        case {"role": "user", "image": str(data)}:
            return Image(base64.b64decode(data), "user")
        case {"role": "assistant", "text": str(text), "tokens": list(tokens)}:
            if all(type(token) is int and 0 <= token < vocab_size for token in tokens):
                return Written(text, "assistant", tuple(tokens))
        case {"role": "assistant", "image": str(data)}:
            return Painted(base64.b64decode(data), "assistant")
    raise ValueError(f"not a part of a conversation with this model: {item!r:.200}")


def accept_picture(data: bytes) -> bytes:
    """A picture that was sent, as it takes part in a conversation: upright, RGB, JPEG, at most `KEPT_SIZE` pixels.

    Raises:
      ImageError: it cannot be used.
    """
    return images.to_jpeg(images.decode(data, KEPT_SIZE), KEPT_SIZE)


def told(event: Event) -> dict[str, Any]:
    """What the page is told of something new: a text so far and its tokens, or a picture, empty until it is painted."""
    if isinstance(event.segment, Painted):
        return {"image": base64.b64encode(event.segment.data).decode(), "complete": event.complete}
    return {"text": event.segment.text, "tokens": event.segment.tokens, "complete": event.complete}
