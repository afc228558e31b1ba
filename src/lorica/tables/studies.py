"""What a study would take, and what it found, as tables and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from lorica.card import studies
from lorica.tables.cells import size

if TYPE_CHECKING:
    from lorica.runs.studying.forecast import ArmForecast, Forecast

TASK, METRIC, COLUMNS = 0, 3, (0, 1, 2, 4, 5, 6, 7)  # of a study's table
LOOK: Mapping[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False}
COLOURS = {"better": "green", "worse": "red"}
PLAN_HEAD = ("arm", "rates", "runs", "steps", "forwards", "trainable", "memory", "done", "left")
NO_MEMORY = "linear probes, quantised bases and models that cannot be run without numbers"


def study(found: Mapping[str, Any]) -> list[Table | str]:
    """A row for each arm on each task; then how each rate did, what each difference shows, and what failed."""
    pairs = zip(studies.verdicts(found), found["differences"], strict=True)
    verdicts = [_coloured(line, each["verdict"]) for line, each in pairs]
    return [_cells(found), *_rates(found), *verdicts, *map(escape, studies.remarks(found))]


def _cells(found: Mapping[str, Any]) -> Table:
    """As narrow as a terminal; the study's card has more columns."""
    head, *rows = studies.table(found)
    table = Table(*(Column(head[at], no_wrap=at != TASK) for at in COLUMNS), title=escape(found["title"]), **LOOK)
    for row in rows:
        cells = {**dict(enumerate(row)), TASK: f"{row[TASK]} ({row[METRIC]})"}
        table.add_row(*(escape(cells[at]) for at in COLUMNS))
    return table


def _coloured(line: str, verdict: str) -> str:
    colour = COLOURS.get(verdict)
    return f"[{colour}]{escape(line)}[/]" if colour else escape(line)


def _rates(found: Mapping[str, Any]) -> list[Table | str]:
    """The dev loss of each rate that an arm was tried at, the chosen one in bold; a dash where a run of it failed."""
    if found["tuning"] is None:
        return []
    lines = found["tuning"]["found"]
    grids = [[f"{each['learning_rate']:g}" for each in line["tried"]] for line in lines]
    is_shared = all(grid == grids[0] for grid in grids)
    head = grids[0] if is_shared else [""] * max(map(len, grids))
    table = Table("task", "arm", *head, title=f"{found['tuning']['by']} by learning rate", **LOOK)
    for line, grid in zip(lines, grids, strict=True):
        losses = [_loss(each["dev_loss"], each["learning_rate"] == line["chosen"]) for each in line["tried"]]
        told = losses if is_shared else [f"{rate}: {loss}" for rate, loss in zip(grid, losses, strict=True)]
        table.add_row(escape(line["task"]), escape(line["arm"]), *told)
    return [table]


def _loss(value: float | None, is_chosen: bool) -> str:
    text = "–" if value is None else f"{value:.4f}"
    return f"[bold]{text}[/]" if is_chosen else text


def study_plan(found: Forecast) -> list[Table | str]:
    """A row for each arm on each task; then how many runs are left, and how long, as far as that can be told."""
    columns = (Column(name, no_wrap=name not in ("arm", "rates"), min_width=len(name)) for name in PLAN_HEAD)
    table = Table(*columns, title=escape(found.title), **LOOK, collapse_padding=True)
    for each in found.arms:
        table.add_row(*map(escape, _foreseen(each)))
    return [table, *_footnotes(found), *_left(found)]


def _foreseen(arm: ArmForecast) -> list[str]:
    """The cells of a row: steps and passes are of a run, and below of all its runs."""
    rates, memory = " ".join(f"{rate:g}" for rate in arm.rates), arm.memory_bytes
    return [
        *(f"{arm.arm}\non {arm.task}", rates or "–", f"{arm.num_tuning} + {arm.num_finals}"),
        *(_of_each_and_all(count, arm.num_runs) for count in (arm.num_steps, arm.num_forwards)),
        *(f"{arm.num_trainable:,}", "–" if memory is None else size(memory)),
        *(str(arm.num_finished), str(arm.num_left)),
    ]


def _of_each_and_all(count: int | None, num_runs: int) -> str:
    return "–" if count is None else f"{count:,}\n{count * num_runs:,}"


def _footnotes(found: Forecast) -> list[str]:
    lines = ["runs: that choose a rate + that are compared; steps and forwards: of a run, and below of all of them"]
    if any(each.num_steps is None for each in found.arms):
        lines.append("steps and forwards: – where seconds are the budget, for the clock decides")
    if any(each.num_forwards is None and each.num_steps is not None for each in found.arms):
        lines.append("forwards: – where rounds end by the loss, for each has a warm start")
    lines.append("memory: as `lorica plan` finds it, at a batch of rows as long as the longest that is trained on")
    if any(each.memory_bytes is None for each in found.arms):
        lines[-1] += f"; – where it knows none: {NO_MEMORY}"
    return lines


def _left(found: Forecast) -> list[str]:
    failed = sum(each.num_failed for each in found.arms)
    line = f"{found.num_left} runs are left, of {found.num_runs}"
    line += f"; {failed} failed, and are run again with retry=true alone" if failed else ""
    if not found.num_timed:
        return [line]
    workers = "one worker" if found.num_workers in (None, 1) else f"{found.num_workers} workers"
    line += f"; about {found.seconds_left / 3600:.2g} hours by {workers}, if they take as long as the finished runs of "
    line += "the same arm and task"
    untimed = found.num_left - found.num_timed
    return [line + (f"; {untimed} of them have none to go by, and are not in it" if untimed else "")]
