"""CIDEr (Vedantam et al. 2015) of captions, as pycocoevalcap computes it.

Its own tokenizer is a Java program. NLTK's follows the same rules, those of the Penn Treebank; the punctuation that is
then left out is the same.
"""

import re
from collections.abc import Sequence

from nltk.tokenize import TreebankWordTokenizer
from pycocoevalcap.cider.cider import Cider

_LEFT_OUT = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}  # they count as words
_PLAIN = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2013": "--", "\u2014": "--"})
_OPENING_QUOTE = re.compile(r"(?<!\S)'(?=[a-z])")
_TOKENIZER = TreebankWordTokenizer()


def tokenize(caption: str) -> str:
    """The caption's words in lower case with a space between, without punctuation."""
    text = _OPENING_QUOTE.sub("' ", caption.lower().translate(_PLAIN))
    return " ".join(_BRACKETS.get(word, word) for word in _TOKENIZER.tokenize(text) if word not in _LEFT_OUT)


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The score of each caption; their mean is the corpus' CIDEr, of which tables print the hundredfold.

    How much an n-gram counts depends on how many images' references have it, so a score depends on the whole corpus.

    Args:
      captions: one an image.
      references: all that are known of each image.
    """
    given = {index: [tokenize(caption)] for index, caption in enumerate(captions)}
    known = {index: [tokenize(caption) for caption in some] for index, some in enumerate(references)}
    return [float(score) for score in Cider().compute_score(known, given)[1]]
