"""Long work made visible: a bar on a terminal, nothing in a log file."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")


def bar(transient: bool = False, wanted: bool = True) -> Progress:
    """A progress bar on stderr, drawn if it is wanted and stderr a terminal; fields `note` are shown behind it.

    Of several processes that torchrun started the first alone draws.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=_console(),
        transient=transient,
        disable=not (wanted and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"),
    )


@functools.cache
def _console() -> Console:
    """One for all bars: rich draws a bar within a bar only where both are on the same console."""
    return Console(stderr=True)


def tracked(items: Iterable[Item], total: int, description: str) -> Iterator[Item]:
    """The items, a bar showing how many of `total` have gone by; it disappears at the end."""
    with bar(transient=True) as progress:
        yield from progress.track(items, total=total, task_id=progress.add_task(description, total=total, note=""))
