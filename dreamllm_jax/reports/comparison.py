"""Several runs beside each other: what was set otherwise, what came of it, and the curves."""

import csv
import dataclasses
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib import colormaps
from matplotlib.colors import to_hex

from dreamllm_jax.checkpoints.saved import CONFIG_FILE
from dreamllm_jax.common.configuration import flat
from dreamllm_jax.common.directories import absolute, read_json
from dreamllm_jax.evaluation import table
from dreamllm_jax.reports.pages import CURVES, curves, page
from dreamllm_jax.training.metrics import read_metrics

LAST = 0.1  # share of the steps over which final metrics are averaged
_MEANS = (*CURVES, "grad_norm", "seconds_per_step")

Value = str | float | int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs by name.

    Attributes:
      settings: of each run, those that are not the same in all.
      results: of each run: steps, the last metrics' means, and what `evaluate` found for their newest
        checkpoint that it was asked of, if it was.
      metrics: of each run, its steps' numbers in order.
    """

    settings: dict[str, dict[str, Value]]
    results: dict[str, dict[str, Value]]
    metrics: dict[str, list[dict[str, float]]]


def find_runs(directories: Sequence[epath.PathLike]) -> list[epath.Path]:
    """The runs that are meant: directories of runs, or directories of such directories.

    Raises:
      FileNotFoundError: one is neither.
    """
    found = []
    for directory in map(absolute, directories):
        if (directory / CONFIG_FILE).exists():
            found.append(directory)
            continue
        children = directory.iterdir() if directory.is_dir() else ()
        inside = sorted(path for path in children if (path / CONFIG_FILE).exists())
        if not inside:
            raise FileNotFoundError(f"{directory} is not the directory of a run, nor of runs: no {CONFIG_FILE} in it")
        found += inside
    return list(dict.fromkeys(found))


def compare(directories: Sequence[epath.PathLike]) -> Comparison:
    """Reads runs; errors as of `find_runs`."""
    runs = find_runs(directories)
    names = _names(runs)
    configs = {name: flat(read_json(run / CONFIG_FILE)) for name, run in zip(names, runs, strict=True)}
    metrics = {name: _metrics(run) for name, run in zip(names, runs, strict=True)}
    results = {name: _results(run, metrics[name]) for name, run in zip(names, runs, strict=True)}
    return Comparison(_differing(configs), results, metrics)


def _names(runs: Sequence[epath.Path]) -> list[str]:
    """The directories' names, with as many of those above as tell them apart."""
    depth = 1
    while len(set(names := ["/".join(run.parts[-depth:]) for run in runs])) < len(runs):
        depth += 1
    return names


def _differing(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Value]]:
    paths = dict.fromkeys(path for config in configs.values() for path in config)
    different = [path for path in paths if len({json.dumps(config.get(path)) for config in configs.values()}) > 1]
    return {name: {path: _plain(config.get(path)) for path in different} for name, config in configs.items()}


def _plain(value: Any) -> Value:
    return value if isinstance(value, int | float | str) else json.dumps(value)


def _metrics(run: epath.Path) -> list[dict[str, float]]:
    """Of a run that has just begun, none."""
    try:
        return read_metrics(run)
    except FileNotFoundError:
        return []


def _results(run: epath.Path, metrics: Sequence[Mapping[str, float]]) -> dict[str, Value]:
    last = metrics[-max(1, round(LAST * len(metrics))) :]
    found: dict[str, Value] = {"steps": int(metrics[-1]["step"]) if metrics else 0}
    for name in _MEANS:
        values = [line[name] for line in last if math.isfinite(line.get(name, math.nan))]  # not those left out for it
        if values:
            found[name] = float(np.mean(values))
    for score in sorted(table.found(run), key=lambda score: score.checkpoint.step):
        found |= {f"{score.task} {metric}": value for metric, value in score.metrics.items()}
    return found


def write_comparison(directories: Sequence[epath.PathLike], to: epath.PathLike) -> epath.Path:
    """Writes `comparison.csv` and the page `comparison.html` into a directory.

    Returns:
      The page.

    Raises:
      FileNotFoundError: a directory without a run that has begun.
    """
    to, compared = absolute(to), compare(directories)
    to.mkdir(parents=True, exist_ok=True)
    header, lines = _rows(compared)
    with (to / "comparison.csv").open("w") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *lines])
    path = to / "comparison.html"
    path.write_text(page(f"{to.name}: {len(lines)} runs", _body(compared)))
    return path


def _rows(compared: Comparison) -> tuple[list[str], list[list[Value]]]:
    settings = list(next(iter(compared.settings.values())))
    results = list(dict.fromkeys(name for found in compared.results.values() for name in found))
    lines = [
        [name, *chosen.values(), *(compared.results[name].get(result, "") for result in results)]
        for name, chosen in compared.settings.items()
    ]
    return ["run", *settings, *results], lines


def _body(compared: Comparison) -> str:
    colours = dict(zip(compared.metrics, _colours(len(compared.metrics)), strict=True))
    header, lines = _rows(compared)
    heads = "".join(f'<th title="{html.escape(name)}">{_breakable(name)}</th>' for name in header)
    body = ""
    for name, *values in lines:
        dot = f'<span class="dot" style="background:{colours[name]}"></span>'
        cells = "".join(f"<td>{html.escape(_shown(value))}</td>" for value in values)
        body += f"<tr><th>{dot}{html.escape(name)}</th>{cells}</tr>"
    return (
        f"<p>Settings that differ, and means over the last {LAST:.0%} of the steps. Curves have their run's colour.</p>"
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<h2>Curves</h2>{curves(compared.metrics, colours)}"
    )


def _breakable(name: str) -> str:
    """A path such as `optimizer.learning_rate`, which may be broken after its dots and underscores."""
    return html.escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _shown(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _colours(count: int) -> list[str]:
    if count <= 10:
        return [to_hex(colormaps["tab10"](i)) for i in range(count)]
    return [to_hex(colormaps["turbo"](0.05 + 0.9 * i / (count - 1))) for i in range(count)]
