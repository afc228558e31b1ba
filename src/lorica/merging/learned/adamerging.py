"""The coefficients at which the merged model is surest of its answers: mean entropy, no labels.

Source: Yang et al. 2024, arXiv 2310.02575; AdaMerging++ (`plus_plus`) does the same with updates filtered as by TIES.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from lorica.merging.fitting.descent import Learned, Watch, descend
from lorica.merging.fitting.losses import Losses, Measured
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.parameterization import parameterization
from lorica.merging.fitting.problem import Problem, mounted

NEEDS_LABELS = False
FILTERS = {"plus_plus": "ties"}
DEGENERATE = 0.25  # of the answers that a task's labels had at the start, beyond the first: 1 + 0.25 of two are left


def learn(
    problem: Problem,
    descent: Descent,
    *,
    init: float = 0.3,
    coefficient_parameterization: Literal["clip", "sigmoid_alpha"] = "clip",
    plus_plus: bool = False,
) -> Learned:
    """Minimise the tasks' mean entropy of the predicted distributions, with coefficients in [0, 1].

    With `plus_plus` the problem's updates are to be filtered ones: FILTERS says by what. Ends with a warning when the
    entropy falls because a task's answers have become all the same, which it is the validation rows that show.
    """
    with mounted(problem, descent) as live:
        start = parameterization(coefficient_parameterization, live.layout, init, descent.normalize_coefficients)
        return descend(
            Losses(problem, live, "entropy", descent.non_blocking_transfer),
            descent,
            start,
            label="adamerging",
            settings={"plus_plus": plus_plus, "coefficient_parameterization": coefficient_parameterization},
            total=torch.mean,
            watch=collapse_watch([task.name for task in problem.tasks]),
        )


def collapse_watch(names: Sequence[str]) -> Watch:
    """Stops where the entropy has fallen and the answers of some task are no longer spread over its labels.

    The spread is the effective number exp(H) of labels in the mean of the answers, held against that at the start.
    """

    def watch(start: Sequence[Measured], found: Sequence[Measured]) -> str | None:
        for name, before, now in zip(names, start, found, strict=True):
            if now.loss < before.loss and _spread(now) - 1 < DEGENERATE * (_spread(before) - 1):
                return (
                    f"the answers of {name} have collapsed onto one label while the entropy fell from "
                    f"{before.loss:.3f} to {now.loss:.3f}: take fewer steps, a lower learning_rate or labels"
                )
        return None

    return watch


def _spread(found: Measured) -> float:
    assert found.answers is not None
    p = found.answers
    return math.exp(-float(p.xlogy(p).sum()))
