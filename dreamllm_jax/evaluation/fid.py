"""Fréchet Inception distance (Heusel et al. 2017), from features alone."""

import dataclasses

import numpy as np
from etils import epath


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean f64[D] and covariance f64[D, D] of the features of `count` images."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int


def statistics(features: np.ndarray) -> Statistics:
    """Of features f[N, D].

    Raises:
      ValueError: of fewer than two images there is no covariance.
    """
    if len(features) < 2:
        raise ValueError(f"statistics need two images or more, got {len(features)}")
    features = features.astype(np.float64)
    return Statistics(
        features.mean(axis=0), np.cov(features, rowvar=False).reshape(2 * features.shape[1:]), len(features)
    )


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
            return Statistics(arrays["mu"], arrays["sigma"], int(arrays["count"]) if "count" in arrays else 0)
    except (KeyError, OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} does not hold the arrays mu and sigma: {error}") from None
