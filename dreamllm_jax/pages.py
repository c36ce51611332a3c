"""What the pages about runs have in common: how they look, images inside them, and the curves of losses."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

CURVES = {"loss": "loss", "lm_loss": "next-token loss (nats)", "dm_loss": "denoising loss"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { font-weight: 600; } .figures { display: flex; gap: 2em; flex-wrap: wrap; } .figures b { font-size: 1.6em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 14px; }
.pair { border: 1px solid #ddd; border-radius: 8px; padding: 10px; } .pair.wrong { border-color: #c33; }
img { width: 90px; height: 90px; image-rendering: pixelated; background: #fff; border: 1px solid #eee; }
.story { border-left: 4px solid #ddd; padding-left: 1em; } .story img { width: 128px; height: 128px; display: block; }
small { color: #777; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; color: #555; }
th:first-child { text-align: left; font-weight: 600; } th { font-weight: 500; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px; }
"""


def embedded(data: bytes, kind: str) -> str:
    """A file's content as an address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def page(title: str, body: str) -> str:
    """A self-contained page."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>"
    )


def curves(metrics: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, str]) -> str:
    """An <img> of the losses that any run has learnt: running means over a fiftieth of the steps.

    Args:
      metrics: of each run, its steps' numbers; of a single run, each step's losses are shown too.
    """
    chosen = [name for name in CURVES if any(_shown(line, name) for lines in metrics.values() for line in lines)]
    if not chosen:
        return "<p>No step is finished yet.</p>"
    figure = Figure(figsize=(9.5, 3.4 * len(chosen)), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(len(chosen), 1)), chosen, strict=True):
        for run, lines in metrics.items():
            points = [(line["step"], line[name]) for line in lines if _shown(line, name)]
            if not points:
                continue
            steps, values = map(np.asarray, zip(*points, strict=True))
            window = max(1, len(values) // 50)
            mean = np.convolve(values, np.ones(window) / window, mode="valid")
            if len(metrics) == 1:
                axes.plot(steps, values, color=colours[run], linewidth=0.8, alpha=0.25)
            axes.plot(steps[window - 1 :], mean, color=colours[run], linewidth=1.5)
        axes.set(title=CURVES[name], xlabel="step", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter("{x:.3g}")
        axes.grid(alpha=0.3, which="both")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    source = embedded(buffer.getvalue(), "image/svg+xml")
    return f'<img style="width:100%;height:auto" alt="loss curves" src="{source}">'


def _shown(line: Mapping[str, float], name: str) -> bool:
    """Whether the scale, a logarithm, has a place for it."""
    return 0 < line.get(name, 0) < math.inf
