"""Qwen's own tokens, from the file that the package dashscope carries, beside tiktoken's."""

import base64
import random
import re
import subprocess
import sys
import unicodedata
import zipfile

import pytest

from dreamllm_jax.data.tokenizer import load_tokenizer

# Of scripts, signs, emoji, letters of more than one form, and marks that combine.
RANGES = [
    (0x20, 0x7F),
    (0xA0, 0x250),
    (0x300, 0x530),
    (0x590, 0x700),
    (0x900, 0xE80),
    (0x1100, 0x1200),
    (0x2000, 0x2070),
]
RANGES += [
    (0x2190, 0x2600),
    (0x3040, 0x3100),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A4),
    (0x1D400, 0x1D800),
    (0x1F300, 0x1F700),
]
WORDS = [
    "def f(self):\n    return",
    "import numpy as np",
    "=>",
    "!=",
    "{}",
    "    ",
    "\t",
    "\n\n",
    "The",
    "quick",
    "don't",
]
WORDS += [
    "I'LL",
    "https://x.y/z?a=1",
    "😀👩‍👩‍👧",
    "0x1F",
    "\uff13",
    "ﬁ",
    "\r\n",
    " \n ",
    "...",
    "====",
    "你好\uff0c世界",
    "привет",
    "שלום",
]
WORDS += ["नमस्ते", "12345", "<|im_end|>", "e\u0301"]

# How Qwen's program splits text before it merges.
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """qwen.tiktoken of a wheel; nothing is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, "dashscope==2.0.2"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("the package dashscope cannot be downloaded here")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        (folder / "qwen.tiktoken").write_bytes(archive.read("dashscope/resources/qwen.tiktoken"))
    return folder / "qwen.tiktoken"


def lines(count: int) -> list[str]:
    rng = random.Random(0)

    def part() -> str:
        if rng.random() < 0.5:
            return rng.choice(WORDS)
        return "".join(chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.randint(1, 6)))

    return ["".join(part() + rng.choice(["", "", " ", "  "]) for _ in range(rng.randint(1, 12))) for _ in range(count)]


@pytest.mark.slow
def test_qwens_tokens(qwen, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, qwen.read_bytes().splitlines())}
    theirs = tiktoken.Encoding("qwen", pat_str=WORD, mergeable_ranks=ranks, special_tokens={})
    ours = load_tokenizer(qwen)
    assert ours.special.bos is None and ours.special.eos == 151643 and ours.special.pad == 151643 + 3 + 205
    for line in lines(10_000):
        want = theirs.encode(unicodedata.normalize("NFC", line), disallowed_special=())
        assert ours.encode_text(line) == want, line
        assert ours.decode(want) == theirs.decode(want)
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.special == ours.special and all(again.encode_text(w) == ours.encode_text(w) for w in WORDS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nIg== 1\n", "or not all of it: the ranks have gaps"),
        (b"a model", "lines of a token in base64 and its rank"),
    ],
)
def test_a_file_that_is_not_tiktokens_is_refused(content, message, tmp_path):
    (tmp_path / "a.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.tiktoken: it is not tiktoken's, .*{re.escape(message)}"):
        load_tokenizer(tmp_path / "a.tiktoken")
