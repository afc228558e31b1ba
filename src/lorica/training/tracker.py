"""What a tracker is: it shows a run's figures to a person while it runs, beside the run folder's own lines.

A tracker is one file in `trackers/`, named as the library behind it and the extra that installs that, which holds
``start``, with the signature below. The library is imported there alone. Nothing leaves this machine unless `online`
is true.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lorica.errors import MissingExtraError
from lorica.plugins import Catalogue

TRACKERS = Catalogue("lorica.training.trackers", "tracker")
Figures = Mapping[str, float]  # `namespace/name` -> value


class Tracker(Protocol):
    """Where figures go."""

    def log(self, figures: Figures, step: int) -> None:
        """Take figures of a step; steps never fall, and one may come several times."""

    def finish(self) -> None:
        """Write what is left: the run is over, however it ended."""


@dataclass(frozen=True)
class Tracked:
    """The run that is tracked."""

    folder: Path
    project: str
    name: str
    id: str  # the same whenever the run is gone on with
    config: Mapping[str, Any]
    first_step: int = 0  # steps done before; what was tracked behind them is told again
    online: bool = False


class Start(Protocol):
    """Begins to track a run, or goes on with it."""

    def __call__(self, run: Tracked, /) -> Tracker: ...


@dataclass
class Trackers:
    """Several trackers as one. One that fails is told of and left out from then on: no run ends by who looks on."""

    warn: Callable[[str], None]
    at_work: dict[str, Tracker] = field(default_factory=dict)

    @classmethod
    def started(cls, names: Sequence[str], run: Tracked, warn: Callable[[str], None]) -> Trackers:
        """The trackers of these names, as far as they start."""
        trackers = cls(warn)
        for name in names:
            trackers._try(name, lambda name=name: trackers.at_work.update({name: find(name)(run)}))  # type: ignore[misc]
        return trackers

    def log(self, figures: Figures, step: int) -> None:
        """Hand the figures to each; those that are no numbers (NaN, infinity) are left out."""
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        for name, tracker in list(self.at_work.items()):
            self._try(name, lambda tracker=tracker: tracker.log(finite, step))  # type: ignore[misc]

    def finish(self) -> None:
        for name, tracker in list(self.at_work.items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self.at_work.pop(name, None)
            words = " ".join(str(error).split())
            self.warn(f"the tracker {name} failed and is left out ({type(error).__name__}: {words})")


def find(name: str) -> Start:
    """The tracker of this name. Raises UnknownNameError, or MissingExtraError if its library is not installed."""
    start: Start = TRACKERS.load(name, "start")
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(f"trackers={name} needs {name}: pip install lorica[{name}]")
    return start
