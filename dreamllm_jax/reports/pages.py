"""What the pages about runs have in common: how they look, images inside them, and the curves of losses."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CURVES = {
    **{"loss": "loss", "lm_loss": "next-token loss (nats)", "dm_loss": "denoising loss"},
    **{"absolute_error": "absolute error of pixels", "squared_error": "squared error of pixels"},
    "distill_error": "distance from the teacher",
}
PLACES = 500  # along an axis that can be told apart
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { font-weight: 600; overflow-wrap: anywhere; }
.figures { display: flex; gap: 2em; flex-wrap: wrap; } .figures b { font-size: 1.6em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr)); gap: 14px; }
.pair { border: 1px solid #ddd; border-radius: 8px; padding: 10px; overflow-wrap: anywhere; }
.pair.wrong { border-color: #c33; }
img { width: 90px; height: 90px; image-rendering: pixelated; background: #fff; border: 1px solid #eee; }
.story { border-left: 4px solid #ddd; padding-left: 1em; } .story img { width: 128px; height: 128px; display: block; }
small { color: #777; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; color: #555; }
th:first-child { text-align: left; font-weight: 600; } th { font-weight: 500; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; }
.curves img { width: 100%; height: auto; image-rendering: auto; box-sizing: border-box; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px; }
"""


def embedded(data: bytes, kind: str) -> str:
    """A file's content as an address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def page(title: str, body: str) -> str:
    """A self-contained page."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>"
    )


def curves(metrics: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, str]) -> str:
    """An <img> for each of the losses that any run has learnt: running means over a fiftieth of the steps.

    Args:
      metrics: of each run, its steps' numbers; of a single run, each step's losses are shown too.
    """
    chosen = [name for name in CURVES if any(_shown(line, name) for lines in metrics.values() for line in lines)]
    if not chosen:
        return "<p>No step is finished yet.</p>"
    return f'<div class="curves">{"".join(_curve(name, metrics, colours) for name in chosen)}</div>'


def _curve(name: str, metrics: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, str]) -> str:
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for run, lines in metrics.items():
        points = [(line["step"], line[name]) for line in lines if _shown(line, name)]
        if not points:
            continue
        steps, values = map(np.asarray, zip(*points, strict=True))
        window = max(1, len(values) // 50)
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        every = max(1, len(mean) // PLACES)
        if len(metrics) == 1:
            _draw_steps(axes, steps, values, colours[run])
        marker = "o" if len(mean) == 1 else None
        axes.plot(steps[window - 1 :][::every], mean[::every], marker=marker, color=colours[run], linewidth=1.5)
    axes.set(title=CURVES[name], xlabel="step", yscale="log")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _label_losses(axes)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    source = embedded(buffer.getvalue(), "image/svg+xml")
    return f'<img alt="{CURVES[name]} by step" src="{source}">'


def _draw_steps(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """The single steps' values: a line or, of more than can be told apart, the band in which they lie."""
    if len(steps) <= 4 * PLACES:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
        return
    parts = np.array_split(np.arange(len(steps)), PLACES)
    low, high = ([pick(values[part]) for part in parts] for pick in (np.min, np.max))
    axes.fill_between([steps[part[0]] for part in parts], low, high, color=colour, linewidth=0, alpha=0.25)


def _label_losses(axes: Axes) -> None:
    """Ticks on a logarithmic axis that have room for their labels, however many powers of ten it spans."""
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    if decades < 0.8:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6))
        axes.yaxis.set_major_formatter(ticker.ScalarFormatter(useOffset=False))
    else:
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=12))
        axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _shown(line: Mapping[str, float], name: str) -> bool:
    """Whether the scale, a logarithm, has a place for it."""
    return 0 < line.get(name, 0) < math.inf
