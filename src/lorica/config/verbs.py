"""What the verbs take that neither train nor merge."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from lorica.config.schema import AdapterConfig, Model, ModelConfig, PrefixConfig, Section, TaskConfig, name_alone


class EvaluateConfig(Section):
    """Everything `lorica evaluate` takes: one target on one task, or a matrix of several."""

    targets: list[str] = Field([], description="runs, adapters, merges or models; `base` is the base model alone")
    tasks: list[str] = Field([], description="by name; none: the runs' own. task.path may hold {task}, for the name")
    model: Annotated[ModelConfig | None, BeforeValidator(name_alone)] = None
    task: Annotated[TaskConfig | None, BeforeValidator(name_alone)] = None
    split: Literal["train", "dev", "test"] | None = Field(None, description="None: the run's own eval_split, or test")
    eval_batch_size: int | None = Field(None, ge=1, description="None: the run's own, or 64")
    branches: int = Field(4, ge=1, description="of a matrix: adapters in one pass; 1: one after the other")
    output_dir: str | None = Field(None, description="of a matrix; None: artifacts/evaluations/matrix-<time>")
    artifacts_dir: str = Field("artifacts", description="where a matrix goes that is given no output_dir")
    resume: str | None = Field(None, description="a matrix's folder: go on behind its finished cells")
    device: str = "auto"

    @property
    def is_matrix(self) -> bool:
        return self.resume is not None or len(self.targets) > 1 or bool(self.tasks)

    @model_validator(mode="after")
    def _named_once(self) -> EvaluateConfig:
        if self.task is None or not self.tasks:
            return self
        if self.task.name is not None:
            raise ValueError(f"--tasks and task.name={self.task.name} both name tasks: drop one of them")
        if self.task.path is not None and "{task}" not in self.task.path:
            raise ValueError(
                f"task.path={self.task.path} is one folder, and --tasks names tasks: write task.path=FOLDER/{{task}}"
            )
        return self

    @model_validator(mode="after")
    def _matrix_keys_are_used(self) -> EvaluateConfig:
        if not self.is_matrix:
            for key in ("branches", "output_dir", "artifacts_dir"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} is of a matrix: name several targets, or --tasks, or drop it")
        return self


class InspectConfig(Section):
    """Everything `lorica inspect` takes beside the adapters."""

    model: Annotated[ModelConfig | None, BeforeValidator(name_alone)] = Field(
        None, description="whose share is told; None: the run's, or the one that the adapter names"
    )
    runs_dir: str = Field("runs", description="where names of runs and tasks are looked up")
    energy_at: int = Field(4, ge=1, description="directions, of whose share of the energy the tables tell")
    all: bool = Field(False, description="a row for every module, however many there are, and what its factors hold")
    representations: bool = Field(False, description="of one run: how far its stages have moved the hidden states")
    num_examples: int = Field(128, ge=2, description="dev examples of which hidden states are taken")
    device: str = "auto"
    output_dir: str | None = Field(None, description="a folder for the figures and hidden states; None: printed alone")


class VerifyConfig(Section):
    """Everything `lorica verify` takes beside the run or adapter."""

    model: Annotated[ModelConfig | None, BeforeValidator(name_alone)] = Field(
        None, description="the base; None: the run's, or the one that the adapter names"
    )
    max_trainable_share: float = Field(0.003, gt=0, description="of the base's parameters, heads not counted")
    speed: bool = Field(False, description="time the adapter live against fused")
    seed: int = Field(0, description="of tokens and labels that are drawn, and of a head that an adapter does not have")
    output_dir: str | None = Field(None, description="a folder for verification.json; None: a run's own")
    device: str = "auto"


class PlanConfig(Section):
    """Everything `lorica plan` takes."""

    model: Model = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    prefix: PrefixConfig = PrefixConfig()
    batch_size: int = Field(16, ge=1)
    length: int = Field(128, ge=1, description="tokens in a row")
    optimizer: Literal["adamw", "sgd", "momentum"] = "adamw"


class ExportConfig(Section):
    """Everything `lorica export` takes beside the run."""

    output_dir: str
    rounds: int | None = Field(None, ge=1, description="the first so many boosters alone")
    drop: list[int] = Field([], description="rounds to leave out")
    rank: int | None = Field(None, ge=1, description="compress to this rank")
    energy: float | None = Field(None, gt=0, le=1, description="compress to the least rank that keeps this share")
    profile: Literal["peft", "portable"] = "peft"
    fuse: bool = Field(False, description="write a whole model with the adapter fused into its weights")


class ReplayConfig(Section):
    """Everything `lorica replay` takes beside the run."""

    output_dir: str | None = Field(None, description="a folder for what was rebuilt; None: it is compared alone")
    device: str | None = Field(None, description="None: the run's own")


class ReportConfig(Section):
    """Everything `lorica report` takes beside the folders."""

    output_dir: str | None = Field(None, description="None: report/ in the one folder, or a new one")
    artifacts_dir: str = Field("artifacts", description="where a report on several folders goes without an output_dir")
    title: str | None = Field(None, description="above the page; None: its first finding")


class DemoConfig(Section):
    """Everything `lorica demo` takes."""

    output_dir: str | None = Field(None, description="None: a new folder under runs/")
    steps: int = Field(150, ge=1, description="steps by backprop, for each task")
    comparison_steps: int = Field(150, ge=1, description="steps of each of the four ways that are compared")
    learning_rate: float = Field(1e-2, gt=0)
    zo_learning_rate: float = Field(0.1, gt=0, description="by zeroth order; twice this for boosters of rank 1")
    seed: int = 0
