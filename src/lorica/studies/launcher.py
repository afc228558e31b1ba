"""What a launcher is: it runs a study's commands, each in a process of its own, and tells how each ended.

A launcher is one file in `launchers/` that holds ``launch``, with the signature below. What it starts ends with it:
when the iterator is closed, when an error or a signal ends the process, and when the process is killed. One whose
commands run on this machine holds ``num_places`` too: `num_workers` -> how many it runs at a time.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lorica.plugins import Catalogue

LAUNCHERS = Catalogue("lorica.studies.launchers", "launcher")
TAIL_BYTES = 1 << 16  # of a log, in which its error is looked for


@dataclass(frozen=True)
class Job:
    """One command to run: the words behind `lorica`, and the file that takes what it says."""

    words: tuple[str, ...]
    log: Path
    cwd: Path = field(default_factory=Path.cwd)


@dataclass(frozen=True)
class Ended:
    """How a job ended. The code is a process's own: negative for the signal that ended it."""

    job: Job
    exit_code: int
    error: str | None  # in one line; None after exit code 0
    seconds: float


class Launch(Protocol):
    """Runs the jobs, and yields each as it ends, in any order."""

    def __call__(self, jobs: Sequence[Job], *, num_workers: int | None = None) -> Iterator[Ended]:
        """At most `num_workers` at a time; None: as many as the machine has places for."""


def find(name: str) -> Launch:
    """The launcher of this name. Raises UnknownNameError."""
    launch: Launch = LAUNCHERS.load(name, "launch")
    return launch


def num_places(name: str, num_workers: int | None) -> int | None:
    """How many jobs the launcher of this name runs at a time; None where that is for other machines to say."""
    places: Callable[[int | None], int] | None = LAUNCHERS.load(name, "num_places", None)
    return places(num_workers) if places else None


def ended(job: Job, exit_code: int, seconds: float) -> Ended:
    """The job with its error, which its log tells."""
    return Ended(job, exit_code, _error(job.log, exit_code) if exit_code else None, seconds)


def _error(log: Path, exit_code: int) -> str:
    """The log's last line that begins with `error:`, else how the process ended and its last words."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    told = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    if told:
        return told[-1]
    how = f"ended by {_named(-exit_code)}" if exit_code < 0 else f"exit code {exit_code}"
    return f"{how}: {lines[-1]}" if lines else how


def _named(number: int) -> str:
    """A signal's name, or its number where this machine has no name for it."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
