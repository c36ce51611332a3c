"""Results of several checkpoints beside those of the paper, as a Markdown table."""

import re
from collections.abc import Sequence

from etils import epath

from dreamllm_jax.common.directories import read_json
from dreamllm_jax.evaluation.scores import FOLDER, Checkpoint, Score

# DreamLLM-7B (not the one tuned with LLaVA-1.5's data) in arXiv 2309.11499, in the units of our metrics. Only what two
# sources agree about; the paper's FID on MS-COCO is of the best of eight pictures.
PAPER = {
    ("coco_caption", "cider"): 1.154,
    ("vqav2", "accuracy"): 0.566,
    ("okvqa", "accuracy"): 0.443,
    ("piqa", "acc"): 0.786,
    ("hellaswag", "acc_norm"): 0.774,
    ("winogrande", "acc"): 0.685,
    ("mmlu", "acc"): 0.418,
    ("ms_coco", "fid_best_of_8"): 8.46,
    ("ln_coco", "fid"): 20.53,
}

_FIRST = ("recall",)  # what the table begins with
_AS_IT_IS = re.compile("fid|clip_score|.*perplexity|bits_per_byte")  # other metrics are shares: the table says per cent


def read(directory: epath.PathLike) -> list[Score]:
    """The scores in a folder, or in `evaluation/` of a run's.

    Raises:
      FileNotFoundError: there are none.
    """
    if scores := found(directory):
        return scores
    raise FileNotFoundError(f"{directory} has no results of `evaluate`")


def found(directory: epath.PathLike) -> list[Score]:
    """As `read`, but there may be none."""
    folder = epath.Path(directory)
    paths = sorted(folder.glob("*-*.json")) or sorted((folder / FOLDER).glob("*-*.json"))
    return [_score(path) for path in paths]


def _score(path: epath.Path) -> Score:
    content = read_json(path)
    return Score(**{**content, "checkpoint": Checkpoint(**content["checkpoint"])})


def markdown(scores: Sequence[Score]) -> str:
    """A row for each task and metric, a column for each checkpoint, and the paper's where it has the metric."""
    runs = list(dict.fromkeys(_column(one.checkpoint)[0] for one in scores))
    order = {_column(one.checkpoint): (one.checkpoint.step, one.checkpoint.average) for one in scores}
    columns = sorted(order, key=lambda column: (runs.index(column[0]), order[column]))
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for one in scores:
        for metric, value in one.metrics.items():
            row = cells.setdefault((one.task, metric), {})
            row[_column(one.checkpoint)] = _cell(metric, value, one.standard_errors.get(metric))
    known = {row: _cell(row[1], PAPER[row]) for row in cells if row in PAPER}
    heads = ["task", "metric", *(f"{name}, step {label}" for name, label in columns), *(["paper"] if known else [])]
    lines = [heads, ["---"] * len(heads)]
    for row in sorted(cells, key=lambda row: (row[0] not in _FIRST, row)):
        ours = [cells[row].get(column, "") for column in columns]
        lines.append([*row, *ours, *([known.get(row, "")] if known else [])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _column(checkpoint: Checkpoint) -> tuple[str, str]:
    return checkpoint.name.split("@")[0], checkpoint.label


def _cell(metric: str, value: float, error: float | None = None) -> str:
    scale = 1 if _AS_IT_IS.match(metric) else 100
    digits = 2 if metric.startswith("fid") else 1
    return f"{value * scale:.{digits}f}" + (f" ± {error * scale:.{digits}f}" if error else "")
