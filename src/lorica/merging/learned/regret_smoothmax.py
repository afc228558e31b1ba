"""The mixture of adapters whose worst task, by the share of its gain that is lost, is best: a smooth maximum.

This project's own objective (MATH section 6.3). The regret of a task is 0 where it does as well as its own adapter
alone and 1 where it does as badly as the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from lorica.merging.fitting import feeding
from lorica.merging.fitting.baselines import Baselines, baselines, with_headroom
from lorica.merging.fitting.descent import Learned, descend
from lorica.merging.fitting.gradients import Total
from lorica.merging.fitting.losses import Losses
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.parameterization import parameterization
from lorica.merging.fitting.problem import FittingTask, Problem, mounted
from lorica.merging.runtime import Mounted
from lorica.tasks.batching import Batch

DEFAULTS = {"learning_rate": 3e-4}
ALIASES = {"baseline_batches": ("num_baseline_batches", lambda value: value)}


def learn(
    problem: Problem,
    descent: Descent,
    *,
    tau: Annotated[float, Gt(0)] = 0.1,
    regret_epsilon: Annotated[float, Ge(0)] = 1e-4,
    num_baseline_batches: Annotated[int, Ge(1)] = 64,
) -> Learned:
    """Minimise τ·logsumexp(r/τ), r_t = (L_t − L_single,t) / (L_base,t − L_single,t + ε), over λ = softmax(u).

    λ adds up to 1 over the adapters of each group, and starts even. A task whose own adapter is no better than the base
    has no regret and is left out with a warning; ConfigError if that leaves none. Validation batches are judged by the
    regrets between their own baselines.
    """
    with mounted(problem, descent) as live:
        kept, fitted = _with_baselines(problem, live, descent, _first_batches(problem, descent, num_baseline_batches))
        validation = feeding.validation_batches(kept, descent)
        judged = fitted
        if validation:
            by_name = {task.name: own for task, own in zip(kept.tasks, validation, strict=True)}
            kept, judged = _with_baselines(kept, live, descent, by_name)
            fitted = fitted.of([task.name for task in kept.tasks])
        return descend(
            Losses(kept, live, "cross_entropy", descent.non_blocking_transfer),
            descent,
            parameterization("softmax", live.layout, 0.0, descent.normalize_coefficients),
            label="regret_smoothmax",
            settings={"tau": tau, "regret_epsilon": regret_epsilon, "num_baseline_batches": num_baseline_batches},
            total=smooth_maximum_regret(fitted, tau, regret_epsilon),
            validation_total=smooth_maximum_regret(judged, tau, regret_epsilon),
        )


def smooth_maximum_regret(found: Baselines, tau: float, regret_epsilon: float) -> Total:
    """J of the tasks' losses (T,); its gradient weighs the tasks by softmax(r/τ)."""

    def total(losses: Tensor) -> Tensor:
        regrets = (losses - found.single) / (found.base - found.single + regret_epsilon)
        return tau * torch.logsumexp(regrets / tau, dim=0)

    return total


def _first_batches(problem: Problem, descent: Descent, num_batches: int) -> dict[str, list[Batch]]:
    return {task.name: feeding.first_batches(task, descent, num_batches) for task in problem.tasks}


def _with_baselines(
    problem: Problem, live: Mounted, descent: Descent, batches: Mapping[str, Sequence[Batch]]
) -> tuple[Problem, Baselines]:
    """The tasks with something to recover on these batches, and their baselines there."""
    losses = Losses(problem, live, "cross_entropy", descent.non_blocking_transfer)

    def loss(task: FittingTask, c: Tensor) -> float:
        return losses.measured(task, c, batches[task.name]).loss

    return with_headroom(problem, baselines(loss, problem, live.layout), sign=-1)
