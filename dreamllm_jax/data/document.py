"""The document: what every corpus becomes before anything else looks at it.

A document is an ordered list of segments, each a text or an encoded image, with a role. How it turns into tokens is
the business of `dreamllm_jax.data.tokens`; how it is stored, of `dreamllm_jax.data.storage`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

Role = Literal["", "system", "user", "assistant"]
Kind = Literal[
    "pair", "image_image", "edit", "interleaved", "instruct_interleaved", "conversation", "text", "preference"
]
KINDS: tuple[str, ...] = get_args(Kind)
ROLES: tuple[str, ...] = get_args(Role)


@dataclasses.dataclass(frozen=True)
class Text:
    """A stretch of text, said by `role` (empty outside conversations)."""

    text: str
    role: Role = ""


@dataclasses.dataclass(frozen=True)
class Image:
    """An image as encoded bytes (PNG, JPEG, ...). In a conversation the assistant's images are painted, others read.

    `stored` holds what the frozen towers made of it, where that was computed beforehand: `moments` and `features`.
    """

    data: bytes
    role: Role = ""
    stored: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False, repr=False)


Segment = Text | Image


@dataclasses.dataclass(frozen=True)
class Document:
    """Segments in reading order, and the kind of corpus they come from.

    pair: one text and one image; image_image: source image, then target image; edit: images that are read, one text,
    the instruction, and last the image that is to be made of them; interleaved: texts and images in any order;
    instruct_interleaved: the user's instruction, then as interleaved by the assistant; conversation: turns of user and
    assistant, each segment with its role; text: texts only; preference: a conversation in texts, whose last one, also
    the assistant's, is an answer that is worse than the one before it.
    """

    kind: Kind
    segments: tuple[Segment, ...]

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of document {self.kind!r}; known are {', '.join(KINDS)}")
        texts, images = len(self.texts), len(self.images)
        if self.kind == "pair" and (texts, images) != (1, 1):
            raise ValueError(f"a pair has one text and one image, got {texts} and {images}")
        if self.kind == "image_image" and (texts, images) != (0, 2):
            raise ValueError(f"an image_image document has two images and no text, got {images} and {texts} texts")
        if self.kind == "edit" and (texts != 1 or images < 2 or not isinstance(self.segments[-1], Image)):
            raise ValueError(
                "an edit has images to read, one text and last the image to paint, got "
                f"{', '.join(type(segment).__name__.lower() for segment in self.segments) or 'nothing'}"
            )
        if self.kind in ("text", "preference") and images:
            raise ValueError(f"a {self.kind} document has no images, got {images}")
        if self.kind == "preference" and [s.role for s in self.segments[-3:]] != ["user", "assistant", "assistant"]:
            raise ValueError("a preference ends with the user's turn, the better and the worse answer")
        for segment in self.segments:
            if segment.role not in ROLES:
                raise ValueError(f"unknown role {segment.role!r}; known are {', '.join(map(repr, ROLES))}")
            if self.kind in ("conversation", "instruct_interleaved") and not segment.role:
                raise ValueError(f"every segment of a {self.kind} document needs a role: system, user or assistant")

        if self.kind == "conversation":
            first = next((s.role for s in self.segments if s.role != "system"), "")
            if first != "user":
                raise ValueError("a conversation begins with the user's turn")

    @property
    def texts(self) -> tuple[Text, ...]:
        return tuple(s for s in self.segments if isinstance(s, Text))

    @property
    def blank(self) -> bool:
        """Whether it says nothing, though it is of a kind that is all about its text."""
        return self.kind in ("pair", "edit", "text") and not any(s.text.strip() for s in self.texts)

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(s for s in self.segments if isinstance(s, Image))


def to_record(document: Document) -> dict[str, Any]:
    """The stored form: parallel lists of roles and texts (empty at an image) and the images in order."""
    return {
        "kind": document.kind,
        "segments": [
            {
                "role": s.role,
                "text": s.text if isinstance(s, Text) else "",
                "is_image": int(isinstance(s, Image)),
            }
            for s in document.segments
        ],
        "images": [s.data for s in document.images],
    }


def from_record(record: Mapping[str, Any]) -> Document:
    """The document of a stored record; inverse of `to_record` after storage."""
    images = iter(record["images"])
    stored = record["segments"]
    segments: list[Segment] = []
    for role, text, is_image in zip(stored["role"], stored["text"], stored["is_image"], strict=True):
        role = _string(role)
        segments.append(Image(bytes(next(images)), role) if is_image else Text(_string(text), role))
    return Document(_string(record["kind"]), tuple(segments))


def with_stored(document: Document, stored: Mapping[str, np.ndarray]) -> Document:
    """The document with each image's part of the arrays [images, ...].

    Raises:
      ValueError: there are not as many of them as images.
    """
    for name, arrays in stored.items():
        if len(arrays) != len(document.images):
            raise ValueError(f"{len(arrays)} stored {name} for {len(document.images)} images")
    images = iter(
        dataclasses.replace(image, stored={name: arrays[index] for name, arrays in stored.items()})
        for index, image in enumerate(document.images)
    )
    return Document(document.kind, tuple(next(images) if isinstance(s, Image) else s for s in document.segments))


def _string(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
