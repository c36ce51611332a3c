"""VQA accuracy (Antol et al. 2015) with the answer normalisation of EvalAI, whose server scores VQAv2, VizWiz and
TextVQA, and which the original program uses too."""

import re
from collections.abc import Sequence

ARTICLES = ("a", "an", "the")
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(_COUNTED)} | {"none": "0"}

# Spelt with all apostrophes; without one of them they are corrected.
_SPELT = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _SPELT.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}

_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_PERIOD = re.compile(r"\.(?!\d)")  # the published rule means to keep those between digits; it keeps those before one
_MOST_PERIODS = 32  # that the published rule removes


def normalise(answer: str) -> str:
    """The answer in lower case, without articles and punctuation, numbers up to ten as digits, contractions spelt out.

    Punctuation that touches a space anywhere in the answer is removed, other punctuation becomes a space.
    """
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    clean = answer
    for mark in _PUNCTUATION:
        apart = f"{mark} " in answer or f" {mark}" in answer
        clean = clean.replace(mark, "" if apart else " ")
    clean = _PERIOD.sub("", clean, count=_MOST_PERIODS)
    words = [NUMBERS.get(word, word) for word in clean.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, annotated: Sequence[str]) -> float:
    """How well an answer agrees with those of the annotators, usually ten: each is left out once, and of the others
    three that gave the same answer are enough. From 0 to 1."""
    given = normalise(answer)
    others = [normalise(other) for other in annotated]
    equal = others.count(given)
    return sum(min(1.0, (equal - (other == given)) / 3) for other in others) / len(others)
