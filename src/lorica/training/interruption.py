"""SIGTERM and SIGINT as a flag: the step under way ends, a checkpoint is written, and the run stops.

Where several processes take the steps, a signal to any of them stops all after the same step.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from lorica.processes import Processes

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """While it is entered, the first signal sets `signal`; a second one ends the process at once."""

    def __init__(self, processes: Processes | None = None) -> None:
        self._processes = processes or Processes()
        self._noted: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def signal(self) -> int | None:
        """The signal that came, once every process knows of it; SIGTERM where it came to another."""
        if self._processes.num == 1:
            return self._noted
        return (self._noted or signal.SIGTERM) if self._processes.stops else None

    def __enter__(self) -> Interruption:
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # only the main thread may set handlers; elsewhere signals keep their meaning
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted, self._processes.wants_stop = number, True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
