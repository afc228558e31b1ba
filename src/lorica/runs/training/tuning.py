"""What an adapter.kind is to a run: how it begins, is trained, and what it leaves. Each kind has a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console
from torch import Tensor

from lorica.card import About
from lorica.config import TrainConfig
from lorica.processes import Processes
from lorica.results import RunFolder
from lorica.runs.ready import Ready
from lorica.tasks.base import Split, TrainAs
from lorica.tasks.batching import TrainingStream
from lorica.tasks.prompting import Encoded
from lorica.training.decided import Decided
from lorica.training.fit import Progress
from lorica.training.ledger import Entry
from lorica.training.stretch import TrainStretch


class RunUnderWay(Protocol):
    """What those who train have to know of the run that they are part of."""

    cfg: TrainConfig
    ready: Ready
    rows: dict[Split, list[Encoded]]
    train_as: TrainAs
    probe_rows: list[Encoded]
    stream: TrainingStream
    say: Console
    processes: Processes
    sharded: bool
    progress: Progress
    decided: Decided | None  # of a run that is taken again by its log: what ended its rounds, and what was laid on
    looked: Mapping[str, Tensor]  # what a first look at the examples has shown, as the log keeps it
    best_dev_loss: float | None
    identity: dict[str, Any]
    tuning: Tuning

    @property
    def num_steps(self) -> int: ...

    @property
    def num_seconds(self) -> float: ...

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def evaluates(self) -> bool: ...

    def rate(self, step: int, first_step: int) -> float: ...


class Outcome(Protocol):
    """What training has made so far: it writes itself, and says what it is."""

    @property
    def place(self) -> Literal["adapter", "model"]:
        """What its folder in the run is called."""

    def write(self, folder: Path) -> None:
        """Write it to a folder, whole or not at all."""

    def about(self) -> About:
        """What the run's card says of it."""


class Tuning(Protocol):
    """One way to change a base model. Making it refuses what cannot be trained, before there is a run folder."""

    def told(self) -> list[str]:
        """Lines for the person who starts the run."""

    def num_trainable(self) -> int:
        """How many numbers are trained at once."""

    def train(self, run: RunFolder, train_stretch: TrainStretch) -> Outcome | None:
        """Train to the run's last step and leave the outcome on the model; None if the training was interrupted."""

    def as_it_stands(self) -> Outcome:
        """What a training under way has made, with what was laid on before."""

    def rounds(self) -> Sequence[Entry]:
        """The boosting rounds so far."""
