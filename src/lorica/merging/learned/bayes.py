"""Coefficients by trial: a Gaussian process over what the tasks recover, for metrics that have no gradient.

Source: Optuna's GPSampler with log expected improvement, Ament et al. 2023, arXiv 2310.20708.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from lorica.errors import ConfigError, NonFiniteLossError
from lorica.merging.fitting import feeding, keeping
from lorica.merging.fitting.baselines import Measure, baselines, with_headroom
from lorica.merging.fitting.descent import Learned
from lorica.merging.fitting.layout import Layout
from lorica.merging.fitting.losses import Losses
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.parameterization import normalized
from lorica.merging.fitting.problem import FittingTask, Problem, mounted
from lorica.merging.runtime import Mounted
from lorica.studies.search import Bayes, Trial, ranked
from lorica.studies.space import Parameter, Point, Space
from lorica.training.interruption import Interruption

USES = (
    *("variant", "batch_size", "seed", "normalize_coefficients"),
    *("split", "enforce_validation_only_selection", "validation_batches", "non_blocking_transfer"),
    *("merge_impl", "delta_residency", "model_dtype", "dtype_compute", "force_cpu"),
)
MOST_COEFFICIENTS = 64  # a Gaussian process of so few trials learns nothing in more dimensions


def learn(
    problem: Problem,
    descent: Descent,
    *,
    budget: Annotated[int, Ge(1)] = 20,
    init_points: Annotated[int, Ge(1)] = 6,
    low: float = 0.0,
    high: float = 1.0,
) -> Learned:
    """Of `budget` trials the one whose least recovery over the tasks is highest, ties by the mean.

    A task's recovery is (s − s_base) / (s_single − s_base), s being what its judge gives, or minus its mean loss on the
    validation batches where it has none. A task without headroom is left out with a warning. Raises ConfigError for
    more coefficients than can be searched, or a task with neither judge nor validation rows.
    """
    with mounted(problem, descent) as live:
        _check(problem, live.layout, low, high)
        measure = _measure(problem, descent, live)
        kept, found = with_headroom(problem, baselines(measure, problem, live.layout), sign=1)

        def tried(point: Point) -> list[float]:
            c = _coefficients(point, live.layout, descent)
            values = torch.tensor([measure(task, c) for task in kept.tasks], dtype=torch.float64)
            if not values.isfinite().all():
                raise NonFiniteLossError(f"NaN or infinite at {point}: load the model in float32 (model_dtype=float32)")
            return found.recovered(values).tolist()

        search = Bayes(_space(live.layout, low, high), budget, min(init_points, budget), descent.seed)
        settings = {"budget": budget, "init_points": init_points, "low": low, "high": high, "tasks": found.names}
        return _searched(problem, descent, live.layout, search, tried, settings)


def _check(problem: Problem, layout: Layout, low: float, high: float) -> None:
    if not low < high:
        raise ConfigError(f"low={low:g}, high={high:g}: the coefficients' range needs low below high")
    if layout.size > MOST_COEFFICIENTS:
        raise ConfigError(
            f"variant={layout.granularity}_wise has {layout.size} coefficients, and bayes searches {MOST_COEFFICIENTS} "
            "at most: take variant=task_wise, or a learner that descends"
        )
    blind = next((task.name for task in problem.tasks if task.judge is None and not task.validation), None)
    if blind is not None:
        raise ConfigError(f"{blind} has neither validation rows nor a judge: give it validation rows")


def _measure(problem: Problem, descent: Descent, live: Mounted) -> Measure:
    losses = Losses(problem, live, "cross_entropy", descent.non_blocking_transfer)
    batches = {task.name: feeding.fixed_batches(task, descent) for task in problem.tasks if task.judge is None}

    @torch.no_grad()
    def measure(task: FittingTask, c: Tensor) -> float:
        if task.judge is None:
            return -losses.measured(task, c, batches[task.name]).loss
        with live.at(losses.ready(c)):
            return task.judge()

    return measure


def _space(layout: Layout, low: float, high: float) -> Space:
    return Space(tuple(Parameter(_spelled(key), "float", low, high) for key in layout.keys))


def _spelled(key: tuple[str, str]) -> str:
    group, adapter = key
    return f"{group}/{adapter}" if group else adapter


def _coefficients(point: Point, layout: Layout, descent: Descent) -> Tensor:
    """(K,) float64."""
    c = torch.tensor([point[_spelled(key)] for key in layout.keys], dtype=torch.float64)
    return normalized(c, layout) if descent.normalize_coefficients else c


def _searched(
    problem: Problem,
    descent: Descent,
    layout: Layout,
    search: Bayes,
    tried: Callable[[Point], list[float]],
    settings: Mapping[str, Any],
) -> Learned:
    """The best of the trials; each is kept when it is done."""
    identity = keeping.identity("bayes", settings, descent, layout)
    state = keeping.kept(problem, identity) or {"trials": [], "seconds": 0.0}
    done: list[dict[str, Any]] = state["trials"]
    begin = time.monotonic() - state["seconds"]
    with Interruption() as interruption:
        while (point := search.propose(_trials(done))) is not None:
            recoveries = tried(point)
            done.append({"point": point, "recoveries": dict(zip(settings["tasks"], recoveries, strict=True))})
            keeping.keep(problem, identity, {"trials": done, "seconds": time.monotonic() - begin})
            problem.say(f"bayes: trial {len(done)}/{search.total}  least recovery {min(recoveries):.4f}")
            if interruption.signal:
                raise keeping.interrupted(problem, f"trial {len(done)}", interruption.signal)
    best = ranked(_trials(done))[0]
    return Learned(
        layout,
        _coefficients(best.point, layout, descent),
        history=[{"step": number, **each} for number, each in enumerate(done, 1)],
        best_step=best.number,
        stopped=f"all {len(done)} trials done",
        seconds=time.monotonic() - begin,
    )


def _trials(done: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """The trials from 1 on, by the least recovery and then by the mean."""
    return [Trial(number, each["point"], _values(each["recoveries"].values())) for number, each in enumerate(done, 1)]


def _values(recoveries: Collection[float]) -> tuple[float, float]:
    return min(recoveries), math.fsum(recoveries) / len(recoveries)
