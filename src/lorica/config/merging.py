"""What may be set of a merge, and the flat keys of older configs read as the same."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lorica.config.flags import warn_of_older
from lorica.config.schema import ModelConfig, Section, name_alone


def _layer_words(overrides: Any) -> Any:
    return {str(layer): value for layer, value in overrides.items()} if isinstance(overrides, dict) else overrides


def _as_dev(split: Any) -> Any:
    """Older configs call the dev split by either name."""
    return {"validation": "dev", "val": "dev"}.get(split, split) if isinstance(split, str) else split


def _adapter_weights(weights: Any) -> Any:
    if weights is None:
        return None
    values = weights.values() if isinstance(weights, dict) else weights
    if not isinstance(weights, dict | list) or any(type(each) not in (int, float) for each in values):
        raise ValueError(
            f"lambda_policy.weights={weights!r}: give each adapter a number, [0.3, 0.7] in their order or {{a: 0.3}}"
        )
    return weights


SplitName = Annotated[Literal["train", "dev", "test"], BeforeValidator(_as_dev)]
OLDER = {
    "lambda": "method_params.lambda",
    "params": "method_params",
    "grid": "search.grid with search.type: grid",
}  # top-level keys of older configs

PerLayer = Annotated[dict[str, float], BeforeValidator(_layer_words)]
PerAdapter = Annotated[dict[str, float] | list[float] | None, BeforeValidator(_adapter_weights)]


class TransformConfig(Section):
    """One transform of every adapter's updates before the merge."""

    name: str
    params: dict[str, Any] = Field({}, description="the transform's own options")


class LambdaPolicyConfig(Section):
    """The method's `lambda`: one value, a value for each layer, or a weight for each adapter."""

    type: Literal["scalar", "per_layer", "per_adapter"] = "scalar"
    value: float | None = Field(None, description="of type=scalar")
    default: float | None = Field(None, description="of type=per_layer: for the layers without an override")
    overrides: PerLayer = Field({}, description="of type=per_layer: layer, or tower.layer -> lambda")
    weights: PerAdapter = Field(None, description="of type=per_adapter: adapter -> weight, or in their order")

    def negative(self) -> str | None:
        """The first value below zero, as the config names it."""
        named = self.weights if isinstance(self.weights, dict) else dict(enumerate(self.weights or []))
        values = {"value": self.value, "default": self.default}
        values |= {f"overrides.{layer}": value for layer, value in self.overrides.items()}
        values |= {f"weights.{adapter}": weight for adapter, weight in named.items()}
        return next((f"lambda_policy.{key}={value:g}" for key, value in values.items() if (value or 0) < 0), None)

    @model_validator(mode="after")
    def _just_its_own_keys(self) -> LambdaPolicyConfig:
        needed = {"scalar": "value", "per_layer": "default", "per_adapter": "weights"}[self.type]
        allowed = {"type", needed} | ({"overrides"} if self.type == "per_layer" else set())
        # A written config states every key, at its default where it was not set.
        set_keys = {key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default}
        stray = sorted(set_keys - allowed)
        if getattr(self, needed) is None or stray:
            said = f", and does not take {stray[0]}" if stray else ""
            raise ValueError(f"lambda_policy.type={self.type} needs lambda_policy.{needed}{said}")
        return self


class OptimizerConfig(Section):
    """What learns the coefficients of a merge."""

    name: str = Field(description="see `lorica list optimizers`")
    params: dict[str, Any] = Field({}, description="its own options, and those that all of them share")


class SubsetConfig(Section):
    """Which examples of a split an evaluation looks at."""

    max_samples: int | None = Field(None, ge=1)


class EvalSubsetConfig(SubsetConfig):
    enabled: bool = True
    seed: int = 0
    shuffle: bool = True
    stratified: bool = False
    per_task: dict[str, SubsetConfig] = Field({}, description="task -> its own subset")


class MergeConfig(Section):
    """Everything `lorica merge` takes."""

    adapters: list[str] = Field([], description="PEFT folders, run folders, names of runs, or tasks (their newest run)")
    method: str = Field("uniform_delta", description="see `lorica list methods`")
    method_params: dict[str, Any] = Field({}, description="the method's own options")
    merge_mode: Literal["common", "strict", "union"] = Field("common", description="which modules are merged")
    transforms: list[Annotated[TransformConfig, BeforeValidator(name_alone)]] = Field(
        [], description="see `lorica list transforms`"
    )
    lambda_policy: LambdaPolicyConfig | None = None
    optimizer: Annotated[OptimizerConfig | None, BeforeValidator(name_alone)] = Field(
        None, description="learns the coefficients of weighted_delta_n"
    )
    constraint_nonnegative: bool = Field(
        False, description="no coefficient below 0: one of a lambda_policy is refused, a learned one is set to 0"
    )
    model: Annotated[ModelConfig | None, BeforeValidator(name_alone)] = Field(
        None, description="None: the adapters' own"
    )
    rank: int | None = Field(None, ge=1, description="compress every module to this rank")
    energy: float | None = Field(None, gt=0, le=1, description="compress to the least rank that keeps this share")
    rank_budget: int | None = Field(None, ge=1, description="ranks of all modules together, given to the largest σ")
    save: Literal["adapter", "dense", "model"] = Field("adapter", description="a PEFT folder, ΔW, or a whole model")
    save_merged: bool = Field(True, description="false: evaluate alone, and write no weights")
    profile: Literal["peft", "portable"] = "peft"
    calibration_batches: int = Field(8, ge=1, description="of each task's training data, for methods that need inputs")
    eval_tasks: list[str] = Field([], description="adapters whose tasks the merge is evaluated on, or all")
    split: SplitName = "test"
    eval_subset: EvalSubsetConfig | None = None
    eval_batch_size: int = Field(64, ge=1)
    runs_dir: str = Field("runs", description="where names of runs and tasks are looked up")
    artifacts_dir: str = Field("artifacts", description="where merges go that are given no output_dir")
    output_dir: str | None = Field(None, description="None: artifacts/merged/<method>/<tasks>/runs/run-<time>-<random>")
    num_workers: int | None = Field(None, ge=1, description="modules at a time; None: one for each core")
    force: bool = Field(False, description="merge adapters of different base models")
    seed: int = 0
    device: str = "auto"

    @model_validator(mode="before")
    @classmethod
    def _older_keys(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        tree = migrated(tree)
        if "search" in tree and "search" not in cls.model_fields:
            raise ValueError("search chooses parameters, which is what `lorica sweep` does: run that, or drop search")
        return tree

    @model_validator(mode="after")
    def _one_source_of_coefficients(self) -> MergeConfig:
        if self.optimizer is None:
            return self
        learns = f"optimizer={self.optimizer.name} learns the coefficients of weighted_delta_n"
        if self.method.lower().replace("-", "_") not in (type(self).model_fields["method"].default, "weighted_delta_n"):
            raise ValueError(f"{learns}, and method={self.method} has none: drop one of the two")
        if self.method_params:
            raise ValueError(f"{learns}, and method_params would set {next(iter(self.method_params))}: drop it")
        return self

    @model_validator(mode="after")
    def _one_lambda(self) -> MergeConfig:
        policy = self.lambda_policy
        if policy is not None and policy.type != "per_adapter" and "lambda" in self.method_params:
            raise ValueError(
                f"method_params.lambda={self.method_params['lambda']} and lambda_policy both set lambda: drop one"
            )
        return self

    @model_validator(mode="after")
    def _no_negative_coefficient(self) -> MergeConfig:
        if not self.constraint_nonnegative or "search" in type(self).model_fields:  # there it judges a point's scores
            return self
        if self.lambda_policy is None and self.optimizer is None:
            raise ValueError(
                "constraint_nonnegative=true is about coefficients that an optimizer learns or a lambda_policy gives, "
                "and this merge has neither: drop it"
            )
        negative = self.lambda_policy.negative() if self.lambda_policy else None
        if negative is not None:
            raise ValueError(
                f"{negative} is below 0, and constraint_nonnegative=true forbids that: drop one of the two"
            )
        return self

    @model_validator(mode="after")
    def _one_size(self) -> MergeConfig:
        sizes = [key for key in ("rank", "energy", "rank_budget") if getattr(self, key) is not None]
        if len(sizes) > 1:
            raise ValueError(f"{' and '.join(sizes)} are both given: a merge is compressed in one way, drop one")
        if sizes and self.save != "adapter":
            raise ValueError(f"{sizes[0]} compresses an adapter, and save={self.save} writes none: drop one of the two")
        return self


class ParameterConfig(Section):
    """What a search may choose a parameter from: a range, or choices."""

    type: Literal["float", "int", "log", "categorical"] = "float"
    min: float | None = Field(None, description="of the other types")
    max: float | None = Field(None, description="of the other types")
    choices: list[Any] = Field([], description="of type=categorical")


class SearchConfig(Section):
    """Which points a sweep tries.

    Parameters are the method's options, or weights.ADAPTER, lambda_policy.KEY, optimizer.KEY.
    """

    type: Literal["grid", "bayes"] = "grid"
    grid: dict[str, list[Any]] = Field({}, description="parameter -> values; every combination is tried")
    budget: int = Field(20, ge=1, description="trials of type=bayes")
    init_points: int = Field(6, ge=1, description="of these trials so many are random, and come first")
    seed: int = 42
    acquisition: Literal["single", "composite"] = Field(
        "single", description="of bayes: model the minimum, or each task's value, which composite takes the minimum of"
    )
    space: dict[str, ParameterConfig] = Field({}, description="parameter -> {type, min, max} or {type, choices}")
    warm_start_sweeps: list[str] = Field([], description="earlier sweeps that bayes learns from: files, folders, globs")
    warm_start_max_points: int | None = Field(None, ge=1, description="None: all that fit; else the best so many")

    @model_validator(mode="after")
    def _something_to_try(self) -> SearchConfig:
        needed = {"grid": "grid", "bayes": "space"}[self.type]
        if not getattr(self, needed):
            raise ValueError(f"search.type={self.type} needs search.{needed}")
        if self.type == "grid" and self.acquisition != "single":
            raise ValueError("search.acquisition=composite is of search.type=bayes: drop one of the two")
        return self


class SweepConfig(MergeConfig):
    """Everything `lorica sweep` takes."""

    search: SearchConfig | None = None
    eval_tasks: list[str] = Field(["all"], min_length=1, description="adapters whose tasks decide, or all")
    split: SplitName = Field("dev", description="of which the points are judged")
    allow_test_selection: bool = Field(False, description="judge the points on split=test all the same")
    constraint_nonnegative: bool = Field(False, description="a point below the base model on any task is infeasible")
    final_split: SplitName | None = Field(
        "test", description="on which the winner alone is evaluated, once, at the end"
    )
    output_dir: str | None = Field(None, description="None: artifacts/sweeps/<method>/<tasks>/sweep-<time>")
    resume: str | None = Field(None, description="a sweep's folder: go on with its own config, or join those who do")
    workers: int = Field(1, ge=1, description="processes of this call that share the trials; more may join by resume")

    @model_validator(mode="after")
    def _honest(self) -> SweepConfig:
        if self.search is None and self.resume is None:
            raise ValueError("a sweep needs search.grid, or search.type=bayes with search.space")
        if self.split == "test" and not self.allow_test_selection:
            raise ValueError(
                "split=test would choose parameters by the examples that judge the result: take split=dev, or say "
                "allow_test_selection=true"
            )
        return self


def migrated(tree: dict[str, Any]) -> dict[str, Any]:
    """A merge's config with the flat keys of older ones moved to where they belong, each with a DeprecationWarning.

    What stands there already wins, as a word on the command line does. Raises ValueError for older keys that contradict
    each other, and for a section that is none.
    """
    tree = dict(tree)
    for old, new in OLDER.items():
        if old in tree:
            warn_of_older(f"the top-level key {old}", new)
    if "params" in tree or "lambda" in tree:
        tree["method_params"] = {**_older_options(tree), **_mapping(tree, "method_params")}
    if "grid" in tree:
        grid = _mapping(tree, "grid")
        tree["search"] = {"type": "grid", "grid": grid, **_mapping(tree, "search")}
        del tree["grid"]
    return tree


def _older_options(tree: dict[str, Any]) -> dict[str, Any]:
    """What `params` and `lambda` say of the method, taken out of the tree."""
    options = _mapping(tree, "params")
    tree.pop("params", None)
    if "lambda" not in tree:
        return options
    value = tree.pop("lambda")
    if options.get("lambda", value) != value:
        raise ValueError(
            f"lambda={value} and params.lambda={options['lambda']} contradict each other: both set "
            "method_params.lambda, drop one"
        )
    return {**options, "lambda": value}


def _mapping(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """A section of keys and values; one that was left empty has none."""
    section = tree.get(key)
    if section is not None and not isinstance(section, dict):
        raise ValueError(f"{key}={section!r}: give keys and values under it")
    return dict(section or {})
