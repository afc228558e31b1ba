"""A study as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from lorica import files
from lorica.studies.search import Trial


def draw_history(trials: Sequence[Trial], path: Path, ylabel: str) -> None:
    """The first value of every trial, and the best so far, as a PNG; what may not be chosen is marked by a cross."""
    # Not through pyplot, whose backend and open figures are global to the caller's process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="trial (below 0: of an earlier search)", ylabel=ylabel)
    counted = [each for each in trials if each.counts]
    others = [each for each in trials if each.is_finite and not each.feasible]
    axes.plot([each.number for each in counted], [each.values[0] for each in counted], "o", label="trial")
    if others:
        axes.plot([each.number for each in others], [each.values[0] for each in others], "x", label="infeasible")
    best = list(accumulate((each.values[0] for each in counted), max))
    axes.step([each.number for each in counted], best, where="post", label="best so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
