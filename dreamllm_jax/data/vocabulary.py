"""The special tokens that documents with images need."""

import dataclasses
from collections.abc import Mapping

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


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Token ids. `<im_patch>` is the placeholder at image patches and at dream queries alike."""

    bos: int
    eos: int
    pad: int
    image: int
    im_patch: int
    im_start: int
    im_end: int
    dream: int
    dream_start: int
    dream_end: int

    @classmethod
    def of(cls, bos: int, eos: int, ids: Mapping[str, int]) -> "SpecialTokens":
        """`ids` has those of `ADDED_TOKENS`, as they are written there."""
        return cls(bos, eos, *(ids[token] for token in ADDED_TOKENS))

    @classmethod
    def last_of(cls, vocab_size: int, bos: int = 1, eos: int = 2) -> "SpecialTokens":
        """The added tokens at the end of a vocabulary of `vocab_size`."""
        return cls(bos, eos, *range(vocab_size - len(ADDED_TOKENS), vocab_size))

    def null_document(self, num_queries: int) -> tuple[int, ...]:
        """`<s> <dream_start> queries <dream_end> </s>`: what an image is painted from when its condition is dropped."""
        return (self.bos, self.dream_start, *[self.im_patch] * num_queries, self.dream_end, self.eos)


NULL_SLOT = 2  # index of the first query in the null document
