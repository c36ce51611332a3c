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


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that keep their period, as the Java program (3.4.1) was found to do; and letters, as in "U.S." and "p.m.".
_ABBREVIATIONS = _words(
    """
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt
    cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs ens esq est etc ext feb fla fri ft
    ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mich
    minn mlle mme mo mon mont mr mrs ms msgr mt neb nev nov oct okla penn pfc plc pres prof profs pte ptes pty pvt
    rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs tue tues
    univ va vs vt wed wis wisc wm wyo ed.d ph.d
    """
)
_CAPITALISED = _words("Ark Del Ill La Mass Miss Ore Pa Tex Wash")  # otherwise they are words
_BEFORE_NUMBERS = _words("art ca fig figs no nos op pp prop")
_BEGINNINGS = _words(
    """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms.
    Now Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet
    You
    """
)  # of a sentence: a single letter before them ends the one before
_PERIODS = re.compile(r"((?:(?<![\w-])[A-Za-z]+(?:\.[A-Za-z]+)*)?)\.+(?=([\"')\]}!?]*)(?:\s+(\S*)|$))")


def tokenize(caption: str) -> str:
    """The caption's words in lower case with a space between, without punctuation."""
    text = _PERIODS.sub(_without_period, caption.translate(_PLAIN))
    text = _OPENING_QUOTE.sub("' ", text.lower())
    words = _TOKENIZER.tokenize(f"{text} .")  # at the end of a text NLTK would part a last period from any word
    return " ".join(_BRACKETS.get(word, word) for word in words if word not in _LEFT_OUT)


def _without_period(match: re.Match) -> str:
    """A word and the periods behind it, if they belong to it."""
    word, closed, following = match[1], match[2], match[3] or ""
    small = word.lower()
    letters = bool(word) and all(len(part) == 1 for part in small.split("."))
    begins = len(word) == 1 and not closed and following[:1].isupper() and following.capitalize() in _BEGINNINGS
    kept = (
        small in _ABBREVIATIONS
        or (letters and not begins)
        or (not word.islower() and word.capitalize() in _CAPITALISED)
        or (small in _BEFORE_NUMBERS and following[:1].isdigit())
    )
    return f"{word}. " if kept else f"{word} "


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
