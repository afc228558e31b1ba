"""A stretch of training: what one optimizer trains, from its first step to its last.

A boosting round is one (`boosting.Round`); a run without rounds is a single one (`Undivided`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorica.training.fit import Step

INTERRUPTED = "interrupted"


class Tunable(Protocol):
    """What a run trains, live on its model: an adapter, a prefix, or the whole model."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter."""

    def set_training(self, training: bool) -> None:
        """Switch its own dropout; the base model's mode is left as it is."""

    def set_dropout_generator(self, generator: torch.Generator) -> None:
        """Let its dropout draw from `generator`."""

    def state(self) -> dict[str, Tensor]:
        """Name -> value of everything that training may change."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Write a state into the live parameters."""


class Stretch(Protocol):
    """What whoever trains has to know of a stretch, and keeps of it in a checkpoint."""

    number: int
    first_step: int  # steps of the run that were done before it

    @property
    def live(self) -> Tunable: ...

    def watch(self, step: Step) -> str | None:
        """Take a step's outcome; the reason if the stretch ends with it."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it as tensors."""

    def values(self) -> dict[str, Any]:
        """What a checkpoint keeps of it beside, as JSON takes it."""

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Put back what a checkpoint kept."""


class TrainStretch(Protocol):
    """Trains a stretch to its end and returns why it ended; `INTERRUPTED` leaves it to be resumed."""

    def __call__(self, stretch: Stretch, /) -> str: ...


@dataclass
class Undivided:
    """A run without rounds: a stretch that nothing ends but the run's last step."""

    live: Tunable
    number: int = 0
    first_step: int = 0

    def watch(self, step: Step) -> str | None:
        return None

    def tensors(self) -> dict[str, Tensor]:
        return within("live", self.live.state())

    def values(self) -> dict[str, Any]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.live.restore(inside("live", tensors))


def within(owner: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under names that say whose it is."""
    return {f"{owner}|{name}": tensor for name, tensor in state.items()}


def inside(owner: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state that `within` put among others; empty if there is none."""
    start = f"{owner}|"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
