"""What a report is about: runs and studies of runs, merges, sweeps and matrices, as their records say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorica import files

Record = Mapping[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curve:
    """The losses of a run's steps; a step that was not applied has none."""

    step: Array  # (n,)
    forwards: Array  # (n,)
    seconds: Array  # (n,)
    loss: Array  # (n,)

    def along(self, unit: str) -> Array:
        """Where each step stands: its number, or the forwards or seconds so far."""
        found: Array = getattr(self, unit)
        return found


@dataclass(frozen=True)
class Round:
    """A boosted run's round as its ledger has it."""

    number: int
    last_step: int
    accepted: bool
    rolled_back: bool


@dataclass(frozen=True)
class Score:
    """A metric with its interval; without one, `low` and `high` are None."""

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = True
    n: int | None = None  # examples


@dataclass(frozen=True, eq=False)
class Run:
    """One training run. `arm` is what it is compared as; what it did not leave is None or empty."""

    folder: Path
    arm: str
    task: str
    seed: int | None
    config: Record  # dotted key -> value
    origin: Record
    score: Score | None
    curve: Curve | None
    rounds: tuple[Round, ...] = ()
    seconds: float | None = None
    peak_bytes: float | None = None
    num_trainable: int | None = None
    num_parameters: int | None = None
    best_step: int | None = None

    @property
    def adapter(self) -> Path | None:
        folder = self.folder / "adapter"
        return folder if (folder / "adapter_config.json").is_file() else None

    @property
    def is_finished(self) -> bool:
        return self.score is not None


@dataclass(frozen=True)
class Cell:
    """An arm on a task, over its seeds; `interval` says in words what low and high are of."""

    arm: str
    task: str
    metric: str
    higher_is_better: bool
    scores: Mapping[str, float]  # seed -> score
    mean: float
    low: float | None
    high: float | None
    interval: str
    learning_rate: float | None
    num_trainable: float | None
    num_parameters: float | None
    peak_bytes: float | None
    seconds: float | None
    forwards: float | None
    num_diverged: int


@dataclass(frozen=True)
class Tried:
    """A learning rate that an arm was tried at; its loss is the mean over seeds, None unless all of them finished."""

    learning_rate: float
    dev_loss: float | None
    has_failed: bool


@dataclass(frozen=True)
class Choice:
    """How an arm came to its learning rate on a task; `chosen` is None while runs are missing, and if all failed."""

    arm: str
    task: str
    chosen: float | None
    tried: tuple[Tried, ...]


@dataclass(frozen=True)
class Difference:
    """An arm against another on a task; task None is all of them together."""

    task: str | None
    arm: str
    against: str
    mean: float | None
    low: float | None
    high: float | None
    num_pairs: int
    verdict: str


@dataclass(frozen=True, eq=False)
class Study:
    """Runs that are compared: a study's, or those that were named one by one."""

    title: str
    name: str  # its own in the report
    kind: str  # compare | ablate | runs
    is_finished: bool
    arms: tuple[str, ...]
    tasks: tuple[str, ...]
    runs: tuple[Run, ...]
    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...] = ()
    configs: Mapping[tuple[str, str], Record] = field(default_factory=dict)  # (arm, task) -> dotted key -> value
    failures: tuple[Record, ...] = ()
    num_missing: int = 0  # of the runs that are compared
    num_missing_choosing: int = 0  # of those that rates are chosen by
    budget: str | None = None
    rates: str | None = None  # how they were chosen, in words
    choices: tuple[Choice, ...] = ()
    remarks: tuple[str, ...] = ()  # what a reader must know of the rates
    origin: Record = field(default_factory=dict)

    @property
    def slug(self) -> str:
        return files.slug(self.name)

    @property
    def num_seeds(self) -> int:
        return max((len(cell.scores) for cell in self.cells), default=0)

    def of(self, arm: str, task: str) -> list[Run]:
        return [run for run in self.runs if (run.arm, run.task) == (arm, task)]

    def cell(self, arm: str, task: str) -> Cell | None:
        return next((cell for cell in self.cells if (cell.arm, cell.task) == (arm, task)), None)


@dataclass(frozen=True)
class Kept:
    """What a merge keeps of a task: d (value, low, high), None where the task's own adapter had nothing to keep."""

    task: str
    metric: str
    base: float
    single: float
    merged: float
    delta: tuple[float, float, float] | None


@dataclass(frozen=True)
class Merge:
    name: str
    method: str
    kept: tuple[Kept, ...]
    total_error: float | None
    origin: Record = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """A point of a sweep; the least and the mean recovery are (value, low, high), None if nothing came of it."""

    number: int
    point: Record
    minimum: tuple[float, float, float] | None
    mean: tuple[float, float, float] | None
    is_feasible: bool
    reason: str | None


@dataclass(frozen=True)
class Sweep:
    name: str
    method: str
    split: str
    is_finished: bool
    trials: tuple[Trial, ...]
    best: Trial | None
    kept: tuple[Kept, ...]  # by the best, on the split that chose it
    final: Merge | None  # the best on `final_split`, which had no part in choosing it
    final_split: str | None
    origin: Record = field(default_factory=dict)

    @property
    def slug(self) -> str:
        return files.slug(self.name)


@dataclass(frozen=True)
class Matrix:
    name: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    scores: Mapping[tuple[str, str], Score]
    reasons: Mapping[tuple[str, str], str]
    origin: Record = field(default_factory=dict)

    @property
    def slug(self) -> str:
        return files.slug(self.name)


@dataclass(frozen=True)
class Subjects:
    """Everything that one report is about."""

    studies: tuple[Study, ...] = ()
    merges: tuple[Merge, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    matrices: tuple[Matrix, ...] = ()
    remarks: tuple[str, ...] = ()  # what was found and could not be read whole
