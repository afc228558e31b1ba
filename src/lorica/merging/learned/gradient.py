"""The coefficients of the least weighted cross-entropy over the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from lorica import plugins
from lorica.errors import ConfigError, UnknownNameError
from lorica.merging.fitting import feeding
from lorica.merging.fitting.descent import Learned, descend
from lorica.merging.fitting.losses import Losses
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.parameterization import ParameterizationName, parameterization
from lorica.merging.fitting.problem import Problem, mounted

DEFAULTS = {"learning_rate": 1e-2}
ALIASES = {"baseline_batches": ("num_baseline_batches", lambda value: value)}

Weighting = Literal["baseline_normalized", "equal", "manual"]


def learn(
    problem: Problem,
    descent: Descent,
    *,
    init: float = 0.3,
    coefficient_parameterization: ParameterizationName = "clip",
    weighting: Weighting = "baseline_normalized",
    weights: dict[str, Annotated[float, Ge(0)]] | None = None,
    num_baseline_batches: Annotated[int, Ge(1)] = 32,
    floor: Annotated[float, Gt(0)] = 1e-6,
) -> Learned:
    """Minimise Σ w_t·CE_t.

    `baseline_normalized`: w_t ∝ 1 / max(floor, CE_t of the task's own adapter), so that a task counts by how far it is
    from what it can have; `equal`; `manual`: `weights`, one for each task. The first two add up to 1. Raises
    ConfigError for weights that do not go with the weighting.
    """
    _check_weights(problem, weighting, weights)
    with mounted(problem, descent) as live:
        losses = Losses(problem, live, "cross_entropy", descent.non_blocking_transfer)
        if weighting == "baseline_normalized":
            w = _normalized_by_baselines(losses, descent, num_baseline_batches, floor)
        else:
            given = weights or {task.name: 1 / len(problem.tasks) for task in problem.tasks}
            w = torch.tensor([given[task.name] for task in problem.tasks], dtype=torch.float64)
        return descend(
            losses,
            descent,
            parameterization(coefficient_parameterization, live.layout, init, descent.normalize_coefficients),
            label="gradient",
            settings={
                "coefficient_parameterization": coefficient_parameterization,
                "weighting": weighting,
                "weights": weights,
                "num_baseline_batches": num_baseline_batches,
                "floor": floor,
            },
            total=lambda found: (w * found).sum(),
        )


def _check_weights(problem: Problem, weighting: Weighting, weights: Mapping[str, float] | None) -> None:
    if (weights is not None) != (weighting == "manual"):
        raise ConfigError(f"weighting={weighting}: weights are given with weighting=manual, and with no other")
    names = [task.name for task in problem.tasks]
    for name in weights or {}:
        if name not in names:
            raise UnknownNameError(plugins.unknown("task of weights", name, names))
    missing = [name for name in names if weights is not None and name not in weights]
    if missing:
        raise ConfigError(f"weights has no {missing[0]}: give each task one")


def _normalized_by_baselines(losses: Losses, descent: Descent, num_batches: int, floor: float) -> Tensor:
    one_hot = losses.mounted.layout.one_hot
    own = [
        losses.measured(task, one_hot(task.name), feeding.first_batches(task, descent, num_batches)).loss
        for task in losses.problem.tasks
    ]
    w = 1 / torch.tensor(own, dtype=torch.float64).clamp(min=floor)
    return w / w.sum()
