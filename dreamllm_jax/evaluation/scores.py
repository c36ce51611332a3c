"""What an evaluation found: one JSON file a task and checkpoint."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from dreamllm_jax.checkpoints.saved import AVERAGE, find
from dreamllm_jax.common.directories import write_whole

FOLDER = "evaluation"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Which model was evaluated.

    Attributes:
      name: as it was asked for, such as `runs/mine@1000`.
      step: steps it was trained for.
      average: whether it is the parameters' average.
    """

    name: str
    step: int
    average: bool

    @property
    def label(self) -> str:
        """Of the step, for names of files and heads of columns."""
        return f"{self.step}-average" if self.average else str(self.step)


def checkpoint_of(name: str) -> Checkpoint:
    """The checkpoint of that name; errors as of `saved.find`."""
    found = find(name)
    return Checkpoint(name, found.step, found.stores[0].name == AVERAGE)


def folder_of(name: str) -> epath.Path:
    """Where the results of a checkpoint go if nothing else is said: `evaluation/` beside it."""
    return find(name).directory / FOLDER


@dataclasses.dataclass(frozen=True)
class Score:
    """What was found for one task.

    Attributes:
      count: items (questions, captions, documents) that were scored.
      metrics: by name; shares are from 0 to 1.
      standard_errors: of those metrics that are means of items.
      settings: everything that decides the result.
    """

    task: str
    checkpoint: Checkpoint
    count: int
    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float]
    settings: Mapping[str, Any]


def summary(found: Mapping[str, Sequence[float] | float]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and standard errors.

    Args:
      found: by the metrics' names, a value for each item, whose mean is taken; or a number, which has no error.
    """
    metrics, errors = {}, {}
    for name, value in found.items():
        values = np.asarray(value, np.float64)
        metrics[name] = float(values.mean())
        if values.ndim:
            errors[name] = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return metrics, errors


def write(score: Score, directory: epath.PathLike) -> epath.Path:
    """Writes `TASK-STEP.json`, on the first host."""
    path = epath.Path(directory) / f"{score.task}-{score.checkpoint.label}.json"
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(dataclasses.asdict(score), indent=2, ensure_ascii=False) + "\n")
    return path


def told(score: Score) -> str:
    """The score as a line."""
    parts = []
    for name, value in score.metrics.items():
        error = score.standard_errors.get(name)
        parts.append(f"{name} {value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    return f"{score.task}: {', '.join(parts)} ({score.count:,} items)"
