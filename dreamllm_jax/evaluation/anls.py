"""Average normalised Levenshtein similarity (Biten et al. 2019), by which answers read from documents are scored."""

from collections.abc import Sequence

THRESHOLD = 0.5  # what is less alike is wrong


def distance(one: str, other: str) -> int:
    """Fewest characters to insert, delete or replace to make one text the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def similarity(answer: str, accepted: Sequence[str]) -> float:
    """How alike the answer is to the most similar accepted one, whatever its case and space: 0, or 1/2 to 1."""

    def alike(one: str, other: str) -> float:
        longest = max(len(one), len(other))
        return 1.0 - distance(one, other) / longest if longest else 1.0

    given = _plain(answer)
    best = max(alike(given, _plain(other)) for other in accepted)
    return best if best >= THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
