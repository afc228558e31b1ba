"""How a search went: every trial, and the best so far."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from lorica.report import words
from lorica.report.figures import canvas
from lorica.report.figures.canvas import Figure, View
from lorica.report.subjects import Sweep, Trial


def draw(sweep: Sweep) -> Figure | str:
    """One panel; the reason if no trial came to anything."""
    told = [each for each in sweep.trials if each.minimum is not None]
    if not told:
        return f"No search history for {sweep.name}: {_why(sweep)}"
    alt = (
        f"Least recovery of all tasks in {words.numbered(len(told), 'trial')} of {sweep.method} on {sweep.split}. "
        f"{_best(sweep)}"
    )
    names = list(dict.fromkeys(key for each in sweep.trials for key in each.point))
    panel = canvas.panel(f"{sweep.slug}-history", "least recovery by trial", alt, lambda axes: _on(axes, told))
    return Figure(
        name=f"{sweep.slug}-history",
        title=sweep.name,
        lede=f"Dots: trials of {sweep.method}, by the task that each keeps least of, on {sweep.split}. Line: the best "
        f"so far. Crosses: trials that may not be chosen. {_best(sweep)}",
        views=[View("", [panel])],
        head=("trial", *names, "minimum", "low", "high", "mean", "feasible", "reason"),
        rows=[
            (
                *(each.number, *(each.point.get(name) for name in names), *(each.minimum or (None, None, None))),
                *(each.mean[0] if each.mean else None, each.is_feasible, each.reason),
            )
            for each in sweep.trials
        ],
    )


def _why(sweep: Sweep) -> str:
    reasons = [each.reason for each in sweep.trials if each.reason]
    return f"no trial could be judged ({reasons[0]})" if reasons else "no trial has ended yet."


def _best(sweep: Sweep) -> str:
    feasible = [each for each in sweep.trials if each.is_feasible and each.minimum is not None]
    best = sweep.best or max(feasible, key=lambda each: each.minimum or (), default=None)
    if best is None or best.minimum is None:
        return "None of them may be chosen."
    return f"Best: {point(best)}, which keeps at least {words.delta(best.minimum[0])} of every task."


def point(trial: Trial) -> str:
    return ", ".join(f"{key} = {words.value(each)}" for key, each in trial.point.items())


def _on(axes: Any, told: list[Trial]) -> None:
    feasible = [each for each in told if each.is_feasible]
    others = [each for each in told if not each.is_feasible]
    values = [each.minimum[0] for each in feasible if each.minimum]
    numbers = [each.number + 1 for each in feasible]
    axes.plot(numbers, values, "o", color=canvas.MUTED, alpha=0.55, markersize=4.5, markeredgewidth=0)
    axes.plot(
        [each.number + 1 for each in others],
        [each.minimum[0] for each in others if each.minimum],
        "x",
        color=canvas.LOSS,
        markersize=5,
    )
    axes.step(numbers, list(accumulate(values, max)), where="post", color=canvas.GAIN, linewidth=2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")
    axes.set_xlabel("trial")
