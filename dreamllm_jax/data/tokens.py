"""What a document becomes: tokens, loss weights and the places of its images.

SEE is `<im_start> <im_patch>*P <im_end>`, or how the language model was taught to read images (`ImageMarks`); DREAM is
`<dream_start> <im_patch>*Q <dream_end>`. Where a tokenizer has no `<s>`, documents begin without it:

    pair, comprehension   <s> SEE text </s>                    learns text, </s>
    pair, creation        <s> text DREAM </s>                  learns the image
    image_image           <s> SEE(source) DREAM(target) </s>   learns the target image
    edit                  <s> SEE(sources) text DREAM(target) </s>   learns the target image
    pair painted, image_image and edit, where the model is asked in words of its own (`Prompting`)
                          turns in a template, DREAM           learns the image
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
from dreamllm_jax.data.batch import RowShape
from dreamllm_jax.data.chat_template import find_template
from dreamllm_jax.data.document import Document, Image, Segment, Text
from dreamllm_jax.data.prompting import Prompting
from dreamllm_jax.data.templates import ChatTemplate, Control, Piece, Said, Template, turns_of
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.data.writing import Encoded, Full, Row

Mode = Literal["joint", "comprehension", "creation"]
MODES = ("joint", "comprehension", "creation")
Dropped = Literal["", "text", "images", "both"]  # what guidance leads away from is learned from such documents


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
    prompting: Prompting | None = None,
    drop: Dropped = "",
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
      prompting: how the model is asked to paint; None for captions, instructions and images that stand alone.
      drop: of what an image is painted from, what this document goes without: its text, the images that are read, which
        become black ones of the same size, or both; of documents whose images are not painted so, nothing.
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
    paints = document.kind in _PAINTED and (document.kind, mode) != ("pair", "comprehension")
    written = find_template(prompting.template if paints and prompting else template, tokenizer)
    row = Row(tokenizer, shape, int(document.kind != "conversation"), see_first, seen_in)
    with contextlib.suppress(Full):
        if document.kind == "conversation":
            _write_conversation(row, document.segments, written, learn_dream_start, complete)
            return row.encoded()
        if document.kind == "instruct_interleaved":
            asked = [segment for segment in document.segments if segment.role != "assistant"]
            _write_conversation(row, asked, written, complete=False)
            _write_interleaved(row, [s for s in document.segments if s.role == "assistant"], mode)
        elif not (paints and prompting):
            row.write(row.special.begin, learn=False)
        if document.kind == "text":
            for segment in document.texts:
                row.write_text(segment.text)
        elif paints:
            _write_painted(row, *_given(document, drop), document.images[-1], prompting)
        elif document.kind == "pair":
            row.require(see=document.images)
            row.write_image(document.images[0], see=True)
            row.write_text(document.texts[0].text)
        elif document.kind == "interleaved":
            _write_interleaved(row, document.segments, mode)
    if complete and document.kind != "conversation":
        end, turns = row.special.eos, document.kind == "instruct_interleaved" or (paints and prompting)
        if turns and not isinstance(written, Template) and written.end is not None:
            end = tokenizer.fast.token_to_id(written.end)
        row.end(end, learn=not paints)
    return row.encoded()


def encode_asked(
    text: str | None,
    read: Sequence[Image],
    tokenizer: Tokenizer,
    shape: RowShape,
    prompting: Prompting,
    seen_in: Callable[[Image], int] | None = None,
) -> Encoded:
    """How a model is asked to paint, up to where `<dream_start>` follows.

    Args:
      text: a caption or, with images, an instruction; None for neither (see `Prompting.turns`).
      shape, seen_in: as of `encode_document`, whose documents begin so.

    Raises:
      ValueError: the row has no room for it.
    """
    row = Row(tokenizer, shape, 0, False, seen_in)
    row.require(read)
    _write_asked(row, text, read, prompting, row.room)
    return row.encoded()


_PAINTED = ("pair", "image_image", "edit")  # documents whose last image is painted from all the rest


def _given(document: Document, drop: Dropped) -> tuple[str | None, list[Image]]:
    """The text that an image is painted from, None for none, and the images that are read."""
    text = document.texts[0].text if document.texts and drop not in ("text", "both") else None
    read = [
        Image(images.black(images.size_of(image.data))) if drop in ("images", "both") else image
        for image in document.images[:-1]
    ]
    return text, read


def _write_painted(
    row: Row, text: str | None, read: Sequence[Image], target: Image, prompting: Prompting | None
) -> None:
    row.require(read, [target])
    _, (group,) = row.places(read, [target])
    room = row.room - len(row.special.painted(row.shape.dream[group].tokens))
    if prompting is not None:
        _write_asked(row, text, read, prompting, room)
    else:
        for image in read:
            row.write_image(image, see=True)
            room -= len(row.special.seen(row.shape.see[row.see[-1].group].tokens))
        row.write(row.tokenizer.encode_text(text or "")[:room], learn=False)
    row.write_image(target, dream=True)


def _write_asked(row: Row, text: str | None, read: Sequence[Image], prompting: Prompting, room: int) -> None:
    """Writes how the model is asked to paint at the row's beginning, in so many tokens; its text is cut to that."""
    template, whole = find_template(prompting.template, row.tokenizer), dataclasses.replace(row.shape, length=1 << 20)
    text = None if text is None else text.strip()
    if text and prompting.max_tokens:
        text = _cut(text, row.tokenizer, prompting.max_tokens)
    while True:
        asked = Row(row.tokenizer, whole, 0, False, row.seen_in)
        said = prompting.turns(text, read)
        if isinstance(template, Template):
            _write_dialogue(asked, said, template, False, False)
            asked.write_text(prompting.answer, learn=False, prefix=False)
        else:
            _write_pieces(asked, [*template.pieces(turns_of(said), True), Said(prompting.answer)], False)
        if (over := len(asked.tokens) - room) <= 0:
            break
        if not text:
            raise ValueError(f"what asks for an image takes {len(asked.tokens)} tokens, there is room for {room}")
        text = _cut(text, row.tokenizer, max(len(row.tokenizer.encode_spans(text)[0]) - over, 0))
    row.tokens, row.weights, row.see = asked.tokens, asked.weights, asked.see


def _cut(text: str, tokenizer: Tokenizer, tokens: int) -> str:
    """As much of a text as its first tokens stand for, whole characters of it."""
    ids, spans = tokenizer.encode_spans(text)
    return text if len(ids) <= tokens else text[: spans[tokens][0]]


def _write_interleaved(row: Row, segments: Sequence[Segment], mode: Mode) -> None:
    see, dream = mode != "creation", mode != "comprehension"
    for segment in segments:
        if isinstance(segment, Text):
            row.write(row.tokenizer.encode_text(segment.text.strip()), learn=True)
        else:
            row.write_image(segment, see=see, dream=dream, learn_dream_start=True)


def _write_conversation(
    row: Row,
    segments: Sequence[Segment],
    template: Template | ChatTemplate,
    learn_dream_start: bool = False,
    complete: bool = True,
) -> None:
    if isinstance(template, Template):
        _write_dialogue(row, segments, template, learn_dream_start, complete)
    else:
        _write_pieces(row, template.pieces(turns_of(segments), not complete), learn_dream_start)


def _write_pieces(row: Row, pieces: Sequence[Piece], learn_dream_start: bool) -> None:
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
    row: Row, segments: Sequence[Segment], template: Template, learn_dream_start: bool, complete: bool
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
