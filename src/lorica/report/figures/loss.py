"""How the loss fell: raw and smoothed, over steps, forwards or seconds, with what boosting decided marked on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lorica.report import curves, words
from lorica.report.figures import canvas
from lorica.report.figures.canvas import Figure, Panel, View
from lorica.report.subjects import Array, Round, Run, Study

Line = tuple[Array, Array, Array, Array]  # x, median, least and most (m,) of the smoothed losses
UNITS = {"step": "Steps", "forwards": "Forward passes", "seconds": "Seconds"}
HEAD = ("arm", "task", "seed", "step", "forwards", "seconds", "loss", "smoothed_loss", "event")
MOST_NAMED = 4  # lines that are named where they end
MOST_MARKED = 60  # rounds of a run that are marked one by one
EVENTS = {  # what a round ended with -> its mark, how that is filled, what the mark says
    "laid on": ("^", "none", "open triangle, a booster was laid on"),
    "rolled back": ("v", "full", "full triangle pointing down, it was rolled back to its best and laid on"),
    "rejected": ("X", "full", "cross, it was rejected"),
}


def draw(study: Study) -> Figure | str | None:
    """A panel for each task; None for a study without runs, the reason if none of them has steps."""
    if not study.runs:
        return None
    runs = [run for run in study.runs if run.curve is not None and np.isfinite(run.curve.loss).any()]
    if not runs:
        return "No loss curves: no run left any step in training_loss.jsonl (nothing was trained by steps)."
    tasks = [task for task in study.tasks if any(run.task == task for run in runs)]
    arms = [arm for arm in study.arms if any(run.arm == arm for run in runs)]
    views = [View(label, [_panel(study, task, unit, runs) for task in tasks]) for unit, label in UNITS.items()]
    return Figure(
        name=f"{study.slug}-loss",
        title=study.title,
        lede=_lede(runs),
        views=views,
        head=HEAD,
        rows=[row for run in runs for row in _rows(run)],
        legend=[(canvas.variable(study.arms.index(arm)), arm) for arm in arms],
    )


def _lede(runs: Sequence[Run]) -> str:
    said = "Faint: the loss of every step. Bold: its exponential mean, over 4 % of the run's steps."
    if len(runs) > len({(run.arm, run.task) for run in runs}):
        said += " Of several seeds: the median of those means, and the band from the least to the most of them."
    lines: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        lines.setdefault((run.arm, run.task), []).append(run)
    marked = {_event(each) for members in lines.values() for _, each in _marked(members)}
    if marked:
        said += f" Marks, of all seeds: {'; '.join(told for event, (*_, told) in EVENTS.items() if event in marked)}."
    crowded = dict.fromkeys(arm for (arm, _), members in lines.items() if _is_crowded(members))
    if crowded:
        said += f" Not marked are the rounds of {words.listed(list(crowded))}, more than {MOST_MARKED} in a run."
    return said


def _panel(study: Study, task: str, unit: str, runs: Sequence[Run]) -> Panel:
    members = {arm: [run for run in runs if (run.arm, run.task) == (arm, task)] for arm in study.arms}
    members = {arm: each for arm, each in members.items() if each}
    lines = {arm: curves.band([run.curve for run in each if run.curve], unit) for arm, each in members.items()}

    def on(axes: Any) -> None:
        for arm, each in members.items():
            _line(axes, study.arms.index(arm), each, lines[arm], unit)
        axes.grid(axis="y")
        axes.set_xlabel(UNITS[unit].lower())
        axes.set_ylabel("loss")
        _ticks(axes, unit)
        _limit(axes, lines)

    name = f"{study.slug}-loss-{study.tasks.index(task)}-{unit}"
    return canvas.panel(name, words.short(task, 44), _alt(task, unit, members, lines), on)


def _ticks(axes: Any, unit: str) -> None:
    """Steps and forward passes at whole numbers, even where there is one alone; seconds with the decimals they need."""
    from matplotlib.ticker import MaxNLocator

    if unit == "seconds":
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _line(axes: Any, place: int, runs: Sequence[Run], line: Line, unit: str) -> None:
    colour, (x, middle, low, high) = canvas.colour(place), line
    for run in runs:
        assert run.curve is not None
        axes.plot(
            *curves.thinned(run.curve.along(unit), run.curve.loss), color=colour, alpha=0.2, linewidth=0.7, zorder=2
        )
    if len(runs) > 1:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=3)
    axes.plot(x, middle, color=colour, linewidth=1.9, linestyle=canvas.dash(place), solid_capstyle="round", zorder=4)
    for event, (marker, fill, _) in EVENTS.items():
        places = [at for run, each in _marked(runs) if _event(each) == event for at in _ends(run, each, unit)]
        if places:
            axes.plot(
                places,
                np.interp(places, x, middle),
                linestyle="none",
                marker=marker,
                markersize=5.5,
                zorder=5,
                color=colour,
                markerfacecolor=canvas.PAPER if fill == "none" else colour,
            )


def _marked(runs: Sequence[Run]) -> list[tuple[Run, Round]]:
    """The rounds of a line's runs, if they are few enough to be seen."""
    return [] if _is_crowded(runs) else [(run, each) for run in runs for each in run.rounds]


def _is_crowded(runs: Sequence[Run]) -> bool:
    return any(len(run.rounds) > MOST_MARKED for run in runs)


def _ends(run: Run, ended: Round, unit: str) -> Iterator[float]:
    """Where a round's last step stands, if the run recorded that step."""
    assert run.curve is not None
    at = int(np.searchsorted(run.curve.step, ended.last_step))
    if at < len(run.curve.step):
        yield float(run.curve.along(unit)[at])


def _event(ended: Round) -> str:
    return ("rolled back" if ended.rolled_back else "laid on") if ended.accepted else "rejected"


def _limit(axes: Any, lines: dict[str, Line]) -> None:
    """A spike of one step must not flatten all the rest."""
    highest = max((float(high.max()) for _, _, _, high in lines.values() if len(high)), default=0.0)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.0, low) if low < 0.15 * highest else low, min(high, 1.35 * highest) if highest > 0 else high)


def _alt(task: str, unit: str, members: dict[str, list[Run]], lines: dict[str, Line]) -> str:
    said = [f"Training loss on {task} against {UNITS[unit].lower()}."]
    for arm, runs in members.items():
        _, middle, _, _ = lines[arm]
        if len(middle):
            fall = f"{arm}: smoothed loss from {middle[0]:.3f} to {middle[-1]:.3f}"
            said.append(f"{fall} ({words.numbered(len(runs), 'seed')}){_rounds(runs)}.")
    return " ".join(said)


def _rounds(runs: Sequence[Run]) -> str:
    rounds = [each for run in runs for each in run.rounds]
    if not rounds:
        return ""
    accepted = sum(each.accepted for each in rounds)
    back = sum(each.rolled_back for each in rounds)
    return f", {accepted} of {words.numbered(len(rounds), 'booster')} laid on, {back} rolled back"


def _rows(run: Run) -> Iterator[tuple[Any, ...]]:
    """Every step as it was recorded, and what happened at it."""
    assert run.curve is not None
    events = {each.last_step: _event(each) for each in run.rounds}
    line = curves.smoothed(run.curve.loss, curves.window_of(run.curve))
    for at, step in enumerate(run.curve.step):
        loss, mean = float(run.curve.loss[at]), float(line[at])
        yield (
            *(run.arm, run.task, run.seed, int(step), int(run.curve.forwards[at]), float(run.curve.seconds[at])),
            *(loss if np.isfinite(loss) else None, mean if np.isfinite(mean) else None, events.get(int(step))),
        )
