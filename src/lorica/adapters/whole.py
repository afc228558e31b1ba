"""A whole model to be trained: no adapter, every parameter of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Whole:
    """Every parameter of a model, its heads included."""

    model: nn.Module

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter; one that several modules share has its first name alone."""
        return dict(self.model.named_parameters())

    def set_training(self, training: bool) -> None:
        """The model's dropout is the base's own, which whoever trains it switches."""

    def set_dropout_generator(self, generator: torch.Generator) -> None:
        """The model's dropout knows no other generator than the global one."""

    def state(self) -> dict[str, Tensor]:
        """Name -> the parameter's own values, not copied."""
        return {name: parameter.detach() for name, parameter in self.trainable().items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Write a state into the model."""
        for name, parameter in self.trainable().items():
            parameter.copy_(state[name])
