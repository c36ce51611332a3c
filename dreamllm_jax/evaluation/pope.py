"""POPE (Li et al. 2023, arXiv 2305.10355): does a model see objects that are not there?"""

from collections.abc import Sequence


def says_yes(answer: str) -> bool:
    """Whether the answer's first sentence has none of the words "No", "no" and "not", which is the published rule."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def scores(answers: Sequence[str], present: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and the share of answers that say it.

    Where nothing was answered, or nothing should have been answered with yes, what cannot be computed is 0.
    """
    said = [says_yes(answer) for answer in answers]
    hits = sum(yes and there for yes, there in zip(said, present, strict=True))
    precision = hits / sum(said) if any(said) else 0.0
    recall = hits / sum(present) if any(present) else 0.0
    return {
        "accuracy": sum(yes == there for yes, there in zip(said, present, strict=True)) / len(said),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": sum(said) / len(said),
    }
