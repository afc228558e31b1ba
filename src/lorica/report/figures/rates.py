"""How a study chose its learning rates: the dev loss at each that was tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lorica.report import words
from lorica.report.figures import canvas
from lorica.report.figures.canvas import Figure, Panel, View
from lorica.report.subjects import Choice, Study, Tried

HEAD = ("arm", "task", "learning_rate", "dev_loss", "state", "chosen")
FOOT = 0.04  # of a panel's height: where the crosses of failed rates stand


def draw(study: Study) -> Figure | str | None:
    """A panel for each task; None for a study that chose no rates, the reason if it has nothing to choose by yet."""
    if not study.choices:
        return None
    if all(each.dev_loss is None for choice in study.choices for each in choice.tried):
        return f"No learning rates of {study.title}: no run that they are chosen by has come to a dev loss yet."
    arms = [arm for arm in study.arms if any(choice.arm == arm for choice in study.choices)]
    tasks = [task for task in study.tasks if any(choice.task == task for choice in study.choices)]
    return Figure(
        name=f"{study.slug}-rates",
        title=study.title,
        lede=_lede(study),
        views=[View("", [_panel(study, task) for task in tasks])],
        head=HEAD,
        rows=[row for choice in study.choices for row in _rows(choice)],
        legend=[(canvas.variable(study.arms.index(arm)), arm) for arm in arms],
    )


def _lede(study: Study) -> str:
    said = "Dots: the mean dev loss of the runs that only chose the learning rate. Ring: the rate that was chosen."
    if any(each.has_failed for choice in study.choices for each in choice.tried):
        said += " Crosses at the foot: rates at which a run failed."
    return said


def _panel(study: Study, task: str) -> Panel:
    choices = [choice for choice in study.choices if choice.task == task]

    def on(axes: Any) -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_xscale("log")
        for choice in choices:
            _line(axes, study.arms.index(choice.arm), choice)
        axes.margins(x=0.1, y=0.16)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: words.rate(value))
        axes.grid(axis="y")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("dev loss")

    name = f"{study.slug}-rates-{study.tasks.index(task)}"
    alt = f"Dev loss on {task} by learning rate. " + " ".join(map(_said, choices))
    return canvas.panel(name, words.short(task, 44), alt, on)


def _line(axes: Any, place: int, choice: Choice) -> None:
    colour, points = canvas.colour(place), list(_points(choice.tried))
    axes.plot(*_columns(points), marker="o", markersize=4.5, color=colour, linewidth=1.6, linestyle=canvas.dash(place))
    chosen = [point for point in points if point[0] == choice.chosen]
    axes.plot(*_columns(chosen), "o", markersize=11, mfc="none", color=colour, mew=1.1)
    failed = [each.learning_rate for each in choice.tried if each.has_failed]
    axes.plot(failed, [FOOT] * len(failed), "x", color=colour, markersize=6, transform=axes.get_xaxis_transform())


def _points(tried: Sequence[Tried]) -> Iterator[tuple[float, float]]:
    """(rate, dev loss) where there is one, by rate."""
    for each in sorted(tried, key=lambda each: each.learning_rate):
        if each.dev_loss is not None:
            yield each.learning_rate, each.dev_loss


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _said(choice: Choice) -> str:
    tried = sorted(choice.tried, key=lambda each: each.learning_rate)
    each = ", ".join(f"{_loss(one)} at {words.rate(one.learning_rate)}" for one in tried)
    chosen = "none chosen" if choice.chosen is None else f"{words.rate(choice.chosen)} chosen"
    return f"{choice.arm}: {each}; {chosen}."


def _loss(tried: Tried) -> str:
    return _state(tried) if tried.dev_loss is None else f"{tried.dev_loss:.4f}"


def _state(tried: Tried) -> str:
    if tried.has_failed:
        return "failed"
    return "not finished" if tried.dev_loss is None else "finished"


def _rows(choice: Choice) -> Iterator[tuple[Any, ...]]:
    for each in choice.tried:
        is_chosen = each.learning_rate == choice.chosen
        yield choice.arm, choice.task, each.learning_rate, each.dev_loss, _state(each), is_chosen
