"""The coefficients of the least cross-entropy, c = tanh(α), so that an adapter may be taken away too.

Source: Yang et al. 2024, arXiv 2412.10416 (SUPERMERGE), with its hierarchical merging.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge

from lorica.errors import ConfigError
from lorica.merging.fitting import tree
from lorica.merging.fitting.descent import Learned, descend
from lorica.merging.fitting.losses import Losses
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.parameterization import parameterization
from lorica.merging.fitting.problem import Problem, mounted

DEFAULTS = {"learning_rate": 1e-2}

ParameterizationName = Literal["tanh_alpha", "simplex_softmax_scaled"]


def learn(
    problem: Problem,
    descent: Descent,
    *,
    init: float = 0.3,
    coefficient_parameterization: ParameterizationName = "tanh_alpha",
    hierarchical: bool = False,
    group_size: Annotated[int, Ge(2)] = 2,
    group_rank: Annotated[int, Ge(1)] | None = None,
) -> Learned:
    """Minimise the tasks' mean cross-entropy.

    `hierarchical` fits groups of `group_size` adapters apart, then the groups' merges in groups, up to one: tree.py
    says what that holds in memory. `group_rank` compresses the groups' merges. Raises ConfigError for a group_rank
    without hierarchical.
    """
    if group_rank is not None and not hierarchical:
        raise ConfigError(f"group_rank={group_rank} without hierarchical=true: there are no groups, drop it")

    def fit(part: Problem, label: str) -> Learned:
        with mounted(part, descent) as live:
            return descend(
                Losses(part, live, "cross_entropy", descent.non_blocking_transfer),
                descent,
                parameterization(coefficient_parameterization, live.layout, init, descent.normalize_coefficients),
                label=label,
                settings={"coefficient_parameterization": coefficient_parameterization, "group_rank": group_rank},
                total=torch.mean,
            )

    if hierarchical:
        return tree.fitted(problem, descent.granularity, fit, group_size=group_size, group_rank=group_rank)
    return fit(problem, "supermerge")
