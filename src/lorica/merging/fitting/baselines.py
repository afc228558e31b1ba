"""What a task gets from the base and from its own adapter alone: the ends between which a merge is measured."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.errors import ConfigError
from lorica.merging.fitting.layout import Layout
from lorica.merging.fitting.problem import FittingTask, Problem

Measure = Callable[[FittingTask, Tensor], float]  # of a task at coefficients c (K,)


@dataclass(frozen=True)
class Baselines:
    """Of each task the measure with no adapter, and with its own alone."""

    names: tuple[str, ...]  # of the tasks
    base: Tensor  # (T,)
    single: Tensor  # (T,)

    def of(self, names: Sequence[str]) -> Baselines:
        """Those of some of the tasks."""
        places = [self.names.index(name) for name in names]
        return Baselines(tuple(names), self.base[places], self.single[places])

    def recovered(self, values: Tensor) -> Tensor:
        """(T,) of measures in between: 0 as the base, 1 as the own adapter alone (MATH section 6.2)."""
        return (values - self.base) / (self.single - self.base)


def baselines(measure: Measure, problem: Problem, layout: Layout) -> Baselines:
    """The measures of all tasks at the two ends, through the same runtime as everything between them."""
    found = [(measure(task, layout.uniform(0.0)), measure(task, layout.one_hot(task.name))) for task in problem.tasks]
    base, single = torch.tensor(found, dtype=torch.float64).T
    return Baselines(tuple(task.name for task in problem.tasks), base, single)


def with_headroom(problem: Problem, found: Baselines, sign: float) -> tuple[Problem, Baselines]:
    """The tasks whose own adapter is better than the base, the others being left out with a warning.

    `sign` is 1 where higher is better and -1 where lower is. Divided by a headroom of another sign, a task's regret
    would reward what hurts it. Raises ConfigError if no task is left.
    """
    headroom = dict(zip(found.names, (sign * (found.single - found.base)).tolist(), strict=True))
    kept = [name for name in found.names if headroom[name] > 0]
    lost = [name for name in found.names if not headroom[name] > 0]
    if not kept:
        raise ConfigError(f"no adapter is better than the base on its own task ({', '.join(lost)}): nothing to recover")
    if lost:
        warnings.warn(f"left out, their own adapters being no better than the base: {', '.join(lost)}", stacklevel=3)
    tasks = [task for task in problem.tasks if task.name in kept]
    return dataclasses.replace(problem, tasks=tasks), found.of(kept)
