"""How full rows get of pictures that are painted from captions, and which rows to choose for them.

A picture takes its queries of a row and whatever its caption takes, so that a row's length and its slots belong
together: too few tokens, and slots stay empty; too many, and tokens do. Rows are packed here as in training, without
pictures or texts, from lengths alone.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from dreamllm_jax.data import images
from dreamllm_jax.data.batch import RowShape
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.packing import Get, Item, Need, RowStream
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.data.tokens import encode_document
from dreamllm_jax.data.writing import Encoded, Placed
from dreamllm_jax.experiment.experiment import Experiment

# Tokens of captions: mean, and spread of the logarithm. COCO's are as people wrote them; the others' means are those of
# what models wrote (BLIP3o, arXiv 2505.09568: 20 and 120), their spread is assumed.
CAPTIONS = {"coco": (12, 0.22), "short": (20, 0.35), "detailed": (60, 0.35), "long": (120, 0.35)}
TOKENS, SLOTS = 0.95, 0.85  # shares of a good row that are filled
STEP = 128  # tokens by which a row's length goes, for attention is computed in such blocks
TOGETHER = 32  # rows that are padded to the longest of them, where documents are not packed
_DRAWN, _ROWS = 8192, 128  # captions that are drawn, rows that are packed of them


@dataclasses.dataclass(frozen=True)
class Fill:
    """Rows, and the shares of their tokens and of their slots for pictures to paint that are filled."""

    length: int
    slots: int
    tokens: float
    painted: float

    @property
    def good(self) -> bool:
        """Whether both are as full as they should be."""
        return self.tokens >= TOKENS and self.painted >= SLOTS

    def __str__(self) -> str:
        return f"{self.length} tokens, {self.slots} slots: {self.tokens:.1%} and {self.painted:.1%}"


def captions(name: str) -> np.ndarray:
    """i64[n], the tokens of captions as those called `name` have them; the same ones each time."""
    mean, spread = CAPTIONS[name]
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - spread**2 / 2, spread, _DRAWN)
    return np.maximum(np.rint(drawn).astype(int), 1)


def documents(experiment: Experiment, tokenizer: Tokenizer, lengths: np.ndarray, reads: int = 0) -> np.ndarray:
    """i64[n], the tokens of documents with such captions, a picture to paint in each and `reads` to read: as the
    experiment asks, cuts and leaves out."""
    shape, asks = _roomy(experiment.row_shape), experiment.model.prompting
    kind = "edit" if reads else "pair"
    read = [Image(images.black((group.width, group.height))) for group in shape.see[:1] * reads]
    blank = Image(images.black((shape.dream[0].width, shape.dream[0].height)))
    document = Document(kind, (*read, Text("a"), blank))

    def size(drop: str) -> int:
        return len(encode_document(document, tokenizer, shape, "creation", prompting=asks, drop=drop).tokens)

    around, null = size("") - len(tokenizer.encode_text("a")), size("text")
    cut = asks.max_tokens if asks is not None and asks.max_tokens else lengths.max()
    uses = experiment.data.corpora.values()
    dropped = np.mean([use.drop_text + use.drop_both for use in uses]) if uses else 0.0
    without = np.random.default_rng(1).random(len(lengths)) < dropped
    return np.where(without, null, around + np.minimum(lengths, cut))


def _roomy(shape: RowShape) -> RowShape:
    """Rows that nothing is cut for."""
    return dataclasses.replace(shape, length=1 << 16)


def fill(sizes: Sequence[int], shape: RowShape, window: int, reads: int = 0) -> Fill:
    """How full such rows get of documents of so many tokens, so many of them waiting."""
    see, dream = (Placed(Image(b""), 0),) * reads, (Placed(Image(b""), 0),)

    def begin(record: int, need: Need | None = None) -> Get:
        size = int(sizes[record % len(sizes)])
        item = Item(record, "", Encoded(np.broadcast_to(0, size), np.broadcast_to(0.0, size), see, dream))
        return lambda: item

    stream = RowStream(begin, shape, first=0, step=1, window=window)
    rows = [[len(item.encoded.tokens) for item in next(stream)] for _ in range(_ROWS)]
    slots = shape.dream_slots
    tokens, painted = sum(map(sum, rows)) / shape.length, sum(map(len, rows)) / slots
    return Fill(shape.length, slots, tokens / _ROWS, painted / _ROWS)


def choices(sizes: np.ndarray, shape: RowShape, window: int, longest: int, reads: int = 0) -> Iterator[Fill]:
    """For each number of slots for which `longest` tokens are enough, the rows that get fullest."""
    for slots in itertools.count(1):
        about = int(slots * sizes.mean()) // STEP * STEP
        if about > longest:
            return
        lengths = [length for length in (about, about + STEP) if max(sizes) <= length <= longest]
        tried = (fill(sizes, _rows(shape, length, slots, reads), window, reads) for length in lengths)
        if best := max(tried, key=lambda one: (one.good, one.tokens * one.painted), default=None):
            yield best


def _rows(shape: RowShape, length: int, slots: int, reads: int = 0) -> RowShape:
    """Rows of one group of slots each, of those of `shape`, of which each document takes one to paint."""
    see = tuple(dataclasses.replace(group, slots=slots * reads) for group in shape.see[: min(reads, 1)])
    dream = (dataclasses.replace(shape.dream[0], slots=slots),)
    return dataclasses.replace(shape, length=length, see=see, dream=dream)


def padded(sizes: np.ndarray, together: int = TOGETHER) -> float:
    """The share of tokens that are filled where each document is a row, padded to the longest of so many."""
    together = min(together, len(sizes))
    rows = sizes[: len(sizes) // together * together].reshape(-1, together)
    return rows.sum() / (together * rows.max(axis=1).sum())


def report(
    experiment: Experiment, tokenizer: Tokenizer, named: dict[str, np.ndarray], longest: int, reads: int = 0
) -> Iterator[str]:
    """Lines that tell of the experiment's rows, and of those to choose, for captions of such lengths by name.

    Raises:
      ValueError: rows have no slots to paint in, or no room for a document.
    """
    shape, window = experiment.row_shape, experiment.data.window
    if not shape.dream:
        raise ValueError("rows.dream_slots=0: rows without pictures to paint are not looked at")
    if reads > shape.see_slots:
        raise ValueError(f"rows.see_slots={shape.see_slots}: no room for documents that read {reads} pictures")
    for name, lengths in named.items():
        sizes = documents(experiment, tokenizer, lengths, reads)
        if max(sizes) > min(shape.length, longest):
            raise ValueError(
                f"{name}: a document takes {max(sizes)} tokens, more than a row of rows.length={shape.length}"
            )
        told = f"documents of {sizes.mean():.0f} ({sizes.min()} to {sizes.max()})"
        yield f"{name}: captions of {lengths.mean():.0f} tokens, {told}"
        alone = f"{padded(sizes):.1%} of the tokens; to the longest of all: {padded(sizes, len(sizes)):.1%}"
        yield f"  a row each, padded to the longest of {TOGETHER}: {alone}"
        yield f"  as it is: {fill(sizes, shape, window, reads)}"
        good = [one for one in choices(sizes, shape, window, longest, reads) if one.good]
        if not good:
            yield f"  none of at most {longest} tokens fills {TOKENS:.0%} of the tokens and {SLOTS:.0%} of the slots"
            continue
        yield f"  the shortest good ones: {good[0]}"
        yield f"  the fullest: {max(good, key=lambda one: one.tokens * one.painted)}"
