"""The tokenizer: SentencePiece's results from the `tokenizers` library, and the special tokens of documents.

A SentencePiece BPE model is converted once (`from_sentencepiece`) and equals SentencePiece on every text; the tokens of
`dreamllm_jax.vocabulary` are appended. Text is always encoded literally: `"<image>"` inside a user's text is seven
characters, never a special token.
"""

import io
import json
import os
from collections.abc import Iterable, Sequence

import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from dreamllm_jax.vocabulary import ADDED_TOKENS, SpecialTokens

FILE = "tokenizer.json"
_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # SentencePiece.Type


class Tokenizer:
    """Text to token ids and back, with the special tokens known by name.

    Attributes:
      special: the ids of the special tokens.
      hf: the same tokenizer as transformers' class, to be saved with an exported model.
    """

    def __init__(self, hf: PreTrainedTokenizerFast):
        self.hf = hf
        ids = {token: hf.convert_tokens_to_ids(token) for token in ADDED_TOKENS}
        self.special = SpecialTokens(
            bos=hf.bos_token_id,
            eos=hf.eos_token_id,
            pad=ids["[PAD]"],
            **{token.strip("<>"): ids[token] for token in ADDED_TOKENS if token != "[PAD]"},
        )
        self._literal = FastTokenizer.from_str(hf.backend_tokenizer.to_str())
        self._literal.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special tokens included."""
        return len(self.hf)

    def encode_text(self, text: str) -> list[int]:
        """Ids of the text, taken literally, without bos or eos; nothing for the empty text."""
        return self._literal.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids."""
        return self.hf.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes `tokenizer.json`."""
        epath.Path(path).write_text(self.hf.backend_tokenizer.to_str())

    def __getstate__(self):
        return {"hf": self.hf}

    def __setstate__(self, state):
        self.__init__(state["hf"])


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads a SentencePiece `.model`, a `tokenizer.json`, or a Hugging Face directory holding either.

    The special tokens that are missing are appended, those already there keep their ids. A directory may give the ids
    of the appended tokens in `added_tokens.json` or in its config's `special_tokens2ids_dict`.

    Raises:
      FileNotFoundError: nothing to read there.
      ValueError: the file is of a kind that cannot be converted exactly.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}")
    added = _recorded_ids(path) if path.is_dir() else {}
    if path.is_dir():
        candidates = [path / "tokenizer.model", path / FILE]
        found = [p for p in candidates if p.exists()]
        if not found:
            raise FileNotFoundError(f"neither tokenizer.model nor {FILE} in {path}")
        directory, path = path, found[0]
    else:
        directory = None
    if path.suffix == ".model":
        fast, names = from_sentencepiece(path.read_bytes()), {"bos_token": "<s>", "eos_token": "</s>"}
    elif path.suffix == ".json":
        fast = FastTokenizer.from_str(path.read_text())
        names = _special_names(fast, directory)
    else:
        raise ValueError(f"{path}: a tokenizer is a SentencePiece .model, a {FILE} or a directory with one of them")
    return _with_special_tokens(fast, names, added)


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
    return _with_special_tokens(from_sentencepiece(model.getvalue()), {"bos_token": "<s>", "eos_token": "</s>"}, {})


def from_sentencepiece(model: bytes) -> FastTokenizer:
    """Converts a serialized SentencePiece BPE model to an equal `tokenizers` one.

    SentencePiece merges the pair whose joined piece scores best, leftmost first; BPE with merges ranked by that score
    does the same.

    Raises:
      ValueError: not a BPE model, or one with a normaliser or pieces that have no counterpart.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    if proto.trainer_spec.model_type != _BPE:
        raise ValueError("the SentencePiece model is not of type BPE; convert it to tokenizer.json with transformers")
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap or not spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        raise ValueError("the SentencePiece model normalises text in a way LLaMA's does not; give a tokenizer.json")
    strange = [p.piece for p in proto.pieces if p.type not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE)]
    if strange:
        raise ValueError(
            f"the SentencePiece model has user-defined pieces ({strange[0]!r}, ...); give a tokenizer.json"
        )
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = [
        (score, len(piece[:cut]), len(piece[cut:]), piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    fast = FastTokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for *_, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    controls = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in controls])
    return fast


def _with_special_tokens(fast: FastTokenizer, names: dict[str, str], recorded: dict[str, int]) -> Tokenizer:
    wanted = sorted(ADDED_TOKENS, key=lambda token: (recorded.get(token, 1 << 30), ADDED_TOKENS.index(token)))
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in wanted])
    for token, index in recorded.items():
        if fast.token_to_id(token) != index:
            raise ValueError(f"the special token {token} should have the id {index}, got {fast.token_to_id(token)}")
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", **names))


def _recorded_ids(directory: epath.Path) -> dict[str, int]:
    """Ids of our special tokens that a checkpoint directory wrote down."""
    recorded: dict[str, int] = {}
    if (directory / "added_tokens.json").exists():
        recorded = json.loads((directory / "added_tokens.json").read_text())
    elif (directory / "config.json").exists():
        recorded = json.loads((directory / "config.json").read_text()).get("special_tokens2ids_dict", {})
    flat = {k: v for value in (recorded, recorded.get("additional_special_tokens", {})) for k, v in dict(value).items()}
    return {token: flat[token] for token in ADDED_TOKENS if isinstance(flat.get(token), int)}


def _special_names(fast: FastTokenizer, directory: epath.Path | None) -> dict[str, str]:
    """The names of bos and eos: from the directory's tokenizer_config.json, else LLaMA's."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    if directory is not None and (directory / "tokenizer_config.json").exists():
        config = json.loads((directory / "tokenizer_config.json").read_text())
        for name in names:
            token = config.get(name)
            if token:
                names[name] = token["content"] if isinstance(token, dict) else token
    for name, token in names.items():
        if fast.token_to_id(token) is None:
            raise ValueError(f"the tokenizer has no {name} {token!r}; give its directory with tokenizer_config.json")
    return names
