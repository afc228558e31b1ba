"""Losses as lines: smoothed, thinned, and several seeds as one line with a band."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorica.report.subjects import Array, Curve

NUM_POINTS = 240  # of a drawn line; more than a panel has to show
SHARE = 0.04  # of a run's steps over which it is smoothed


def smoothed(loss: Array, window: float) -> Array:
    """(n,) -> (n,): the exponential mean with time constant `window`, free of its start.

    A step without a loss adds nothing to it.
    """
    keep = 1 - 1 / max(1.0, window)
    total, weight, found = 0.0, 0.0, np.full_like(loss, np.nan)
    for at, value in enumerate(loss):
        if np.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        found[at] = total / weight if weight else np.nan
    return found


def window_of(curve: Curve) -> float:
    """The time constant, in steps, that suits a run's length."""
    return max(1.0, SHARE * len(curve.loss))


def thinned(x: Array, y: Array, num_points: int = NUM_POINTS) -> tuple[Array, Array]:
    """The least and the largest y of each of `num_points` / 2 stretches: what a line of all points looks like."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= num_points:
        return x, y
    kept: list[int] = []
    for part in np.array_split(np.arange(len(x)), num_points // 2):
        kept += sorted({int(part[np.argmin(y[part])]), int(part[np.argmax(y[part])])})
    return x[kept], y[kept]


def band(curves: Sequence[Curve], unit: str) -> tuple[Array, Array, Array, Array]:
    """x, median, least and most (m,) of the smoothed losses, over the stretch of x that all curves have."""
    lines = [(curve.along(unit), smoothed(curve.loss, window_of(curve))) for curve in curves]
    lines = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in lines]
    lines = [(x, y) for x, y in lines if len(x)]
    if not lines:
        nothing = np.empty(0)
        return nothing, nothing, nothing, nothing
    start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    grid = np.linspace(start, max(start, end), NUM_POINTS)
    values = np.stack([np.interp(grid, x, y) for x, y in lines])  # (curves, m)
    return grid, np.median(values, axis=0), values.min(axis=0), values.max(axis=0)
