"""How well each arm does on each task: a bar for the mean, its interval, and a dot for every seed."""

from __future__ import annotations

from typing import Any

from lorica.report import words
from lorica.report.figures import canvas
from lorica.report.figures.canvas import Figure, Panel, View
from lorica.report.subjects import Cell, Study

HEAD = ("arm", "task", "metric", "mean", "low", "high", "interval", "seed", "score")
ROW_INCHES = 0.52


def draw(study: Study) -> Figure | str | None:
    """A panel for each task; None for a study without runs, the reason if nothing was evaluated."""
    if not study.cells:
        return "No scores: no run has ended with an evaluation yet." if study.runs else None
    tasks = [task for task in study.tasks if any(cell.task == task for cell in study.cells)]
    return Figure(
        name=f"{study.slug}-scores",
        title=study.title,
        lede=_lede(study),
        views=[View("", [_panel(study, task) for task in tasks])],
        head=HEAD,
        rows=[
            (cell.arm, cell.task, cell.metric, cell.mean, cell.low, cell.high, cell.interval, seed, score)
            for cell in study.cells
            for seed, score in cell.scores.items()
        ],
    )


def _lede(study: Study) -> str:
    intervals = words.listed(sorted({cell.interval for cell in study.cells if cell.low is not None}))
    lines = f" Lines: {intervals}." if intervals else " There are too few runs for intervals."
    dots = " Dots: single seeds." if study.num_seeds > 1 else ""
    return f"Bars: the mean score on the examples that no run was trained or tuned on.{lines}{dots}"


def _panel(study: Study, task: str) -> Panel:
    cells = [(place, cell) for place, arm in enumerate(study.arms) if (cell := study.cell(arm, task)) is not None]
    metric = cells[0][1].metric

    def on(axes: Any) -> None:
        for row, (place, cell) in enumerate(cells):
            _bar(axes, row, canvas.colour(place), cell)
        axes.set_ylim(len(cells) - 0.35, -0.65)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        _scale(axes, [cell for _, cell in cells])

    title = f"{words.short(task, 34)} · {metric.replace('_', ' ')}"
    alt = f"{metric} on {task}. " + " ".join(map(_said, (cell for _, cell in cells)))
    name = f"{study.slug}-scores-{study.tasks.index(task)}"
    return canvas.panel(name, title, alt, on, height=0.85 + ROW_INCHES * len(cells))


def _bar(axes: Any, row: int, colour: str, cell: Cell) -> None:
    axes.barh(row, cell.mean, height=0.34, color=canvas.PAPER, zorder=2)  # or the grid would show through the next
    axes.barh(row, cell.mean, height=0.34, color=colour, alpha=0.28, zorder=3)
    axes.plot([cell.mean] * 2, [row - 0.17, row + 0.17], color=colour, linewidth=2.2, zorder=4)
    if cell.low is not None and cell.high is not None:
        axes.plot([cell.low, cell.high], [row, row], color=colour, linewidth=1.4, zorder=4)
    if len(cell.scores) > 1:
        places = list(cell.scores.values())
        axes.plot(places, [row] * len(places), "o", markersize=3.6, color=colour, mec=canvas.PAPER, mew=0.6, zorder=5)
    found = words.score(cell.mean, cell.metric)
    across = axes.get_yaxis_transform()
    axes.text(0, row - 0.26, words.short(cell.arm, 40), va="bottom", ha="left", transform=across)
    axes.text(1, row - 0.26, found, va="bottom", ha="right", color=colour, weight="bold", transform=across)


def _scale(axes: Any, cells: list[Cell]) -> None:
    """From zero, for bars; shares up to one, so that panels can be compared."""
    if cells[0].metric in words.PERCENTAGES:
        axes.set_xlim(0, 1.0)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    elif min(cell.mean for cell in cells) >= 0:
        axes.set_xlim(left=0)
    axes.grid(axis="x")


def _said(cell: Cell) -> str:
    between = f" ({cell.interval}: {words.between(cell.low, cell.high, cell.metric)})" if cell.low is not None else ""
    return f"{cell.arm}: {words.score(cell.mean, cell.metric)}{between}."
