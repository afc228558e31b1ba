"""The options that all learners of coefficients share, under the names that configs use (MATH section 6.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from annotated_types import Ge, Gt, Lt
from pydantic import BeforeValidator, ConfigDict

from lorica.errors import ConfigError
from lorica.merging.fitting.layout import Granularity
from lorica.merging.runtime import Compute, MergeImpl, Residency
from lorica.plugins import Conversions

Strategy = Literal["uniform", "inverse", "sqrt_inverse", "balanced", "none"]
EstimatorName = Literal["backprop", "spsa", "forward_gradient"]
Count = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Lt(1)]


def _dev(split: Any) -> Any:
    return "dev" if split in ("validation", "val") else split


def _wise(variant: Any) -> Any:
    return f"{variant}_wise" if variant in ("task", "layer", "module", "direction") else variant


@dataclass(frozen=True)
class Sampling:
    """How a task's rows come into its batches; sampling.py says what the strategies are."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    enabled: bool = True
    strategy: Strategy = "none"


@dataclass(frozen=True)
class SamplingPlan:
    """The sampling of every task, and of those that have their own."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    default: Sampling = field(default_factory=Sampling)
    per_task: Mapping[str, Sampling] = field(default_factory=dict)

    def strategy(self, task: str) -> Strategy:
        chosen = self.per_task.get(task, self.default)
        return chosen.strategy if chosen.enabled else "none"


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How coefficients are fitted, whatever the objective.

    An evaluation measures the objective on the same validation batches at the coefficients as they stand. Fitting stops
    early after `early_stopping_patience` evaluations in a row that are not better by more than the threshold; those of
    the first `early_stopping_warmup_steps` do not count. Raises ConfigError for a split other than dev, unless
    enforce_validation_only_selection is false.
    """

    steps: Annotated[int, Ge(0)] = 200
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    betas: tuple[Share, Share] = (0.9, 0.999)
    batch_size: Count = 16
    gradient_accumulation_steps: Count = 1
    seed: int = 0
    variant: Annotated[Literal["task_wise", "layer_wise", "module_wise", "direction_wise"], BeforeValidator(_wise)] = (
        "task_wise"
    )
    normalize_coefficients: bool = False  # divide by the sum over the adapters of each group
    # The gradient
    estimator: EstimatorName = "backprop"
    epsilon: Annotated[float, Gt(0)] = 1e-3  # of spsa
    num_directions: Count = 1  # of spsa and forward_gradient
    # The data; who hands in the rows reads `split` and `validation_batches`
    split: Annotated[Literal["train", "dev", "test"], BeforeValidator(_dev)] = "dev"
    enforce_validation_only_selection: bool = True
    validation_batches: Count = 8
    sampling: SamplingPlan = field(default_factory=SamplingPlan)
    dataloader_num_workers: Annotated[int, Ge(0)] = 0  # threads that make batches ahead
    dataloader_pin_memory: bool = False
    non_blocking_transfer: bool = True
    # When to stop, and what to keep
    eval_steps: Count = 10
    early_stopping_patience: Count | None = None
    early_stopping_threshold: Annotated[float, Ge(0)] = 0.0
    early_stopping_warmup_steps: Annotated[int, Ge(0)] = 20
    min_optimizer_steps_before_early_stop: Annotated[int, Ge(0)] = 20
    restore_best_checkpoint: bool = True
    # The model; who loads it reads `model_dtype` and `force_cpu`
    merge_impl: MergeImpl = "fused_lora_linear"
    delta_residency: Residency = "cpu_stream"
    model_dtype: str = "auto"
    dtype_compute: Compute = "float32"
    force_cpu: bool = False
    # What is shown, and how often the state is written
    progress_bar: bool = True
    logging_steps: Count = 10

    def __post_init__(self) -> None:
        if self.enforce_validation_only_selection and self.split != "dev":
            raise ConfigError(
                f"split={self.split}: coefficients are fitted on dev; set enforce_validation_only_selection=false to "
                f"fit them on {self.split} all the same"
            )

    @property
    def granularity(self) -> Granularity:
        return cast(Granularity, self.variant.removesuffix("_wise"))


def _same(value: Any) -> Any:
    return value


ALIASES: Conversions = {
    "max_steps": ("steps", _same),
    "num_steps": ("steps", _same),
    "lr": ("learning_rate", _same),
    "granularity": ("variant", _same),
    "gradient_estimator": ("estimator", _same),
    "log_every": ("logging_steps", _same),
    "grad_accum_steps": ("gradient_accumulation_steps", _same),
    "early_stopping_min_delta": ("early_stopping_threshold", _same),
}
