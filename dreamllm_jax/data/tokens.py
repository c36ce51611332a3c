"""What a document becomes: tokens, loss weights and the places of its images.

SEE is `<im_start> <im_patch>*P <im_end>`, or how the language model was taught to read images (`ImageMarks`); DREAM is
`<dream_start> <im_patch>*Q <dream_end>`. Where a tokenizer has no `<s>`, documents begin without it:

    pair, comprehension   <s> SEE text </s>                    learns text, </s>
    pair, creation        <s> text DREAM </s>                  learns the image
    image_image           <s> SEE(source) DREAM(target) </s>   learns the target image
    interleaved           <s> text DREAM SEE text ... </s>     learns text, <dream_start>, </s>, images
      comprehension       only SEE at each image
      creation            only DREAM at each image
      see_first           SEE DREAM at each image, an ablation: it is then painted from itself
    instruct_interleaved  prompt in a template, then as interleaved   learns what follows the prompt
    conversation          turns in a template; the user's images are SEE, the assistant's DREAM SEE
                                                               learns the assistant's turns, images
    text                  <s> text </s>                        learns text, </s>
    preference            a conversation with the better answer, then one with the worse, in half a row at most each
                                                               learns the first; the second's answer has weight -1
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Literal

import numpy as np

from dreamllm_jax.data import images
from dreamllm_jax.data.batch import RowShape, SlotGroup
from dreamllm_jax.data.chat_template import find_template
from dreamllm_jax.data.document import Document, Image, Segment, Text
from dreamllm_jax.data.templates import ChatTemplate, Control, Piece, Said, Template, turns_of
from dreamllm_jax.data.tokenizer import Tokenizer

Mode = Literal["joint", "comprehension", "creation"]
MODES = ("joint", "comprehension", "creation")


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


def encode_document(
    document: Document,
    tokenizer: Tokenizer,
    shape: RowShape,
    mode: Mode = "joint",
    *,
    draw: float = 0.0,
    template: str = "vicuna_v1",
    learn_dream_start: bool = False,
    see_first: bool = False,
    complete: bool = True,
    seen_in: Callable[[Image], int] | None = None,
) -> Encoded:
    """Turns a document into tokens that fit a row.

    What does not fit is cut: an interleaved document before the first text or image that does not fit, any other in
    its text; never inside an image. (The original cuts through a conversation's slot; here the conversation ends
    before it.)

    Args:
      document: what to encode.
      tokenizer: its tokenizer.
      shape: room for tokens and images.
      mode: joint, comprehension (images are read) or creation (images are painted). Only pairs and interleaved
        documents differ between them.
      draw: uniform in [0, 1); a pair in mode joint is painted below 0.5 and read otherwise.
      template: of conversations and instructions, one of `templates.NAMES`.
      learn_dream_start: learn the assistant's decision to paint in conversations too; the original does not.
      see_first: where an image is both painted and read, read it first; the model then paints what it has seen.
      complete: end with `</s>`; False leaves the document open, as a prompt. A conversation that ends with the user's
        turn is open for the assistant's in either case.
      seen_in: which group of slots an image to see takes; None for the one next to it in shape of those that have one
        left.

    Raises:
      ValueError: the row has no room for the images without which the document means nothing.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known are {', '.join(MODES)}")
    if document.kind == "preference":
        half, (*before, better, worse) = dataclasses.replace(shape, length=shape.length // 2), document.segments
        alone = (Document("conversation", (*before, answer)) for answer in (better, worse))
        first, second = (encode_document(one, tokenizer, half, template=template) for one in alone)
        joined = [
            np.concatenate(x) for x in ((first.tokens, second.tokens), (first.loss_weights, -second.loss_weights))
        ]
        return Encoded(*joined, starts=(0, len(first.tokens)))
    if document.kind == "pair" and mode == "joint":
        mode = "creation" if draw < 0.5 else "comprehension"
    written = find_template(template, tokenizer)
    row = _Row(tokenizer, shape, int(document.kind != "conversation"), see_first, seen_in)
    with contextlib.suppress(_Full):
        if document.kind == "conversation":
            _write_conversation(row, document.segments, written, learn_dream_start, complete)
            return row.encoded()
        if document.kind == "instruct_interleaved":
            asked = [segment for segment in document.segments if segment.role != "assistant"]
            _write_conversation(row, asked, written, complete=False)
            _write_interleaved(row, [s for s in document.segments if s.role == "assistant"], mode)
        else:
            row.write(row.special.begin, learn=False)
        if document.kind == "text":
            for segment in document.texts:
                row.write_text(segment.text)
        elif document.kind == "pair":
            _write_pair(row, document.texts[0].text, document.images[0], mode)
        elif document.kind == "image_image":
            row.require(document.images[:1], document.images[1:2])
            row.write_image(document.images[0], see=True)
            row.write_image(document.images[1], dream=True)
        elif document.kind == "interleaved":
            _write_interleaved(row, document.segments, mode)
    if complete and document.kind != "conversation":
        end = row.special.eos
        if document.kind == "instruct_interleaved" and not isinstance(written, Template) and written.end is not None:
            end = tokenizer.fast.token_to_id(written.end)
        row.end(end, learn=document.kind != "image_image" and (document.kind, mode) != ("pair", "creation"))
    return row.encoded()


def _next_in_shape(image: Image, groups: Sequence[SlotGroup], free: Sequence[int], cropped: bool) -> int:
    """Which of the free groups it is, see `images.nearest`."""
    sizes = [(groups[group].height, groups[group].width) for group in free]
    return free[images.nearest(images.size_of(image.data), sizes, cropped)]


class _Full(Exception):
    """There is no room for what comes next: the document is cut before it."""


def _write_pair(row: "_Row", text: str, image: Image, mode: Mode) -> None:
    if mode == "creation":
        row.require(dream=[image])
        ids = row.tokenizer.encode_text(text)
        _, (group,) = row.places((), [image])
        row.write(ids[: row.room - len(row.special.painted(row.shape.dream[group].tokens))], learn=False)
        row.write_image(image, dream=True)
    else:
        row.require(see=[image])
        row.write_image(image, see=True)
        row.write_text(text)


def _write_interleaved(row: "_Row", segments: Sequence[Segment], mode: Mode) -> None:
    see, dream = mode != "creation", mode != "comprehension"
    for segment in segments:
        if isinstance(segment, Text):
            row.write(row.tokenizer.encode_text(segment.text.strip()), learn=True)
        else:
            row.write_image(segment, see=see, dream=dream, learn_dream_start=True)


def _write_conversation(
    row: "_Row",
    segments: Sequence[Segment],
    template: Template | ChatTemplate,
    learn_dream_start: bool = False,
    complete: bool = True,
) -> None:
    if isinstance(template, Template):
        _write_dialogue(row, segments, template, learn_dream_start, complete)
    else:
        _write_pieces(row, template.pieces(turns_of(segments), not complete), learn_dream_start)


def _write_pieces(row: "_Row", pieces: Sequence[Piece], learn_dream_start: bool) -> None:
    """Writes what a chat template made of a conversation: images are read, the assistant's painted before.

    The text between two special tokens is encoded as one, as `apply_chat_template` does; those of its tokens are
    learned that have a character to be learned.
    """
    for stretched, group in groupby(pieces, lambda piece: isinstance(piece, Said)):
        if stretched:
            row.write_stretch([(piece.text, piece.learn) for piece in group])
            continue
        for piece in group:
            if isinstance(piece, Control):
                row.write([row.tokenizer.fast.token_to_id(piece.token)], piece.learn)
            else:
                painted = piece.role == "assistant"
                row.write_image(piece, see=True, dream=painted, learn_dream_start=painted and learn_dream_start)


def _write_dialogue(
    row: "_Row", segments: Sequence[Segment], template: Template, learn_dream_start: bool, complete: bool
) -> None:
    """Writes turns in plain text.

    Every stretch of text between images and `</s>` is encoded by itself, as the original's tokenizer does.
    """

    def say(text: str, learn: bool) -> None:
        row.write_text(text, learn, prefix=row.tokenizer.legacy or not row.behind_special)

    row.write(row.special.begin, learn=False)
    system = "".join(s.text for s in segments if isinstance(s, Text) and s.role == "system") or template.system
    turns = [(role, list(turn)) for role, turn in groupby(segments, lambda s: s.role) if role != "system"]
    for index, (role, turn) in enumerate(turns):
        if role == "user":
            if template.bos_each_turn and index:
                row.write(row.special.begin, learn=False)
            heard = template.user if index or not system else template.first.format(system)
            for segment in turn:
                if isinstance(segment, Text):
                    heard += segment.text
                else:
                    say(heard, learn=False)
                    row.write_image(segment, see=True)
                    heard = ""
            say(heard + template.assistant, learn=False)
            continue
        ends = complete or index < len(turns) - 1
        for place, segment in enumerate(turn):
            said = segment.text if isinstance(segment, Text) else ""
            if said and ends and place == len(turn) - 1:
                said += template.end
            if place == 0:
                row.write_text(f" {said}", prefix=False)
            else:
                say(said, learn=True)
            if not isinstance(segment, Text):
                row.write_image(segment, see=True, dream=True, learn_dream_start=learn_dream_start)
        if ends:
            row.write([row.special.eos], learn=True)


class _Row:
    """The tokens and images of one document as they are written, `reserved` tokens being kept free for its end.

    What is written raises `_Full` if it does not fit.
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
            raise _Full
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
            raise _Full

    def write_stretch(self, parts: Sequence[tuple[str, bool]]) -> None:
        """Writes as much as fits of a text, whose parts are learned or not."""
        text = "".join(part for part, _ in parts)
        ids, spans = self.tokenizer.encode_spans(text, first=not self.tokens)
        learned = np.repeat([learn for _, learn in parts], [len(part) for part, _ in parts])
        room = self.room
        for token, (start, end) in list(zip(ids, spans, strict=True))[:room]:
            self.write([token], learn=bool(learned[start:end].any()))
        if len(ids) > room:
            raise _Full

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
        except _Full:
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
          _Full: tokens or slots are lacking.
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
                    raise _Full
                chosen.append(_next_in_shape(image, groups, free, cropped=paints) if len(free) > 1 else free[0])
                room -= groups[chosen[-1]].tokens + more
            found.append(chosen[len(before) :])
        if room < 0:
            raise _Full
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
