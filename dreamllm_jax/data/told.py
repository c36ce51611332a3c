"""What a directory tells of its tokenizer beside the vocabulary: added tokens, and what begins and ends a text."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from etils import epath
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from dreamllm_jax.data.vocabulary import ADDED_TOKENS, OUR_MARKS, OUR_PAINT_MARKS, ImageMarks, PaintMarks, marks_among

SENTENCEPIECE_NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT_TEMPLATE = "chat_template.jinja"
MARKS, PAINT_MARKS = "image_marks", "paint_marks"  # where tokenizer_config.json tells them
_LISTS = ("additional_special_tokens", "extra_special_tokens")  # of special tokens without a role


@dataclasses.dataclass(frozen=True)
class Told:
    """What a directory tells of its tokenizer beside the vocabulary.

    Attributes:
      settings: of tokenizer_config.json, over those of special_tokens_map.json; a template of conversations that has a
        file of its own is taken before the one in there.
      added: tokens that were added to a base vocabulary, by id; ours are among them where they have ids already.
      ends: ids of eos in generation_config.json or config.json.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    added: Mapping[int, AddedToken] = dataclasses.field(default_factory=dict)
    ends: Sequence[int] = ()

    @classmethod
    def read(cls, directory: epath.Path | None) -> "Told":
        """Raises ValueError for a damaged file, or two ids of a token."""
        if directory is None:
            return cls()
        names = ("special_tokens_map.json", "tokenizer_config.json", "generation_config.json", "config.json")
        special, config, generation, model = (read_json(directory / name) for name in names)
        told = cls({**config, **special, **{name: value for name, value in config.items() if value is not None}})
        for index, token in (config.get("added_tokens_decoder") or {}).items():
            flags = {name: token.get(name, False) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            special = token.get("special", False) or told.is_special(token["content"])
            told = told.with_token(int(index), AddedToken(token["content"], special=special, **flags))
        recorded = model.get("special_tokens2ids_dict", {})
        ids = read_json(directory / "added_tokens.json") | {t: i for t, i in _flat(recorded) if t in ADDED_TOKENS}
        for token, index in ids.items():
            told = told.with_token(index, AddedToken(token, normalized=False, special=told.is_special(token)))
        template = read_json(directory / "chat_template.json").get("chat_template")
        if (file := directory / CHAT_TEMPLATE).exists():
            template = file.read_text()
        if template is not None:
            told = dataclasses.replace(told, settings={**told.settings, "chat_template": template})
        ends = next((end for file in (generation, model) if (end := file.get("eos_token_id")) is not None), ())
        return dataclasses.replace(told, ends=[ends] if isinstance(ends, int) else list(ends))

    @property
    def recorded(self) -> dict[str, int]:
        """Ids of our special tokens."""
        return {token.content: index for index, token in self.added.items() if token.content in ADDED_TOKENS}

    def is_special(self, token: str) -> bool:
        """Whether a text never means it."""
        named = {_content(value) for name, value in self.settings.items() if name.endswith("_token")}
        for more in (self.settings.get(name) or () for name in _LISTS):
            named |= {*map(_content, more.values() if isinstance(more, Mapping) else more)}
        return token in ADDED_TOKENS or token in named

    def choosing(
        self, marks: ImageMarks | None, painting: PaintMarks | None, added: Mapping[str, int] = MappingProxyType({})
    ) -> "Told":
        """As if the files told of images and painted ones so, and of these special tokens, at these ids, too.

        Raises:
          ValueError: as of `with_token`.
        """
        chosen = {name: list(found) for name, found in ((MARKS, marks), (PAINT_MARKS, painting)) if found is not None}
        told = dataclasses.replace(self, settings={**self.settings, **chosen})
        for token, index in added.items():
            told = told.with_token(index, AddedToken(token, normalized=False, special=True))
        return told

    def joined(self, whole: FastTokenizer) -> "Told":
        """With the tokens that a tokenizer.json has added; ValueError for two ids of a token."""
        told = self
        for index, token in whole.get_added_tokens_decoder().items():
            told = told.with_token(index, token)
        return told

    def with_token(self, index: int, token: AddedToken) -> "Told":
        """One more, unless it is known; ValueError for two ids of a token, or two tokens of an id."""
        for other, known in self.added.items():
            if (other == index) != (known.content == token.content):
                raise ValueError(
                    f"the tokenizer's files disagree: {known.content!r} has the id {other} in one, {token.content!r} "
                    f"the id {index} in another"
                )
        return dataclasses.replace(self, added={index: token, **self.added})

    def add_to(self, fast: FastTokenizer) -> None:
        """Adds the tokens that the tokenizer lacks; ValueError if one cannot have its id."""
        known = fast.get_added_tokens_decoder()
        for index, token in sorted(self.added.items()):
            if index not in known:
                (fast.add_special_tokens if token.special else fast.add_tokens)([token])
            if (got := fast.token_to_id(token.content)) != index:
                raise ValueError(
                    f"the {'special' if token.special else 'added'} token {token.content} should have the id {index}, "
                    f"got {got}"
                )

    def names(self, fast: FastTokenizer) -> dict[str, str]:
        """The names of bos and eos: as told, else SentencePiece's; no bos if that is told, or there is no `<s>`."""
        names = dict(SENTENCEPIECE_NAMES)
        bos = SENTENCEPIECE_NAMES["bos_token"]
        if not self.settings.get("bos_token", fast.token_to_id(bos) is not None and bos):
            del names["bos_token"]
        ends = [token for index in self.ends if (token := fast.id_to_token(index)) is not None]
        if ends and names["eos_token"] not in ends:
            names["eos_token"] = ends[0]
        for name in names:
            names[name] = _content(self.settings.get(name)) or names[name]
        for name, token in names.items():
            if fast.token_to_id(token) is None:
                raise ValueError(
                    f"the tokenizer has no {name} {token!r}; give its directory with tokenizer_config.json"
                )
        return names

    def marks(self, fast: FastTokenizer) -> ImageMarks:
        """How images are marked: as told, else as the vocabulary's authors do it, else our way.

        Raises:
          ValueError: told otherwise than as start, patch and end; or tokens that the vocabulary does not have.
        """
        vocabulary = fast.get_vocab()
        given = self.settings.get(MARKS)
        if given is None:
            return OUR_MARKS if self.recorded.keys() & set(OUR_MARKS) else marks_among(vocabulary)
        match given:
            case [str() | None, str(), str() | None]:
                marks = ImageMarks(*given)
            case _:
                raise ValueError(f"{MARKS} are the tokens before, at and after an image's patches, got {given!r}")
        if marks != OUR_MARKS and (missing := [token for token in marks.tokens if token not in vocabulary]):
            raise ValueError(f"{MARKS} {', '.join(missing)}: the tokenizer has no such token")
        if len(set(marks.tokens)) < len(marks.tokens):
            raise ValueError(f"{MARKS} must differ from each other, got {', '.join(marks.tokens)}")
        return marks

    def painting(self, fast: FastTokenizer) -> PaintMarks:
        """How painted images are marked: as told, else our way; errors as of `marks`."""
        match self.settings.get(PAINT_MARKS):
            case None:
                return OUR_PAINT_MARKS
            case [str() as start, str() as end]:
                marks = PaintMarks(start, end)
            case given:
                raise ValueError(f"{PAINT_MARKS} are the tokens before and after a painted image, got {given!r}")
        if marks != OUR_PAINT_MARKS and (missing := [mark for mark in marks if fast.token_to_id(mark) is None]):
            raise ValueError(f"{PAINT_MARKS} {', '.join(missing)}: the tokenizer has no such token")
        return marks

    def pad(self, fast: FastTokenizer, otherwise: str) -> str:
        """The token that pads, as told, if the vocabulary has it."""
        name = _content(self.settings.get("pad_token"))
        return name if name and fast.token_to_id(name) is not None else otherwise

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations, where several are named the default one."""
        template = self.settings.get("chat_template")
        if isinstance(template, Sequence) and not isinstance(template, str):
            return {each["name"]: each["template"] for each in template}.get("default")
        return template


def _content(token: Any) -> str:
    """A token's text, which files tell alone or with its flags."""
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _flat(recorded: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The tokens of a `special_tokens2ids_dict`, some of which are nested in it."""
    found = {**recorded, **dict(recorded.get("additional_special_tokens", {}))}
    return [(token, index) for token, index in found.items() if isinstance(index, int)]


def read_json(file: epath.Path) -> dict[str, Any]:
    """What stands in a file; nothing if it is not there."""
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from error
