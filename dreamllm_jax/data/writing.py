"""The row of a document as it is written: tokens, what is learned of them, and the places of images."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from dreamllm_jax.data import images
from dreamllm_jax.data.batch import RowShape, SlotGroup
from dreamllm_jax.data.document import Image
from dreamllm_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Placed:
    """An image and its place: the index `at` of its first token, and which `group` of slots it takes one of."""

    image: Image
    at: int
    group: int = 0


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A document as tokens, n of them, with images to see and to paint.

    Attributes:
      tokens: i32[n].
      loss_weights: f32[n], weight of predicting `tokens[i]` from those before it.
      see, dream: the images in the order of their places.
      starts: where parts begin that do not see each other, and are taken by one row.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray
    see: tuple[Placed, ...] = ()
    dream: tuple[Placed, ...] = ()
    starts: tuple[int, ...] = (0,)

    @property
    def learns(self) -> bool:
        """Whether any token or image of it is learned, beside its end."""
        return bool(self.loss_weights[:-1].any()) or bool(self.dream)


class Full(Exception):
    """There is no room for what comes next: the document is cut before it."""


class Row:
    """The tokens and images of one document as they are written, `reserved` tokens being kept free for its end.

    What is written raises `Full` if it does not fit.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        shape: RowShape,
        reserved: int,
        see_first: bool,
        seen_in: Callable[[Image], int] | None,
    ):
        self.see_first, self.seen_in = see_first, seen_in
        self.tokenizer, self.shape, self.special = tokenizer, shape, tokenizer.special
        self.limit = shape.length - reserved
        self.tokens: list[int] = []
        self.weights: list[float] = []
        self.see: list[Placed] = []
        self.dream: list[Placed] = []

    @property
    def room(self) -> int:
        return self.limit - len(self.tokens)

    def write(self, ids: Sequence[int], learn: bool) -> None:
        """Writes all of the ids or nothing."""
        if len(ids) > self.room:
            raise Full
        self.tokens.extend(ids)
        self.weights.extend([float(learn)] * len(ids))

    @property
    def behind_special(self) -> bool:
        """Whether the last token is a special one that is not the row's first."""
        ids = self.special
        return len(self.tokens) > 1 and self.tokens[-1] in (ids.bos, ids.eos, ids.seen(1)[-1], ids.dream_end)

    def write_text(self, text: str, learn: bool = True, prefix: bool = True) -> None:
        """Writes as much of the text as fits; `prefix` as in `Tokenizer.encode_text`."""
        ids = self.tokenizer.encode_text(text, prefix)
        room = self.room
        self.write(ids[:room], learn)
        if len(ids) > room:
            raise Full

    def write_stretch(self, parts: Sequence[tuple[str, bool]]) -> None:
        """Writes as much as fits of a text, whose parts are learned or not."""
        text = "".join(part for part, _ in parts)
        ids, spans = self.tokenizer.encode_spans(text, first=not self.tokens)
        learned = np.repeat([learn for _, learn in parts], [len(part) for part, _ in parts])
        room = self.room
        for token, (start, end) in list(zip(ids, spans, strict=True))[:room]:
            self.write([token], learn=bool(learned[start:end].any()))
        if len(ids) > room:
            raise Full

    def write_image(
        self, image: Image, see: bool = False, dream: bool = False, learn_dream_start: bool = False
    ) -> None:
        """Writes DREAM, SEE or both for one image; or nothing, when tokens or slots are lacking."""
        seen, painted = self.places([image] if see else [], [image] if dream else [])
        if see and self.see_first:
            self._write_see(image, seen[0])
        if dream:
            start, *rest = self.special.painted(self.shape.dream[painted[0]].tokens)
            self.write([start], learn_dream_start)
            self.dream.append(Placed(image, len(self.tokens), painted[0]))
            self.write(rest, learn=False)
        if see and not self.see_first:
            self._write_see(image, seen[0])

    def _write_see(self, image: Image, group: int) -> None:
        self.see.append(Placed(image, len(self.tokens) + len(self.special.before_patches), group))
        self.write(self.special.seen(self.shape.see[group].tokens), learn=False)

    def require(self, see: Sequence[Image] = (), dream: Sequence[Image] = ()) -> None:
        """Raises ValueError unless these images fit."""
        try:
            self.places(see, dream)
        except Full:
            shape = self.shape
            room = [
                f"{sum(g.slots for g in groups)} {name} slots" + "".join(f" of {g.tokens} tokens" for g in groups[:1])
                for name, groups in (("see", shape.see), ("dream", shape.dream))
            ]
            raise ValueError(
                f"a row of {shape.length} tokens with {room[0]} and {room[1]} has no room for {len(see)} images to "
                f"read and {len(dream)} to paint"
            ) from None

    def places(self, see: Sequence[Image], dream: Sequence[Image]) -> tuple[list[int], list[int]]:
        """The groups whose slots these images take.

        Raises:
          Full: tokens or slots are lacking.
        """
        found: list[list[int]] = []
        room, around = self.room, (len(self.special.seen(0)), len(self.special.painted(0)))
        uses = ((see, self.shape.see, self.see), (dream, self.shape.dream, self.dream))
        for (wanted, groups, before), more, paints in zip(uses, around, (False, True), strict=True):
            chosen = [placed.group for placed in before]
            for image in wanted:
                free = [g for g, group in enumerate(groups) if chosen.count(g) < group.slots]
                if self.seen_in is not None and not paints:
                    free = [g for g in free if g == self.seen_in(image)]
                if not free:
                    raise Full
                chosen.append(_next_in_shape(image, groups, free, cropped=paints) if len(free) > 1 else free[0])
                room -= groups[chosen[-1]].tokens + more
            found.append(chosen[len(before) :])
        if room < 0:
            raise Full
        return found[0], found[1]

    def end(self, token: int, learn: bool) -> None:
        """Writes what ends the document in the reserved place."""
        self.tokens.append(token)
        self.weights.append(float(learn))

    def encoded(self) -> Encoded:
        weights = np.asarray(self.weights, np.float32)
        weights[:1] = 0  # nothing stands before it that it could be predicted from
        return Encoded(
            tokens=np.asarray(self.tokens, np.int32),
            loss_weights=weights,
            see=tuple(self.see),
            dream=tuple(self.dream),
        )


def _next_in_shape(image: Image, groups: Sequence[SlotGroup], free: Sequence[int], cropped: bool) -> int:
    """Which of the free groups it is, see `images.nearest`."""
    sizes = [(groups[group].height, groups[group].width) for group in free]
    return free[images.nearest(images.size_of(image.data), sizes, cropped)]
