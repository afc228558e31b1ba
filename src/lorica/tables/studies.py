"""What a study found, as a table and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from lorica.card import studies

TASK, METRIC, COLUMNS = 0, 3, (0, 1, 2, 4, 5, 6, 7)  # of a study's table
LOOK: Mapping[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False}
COLOURS = {"better": "green", "worse": "red"}


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
    """The dev loss of each rate that was tried, the chosen one in bold."""
    if found["tuning"] is None:
        return []
    rates = found["tuning"]["learning_rates"]
    head = ("task", "arm", *(f"{rate:g}" for rate in rates))
    table = Table(*head, title=f"{found['tuning']['by']} by learning rate", **LOOK)
    for line in found["tuning"]["found"]:
        losses = {each["learning_rate"]: each["dev_loss"] for each in line["tried"]}
        cells = [_loss(losses.get(rate), rate == line["chosen"]) for rate in rates]
        table.add_row(escape(line["task"]), escape(line["arm"]), *cells)
    return [table]


def _loss(value: float | None, is_chosen: bool) -> str:
    text = "–" if value is None else f"{value:.4f}"
    return f"[bold]{text}[/]" if is_chosen else text
