"""Fréchet Inception distance (Heusel et al. 2017), from features alone."""

import dataclasses
import zipfile
from collections.abc import Sequence

import numpy as np
from etils import epath


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean f64[D] and covariance f64[D, D] of the features of `count` images."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int


def statistics(features: np.ndarray) -> Statistics:
    """Of features f[N, D]; of a single image the covariance is 0."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    centred = features - mean
    return Statistics(mean, centred.T @ centred / max(len(features) - 1, 1), len(features))


def pooled(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of all images together.

    Raises:
      ValueError: of fewer than two images there is no covariance.
    """
    count = sum(part.count for part in parts)
    if count < 2:
        raise ValueError(f"FID needs two images or more, got {count}")
    mean = sum(part.count * part.mean for part in parts) / count
    within = sum((part.count - 1) * part.covariance for part in parts)
    between = sum(part.count * np.outer(part.mean - mean, part.mean - mean) for part in parts)
    return Statistics(mean, (within + between) / (count - 1), count)


def distance(one: Statistics, other: Statistics) -> float:
    """|μ1 − μ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½, the last from the eigenvalues of Σ1 Σ2.

    Raises:
      ValueError: they are of different features.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"features of {one.mean.size} and {other.mean.size} numbers cannot be compared")
    roots = np.sqrt(np.linalg.eigvals(one.covariance @ other.covariance).astype(complex)).real
    between = np.square(one.mean - other.mean).sum()
    return float(between + np.trace(one.covariance) + np.trace(other.covariance) - 2 * roots.sum())


def save(found: Statistics, file: epath.PathLike) -> None:
    """Writes `mu`, `sigma` and `count` to an .npz, the names that pytorch-fid gives them."""
    path = epath.Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        np.savez(out, mu=found.mean, sigma=found.covariance, count=found.count)


def load(file: epath.PathLike) -> Statistics:
    """Statistics as `save` or pytorch-fid wrote them.

    Raises:
      FileNotFoundError, ValueError: none there, or something else.
    """
    path = epath.Path(file)
    if not path.exists():
        raise FileNotFoundError(f"the statistics {file} are missing: make them with `evaluate reference`")
    try:
        with path.open("rb") as content, np.load(content) as arrays:
            mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
            count = int(arrays["count"]) if "count" in arrays else 0
        if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
            raise ValueError(f"they are of shape {mean.shape} and {covariance.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("some of their values are not finite")
        return Statistics(mean, covariance, count)
    except (AttributeError, KeyError, OSError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} does not hold the arrays mu and sigma: {error}") from None
