"""What may be set: one section for each part of a run, every key typed, bounded and checked against the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

import lorica.config.contradictions as contradictions
import lorica.config.defaults as defaults
from lorica.config.contradictions import LOW_RANK, refuse_set
from lorica.config.flags import Flag


class Section(BaseModel):
    """A part of the schema: unknown keys are errors, values do not change after they were checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    also: ClassVar[type[Section] | None] = None  # whose keys may be given beside its own
    flags: ClassVar[Mapping[str, Flag]] = {}  # older tools' flags that mean something else here


class ModelConfig(Section):
    name: str = Field("demo", description="local folder or hub name of a transformers checkpoint, or `demo`")
    kind: Literal["auto", "causal", "seq2seq", "classification"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "int8"] = "none"
    revision: str | None = None
    trust_remote_code: bool = False
    attention: Literal["eager", "sdpa"] | None = Field(None, description="attention kernel; None: transformers chooses")


class TaskConfig(Section):
    name: str | None = Field(None, description="a catalog task, `hub:OWNER/NAME[:CONFIG]`, or `file:TRAIN_FILE`")
    path: str | None = Field(None, description="local folder with train/dev/test.jsonl and meta.json")
    kind: Literal["auto", "choice", "classification", "generation"] = "auto"
    files: dict[Literal["train", "dev", "test"], str] = Field({}, description="further files of a `file:` task")
    columns: dict[str, str] = Field({}, description="field of the template -> column of the data")
    label_column: str = "label"
    labels: list[str] | None = Field(None, description="label names, in the order of the data's label numbers")
    prompt: str | None = Field(None, description="name of one of the task's prompts")
    template: str | None = Field(None, description="own prompt, with {field} places; the option's word follows it")
    verbalizer: dict[str, str] | None = Field(None, description="label -> the word that stands for it")
    sfc: bool = Field(False, description="surface-form calibration: score what the prompt adds to each option")
    num_train: int | None = Field(None, ge=0, description="under trainer=none, so many demonstrations; None: none")
    demonstrations: Literal["one_set", "per_example"] = Field(
        "one_set", description="under trainer=none: the same for all, or drawn anew for each example"
    )
    num_dev: int | None = Field(None, ge=1)
    num_eval: int | None = Field(None, ge=1)
    stratified: bool = False
    train_set_seed: int = 0
    max_length: int = Field(512, ge=8, description="tokens; longer prompts lose the start of their passage alone")


class AdapterConfig(Section):
    kind: Literal["lora", "xgblora", "full", "prefix", "linear_probe"] = Field(
        "lora", description="xgblora: boosting, see boosting.*; full: no adapter; prefix: see prefix.*"
    )
    rank: int | None = Field(None, ge=1, description="None: 8, or 1 under xgblora")
    alpha: float | None = Field(
        None, gt=0, description="scale = alpha / rank; None: 2 · rank, or rank under xgblora by backprop"
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = Field("standard", description="standard | extended | all-linear | names | a regex")
    init: Literal["auto", "kaiming", "gaussian", "orthogonal", "activations", "discriminant"] = Field(
        "auto",
        description="of A; auto: kaiming, or where trainer=zo trains B alone what a first look at the task shows",
    )
    init_std: float | None = Field(None, gt=0, description="standard deviation of init=gaussian")
    profile: Literal["peft", "portable"] = Field("peft", description="how the adapter folder is written")

    @model_validator(mode="after")
    def _gaussian_states_its_std(self) -> AdapterConfig:
        if (self.init == "gaussian") != (self.init_std is not None):
            raise ValueError("adapter.init=gaussian and adapter.init_std=STD go together: give both or neither")
        return self

    @model_validator(mode="after")
    def _low_rank_keys_are_used(self) -> AdapterConfig:
        if self.kind not in LOW_RANK:
            refuse_set(self, "adapter", f"adapter.kind={self.kind} has no low-rank factors: drop it", allowed={"kind"})
        return self


class PrefixConfig(Section):
    """How adapter.kind=prefix tunes keys and values that stand before every prompt."""

    num_tokens: int = Field(5, ge=1, description="trained pairs of key and value before the prompt, in every layer")
    reparameterize: bool | None = Field(
        None, description="train a small network that makes them; None: true by backprop, false under zo"
    )
    init: Literal["real_activations", "random"] = Field(
        "real_activations", description="keys and values of random tokens of the vocabulary, or N(0, 0.02²)"
    )


class BoostingConfig(Section):
    """How adapter.kind=xgblora boosts. The one rule in force: steps if given, else adaptive if on, else epochs.

    Where none is given, a run with a warm start has eight rounds of equal length; where no rank is, the first of its
    boosters, which holds the warm start, is as large as a LoRA.
    """

    steps_per_iteration: int | None = Field(None, ge=1, description="a round is so many optimizer steps")
    use_adaptive_merge: bool = Field(False, description="a round ends when the smoothed loss stops improving")
    merge_frequency: int | None = Field(None, ge=1, description="a round is so many epochs; None: 1")
    patience: int = Field(100, ge=0, description="steps without an improvement; 0: only the run's end ends a round")
    ema_beta: float = Field(0.9, ge=0, lt=1, description="smoothing of the raw loss; 0: none")
    improvement_threshold: float = Field(0.01, ge=0)
    best_scope: Literal["round", "run"] = "round"
    roll_back_on_patience_alone: bool = False
    judge: Literal["none", "probe"] = Field("none", description="probe: lay on only what improves a held-out batch")
    probe_size: int = Field(64, ge=8, description="examples cut off the training data for the probe")
    probe_k: float = Field(1.0, ge=0, description="standard errors by which the probe must improve")
    shrinkage: float = Field(1.0, gt=0, le=1)
    ranks: list[int] | None = Field(
        None, description="rank of each round; the last one goes on. None: adapter.rank; behind a warm start [8, 1]"
    )
    train_factors: Literal["both", "B"] = "both"
    layer_fraction: float = Field(1.0, gt=0, le=1, description="share of the modules, drawn anew each round")
    orthogonal: bool = Field(False, description="draw A orthogonal to the boosters so far")
    rewarm: bool = Field(False, description="run the learning rate's schedule anew in each round")
    ensemble: bool = Field(False, description="run the boosters beside the weights instead of fusing them")


class ZerothOrderConfig(Section):
    """How trainer=zo estimates gradients from forward passes alone."""

    estimator: Literal["spsa", "one_sided", "forward_gradient"] | None = Field(
        None,
        description="two probes a direction; one, against the mean of the others; the exact slope. "
        "None: one_sided where B alone is trained, else spsa",
    )
    epsilon: float = Field(1e-3, gt=0, description="how far a probe goes along its direction")
    num_directions: int | None = Field(
        None,
        ge=1,
        description="directions a step; the gradient is the mean of slope times direction. None: 1, one_sided 8",
    )
    distribution: Literal["gaussian", "rademacher"] | None = Field(
        None, description="None: gaussian, or rademacher under adapter.kind=full, where the draws are the cost"
    )
    train: Literal["auto", "both", "B"] = Field(
        "auto", description="factors that are trained; auto: B, since probing A says nothing while B is zero"
    )
    space: Literal["parameter", "update"] = Field(
        "parameter", description="units of epsilon and learning_rate; update: those of the weights' change"
    )
    normalize: Literal["none", "std", "rms"] = Field(
        "none", description="divide slopes by the spread of the step's losses, or by their running root mean square"
    )
    clip: float | None = Field(None, gt=0, description="cut a slope at so many medians of the last slopes' magnitudes")
    objective: Literal["loss", "accuracy", "macro_f1"] = Field(
        "loss", description="what is trained for; no gradient needed"
    )
    warm_start_steps: int | None = Field(
        None,
        ge=0,
        description="batches that the last block is fitted to first, by gradients that end there. None: 200, and at "
        "most a tenth of the run's forward passes; 0 with an adapter.init of your own, zo.train=both or a metric",
    )
    branches: Literal["auto", "timed"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="probes that one forward pass takes; auto: by their tokens; timed: what is fastest here"
    )


class TrackingConfig(Section):
    """What the trackers are told of where a run belongs."""

    project: str = Field("lorica", min_length=1)
    name: str | None = Field(None, min_length=1, description="None: the run folder's")
    online: bool = Field(False, description="send it to the tracker's server; false: nothing leaves this machine")


def one_or_more(value: Any) -> Any:
    """`trackers: wandb` is short for `trackers: [wandb]`."""
    return [value] if isinstance(value, str) else value


def name_alone(value: Any) -> Any:
    """`task: sst2` is short for `task: {name: sst2}`, and so for every section with a name."""
    return {"name": value} if isinstance(value, str) else value


Model = Annotated[ModelConfig, BeforeValidator(name_alone)]
Task = Annotated[TaskConfig, BeforeValidator(name_alone)]


class TrainConfig(Section):
    """Everything `lorica train` takes."""

    model: Model = ModelConfig()
    task: Task = TaskConfig()
    adapter: AdapterConfig = AdapterConfig()
    boosting: BoostingConfig = BoostingConfig()
    prefix: PrefixConfig = PrefixConfig()
    trainer: Literal["backprop", "zo", "none"] = Field(
        "backprop", description="zo: by forward passes, see the keys zo.*; none: the base as it is, in context"
    )
    zo: ZerothOrderConfig = ZerothOrderConfig()
    train_as: Literal["auto", "classification", "lm"] = Field(
        "auto", description="cross-entropy over the options, or the right answer's words; auto: as the task's users do"
    )
    optimizer: Literal["adamw", "sgd", "momentum"] | None = Field(None, description="None: adamw, or sgd under zo")
    learning_rate: float | None = Field(
        None,
        ge=0,
        description="None: 1e-3; under zo 3e-4 after a warm start (boosted 6e-4), 1e-4 two-sided; full 5e-5, zo 1e-6",
    )
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(None, gt=0, description="clip the gradient to this norm; None: no clipping")
    schedule: Literal["constant", "linear", "cosine"] | None = Field(
        None, description="None: linear; constant under zo or max_seconds"
    )
    warmup: float = Field(0.0, ge=0, description="below 1 a fraction of the steps, from 1 on a number of steps")
    batch_size: int = Field(16, ge=1)
    eval_batch_size: int = Field(64, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=0)
    num_epochs: float | None = Field(None, gt=0)
    max_seconds: float | None = Field(
        None, gt=0, description="stop at the first step past so many seconds of training, wherever that is"
    )
    bucketing: bool = Field(True, description="draw batches of similar lengths: less padding")
    stratified: bool | None = Field(
        None, description="let every batch hold each class by its share: less noise; None: by zeroth order"
    )
    base_dropout: bool = Field(False, description="keep the frozen base's own dropout on while training")
    compile: bool = Field(
        False, description="train with the model's blocks compiled: a wait at the start, then what the machine gains"
    )
    eval_steps: int | None = Field(None, ge=1, description="evaluate on dev every so many steps")
    eval_split: Literal["dev", "test"] = "test"
    logging_steps: int = Field(10, ge=1, description="how often a line is printed where there is no progress bar")
    trackers: Annotated[list[str], BeforeValidator(one_or_more)] = Field(
        [], description="who is told beside the run folder: tensorboard, trackio, wandb"
    )
    tracking: TrackingConfig = TrackingConfig()
    save_steps: int | None = Field(500, ge=1, description="a checkpoint every so many steps; null: none")
    seed: int = 0
    device: str = "auto"
    output_dir: str | None = None
    resume: str | None = Field(None, description="a run folder: go on from its newest checkpoint, with its config")
    force: bool = Field(False, description="resume although config, model or data have changed")

    @model_validator(mode="before")
    @classmethod
    def _spsa_is_an_estimator(cls, tree: Any) -> Any:
        """`trainer: spsa` is short for `trainer: zo, zo.estimator: spsa`."""
        if not isinstance(tree, dict) or tree.get("trainer") != "spsa":
            return tree
        zo = tree.get("zo") or {}
        if not isinstance(zo, dict):
            return {**tree, "trainer": "zo"}
        estimator = zo.get("estimator", "spsa")
        if estimator != "spsa":
            raise ValueError(f"trainer=spsa and zo.estimator={estimator} contradict each other: use trainer=zo")
        return {**tree, "trainer": "zo", "zo": {**zo, "estimator": "spsa"}}

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.max_steps is not None and self.num_epochs is not None:
            raise ValueError("max_steps and num_epochs are both given: a run has one length, drop one of them")
        if self.max_seconds is None or self.max_steps is not None or self.num_epochs is not None:
            return self
        if self.schedule in ("linear", "cosine") or 0 < self.warmup < 1:
            key = f"warmup={self.warmup:g}" if 0 < self.warmup < 1 else f"schedule={self.schedule}"
            raise ValueError(f"{key} is laid over a run's steps, whose number max_seconds leaves open: give max_steps")
        return self

    @model_validator(mode="after")
    def _boosting_is_used(self) -> TrainConfig:
        if self.adapter.kind == "lora":
            reason = "adapter.kind=lora does not boost: add adapter.kind=xgblora (--xgblora), or drop it"
            refuse_set(self.boosting, "boosting", reason)
        elif self.adapter.kind != "xgblora":
            reason = f"boosters are updates of weights, and adapter.kind={self.adapter.kind} has none to lay on"
            refuse_set(self.boosting, "boosting", reason)
        return self

    @model_validator(mode="after")
    def _prefix_is_used(self) -> TrainConfig:
        if self.adapter.kind != "prefix":
            reason = f"adapter.kind={self.adapter.kind} has no prefix: add adapter.kind=prefix (--prefix_tuning)"
            refuse_set(self.prefix, "prefix", reason)
        return self

    @model_validator(mode="after")
    def _kind_fits(self) -> TrainConfig:
        mistakes = contradictions.of_kind(self)
        if mistakes:
            raise ValueError(mistakes[0])
        return self

    @model_validator(mode="after")
    def _zeroth_order_is_used(self) -> TrainConfig:
        if self.trainer != "zo":
            refuse_set(self.zo, "zo", f"trainer={self.trainer} takes no probes: add trainer=zo, or drop it")
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> TrainConfig:
        mistakes = contradictions.of_no_trainer(self)
        if mistakes:
            raise ValueError(mistakes[0])
        return self

    @model_validator(mode="after")
    def _zeroth_order_fits(self) -> TrainConfig:
        mistakes = contradictions.of_zeroth_order(self) if self.trainer == "zo" else []
        if mistakes:
            raise ValueError(mistakes[0])
        return self

    @model_validator(mode="after")
    def _tracking_is_used(self) -> TrainConfig:
        if not self.trackers:
            refuse_set(self.tracking, "tracking", "there is nobody to tell: add trackers=NAME, or drop it")
        return self

    @model_validator(mode="after")
    def _compiles(self) -> TrainConfig:
        mistakes = contradictions.of_compiling(self) if self.compile else []
        if mistakes:
            raise ValueError(mistakes[0])
        return self

    @property
    def num_prefix(self) -> int:
        """How many of the model's positions a prefix takes."""
        return self.prefix.num_tokens if self.adapter.kind == "prefix" else 0

    def resolved(self) -> TrainConfig:
        """The same config with every default that depends on another key filled in."""
        return self.model_copy(update=defaults.of_run(self))

    def warm_starts(self) -> bool:
        """Whether a run begins with its last block fitted."""
        return defaults.warm_starts(self)
