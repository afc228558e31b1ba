"""The training losses of several arms as one picture: every seed faint, the median of the smoothed ones bold."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lorica import files

X = {"steps": "step", "forwards": "forwards", "seconds": "seconds"}  # unit -> its key in training_loss.jsonl
PANES_ABREAST = 3
Row = tuple[str, str, float, float]  # task, arm, x, loss
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One run's lines of training_loss.jsonl."""

    arm: str
    task: str
    steps: Sequence[Mapping[str, Any]]

    def points(self, unit: str) -> tuple[Array, Array]:
        """(steps that were applied,) of x and of the loss."""
        applied = [each for each in self.steps if each["applied"]]
        return np.array([each[X[unit]] for each in applied], dtype=float), np.array([each["loss"] for each in applied])


def draw_losses(
    curves: Sequence[Curve], path: Path, *, unit: Literal["steps", "forwards", "seconds"], smoothing: float
) -> None:
    """A pane for each task, as PNG, as SVG and as the CSV of what is drawn bold; nothing where no run took a step."""
    curves = [each for each in curves if len(each.points(unit)[0])]
    if not curves:
        return
    # Not through pyplot, whose backend and open figures are global to the caller's process.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms, tasks = (list(dict.fromkeys(getattr(each, key) for each in curves)) for key in ("arm", "task"))
    down, abreast = -(-len(tasks) // PANES_ABREAST), min(len(tasks), PANES_ABREAST)
    figure = Figure(figsize=(5 * abreast, 3.6 * down), layout="constrained")
    FigureCanvasAgg(figure)
    rows: list[Row] = []
    for at, task in enumerate(tasks, 1):
        axes = figure.add_subplot(down, abreast, at, title=_shown(task), xlabel=X[unit], ylabel="training loss")
        rows += _draw(axes, arms, [each for each in curves if each.task == task], unit, smoothing)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "lorica"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the PNG has a box there, the SVG the letter
        for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            with files.replacing(path.with_suffix(f".{form}")) as file:
                figure.savefig(file, format=form, dpi=120, metadata=metadata)
    files.write_csv(path.with_suffix(".csv"), ("task", "arm", X[unit], "loss"), rows)


def _draw(axes: Any, arms: Sequence[str], curves: Sequence[Curve], unit: str, smoothing: float) -> list[Row]:
    """One task's curves; what is drawn bold of them as rows. An arm has its colour in every pane."""
    rows: list[Row] = []
    for number, arm in enumerate(arms):
        points = [each.points(unit) for each in curves if each.arm == arm]
        for x, loss in points:
            axes.plot(x, loss, color=f"C{number}", alpha=0.15, linewidth=0.8)
        if points:
            x, median = median_of([(x, smoothed(loss, smoothing)) for x, loss in points])
            axes.plot(x, median, color=f"C{number}", linewidth=1.8, label=_shown(arm))
            rows += [(curves[0].task, arm, *point) for point in zip(x.tolist(), median.tolist(), strict=True)]
    axes.grid(alpha=0.3)
    axes.legend()
    return rows


def _shown(name: str) -> str:
    """A name as text, where $ would begin a formula and a first underscore hide a line from the legend."""
    return name.replace("$", r"\$").removeprefix("_")


def smoothed(loss: Array, beta: float) -> Array:
    """The exponential mean of the losses so far, from the first one on."""
    found = loss.copy()
    for at in range(1, len(found)):
        found[at] = beta * found[at - 1] + (1 - beta) * loss[at]
    return found


def median_of(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The median over seeds at the x of the shortest curve, the others interpolated."""
    x = min((each for each, _ in curves), key=lambda each: each[-1])
    return x, np.median([np.interp(x, own, values) for own, values in curves], axis=0)
