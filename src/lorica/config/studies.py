"""What studies take: the arms, tasks and seeds of a question, one budget, and whatever a training run takes beside."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from lorica import plugins
from lorica.config.flags import Flag
from lorica.config.reading import set_key
from lorica.config.schema import AdapterConfig, Section, TrainConfig

Unit = Literal["steps", "forwards", "seconds", "epochs"]
Ablation = Literal["rank", "alpha", "modules", "grid"]
KINDS: tuple[str, ...] = get_args(AdapterConfig.model_fields["kind"].annotation)
RATES = {"zo": [1e-6, 1e-5, 1e-4, 1e-3], "backprop": [3e-5, 1e-4, 3e-4, 1e-3]}  # a trainer's grid where none is given
NOT_SHARED = {
    "seed": "a study takes seeds=[0, 1, 2]",
    "eval_split": "rates are chosen on dev, and what is told is of test",
    "force": "a study's runs go on by themselves",
}
BUDGETS = ("max_steps", "max_forwards", "max_seconds", "num_epochs")
OF_ALL_ARMS = (
    *(*NOT_SHARED, *BUDGETS, "output_dir", "resume", "task", "task.name", "task.path"),
    *("task.num_dev", "task.num_eval", "task.train_set_seed", "task.stratified"),
)
NUM_STEPS = 1000  # where no budget is given
TUNING_SEED = 100
LEARNING_RATE_SEARCH: Mapping[str, Any] = {
    "arms": ["lora"],
    "learning_rates": [1e-4, 3e-4],
    "warmup": 0.06,
    "seeds": [42, 1337, 2024],
    "tuning_seeds": [42, 1337, 2024],
}


class ArmConfig(Section):
    """One arm: what it is called, and what it sets of a training run's keys."""

    name: str = Field(min_length=1, description="a kind of adapter stands for adapter.kind=NAME")
    overrides: dict[str, Any] = Field({}, description="dotted keys of `lorica train` -> values")
    learning_rates: list[float] | None = Field(None, min_length=1, description="its own grid; None: the study's")

    @model_validator(mode="after")
    def _says_something(self) -> ArmConfig:
        if not self.overrides and self.name not in KINDS:
            raise ValueError(f"{plugins.unknown('arm', self.name, KINDS)} Or give {{name: ..., overrides: {{...}}}}")
        own = next((key for key in self.overrides if key in OF_ALL_ARMS), None)
        if own is not None:
            raise ValueError(f"arm {self.name!r} sets {own}, which is the same for every arm of a study: drop it")
        return self

    @property
    def has_rates(self) -> bool:
        """Whether there is a rate to choose for it."""
        kind = self.overrides.get("adapter.kind", self.name)
        return kind != "linear_probe" and "learning_rate" not in self.overrides


def _arm(value: Any) -> Any:
    """`lora`, {name, overrides, learning_rates}, or bare overrides, which are their own name."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and value and not value.keys() <= ArmConfig.model_fields.keys():
        return {"name": arm_name(value), "overrides": value}
    return value


def arm_name(overrides: Mapping[str, Any]) -> str:
    """What an arm is called that has no name: its keys' last words with their values."""
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in overrides.items())


Arm = Annotated[ArmConfig, BeforeValidator(_arm)]


class LoraArmConfig(Section):
    """What the arms of kind lora take alone, where others have a rank too."""

    rank: int | None = Field(None, ge=1)
    alpha: float | None = Field(None, gt=0)


class StudyConfig(Section):
    """What every study takes. Keys of `lorica train` are taken too, and go to every arm that has them."""

    also: ClassVar = TrainConfig
    flags: ClassVar = {"output_root": Flag("output_dir"), "lora_rank": Flag("adapter.rank")}

    title: str | None = Field(None, description="the question; None: made of the arms and tasks")
    tasks: list[str] = Field([], description="by name; none: the one of task.*. task.path may hold {task}")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="of the runs that are compared")
    max_steps: int | None = Field(None, ge=1, description="the budget of a run; None, and no other budget: 1000")
    max_forwards: int | None = Field(None, ge=1, description="as a budget: passes, as training_loss counts them")
    max_seconds: float | None = Field(None, gt=0, description="as a budget: seconds of training")
    num_epochs: float | None = Field(None, gt=0, description="as a budget: passes over the training data")
    tune: bool = Field(False, description="choose each arm's rate on dev; true where learning_rates are given")
    learning_rates: list[float] | None = Field(None, min_length=1, description="the grid of every arm without its own")
    tuning_seeds: list[int] | None = Field(None, min_length=1, description="None: one that is not among seeds")
    loss_smoothing: float = Field(0.9, ge=0, lt=1, description="of the losses in the figure")
    loss_figure_path: str | None = Field(None, description="None: loss.png in the study's folder")
    launcher: str = Field("here", description="where runs are run: here, inline (one after the other), ray")
    num_workers: int | None = Field(None, ge=1, description="runs at a time; None: as the launcher finds places")
    retry: bool = Field(False, description="run failed runs again")
    plan: bool = Field(False, description="tell what it would take, and run nothing")
    output_dir: str | None = Field(None, description="new, or a study; None: artifacts/studies/<kind>-<time>")
    resume: str | None = Field(None, description="a study's folder: go on with its own config")
    run: dict[str, Any] = Field({}, description="what goes to every arm, as keys of `lorica train`")

    @model_validator(mode="before")
    @classmethod
    def _runs_keys_apart(cls, tree: Any) -> Any:
        """Keys of a training run go to `run`; some say more than themselves: zo.* a trainer, rates whether to tune."""
        if not isinstance(tree, dict):
            return tree
        apart = {key: value for key, value in tree.items() if key in TrainConfig.model_fields.keys() - cls.model_fields}
        own = {key: value for key, value in tree.items() if key not in apart}
        run = copy.deepcopy(own["run"]) if isinstance(own.get("run"), dict) else {}
        for key, value in apart.items():
            set_key(run, key, value)
        if run.get("zo") and "trainer" not in run:
            run["trainer"] = "zo"
        if "tune" not in own and (own.get("learning_rates") or run.get("learning_rate") is not None):
            own["tune"] = bool(own.get("learning_rates"))
        return {**own, "run": run} if run else own

    @model_validator(mode="after")
    def _shared_keys_are_runs(self) -> StudyConfig:
        for key, reason in NOT_SHARED.items():
            if key in self.run:
                raise ValueError(f"{key} is no key of a study: {reason}")
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> StudyConfig:
        given = [key for key in BUDGETS if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given: a study has one budget, drop one of them")
        return self

    @model_validator(mode="after")
    def _one_way_to_a_rate(self) -> StudyConfig:
        rate = self.run.get("learning_rate")
        if rate is not None and self.tune:
            asked = "learning_rates" if self.learning_rates else "tune=true"
            raise ValueError(f"learning_rate={rate} is every arm's rate, and {asked} chooses them: drop one of the two")
        if not self.tune and (self.learning_rates or self.tuning_seeds):
            asked = "learning_rates" if self.learning_rates else "tuning_seeds"
            raise ValueError(f"{asked} is set, and tune=false chooses no rates: drop one of the two")
        return self

    @property
    def budget(self) -> tuple[Unit, float]:
        """The unit, and how much of it a run has."""
        if self.max_forwards:
            return "forwards", self.max_forwards
        if self.max_seconds:
            return "seconds", self.max_seconds
        return ("epochs", self.num_epochs) if self.num_epochs else ("steps", self.max_steps or NUM_STEPS)

    @property
    def tuned_seeds(self) -> list[int]:
        """The seeds that choose the rates: another than those that are compared, so that no luck counts twice."""
        return self.tuning_seeds or [next(seed for seed in itertools.count(TUNING_SEED) if seed not in self.seeds)]

    def resolved(self) -> Self:
        """The same study with every default that depends on another key filled in."""
        budget = {} if any(getattr(self, key) for key in BUDGETS) else {"max_steps": NUM_STEPS}
        return self.model_copy(update={**budget, **({"tuning_seeds": self.tuned_seeds} if self.tune else {})})

    def rates(self, trainer: str) -> list[float]:
        """The grid for arms of this trainer."""
        return self.learning_rates or RATES["zo" if trainer in ("zo", "spsa") else "backprop"]


class CompareConfig(StudyConfig):
    """Everything `lorica compare` takes."""

    flags: ClassVar = {
        "output_root": Flag("output_dir"),
        "lora_rank": Flag("lora.rank"),
        "lora_r": Flag("lora.rank"),
        "lora_alpha": Flag("lora.alpha"),
    }

    arms: list[Arm] = Field(
        [ArmConfig(name="lora"), ArmConfig(name="xgblora")],
        min_length=1,
        description="kinds of adapter, {name, overrides}, or bare overrides; the others are compared with the first",
    )
    lora: LoraArmConfig = LoraArmConfig()
    tune: bool = Field(True, description="choose each arm's rate on dev; false where learning_rate is given")

    @model_validator(mode="after")
    def _arms_say_their_kinds(self) -> CompareConfig:
        adapter = self.run.get("adapter")
        if isinstance(adapter, Mapping) and "kind" in adapter:
            raise ValueError(
                f"adapter.kind={adapter['kind']} is what arms differ in: give arms=[{adapter['kind']}, ...]"
            )
        return self

    @model_validator(mode="after")
    def _grids_are_fair(self) -> CompareConfig:
        own = {arm.name: arm.learning_rates for arm in self.arms if arm.learning_rates}
        if own and not self.tune:
            raise ValueError(
                f"arm {next(iter(own))!r} has learning_rates, and tune=false chooses none: drop one of them"
            )
        sizes = {arm.name: len(arm.learning_rates or self.rates("backprop")) for arm in self.arms if arm.has_rates}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{size} of {name}" for name, size in sizes.items())
            raise ValueError(f"learning rates to choose from: {told}; for a fair comparison give as many to each arm")
        return self


class AblateConfig(StudyConfig):
    """Everything `lorica ablate` takes."""

    flags: ClassVar = {**StudyConfig.flags, "ablation_type": Flag("type")}

    type: Ablation | None = Field(
        None, description="rank: 4, 8, 16 with alpha = 2 · rank; alpha: 8, 16, 32 at rank 8; modules; None: grid"
    )
    grid: dict[str, list[Any]] = Field({}, description="key -> values; every combination is an arm")

    @model_validator(mode="after")
    def _one_question(self) -> AblateConfig:
        if self.resume is not None and not self.model_fields_set & {"type", "grid"}:
            return self
        if (self.type in (None, "grid")) != bool(self.grid):
            known = ", ".join(get_args(Ablation))
            raise ValueError(
                f"type={self.type} and grid are both given: drop one of the two"
                if self.grid
                else f"an ablation needs type={known}, or grid={{KEY: [VALUES]}}"
            )
        return self

    @property
    def arms(self) -> list[ArmConfig]:
        """One arm for each value of what is varied."""
        changes: dict[str, list[dict[str, Any]]] = {
            "rank": [{"adapter.rank": rank, "adapter.alpha": 2.0 * rank} for rank in (4, 8, 16)],
            "alpha": [{"adapter.alpha": alpha, "adapter.rank": 8} for alpha in (8.0, 16.0, 32.0)],
            "modules": [{"adapter.targets": targets} for targets in ("standard", "extended", "all-linear")],
        }
        if self.type in changes:
            return [ArmConfig(name=arm_name(dict([*each.items()][:1])), overrides=each) for each in changes[self.type]]
        points = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return [ArmConfig(name=arm_name(point), overrides=point) for point in points]
