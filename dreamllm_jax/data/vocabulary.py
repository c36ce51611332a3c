"""The special tokens that documents with images need."""

import dataclasses
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

# Appended after the base vocabulary, in this order.
ADDED_TOKENS = (
    "[PAD]",
    "<image>",
    "<im_patch>",
    "<im_start>",
    "<im_end>",
    "<dream>",
    "<dream_start>",
    "<dream_end>",
)


class ImageMarks(NamedTuple):
    """How an image that is read is written: the tokens before, at each of its patches, and after; None for no token."""

    start: str | None
    patch: str
    end: str | None

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(token for token in self if token is not None)


OUR_MARKS = ImageMarks("<im_start>", "<im_patch>", "<im_end>")
# What models were taught to read images by. InternVL's vocabulary has Qwen's too, without a use.
KNOWN_MARKS = (
    OUR_MARKS,
    ImageMarks("<img>", "<IMG_CONTEXT>", "</img>"),  # InternVL
    ImageMarks("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),  # Qwen2-VL and later
    ImageMarks(None, "<image>", None),  # LLaVA
)


def marks_among(tokens: Collection[str]) -> ImageMarks:
    """The first of `KNOWN_MARKS` that a vocabulary has; ours, to be appended, if it has none."""
    return next((marks for marks in KNOWN_MARKS if all(token in tokens for token in marks.tokens)), OUR_MARKS)


class PaintMarks(NamedTuple):
    """How an image that is painted is written: the tokens before and after its dream queries."""

    start: str
    end: str


OUR_PAINT_MARKS = PaintMarks("<dream_start>", "<dream_end>")


def added_tokens(marks: ImageMarks, painting: PaintMarks = OUR_PAINT_MARKS) -> tuple[str, ...]:
    """Those of `ADDED_TOKENS` that a vocabulary needs whose images are marked so; one that marks painted images by
    tokens of its own has all that is needed for them."""
    seen, others = marks == OUR_MARKS, painting == OUR_PAINT_MARKS
    return tuple(token for token in ADDED_TOKENS if (seen if token in OUR_MARKS else others))


def written_as(marks: ImageMarks, painting: PaintMarks, pad: str) -> dict[str, str | None]:
    """What stands for those of `ADDED_TOKENS` that such a vocabulary does not need; `pad` is its own padding."""
    found = dict(zip(OUR_MARKS, marks, strict=True))
    if painting == OUR_PAINT_MARKS:
        return found
    others = {"[PAD]": pad, "<image>": marks.patch, "<dream>": painting.start}
    return found | others | dict(zip(OUR_PAINT_MARKS, painting, strict=True))


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Token ids. `im_patch` is the placeholder at image patches and at dream queries alike.

    `bos` is None where documents begin with nothing; `im_start` and `im_end` where nothing stands around an image.
    """

    bos: int | None
    eos: int
    pad: int
    image: int
    im_patch: int
    im_start: int | None
    im_end: int | None
    dream: int
    dream_start: int
    dream_end: int

    @classmethod
    def of(
        cls, bos: int | None, eos: int, ids: Mapping[str, int], written: Mapping[str, str | None] = MappingProxyType({})
    ) -> "SpecialTokens":
        """`ids` has those of `ADDED_TOKENS`, as they are `written`."""
        names = [written.get(token, token) for token in ADDED_TOKENS]
        return cls(bos, eos, *(None if name is None else ids[name] for name in names))

    @classmethod
    def last_of(cls, vocab_size: int, bos: int | None = 1, eos: int = 2) -> "SpecialTokens":
        """The added tokens at the end of a vocabulary of `vocab_size`."""
        return cls(bos, eos, *range(vocab_size - len(ADDED_TOKENS), vocab_size))

    @property
    def begin(self) -> tuple[int, ...]:
        """What a document begins with: `<s>`, or nothing."""
        return () if self.bos is None else (self.bos,)

    @property
    def before_patches(self) -> tuple[int, ...]:
        return () if self.im_start is None else (self.im_start,)

    @property
    def after_patches(self) -> tuple[int, ...]:
        return () if self.im_end is None else (self.im_end,)

    def seen(self, patches: int) -> tuple[int, ...]:
        """An image that is read: `<im_start> patches <im_end>`."""
        return (*self.before_patches, *[self.im_patch] * patches, *self.after_patches)

    def painted(self, queries: int) -> tuple[int, ...]:
        """An image that is painted: `<dream_start> queries <dream_end>`."""
        return (self.dream_start, *[self.im_patch] * queries, self.dream_end)

    def null_document(self, num_queries: int) -> tuple[int, ...]:
        """`<s> <dream_start> queries <dream_end> </s>`: what an image is painted from when its condition is dropped."""
        return (*self.begin, *self.painted(num_queries), self.eos)

    @property
    def null_slot(self) -> int:
        """Index of the first query in the null document."""
        return len(self.begin) + 1
