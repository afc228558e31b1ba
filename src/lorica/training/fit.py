"""The training loop: one function, readable from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lorica.errors import NonFiniteLossError
from lorica.optim.backprop import Estimate, Estimator
from lorica.optim.updates import set_learning_rate
from lorica.tasks.batching import Batch
from lorica.tasks.objectives import LossModule

NUM_BAD_IN_A_ROW = 10
BAD_SHARE = 0.05
MAX_STEPS = "max_steps"


@dataclass(frozen=True)
class Step:
    """What is known after an optimizer step, numbered from 1; one line of `training_loss.jsonl`."""

    step: int
    loss: float
    learning_rate: float
    forwards: int  # so far
    tokens: int  # so far, each batch counted once whatever the number of forwards over it
    seconds: float  # so far
    applied: bool = True
    num_left_out: int = 0  # directions of this step whose loss was not finite
    trend_t: float | None = None  # t-statistic of the loss's trend, where somebody measures it
    weights: tuple[float, ...] = ()  # of a zeroth-order step's directions; not in that line, but in `replay.jsonl`


@dataclass
class Progress:
    """How far a run has come. `fit` moves it on; a checkpoint keeps it."""

    step: int = 0
    forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    num_bad: int = 0
    bad_in_a_row: int = 0
    num_left_out: int = 0
    has_warm_start: bool = False


OnStep = Callable[[Step], str | None]


def fit(
    objective: LossModule,
    trainable: Mapping[str, nn.Parameter],
    batches: Iterator[Batch],
    *,
    estimator: Estimator,
    optimizer: torch.optim.Optimizer,
    learning_rate: Callable[[int], float],
    num_steps: int,
    num_seconds: float = math.inf,
    progress: Progress | None = None,
    batches_per_step: int = 1,
    max_grad_norm: float | None = None,
    on_step: OnStep = lambda step: None,
) -> str:
    """Train from `progress` to step `num_steps`, or until `on_step` returns a reason to stop; returns the reason.

    The first step that ends past `num_seconds` of training, those before `progress` among them, is the last one too.

    `learning_rate` gives the rate of each step from 0 on. A step whose loss or gradient is not finite is not applied,
    and is told to `on_step` as such; NonFiniteLossError ends the run after 10 of them in a row, or when they are more
    than 5 % of at least 200 steps. Directions that a zeroth-order estimate had to leave out are counted.
    """
    progress = progress if progress is not None else Progress()
    begin = time.monotonic() - progress.seconds
    while progress.step < num_steps and progress.seconds < num_seconds:
        rate = learning_rate(progress.step)
        taken = [next(batches) for _ in range(batches_per_step)]
        estimate = estimator(objective, trainable, taken, progress.step)
        applied = _is_finite(estimate, trainable.values())
        if applied:
            apply(optimizer, trainable, rate, max_grad_norm)
        _move_on(progress, estimate, taken, applied)
        progress.seconds = time.monotonic() - begin
        reason = on_step(_told(progress, estimate, rate, applied))
        if reason is not None:
            return reason
        stop_if_hopeless(progress, rate)
    return MAX_STEPS


def _is_finite(estimate: Estimate, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the loss and the gradient are finite."""
    if not math.isfinite(estimate.loss):
        return False
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())


def apply(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], rate: float, max_grad_norm: float | None
) -> None:
    """Take the step that the gradients ask for, after cutting them to `max_grad_norm`."""
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(trainable.values(), max_grad_norm)
    set_learning_rate(optimizer, rate)
    optimizer.step()


def _move_on(progress: Progress, estimate: Estimate, taken: list[Batch], applied: bool) -> None:
    progress.step += 1
    progress.forwards += estimate.num_forwards
    progress.tokens += sum(batch.num_tokens for batch in taken)
    progress.num_left_out += estimate.num_left_out
    progress.num_bad += not applied
    progress.bad_in_a_row = 0 if applied else progress.bad_in_a_row + 1


def _told(progress: Progress, estimate: Estimate, rate: float, applied: bool) -> Step:
    counts = progress.step, estimate.loss, rate, progress.forwards, progress.tokens, progress.seconds
    return Step(*counts, applied, estimate.num_left_out, weights=estimate.weights)


def stop_if_hopeless(progress: Progress, rate: float) -> None:
    """Raise NonFiniteLossError after 10 bad steps in a row, or when they are more than 5 % of at least 200."""
    too_many = progress.step >= 200 and progress.num_bad > BAD_SHARE * progress.step
    if progress.bad_in_a_row >= NUM_BAD_IN_A_ROW or too_many:
        raise NonFiniteLossError(
            f"the loss was NaN or infinite in {progress.num_bad} of {progress.step} steps (none of them was applied): "
            f"lower learning_rate={rate:g}, or load the model in float32"
        )
