"""What quality costs: scores against trainable parameters, memory and time, and the arms that nothing beats at both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lorica.report import words
from lorica.report.figures import canvas
from lorica.report.figures.canvas import Figure, Panel, View
from lorica.report.subjects import Cell, Study

# cost -> what it is called, how it is written in words, the unit of the axis
COSTS = {
    "num_trainable": ("trainable parameters", words.count, 1),
    "peak_bytes": ("peak memory, MiB", words.size, 2**20),
    "seconds": ("seconds for a run", words.duration, 1),
}


@dataclass(frozen=True)
class Point:
    """An arm's cost and its score, the higher the better, each the mean over the tasks that all arms have."""

    arm: str
    place: int
    cost: float
    score: float


def draw(study: Study) -> Figure | str | None:
    """A panel for each cost that was measured; None with one arm or none, the reason where nothing compares."""
    if len(study.arms) < 2 or not study.cells:
        return None
    shared = [task for task in study.tasks if all(study.cell(arm, task) is not None for arm in study.arms)]
    if not shared:
        return "No costs against quality: there is no task that all arms were evaluated on."
    metric = {cell.metric for cell in study.cells if cell.task in shared}
    if len(metric) > 1 or not all(cell.higher_is_better for cell in study.cells if cell.task in shared):
        return f"No costs against quality: the tasks' metrics ({words.listed(sorted(metric))}) have no mean."
    points = {cost: _points(study, shared, cost) for cost in COSTS}
    measured = [cost for cost, found in points.items() if len(found) > 1]
    if not measured:
        return "No costs against quality: the runs' records hold neither parameters, memory nor time."
    missing = [COSTS[cost][0].partition(",")[0] for cost in COSTS if cost not in measured]
    return Figure(
        name=f"{study.slug}-pareto",
        title=study.title,
        lede=f"Mean {metric.pop().replace('_', ' ')} on {words.listed(shared)}. Up and to the left is better; a ring "
        "marks an arm that no other beats at both." + (f" Not recorded: {words.listed(missing)}." if missing else ""),
        views=[View("", [_panel(study, cost, points[cost], _metric(study)) for cost in measured])],
        head=("cost", "arm", "value", "mean_score", "on_front"),
        rows=[
            (cost, each.arm, each.cost, each.score, each in _front(points[cost]))
            for cost in measured
            for each in points[cost]
        ],
        legend=[(canvas.variable(place), arm) for place, arm in enumerate(study.arms)],
    )


def _metric(study: Study) -> str:
    return study.cells[0].metric


def _points(study: Study, tasks: Sequence[str], cost: str) -> list[Point]:
    found = []
    for place, arm in enumerate(study.arms):
        cells: list[Cell] = [cell for task in tasks if (cell := study.cell(arm, task)) is not None]
        costs = [value for cell in cells if (value := getattr(cell, cost)) is not None]
        if len(costs) == len(tasks):
            found.append(Point(arm, place, fmean(costs), fmean(cell.mean for cell in cells)))
    return found


def _front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats at cost or score without being worse at the other."""
    return [each for each in points if not any(_beats(other, each) for other in points)]


def _beats(one: Point, other: Point) -> bool:
    no_worse = one.cost <= other.cost and one.score >= other.score
    return no_worse and (one.cost < other.cost or one.score > other.score)


def _panel(study: Study, cost: str, points: Sequence[Point], metric: str) -> Panel:
    label, written, unit = COSTS[cost]
    front = _front(points)

    def on(axes: Any) -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        for each in points:
            colour = canvas.colour(each.place)
            axes.plot(each.cost / unit, each.score, "o", markersize=6, color=colour)
            if each in front:
                axes.plot(each.cost / unit, each.score, "o", markersize=11, mfc="none", color=colour, mew=1.1)
        axes.margins(x=0.22, y=0.22)
        if max(each.cost for each in points) > 4 * min(each.cost for each in points) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=8))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(lambda value, _: words.count(value) if value >= 1 else f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: words.score(value, metric))
        if metric in words.PERCENTAGES:
            axes.set_ylim(max(0.0, axes.get_ylim()[0]), min(1.04, axes.get_ylim()[1]))
        axes.grid()
        axes.set_xlabel(label)

    said = " ".join(f"{each.arm}: {words.score(each.score, metric)} at {written(each.cost)}." for each in points)
    best = words.listed([each.arm for each in front])
    alt = f"Mean score against {label}. {said} No other arm beats {best} at both."
    return canvas.panel(f"{study.slug}-pareto-{cost}", f"against {label}", alt, on)
