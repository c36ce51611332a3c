"""A tokenizer's own template of conversations: Jinja, as transformers renders it in `apply_chat_template`.

The template is rendered with placeholders where people speak, so that it alone writes special tokens; and once more
with what they say, to be sure that it writes that as it is.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from dreamllm_jax.data.document import Image, Text
from dreamllm_jax.data.templates import (
    CHAT_TEMPLATE,
    NAMES,
    TEMPLATES,
    ChatML,
    ChatTemplate,
    Control,
    Piece,
    Said,
    Template,
    TemplateError,
    Turn,
)
from dreamllm_jax.data.tokenizer import Tokenizer

_PLACE = re.compile("\ue000(\\d+)\ue001")  # of private use: no template has it
_TRIMMED = (str, str.rstrip, lambda text: text.lstrip("\n"), lambda text: text.strip("\n"), str.lstrip, str.strip)


@functools.lru_cache(maxsize=16)
def find_template(name: str, tokenizer: Tokenizer) -> Template | ChatTemplate:
    """The template of a name, for this tokenizer.

    Raises:
      ValueError: there is none, or the tokenizer does not have its tokens.
    """
    if name == CHAT_TEMPLATE:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"template {CHAT_TEMPLATE}: the tokenizer came without one (chat_template.jinja, or in "
                f"tokenizer_config.json); there are {', '.join(TEMPLATES)}"
            )
        return JinjaTemplate(tokenizer)
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}; known are {', '.join(NAMES)}")
    template = TEMPLATES[name]
    if isinstance(template, ChatML):
        for token in (template.start, template.end):
            if token not in tokenizer.control:
                raise ValueError(f"template {name} writes {token}, which is no special token of the tokenizer")
    return template


def ends_of(name: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end what the model writes: `</s>`, and what ends a turn in the template, if one is named."""
    template = find_template(name, tokenizer) if name else None
    ends = {tokenizer.special.eos}
    if not isinstance(template, Template | None) and template.end is not None:
        ends.add(tokenizer.fast.token_to_id(template.end))
    return tuple(sorted(ends))


class JinjaTemplate:
    """The template of a tokenizer.

    Templates take what is said as one string, or as a list of texts and images, where they write images by the
    tokenizer's marks. With the former an image stands where the document has it; so it does in the assistant's turns.

    Raises:
      ValueError: it cannot be rendered in either way.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._names, marks = tokenizer.names, tokenizer.marks
        image = "".join(f"(?:{re.escape(mark)})?" if mark != marks.patch else re.escape(mark) for mark in marks.tokens)
        longest = sorted(tokenizer.control, key=len, reverse=True)
        self._control = re.compile("|".join([f"(?P<image>{image})", *map(re.escape, longest)]))
        self._blanks = {token for token, how in tokenizer.control.items() if how.lstrip or how.rstrip}
        self._template = _compiled(tokenizer.chat_template)
        self._lists = True
        asked: Turn = ("user", (Image(b"", "user"), Text("a", "user")))
        probe = [asked, ("assistant", (Text("b", "assistant"),)), ("user", (Text("c", "user"),))]
        try:
            self.pieces(probe, False)
        except TemplateError as lists:
            self._lists = False
            try:
                self.pieces(probe, False)
            except TemplateError as strings:
                raise ValueError(
                    f"the tokenizer's chat_template cannot be used. With turns as lists of texts and images, marked by "
                    f"{' '.join(marks.tokens)}: {lists}. With turns as strings: {strings}"
                ) from None
        ends = [piece for piece in self.pieces(probe, False) if isinstance(piece, Control) and piece.learn]
        self.end = ends[0].token if ends else None

    def pieces(self, turns: Sequence[Turn], opened: bool) -> list[Piece]:
        segments = [(role, segment) for role, said in turns for segment in said]
        header = opened and turns[-1][0] != "assistant"
        texts = self._render(turns, header, [f"\ue000{index}\ue001" for index in range(len(segments))])
        between = _PLACE.split(texts)
        inline = [index for index, (role, one) in enumerate(segments) if self._inline(role) or isinstance(one, Text)]
        if [int(place) for place in between[1::2]] != inline:
            raise TemplateError("it leaves out, repeats or reorders what is said")
        said = [
            one.text if isinstance(one, Text) else f"\ue000{index}\ue001" for index, (_, one) in enumerate(segments)
        ]
        kept = _kept(self._render(turns, header, said), between[::2], [said[index] for index in inline])

        images = iter([one for role, one in segments if isinstance(one, Image) and not self._inline(role)])
        last = {index for index, (role, _) in enumerate(segments) if [*segments, ("", None)][index + 1][0] != role}
        written = list(self._written(between[0], images, False))
        for index, text, after in zip(inline, kept, between[2::2], strict=True):
            role, segment = segments[index]
            written.append(segment if isinstance(segment, Image) else Said(text, role == "assistant"))
            if opened and index == len(segments) - 1 and role == "assistant":
                break
            written += self._written(after, images, role == "assistant" and index in last)
        if next(images, None) is not None:
            raise TemplateError("it does not write all images")
        return written

    def _inline(self, role: str) -> bool:
        return role == "assistant" or not self._lists

    def _render(self, turns: Sequence[Turn], header: bool, said: Sequence[str]) -> str:
        """The conversation as the template writes it, when `said` stands for its segments."""
        messages, segments = [], iter(said)
        for role, turn in turns:
            words = [(segment, next(segments)) for segment in turn]
            content: Any = "".join(text for _, text in words)
            if self._lists:
                parts = [("text", content)] if self._inline(role) else [(_kind(one), text) for one, text in words]
                content = [{"type": kind} | ({"text": text} if kind == "text" else {}) for kind, text in parts]
            messages.append({"role": role, "content": content})
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=header, **self._names
            )
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise TemplateError(f"rendering it fails: {error}") from None

    def _written(self, text: str, images: Iterator[Image], ends: bool) -> Iterator[Piece]:
        """What the template itself writes; its first special token and all before it is learned where a turn ends."""
        if ends and not any(match["image"] is None for match in self._control.finditer(text)):
            ends = False
        start = 0
        for match in self._control.finditer(text):
            yield Said(text[start : match.start()], ends)
            start = match.end()
            if match[0] in self._blanks:
                raise TemplateError(f"{match[0]} takes the blanks beside it, which is not supported")
            if match["image"] is None:
                yield Control(match[0], ends)
                ends = False
            elif (image := next(images, None)) is not None:
                yield image
            else:
                raise TemplateError("it writes more images than there are")
        yield Said(text[start:])


def _kind(segment: Text | Image) -> str:
    return "text" if isinstance(segment, Text) else "image"


def _kept(written: str, between: Sequence[str], said: Sequence[str]) -> list[str]:
    """What the template wrote of each text, when `between` is what it writes around them.

    Raises:
      TemplateError: it takes more from a text than the blanks at its ends, or writes something else around it.
    """
    kept, at = [], len(between[0])
    for text, after in zip(said, between[1:], strict=True):
        ways = sorted({trim(text) for trim in _TRIMMED}, key=len, reverse=True)
        found = next((way for way in ways if written.startswith(way + after, at)), None)
        if found is None:
            raise TemplateError(f"it does not write {text[:40]!r} as it is said")
        kept.append(found)
        at += len(found) + len(after)
    if not written.startswith(between[0]) or at != len(written):
        raise TemplateError("what it writes around a text depends on the text")
    return kept


@functools.cache
def _compiled(source: str) -> jinja2.Template:
    """Compiled with transformers' settings, but for the date: a text does not depend on the day."""

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the tokenizer's chat_template is no template of Jinja: {error}") from None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, by which some templates mark what the assistant says: as if it were not there."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
