"""Whether one arm is better than another: differences of pairs with 95 % intervals, and the verdict that they carry.

Both the seeds and the test examples are samples, and what another sample of either would have shown is in the
interval: half its width is √(h_s² + h_e²), Student's half-widths over the seeds and over the examples. What hangs on
seed and example at once is counted in both, so that the interval is rather too wide. With one seed h_s is not known,
and the interval is that of the examples alone. Nothing is corrected for the number of comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit  # type: ignore[import-untyped]

from lorica.evaluation.metrics import CONFIDENCE, Array

Verdict = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; None where there is too little to tell."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    num_seeds: int = 0

    def verdict(self, higher_is_better: bool = True) -> Verdict:
        """What the interval of a difference shows: nothing as long as it holds zero."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "no difference shown"
        return "better" if (self.low > 0) == higher_is_better else "worse"


def interval(means: Sequence[float], examples: Sequence[Array] | None = None) -> Interval:
    """The mean over seeds of `means` (seeds,), with its interval.

    `examples` are the values whose mean each of them is: of each task, all weighed alike, (seeds, n). None: not known.
    """
    if not means:
        return Interval()
    mean = float(np.mean(means))
    halves = [half for half in (_over_seeds(means), _over_examples(examples or [])) if half is not None]
    if not halves:
        return Interval(mean, num_seeds=len(means))
    half = math.hypot(*halves)
    return Interval(mean, mean - half, mean + half, len(means))


def _over_seeds(means: Sequence[float]) -> float | None:
    if len(means) < 2:
        return None
    return _student(len(means)) * float(np.std(means, ddof=1)) / math.sqrt(len(means))


def _over_examples(examples: Sequence[Array]) -> float | None:
    """The tasks' examples are drawn apart, each with all its seeds."""
    sizes = [values.shape[1] for values in examples]
    if not sizes or min(sizes) < 2:
        return None
    variances = [float(values.mean(axis=0).var(ddof=1)) / values.shape[1] for values in examples]
    return _student(min(sizes)) * math.sqrt(sum(variances)) / len(examples)


def _student(num: int) -> float:
    """How many standard errors of the mean of `num` values the interval goes to either side."""
    return float(stdtrit(num - 1, (1 + CONFIDENCE) / 2))
