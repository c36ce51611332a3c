"""Multistep solvers over any process x = signal · x0 + deviation · noise: what they make of x and of clean predictions.

Each function takes signal and deviation at the S noise levels where the model is asked and at a last one without noise,
in float64, and gives the columns `x`, `x0`, `before` and `earlier` of `samplers.Steps`.
"""

import numpy as np
from jaxtyping import Float

Column = Float[np.ndarray, " S"]
Levels = Float[np.ndarray, " S+1"]


def dpmpp_2m(signal: Levels, deviation: Levels) -> tuple[Column, Column, Column, Column]:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2, midpoint; of first order at the first step and at the last."""
    ratio = deviation[1:] / deviation[:-1]
    gain = signal[1:] - signal[:-1] * ratio
    widths = _widths(signal, deviation)
    half = np.zeros_like(gain)  # the second order's correction, half of gain over the steps' ratio
    half[1:-1] = 0.5 * gain[1:-1] * widths[1:] / widths[:-1]
    return ratio, gain + half, -half, np.zeros_like(gain)


def unipc(signal: Levels, deviation: Levels) -> tuple[Column, Column, Column, Column]:
    """UniPC of second order with B2(h) (Zhao et al. 2023, arXiv 2302.04867).

    Its predictor is `dpmpp_2m`. Its corrector goes back to the x before and comes again with the prediction at the x
    that was predicted; the difference to that x is linear in three clean predictions, so a row can have both: x is
    first corrected and then moved.
    """
    ratio, now, before, earlier = dpmpp_2m(signal, deviation)
    gain = signal[1:] - signal[:-1] * ratio
    widths = _widths(signal, deviation)
    base = np.expm1(-widths)
    first = (-base / widths - 1) / base
    second = 2 * ((base / widths + 1) / widths - 0.5) / base
    slope = widths[1:] / widths[:-1]
    # Two conditions of order give the weights of both differences; the first step has one and half of it.
    bent = (first - second)[1:] / (1 + 1 / slope)
    weight, bend = np.full_like(widths, 0.5), np.zeros_like(widths)
    weight[1:] = first[1:] - bent
    bend[1:] = (bent - 0.5) * slope
    weight, bend = gain[:-1] * weight, gain[:-1] * bend
    now[1:] += ratio[1:] * weight
    before[1:] += ratio[1:] * (bend - weight)
    earlier[1:] -= ratio[1:] * bend
    return ratio, now, before, earlier


def _widths(signal: Levels, deviation: Levels) -> np.ndarray:
    """Of the steps in log signal-to-noise, but for the last, which has no end."""
    return np.diff(np.log(signal[:-1]) - np.log(deviation[:-1]))
