"""Defaults of a training config that depend on its other keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lorica.config.contradictions import LOW_RANK

if TYPE_CHECKING:
    from lorica.config.schema import TrainConfig

RATES = {"lora": (1e-3, 1e-4), "full": (5e-5, 1e-6), "prefix": (1e-3, 1e-3)}  # by backprop, under zo
RATE_OF_SEVERAL = 1e-3  # under zo, where the mean of several one-sided directions is taken
# The same, from where a larger one would lead away again; boosters of rank 1 have fewer directions, and bear more.
RATES_AFTER_WARM_START = {"lora": 3e-4, "xgblora": 6e-4}
NUM_STEPS, MOST_STEPS = 1000, 1_000_000  # the latter of a run whose length is a time
RANKS = {"lora": 8, "xgblora": 1}
NUM_BOOSTERS = 8  # of a boosted run that begins with a warm start


def of_run(cfg: TrainConfig) -> dict[str, Any]:
    """Key -> value of what a config leaves open, and of the sections in which something is."""
    kind, zeroth_order = cfg.adapter.kind, cfg.trainer == "zo"
    if cfg.trainer == "none":
        return {}
    if kind == "linear_probe":
        return {"max_steps": 0, "task": cfg.task.model_copy(update={"kind": "classification"})}
    steps = cfg.max_steps
    if steps is None and cfg.num_epochs is None:
        steps = NUM_STEPS if cfg.max_seconds is None else MOST_STEPS
    constant = zeroth_order or cfg.max_seconds is not None
    return {
        "optimizer": cfg.optimizer or ("sgd" if zeroth_order else "adamw"),
        "schedule": cfg.schedule or ("constant" if constant else "linear"),
        "learning_rate": _rate(cfg) if cfg.learning_rate is None else cfg.learning_rate,
        "stratified": zeroth_order if cfg.stratified is None else cfg.stratified,
        "max_steps": steps,
        **(_low_rank_section(cfg) if kind in LOW_RANK else {}),
        **(_zeroth_order_sections(cfg, steps) if zeroth_order else {}),
        **(_prefix_section(cfg) if kind == "prefix" else {}),
    }


def warm_starts(cfg: TrainConfig) -> bool:
    """Whether a run begins with its last block fitted. Where that is left open: if A's start is too, and the loss is
    trained for, by B alone and in its own units, on a base that has gradients.
    """
    if cfg.trainer != "zo" or cfg.adapter.kind not in LOW_RANK or cfg.zo.warm_start_steps is not None:
        return bool(cfg.zo.warm_start_steps)
    of_B = _factors(cfg) == "B" and cfg.zo.space == "parameter" and not cfg.boosting.orthogonal
    has_gradient = cfg.zo.objective == "loss" and cfg.model.quantization == "none"
    return cfg.adapter.init == "auto" and of_B and has_gradient


def _rate(cfg: TrainConfig) -> float:
    zeroth_order = cfg.trainer == "zo"
    if zeroth_order and cfg.adapter.kind in LOW_RANK and _estimator(cfg) == "one_sided":
        return RATES_AFTER_WARM_START[cfg.adapter.kind] if warm_starts(cfg) else RATE_OF_SEVERAL
    return RATES.get(cfg.adapter.kind, RATES["lora"])[zeroth_order]


def _low_rank_section(cfg: TrainConfig) -> dict[str, Any]:
    boosted = cfg.adapter.kind == "xgblora"
    rank = cfg.adapter.rank or RANKS[cfg.adapter.kind]
    alpha = cfg.adapter.alpha or (1.0 if boosted and cfg.trainer != "zo" else 2.0) * rank
    return {"adapter": cfg.adapter.model_copy(update={"rank": rank, "alpha": alpha})}


def _zeroth_order_sections(cfg: TrainConfig, num_steps: int | None) -> dict[str, Any]:
    """With the factors that are trained, of which two sections speak, in agreement."""
    low_rank, factors, estimator = cfg.adapter.kind in LOW_RANK, _factors(cfg), _estimator(cfg)
    zo = cfg.zo.model_copy(
        update={
            "estimator": estimator,
            "num_directions": cfg.zo.num_directions or (8 if estimator == "one_sided" else 1),
            "distribution": cfg.zo.distribution or ("rademacher" if cfg.adapter.kind == "full" else "gaussian"),
        }
    )
    if not low_rank:
        return {"zo": zo}
    rounds = {
        "train_factors": factors,
        "steps_per_iteration": _steps_of_a_round(cfg, num_steps),
        "ranks": _ranks_of_rounds(cfg),
    }
    boosting = cfg.boosting.model_copy(update=rounds) if cfg.adapter.kind == "xgblora" else cfg.boosting
    return {"zo": zo.model_copy(update={"train": factors}), "boosting": boosting}


def _steps_of_a_round(cfg: TrainConfig, num_steps: int | None) -> int | None:
    """Behind a warm start, where no rule is asked for, as many boosters as an adapter usually has ranks."""
    asked = cfg.boosting.model_fields_set & {"steps_per_iteration", "use_adaptive_merge", "merge_frequency"}
    if asked or not num_steps or cfg.max_seconds is not None or not warm_starts(cfg):
        return cfg.boosting.steps_per_iteration
    return -(-num_steps // NUM_BOOSTERS)


def _ranks_of_rounds(cfg: TrainConfig) -> list[int] | None:
    """Behind a warm start, where no rank is asked for: the booster that holds it is as large as a LoRA."""
    if cfg.boosting.ranks or cfg.adapter.rank or not warm_starts(cfg):
        return cfg.boosting.ranks
    return [RANKS["lora"], RANKS["xgblora"]]


def _estimator(cfg: TrainConfig) -> Literal["spsa", "one_sided", "forward_gradient"]:
    by_B = cfg.adapter.kind in LOW_RANK and _factors(cfg) == "B"
    return cfg.zo.estimator or ("one_sided" if by_B else "spsa")


def _factors(cfg: TrainConfig) -> Literal["both", "B"]:
    asked = cfg.boosting.train_factors if "train_factors" in cfg.boosting.model_fields_set else "B"
    return asked if cfg.zo.train == "auto" else cfg.zo.train


def _prefix_section(cfg: TrainConfig) -> dict[str, Any]:
    by_network = cfg.trainer == "backprop" if cfg.prefix.reparameterize is None else cfg.prefix.reparameterize
    return {"prefix": cfg.prefix.model_copy(update={"reparameterize": by_network})}
