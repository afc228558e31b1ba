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


def fit(
    objective: LossModule,
    trainable: Mapping[str, nn.Parameter],
    batches: Iterator[Batch],
    *,
    estimator: Estimator,
    optimizer: torch.optim.Optimizer,
    learning_rate: Callable[[int], float],
    num_steps: int,
    batches_per_step: int = 1,
    max_grad_norm: float | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> int:
    """Train for `num_steps` optimizer steps and return how many were applied.

    `learning_rate` gives the rate of each step from 0 on. A step whose loss or gradient is not finite is not applied,
    and is told to `on_step` as such; NonFiniteLossError ends the run after 10 of them in a row, or when they are more
    than 5 % of at least 200 steps.
    """
    begin = time.monotonic()
    forwards = tokens = num_bad = bad_in_a_row = 0
    for step in range(num_steps):
        rate = learning_rate(step)
        taken = [next(batches) for _ in range(batches_per_step)]
        estimate = estimator(objective, trainable, taken, step)
        applied = _is_finite(estimate, trainable.values())
        if applied:
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(trainable.values(), max_grad_norm)
            set_learning_rate(optimizer, rate)
            optimizer.step()
        bad_in_a_row = 0 if applied else bad_in_a_row + 1
        num_bad += not applied
        forwards += estimate.num_forwards
        tokens += sum(batch.num_tokens for batch in taken)
        on_step(Step(step + 1, estimate.loss, rate, forwards, tokens, time.monotonic() - begin, applied))
        _stop_if_hopeless(step + 1, num_bad, bad_in_a_row, rate)
    return num_steps - num_bad


def _is_finite(estimate: Estimate, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the loss, the projected gradients and the gradient are all finite."""
    if not all(map(math.isfinite, (estimate.loss, *estimate.projected))):
        return False
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())


def _stop_if_hopeless(num_steps: int, num_bad: int, bad_in_a_row: int, rate: float) -> None:
    if bad_in_a_row >= NUM_BAD_IN_A_ROW or (num_steps >= 200 and num_bad > BAD_SHARE * num_steps):
        raise NonFiniteLossError(
            f"the loss was NaN or infinite in {num_bad} of {num_steps} steps (none of them was applied): lower "
            f"learning_rate={rate:g}, or load the model in float32"
        )
