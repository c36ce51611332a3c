"""Byte-level BPE tokenizers from what older directories have in place of a tokenizer.json, or GGUF files.

A token is a string of bytes, which is written in characters that stand for them, as GPT-2's program has it.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping

from etils import epath
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

VOCABULARY, MERGES = "vocab.json", "merges.txt"


def _pieces(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Text is cut into what the pattern finds."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pattern(digits: str) -> str:
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
# How text is split before merging, by the name that GGUF files give: llama.cpp's `llama_vocab_pre_type`.
SPLITS = {
    "gpt-2": _WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WORDS]),
    "llama-bpe": _pieces(_pattern(r"\p{N}{1,3}")),
    "qwen2": _pieces(_pattern(r"\p{N}")),
}
_NORMALIZERS = {"qwen2": normalizers.NFC()}
_CLASSES = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}  # of tokenizer_config.json
_TYPES = {"qwen2": "qwen2", "qwen3": "qwen2", "gpt2": "gpt-2"}  # of config.json


def from_merges(vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]], split: str) -> FastTokenizer:
    """The tokenizer of such tokens and merges, the first merge first; `split` is one of `SPLITS`."""
    fast = FastTokenizer(models.BPE(dict(vocabulary), list(merges)))
    if split in _NORMALIZERS:
        fast.normalizer = _NORMALIZERS[split]
    fast.pre_tokenizer, fast.decoder = SPLITS[split], decoders.ByteLevel()
    return fast


def from_files(directory: epath.Path, tokenizer_class: str, model_type: str) -> FastTokenizer:
    """The tokenizer of a directory's vocab.json and merges.txt.

    Args:
      tokenizer_class, model_type: of tokenizer_config.json and config.json, empty where they are not there: they alone
        say how text is split.

    Raises:
      ValueError: a class that splits text in a way not known here, or a damaged file.
    """
    split = _CLASSES.get(tokenizer_class.removesuffix("Fast")) or _TYPES.get(model_type)
    if split is None:
        raise ValueError(
            f"{directory}: {VOCABULARY} and {MERGES} do not say how text is split, and neither does its class "
            f"{tokenizer_class!r}; save it once with transformers, which writes a tokenizer.json"
        )
    try:
        lines = (directory / MERGES).read_text().splitlines()
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        return from_merges(json.loads((directory / VOCABULARY).read_text()), merges, split)
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory} has a {VOCABULARY} without {MERGES}") from None
    except Exception as error:  # of which `tokenizers` has no other kind
        raise ValueError(f"{directory}: {VOCABULARY} and {MERGES} do not fit each other: {error}") from None


# Of Qwen's first generation, whose `.tiktoken` file has its ordinary tokens alone.
_QWEN_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


def from_tiktoken(content: bytes) -> FastTokenizer:
    """The tokenizer of Qwen's `.tiktoken` file: lines of a token in base64 and its rank.

    tiktoken merges the pair that makes the token of the lowest rank; so do merges in the order of what they make.

    Raises:
      ValueError: not such a file.
    """
    try:
        lines = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"it is not tiktoken's, lines of a token in base64 and its rank: {error}") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise ValueError("it is not tiktoken's, or not all of it: the ranks have gaps")
    letters = _letters()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        parts = [(ranks[left], ranks[right], left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += [(written[left], written[right]) for *_, left, right in sorted(parts)]
    fast = from_merges({written[token]: rank for token, rank in ranks.items()}, merges, "qwen2")
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _QWEN_CONTROL])
    return fast


def _letters() -> list[str]:
    """The character that stands for each byte: itself where it can be seen, else the next one from U+0100 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]
