"""Update rules. Each takes gradients as it finds them, whoever filled them: backprop or an estimator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

RuleName = Literal["adamw", "sgd", "momentum"]


def update_rule(
    name: RuleName, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """A torch optimizer. Decay is decoupled under `adamw`, added to the gradient under `sgd` and `momentum` (0.9)."""
    parameters = list(parameters)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    momentum = 0.9 if name == "momentum" else 0.0
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
