"""The tokenizer: SentencePiece's or a byte-level one's results from the `tokenizers` library, and special tokens.

A SentencePiece BPE model is converted once (`from_sentencepiece`) and equals SentencePiece on every text; the tokens of
`dreamllm_jax.data.vocabulary` are appended. Text is always encoded literally: `"<image>"` inside a user's text is seven
characters, never a special token.
"""

import functools
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import sentencepiece
from etils import epath
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer

from dreamllm_jax.common import gguf_reader
from dreamllm_jax.common.directories import NO_POINTER, is_lfs_pointer, write_whole
from dreamllm_jax.data.byte_level import SPLITS, VOCABULARY, from_files, from_merges, from_tiktoken
from dreamllm_jax.data.told import CHAT_TEMPLATE, MARKS, PAINT_MARKS, SENTENCEPIECE_NAMES, Told, read_json
from dreamllm_jax.data.vocabulary import (
    ADDED_TOKENS,
    OUR_MARKS,
    OUR_PAINT_MARKS,
    ImageMarks,
    PaintMarks,
    SpecialTokens,
    added_tokens,
    written_as,
)

_logger = logging.getLogger(__name__)

FOLDER = "tokenizer"  # where checkpoints and data sets keep theirs
FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6  # SentencePiece.Type, and GGUF's token_type


class Tokenizer:
    """Text to token ids and back, with the special tokens known by name.

    Attributes:
      fast: the tokenizer itself, which holds all special tokens.
      names: which of them transformers knows as bos_token, if documents begin with one, eos_token, unk_token and
        pad_token.
      special: the ids of the special tokens.
      new_tokens: ids that were appended to a base vocabulary just now: no model has seen them.
      sentencepiece_model: what it was converted from, if it was.
      legacy: in a conversation, text behind a special token begins with SentencePiece's space, as any text does; False
        where the tokenizer's configuration says so, as Llama 2's does.
      marks: the tokens by which an image that is read is written; `painting` those of one that is painted.
      chat_template: how its model's authors write conversations, in Jinja; None if nothing tells.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        names: Mapping[str, str],
        new_tokens: Sequence[int] = (),
        sentencepiece_model: bytes | None = None,
        legacy: bool = True,
        marks: ImageMarks = OUR_MARKS,
        chat_template: str | None = None,
        painting: PaintMarks = OUR_PAINT_MARKS,
    ):
        self.fast, self.names = fast, dict(names)
        self.new_tokens = tuple(new_tokens)
        self.sentencepiece_model = sentencepiece_model
        self.legacy = legacy
        self.marks, self.chat_template, self.painting = marks, chat_template, painting
        bos, eos = (fast.token_to_id(names[name]) if name in names else None for name in ("bos_token", "eos_token"))
        written = written_as(marks, painting, names.get("pad_token", names["eos_token"]))
        tokens = filter(None, (*added_tokens(marks, painting), *written.values()))
        self.special = SpecialTokens.of(bos, eos, {token: fast.token_to_id(token) for token in tokens}, written)
        fast.encode_special_tokens = True  # as any other text
        fast.no_truncation()  # which transformers stores with a tokenizer that was used so
        fast.no_padding()
        if getattr(fast.model, "dropout", None):  # for training it: a text would have other tokens each time
            fast.model.dropout = None

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, the special tokens included."""
        return max(self.fast.get_vocab().values()) + 1

    @property
    def fingerprint(self) -> str:
        """Changes when a text, an image or a conversation gets other tokens."""
        written = (self.fast.to_str(), self.names, self.legacy, self.marks, self.chat_template)
        written += () if self.painting == OUR_PAINT_MARKS else (self.painting,)
        return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()

    def encode_text(self, text: str, prefix: bool = True) -> list[int]:
        """Ids of the text, taken literally, without bos or eos; nothing for the empty text.

        Args:
          prefix: begin with the space that SentencePiece puts before a text; other tokenizers have none.
        """
        fast = self.fast if prefix else self._without_prefix
        return fast.encode(text, add_special_tokens=False).ids

    def encode_spans(self, text: str, first: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text behind a special token, or `first` of all, and the characters that each is made of."""
        fast = self._with_prefix if first or self._prefixed else self._without_prefix
        encoded = fast.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    @functools.cached_property
    def _prefixed(self) -> bool:
        """Whether a text behind a special token begins with SentencePiece's space."""
        meant, end = FastTokenizer.from_str(self.fast.to_str()), self.special.eos
        (given,) = {token for token, index in meant.get_vocab().items() if index == end}
        return self.legacy and meant.encode(f"{given}a", add_special_tokens=False).ids == [end, *self.encode_text("a")]

    @functools.cached_property
    def _with_prefix(self) -> FastTokenizer:
        return _literal(self.fast.to_str())

    @functools.cached_property
    def control(self) -> Mapping[str, AddedToken]:
        """The special tokens, which no text means."""
        return {token.content: token for token in self.fast.get_added_tokens_decoder().values() if token.special}

    @functools.cached_property
    def _without_prefix(self) -> FastTokenizer:
        return _literal(json.dumps(_drop_prefix(json.loads(self.fast.to_str()))))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out."""
        return self.fast.decode([int(i) for i in ids])

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files by which transformers (and `load_tokenizer`) read a tokenizer.

        That is `tokenizer.json`, `tokenizer_config.json`, `added_tokens.json`, `special_tokens_map.json`, and
        `tokenizer.model` if it came from SentencePiece; `chat_template.jinja` if there is one.
        """
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / FILE, self.fast.to_str())
        if self.sentencepiece_model is not None:
            write_whole(directory / SENTENCEPIECE_FILE, self.sentencepiece_model)
        if self.chat_template is not None:
            write_whole(directory / CHAT_TEMPLATE, self.chat_template)
        special = dict.fromkeys([*added_tokens(self.marks, self.painting), *self.marks.tokens, *self.painting])
        more = [token for token in special if token not in self.names.values()]
        names = {**self.names, "additional_special_tokens": more}
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        added = {
            str(index): {flag: getattr(token, flag) for flag in flags}
            for index, token in sorted(self.fast.get_added_tokens_decoder().items())
        }
        base = self.fast.get_vocab(with_added_tokens=False)
        ids = {token["content"]: int(index) for index, token in added.items() if token["content"] not in base}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            **names,
            MARKS: list(self.marks),
            PAINT_MARKS: list(self.painting),
            "added_tokens_decoder": added,
            "clean_up_tokenization_spaces": False,
            "legacy": self.legacy,
        }
        for file, content in (
            ("tokenizer_config.json", config),
            ("added_tokens.json", ids),
            ("special_tokens_map.json", names),
        ):
            write_whole(directory / file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def load_tokenizer(
    path: str | os.PathLike,
    marks: ImageMarks | None = None,
    painting: PaintMarks | None = None,
    added: Mapping[str, int] = MappingProxyType({}),
) -> Tokenizer:
    """Reads a SentencePiece `.model`, a `tokenizer.json`, a Hugging Face directory holding either or a byte-level
    `vocab.json` with `merges.txt`, Qwen's `.tiktoken`, or a `.gguf` model.

    A directory's SentencePiece model is taken before its `tokenizer.json`, unless it cannot be converted or has another
    vocabulary. Tokens that the model's authors added stay at their ids, wherever the directory tells them
    (`added_tokens.json`, `tokenizer_config.json`, `tokenizer.json`), and so do those that begin and end a text. Of our
    special tokens, the missing ones are appended; a directory may give their ids like the others' or in its config's
    `special_tokens2ids_dict`. Whether a SentencePiece model is `legacy` stands in the tokenizer_config.json beside it.

    Images are marked by the tokens that the vocabulary has for it (`KNOWN_MARKS`), of which then none of ours are
    appended; unless tokenizer_config.json says otherwise in `image_marks`, a list of three. Where it says in
    `paint_marks`, a list of two, how painted ones are, none of ours are appended for these.

    Args:
      marks, painting: how images, and painted ones, are marked, whatever is told.
      added: special tokens that the vocabulary has too, and their ids.

    Raises:
      FileNotFoundError: nothing to read there.
      ValueError: the file is damaged, or of a kind that cannot be converted exactly, or ids that cannot be.
    """
    try:
        return _load(epath.Path(path), lambda told: told.choosing(marks, painting, added))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its files are not as transformers writes them: {error!r}") from None
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None


def _load(path: epath.Path, choose: Callable[[Told], Told]) -> Tokenizer:
    if not path.exists():
        raise FileNotFoundError(
            f"no tokenizer at {path}: put a {SENTENCEPIECE_FILE} or a {FILE} there, with the tokenizer_config.json "
            "beside it, or import the model with --tokenizer"
        )
    if path.suffix == ".gguf":
        fast, names, template = from_gguf(path)
        return _with_special_tokens(fast, names, choose(Told({"chat_template": template})))
    if path.suffix == ".tiktoken":
        fast, names = from_tiktoken(_read_file(path)), {"eos_token": "<|endoftext|>"}
        return _with_special_tokens(fast, names, choose(Told()))
    if path.is_dir():
        files = [file for file in (path / SENTENCEPIECE_FILE, path / FILE) if file.exists()]
        if not files and (path / VOCABULARY).exists():
            told, model = choose(Told.read(path)), read_json(path / "config.json").get("model_type", "")
            fast = from_files(path, told.settings.get("tokenizer_class") or "", model)
            told.add_to(fast)
            return _with_special_tokens(fast, told.names(fast), told)
        if not files:
            raise FileNotFoundError(f"neither {SENTENCEPIECE_FILE} nor {FILE} in {path}")
    elif path.suffix in (".model", ".json"):
        files = [path]
    else:
        kinds = f"a SentencePiece .model, a {FILE}, a .gguf, Qwen's .tiktoken or a directory with one"
        raise ValueError(f"{path}: a tokenizer is {kinds}")
    told = choose(Told.read(files[0].parent if files[0].name in (SENTENCEPIECE_FILE, FILE) else None))
    converted = _converted(*files) if files[0].suffix == ".model" else None
    if files[-1].suffix == ".json":
        whole = _read_whole(files[-1])
        told = told.joined(whole)
        told.add_to(whole)
        if converted is None or not _same_ids(converted, whole, told):
            if converted is not None:
                _logger.warning("%s is left aside for %s, which has other ids", *files)
            return _with_special_tokens(whole, told.names(whole), told)
    else:
        told.add_to(converted)
    legacy = read_json(files[0].parent / "tokenizer_config.json").get("legacy") is not False
    return _with_special_tokens(converted, told.names(converted), told, files[0].read_bytes(), legacy)


def _converted(file: epath.Path, instead: epath.Path | None = None) -> FastTokenizer | None:
    """A SentencePiece model; None, with a warning, if it cannot be converted but there is another file instead."""
    try:
        return from_sentencepiece(_read_file(file))
    except ValueError as error:
        if instead is None:
            raise ValueError(f"{file}: {error}") from None
        _logger.warning("%s is left aside for %s: %s", file, instead.name, error)
        return None


def _same_ids(converted: FastTokenizer, whole: FastTokenizer, told: Told) -> bool:
    try:
        told.add_to(converted)
    except ValueError:
        return False
    return converted.get_vocab() == whole.get_vocab()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a SentencePiece BPE tokenizer the way LLaMA's was: digits split, bytes for what it has never seen.

    Args:
      texts: what to learn the pieces from.
      vocab_size: ids wanted, the special tokens included; fewer when the texts do not yield as
        many, more when they hold more different characters.
    """
    smallest = 3 + 256 + len(ADDED_TOKENS)
    if vocab_size <= smallest:
        raise ValueError(f"a vocabulary needs more than {smallest} ids (bytes and special tokens), got {vocab_size}")
    texts = list(texts)
    model = io.BytesIO()
    characters = len(set("".join(texts)) - {" "}) + 1
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=max(vocab_size - len(ADDED_TOKENS), 3 + 256 + characters),
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    fast = from_sentencepiece(model.getvalue())
    return _with_special_tokens(fast, dict(SENTENCEPIECE_NAMES), Told(), model.getvalue())


def from_sentencepiece(model: bytes) -> FastTokenizer:
    """Converts a serialized SentencePiece BPE model to an equal `tokenizers` one.

    SentencePiece merges the pair whose joined piece scores best, leftmost first; BPE with merges ranked by that score
    does the same.

    Raises:
      ValueError: not a BPE model, or one with a normaliser or pieces that have no counterpart.
    """
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", model):
        raise ValueError(f"it is tiktoken's and not SentencePiece's; give the {FILE} of the same model")
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise ValueError(f"it is no SentencePiece model ({error}); download it again, or give a {FILE}") from None
    if not proto.pieces or not proto.HasField("trainer_spec"):
        raise ValueError(f"it is no SentencePiece model, or not all of one; download it again, or give a {FILE}")
    if proto.trainer_spec.model_type != _BPE:
        raise ValueError("the SentencePiece model is not of type BPE; convert it to tokenizer.json with transformers")
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap or not spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        raise ValueError("the SentencePiece model normalises text in a way LLaMA's does not; give a tokenizer.json")
    return _bpe(
        [(p.piece, p.score, p.type) for p in proto.pieces], proto.trainer_spec.unk_id, proto.trainer_spec.bos_id
    )


def _bpe(pieces: list[tuple[str, float, int]], unknown: int, bos: int) -> FastTokenizer:
    """(piece, score, type) of a SentencePiece vocabulary as the `tokenizers` model that equals it."""
    strange = [piece for piece, _, kind in pieces if kind not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE)]
    if strange:
        raise ValueError(
            f"the SentencePiece model has user-defined pieces ({strange[0]!r}, ...); give a tokenizer.json"
        )
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    scores = {piece: score for piece, score, kind in pieces if kind == _NORMAL}
    merges = [
        (score, len(piece[:cut]), len(piece[cut:]), piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    fast = FastTokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for *_, left, right in merges],
            unk_token=pieces[unknown][0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    first = pieces[bos][0]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[(first, bos)]
    )
    _mark_special(fast, [piece for piece, _, kind in pieces if kind in (_UNKNOWN, _CONTROL)])
    return fast


def from_gguf(path: str | os.PathLike) -> tuple[FastTokenizer, dict[str, str], str | None]:
    """The tokenizer inside a `.gguf` model, the names of its bos and eos, and its template of conversations.

    Raises:
      FileNotFoundError, ValueError, ImportError: as `gguf_reader.open_gguf_reader`.
      ValueError: a kind of tokenizer that is not supported.
    """
    reader = gguf_reader.open_gguf_reader(path)

    def field(name: str, default: Any = None) -> Any:
        return gguf_reader.field(reader, f"tokenizer.ggml.{name}", default)

    tokens, kinds, kind = field("tokens"), field("token_type"), field("model")
    bos, eos = field("bos_token_id", 1), field("eos_token_id", 2)
    if kind == "llama":
        fast = _bpe(list(zip(tokens, field("scores"), kinds, strict=True)), field("unknown_token_id", 0), bos)
    elif kind == "gpt2" and field("pre", "gpt-2") in SPLITS:
        merges = [tuple(merge.split(" ")) for merge in field("merges")]
        while kinds[-1] == _UNUSED:  # made up for the rows to which a vocabulary was padded
            tokens, kinds = tokens[:-1], kinds[:-1]
        fast = from_merges({token: index for index, token in enumerate(tokens)}, merges, field("pre", "gpt-2"))
        _mark_special(fast, [token for token, type_ in zip(tokens, kinds, strict=True) if type_ == _CONTROL])
    else:
        raise ValueError(
            f"{path}: its tokenizer ({kind}, {field('pre')}) is not supported; give another with --tokenizer"
        )
    names = {"bos_token": tokens[bos], "eos_token": tokens[eos]}
    if field("pre") == "qwen2":  # whose documents begin with nothing, though the files have an id for it
        del names["bos_token"]
    return fast, names, gguf_reader.field(reader, "tokenizer.chat_template", None)


def _mark_special(fast: FastTokenizer, tokens: Iterable[str]) -> None:
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])


def _literal(description: str) -> FastTokenizer:
    """To encode text with; no post-processor, for some take blanks from what a token is said to be made of."""
    fast = FastTokenizer.from_str(description)
    fast.encode_special_tokens, fast.post_processor = True, None
    return fast


def _drop_prefix(part: Any) -> Any:
    """A tokenizer's description, or a part of it, without what puts a space before a text."""
    if isinstance(part, list):
        return [_drop_prefix(each) for each in part if not (isinstance(each, dict) and each.get("type") == "Prepend")]
    if not isinstance(part, dict):
        return part
    without = {"prepend_scheme": "never", "add_prefix_space": False}
    return {name: without.get(name, _drop_prefix(each)) for name, each in part.items()}


def _with_special_tokens(
    fast: FastTokenizer,
    names: dict[str, str],
    told: Told,
    sentencepiece_model: bytes | None = None,
    legacy: bool = True,
) -> Tokenizer:
    told.add_to(fast)
    recorded, marks, painting = told.recorded, told.marks(fast), told.painting(fast)
    ours = added_tokens(marks, painting)
    wanted = sorted(ours, key=lambda token: (recorded.get(token, 1 << 30), ours.index(token)))
    new = [token for token in wanted if fast.token_to_id(token) is None and token not in recorded]
    _mark_special(fast, dict.fromkeys([*wanted, *marks.tokens, *painting]))
    for token in wanted:
        if fast.model.id_to_token(fast.token_to_id(token)) not in (None, token):
            raise ValueError(f"the vocabulary has gaps, so that {token} has the id of another token: close them")
    for token, index in recorded.items():
        if fast.token_to_id(token) != index:
            raise ValueError(f"the special token {token} should have the id {index}, got {fast.token_to_id(token)}")
    if fast.token_to_id("<unk>") is not None:
        names = {**names, "unk_token": "<unk>"}
    names = {**names, "pad_token": "[PAD]" if "[PAD]" in ours else told.pad(fast, names["eos_token"])}
    known = {token.content for token in fast.get_added_tokens_decoder().values() if token.special}
    _mark_special(fast, [token for token in names.values() if token not in known])
    added = [fast.token_to_id(token) for token in new]
    return Tokenizer(fast, names, added, sentencepiece_model, legacy, marks, told.chat_template, painting)


def _read_file(path: epath.Path) -> bytes:
    content = path.read_bytes()
    if is_lfs_pointer(content):
        raise ValueError(f"it {NO_POINTER}")
    return content


def _read_whole(file: epath.Path) -> FastTokenizer:
    try:
        return FastTokenizer.from_buffer(_read_file(file))
    except Exception as error:  # of which `tokenizers` has no other kind
        raise ValueError(f"{file} is not a tokenizer of Hugging Face: {' '.join(str(error).split())}") from None
