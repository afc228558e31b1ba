"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine"]


def multiplier(schedule: ScheduleName, step: int, num_steps: int, warmup: float = 0.0) -> float:
    """What the learning rate is multiplied by at `step` (from 0) of `num_steps`.

    `warmup` below 1 is a share of the steps, from 1 on a number of steps: the rate rises to 1 over them, and then stays
    (constant), falls to 0 in a line (linear) or along a half cosine (cosine).
    """
    rise = warmup_steps(warmup, num_steps)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, num_steps - rise)
    if schedule == "linear":
        return max(0.0, 1.0 - done)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return 1.0


def warmup_steps(warmup: float, num_steps: int) -> int:
    """The number of warm-up steps that `warmup` stands for."""
    return math.ceil(warmup * num_steps) if warmup < 1 else int(warmup)
