"""The curves in written pages can be read, of short runs and of long ones."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dreamllm_jax.reports import pages


def run(steps: int, first: float, last: float) -> list[dict[str, float]]:
    values = np.geomspace(first, last, steps) * np.exp(0.1 * np.random.default_rng(0).standard_normal(steps))
    return [{"step": step, "lm_loss": float(value)} for step, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("steps", "first", "last"),
    [(1, 2.0, 2.0), (3, 6.0, 5.0), (30, 6.3, 0.5), (750, 6.3, 0.02), (3000, 10.0, 1e-5), (100_000, 2.2, 1.8)],
)
def test_labels_do_not_overlap_and_long_runs_make_no_large_page(steps, first, last, monkeypatch):
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **named: (drawn.append(self), save(self, *given, **named))
    )
    written = pages.curves({"run": run(steps, first, last)}, {"run": "#147"})
    assert written.count("<img") == len(drawn) == 1 and len(written) < 400_000
    canvas = FigureCanvasAgg(drawn[0])
    canvas.draw()
    (axes,) = drawn[0].axes
    for axis, along in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        labels = [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]
        ends = sorted(getattr(label.get_window_extent(), f"interval{along}").tolist() for label in labels)
        assert len(labels) >= (1 if along == "x" else 2)
        assert len({label.get_text() for label in labels}) == len(labels)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(ends)), ends
