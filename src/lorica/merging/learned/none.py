"""The coefficients as they start: nothing is fitted, for a merge to hold the learned ones against."""

from __future__ import annotations

from lorica.merging.fitting.descent import Learned
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.parameterization import parameterization
from lorica.merging.fitting.problem import Problem, layout_of

USES = ("variant", "normalize_coefficients")
NEEDS_LABELS = False


def learn(problem: Problem, descent: Descent, *, init: float = 0.3) -> Learned:
    """Every coefficient `init`."""
    layout = layout_of(problem, descent.granularity)
    start = parameterization("free", layout, init, descent.normalize_coefficients)
    return Learned(layout, start.coefficients(start.start), stopped="nothing to fit")
