"""The batches that coefficients are fitted on: those of each step, and the fixed ones that they are judged by."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor

from lorica.errors import ConfigError
from lorica.merging.fitting import sampling
from lorica.merging.fitting.gradients import StepBatches
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.problem import FittingTask, Problem
from lorica.tasks.batching import Batch, mapped

Step = list[list[list[int]]]  # the rows of each task's micro-batches


def step_batches(problem: Problem, descent: Descent, start: int = 0) -> Iterator[StepBatches]:
    """Each task's micro-batches of step `start`, `start` + 1, and so on, made ahead where there are workers."""
    pinned = descent.dataloader_pin_memory and torch.device(problem.device).type == "cuda"

    def made(step: Step) -> StepBatches:
        return [
            [_placed(task.collate([task.rows[row] for row in rows]), pinned) for rows in own]
            for task, own in zip(problem.tasks, step, strict=True)
        ]

    return _ahead(made, _steps(problem, descent, start), descent.dataloader_num_workers)


def _placed(batch: Batch, pinned: bool) -> Batch:
    return mapped(batch, Tensor.pin_memory) if pinned else batch


def _steps(problem: Problem, descent: Descent, start: int) -> Iterator[Step]:
    micro = descent.gradient_accumulation_steps
    streams = [
        sampling.batches(
            task, descent.sampling.strategy(task.name), descent.batch_size, descent.seed, start=start * micro
        )
        for task in problem.tasks
    ]
    while True:
        yield [list(islice(stream, micro)) for stream in streams]


def _ahead(made: Callable[[Step], StepBatches], steps: Iterator[Step], num_workers: int) -> Iterator[StepBatches]:
    if num_workers == 0:
        yield from map(made, steps)
        return
    with ThreadPoolExecutor(num_workers) as pool:
        waiting: deque[Future[StepBatches]] = deque(pool.submit(made, step) for step in islice(steps, num_workers))
        while True:
            waiting.append(pool.submit(made, next(steps)))
            yield waiting.popleft().result()


def first_batches(task: FittingTask, descent: Descent, num_batches: int) -> list[Batch]:
    """The task's batches of its first steps, for what is measured before fitting starts."""
    chosen = sampling.batches(task, descent.sampling.strategy(task.name), descent.batch_size, descent.seed)
    return [task.collate([task.rows[row] for row in rows]) for rows in islice(chosen, num_batches)]


def validation_batches(problem: Problem, descent: Descent) -> list[list[Batch]]:
    """Each task's fixed batches of rows that nothing is fitted to; empty if no task has such rows.

    Raises ConfigError if only some tasks have them, or early stopping is asked for without.
    """
    without = [task.name for task in problem.tasks if not task.validation]
    if len(without) == len(problem.tasks):
        if descent.early_stopping_patience is not None:
            raise ConfigError("early_stopping_patience is set, and no task has validation rows: drop it, or give some")
        return []
    if without:
        raise ConfigError(f"no validation rows for {', '.join(without)}, and others have some: give all tasks some")
    return [fixed_batches(task, descent) for task in problem.tasks]


def fixed_batches(task: FittingTask, descent: Descent) -> list[Batch]:
    """The task's first validation rows, in `validation_batches` batches or as many as there are."""
    size = descent.batch_size
    last = min(len(task.validation), descent.validation_batches * size)
    return [task.collate(task.validation[start : min(start + size, last)]) for start in range(0, last, size)]
