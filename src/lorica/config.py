"""One schema for every verb, filled from YAML files, `key=value` words and flags. Imports no torch.

`read(TrainConfig, ["run.yaml", "learning_rate=1e-4", "--lora_r", "8"])` gives a checked, frozen config. Words win over
YAML; two words that set one key to different values contradict each other and are an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lorica import files, plugins
from lorica.errors import ConfigError, MissingPathError, UnknownNameError

CONFIG_LIMIT_BYTES = 1 << 20


class Section(BaseModel):
    """A part of the schema: unknown keys are errors, values do not change after they were checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    kind: Literal["auto", "choice", "classification"] = "auto"
    files: dict[Literal["train", "dev", "test"], str] = Field({}, description="further files of a `file:` task")
    columns: dict[str, str] = Field({}, description="field of the template -> column of the data")
    label_column: str = "label"
    labels: list[str] | None = Field(None, description="label names, in the order of the data's label numbers")
    prompt: str | None = Field(None, description="name of one of the task's prompts")
    template: str | None = Field(None, description="own prompt, with {field} places; the option's word follows it")
    verbalizer: dict[str, str] | None = Field(None, description="label -> the word that stands for it")
    num_train: int | None = Field(None, ge=1)
    num_dev: int | None = Field(None, ge=1)
    num_eval: int | None = Field(None, ge=1)
    stratified: bool = False
    train_set_seed: int = 0
    max_length: int = Field(512, ge=8, description="tokens; longer prompts lose their start, never their answer")


class AdapterConfig(Section):
    kind: Literal["lora", "xgblora"] = Field("lora", description="xgblora: boosting, see the keys boosting.*")
    rank: int | None = Field(None, ge=1, description="None: 8, or 1 under xgblora")
    alpha: float | None = Field(None, gt=0, description="scale = alpha / rank; None: 2 · rank, or rank")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = Field("standard", description="standard | extended | all-linear | names | a regex")
    init: Literal["kaiming", "gaussian", "orthogonal", "activations"] = "kaiming"
    init_std: float | None = Field(None, gt=0, description="standard deviation of init=gaussian")
    profile: Literal["peft", "portable"] = Field("peft", description="how the adapter folder is written")

    @model_validator(mode="after")
    def _gaussian_states_its_std(self) -> AdapterConfig:
        if (self.init == "gaussian") != (self.init_std is not None):
            raise ValueError("adapter.init=gaussian and adapter.init_std=STD go together: give both or neither")
        return self


class BoostingConfig(Section):
    """How adapter.kind=xgblora boosts. The one rule in force: steps if given, else adaptive if on, else epochs."""

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
    ranks: list[int] | None = Field(None, description="rank of each round; the last one goes on")
    train_factors: Literal["both", "B"] = "both"
    layer_fraction: float = Field(1.0, gt=0, le=1, description="share of the modules, drawn anew each round")
    orthogonal: bool = Field(False, description="draw A orthogonal to the boosters so far")
    rewarm: bool = Field(False, description="run the learning rate's schedule anew in each round")
    ensemble: bool = Field(False, description="run the boosters beside the weights instead of fusing them")


class ZerothOrderConfig(Section):
    epsilon: float = Field(1e-3, gt=0)
    num_directions: int = Field(1, ge=1)


def _name_alone(value: Any) -> Any:
    """`task: sst2` is short for `task: {name: sst2}`."""
    return {"name": value} if isinstance(value, str) else value


Model = Annotated[ModelConfig, BeforeValidator(_name_alone)]
Task = Annotated[TaskConfig, BeforeValidator(_name_alone)]


class TrainConfig(Section):
    """Everything `lorica train` takes."""

    model: Model = ModelConfig()
    task: Task = TaskConfig()
    adapter: AdapterConfig = AdapterConfig()
    boosting: BoostingConfig = BoostingConfig()
    trainer: Literal["backprop", "spsa"] = "backprop"
    zo: ZerothOrderConfig = ZerothOrderConfig()
    train_as: Literal["auto", "classification", "lm"] = "auto"
    optimizer: Literal["adamw", "sgd", "momentum"] | None = Field(None, description="None: adamw, or sgd under spsa")
    learning_rate: float | None = Field(None, ge=0, description="None: 1e-3, or 1e-4 under spsa")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(None, gt=0, description="clip the gradient to this norm; None: no clipping")
    schedule: Literal["constant", "linear", "cosine"] | None = Field(None, description="None: linear; spsa constant")
    warmup: float = Field(0.0, ge=0, description="below 1 a fraction of the steps, from 1 on a number of steps")
    batch_size: int = Field(16, ge=1)
    eval_batch_size: int = Field(64, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=0)
    num_epochs: float | None = Field(None, gt=0)
    bucketing: bool = Field(True, description="draw batches of similar lengths: less padding")
    base_dropout: bool = Field(False, description="keep the frozen base's own dropout on while training")
    eval_steps: int | None = Field(None, ge=1, description="evaluate on dev every so many steps")
    eval_split: Literal["dev", "test"] = "test"
    logging_steps: int = Field(10, ge=1, description="how often a line is printed where there is no progress bar")
    save_steps: int | None = Field(500, ge=1, description="a checkpoint every so many steps; null: none")
    seed: int = 0
    device: str = "auto"
    output_dir: str | None = None
    resume: str | None = Field(None, description="a run folder: go on from its newest checkpoint, with its config")
    force: bool = Field(False, description="resume although config, model or data have changed")

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.max_steps is not None and self.num_epochs is not None:
            raise ValueError("max_steps and num_epochs are both given: a run has one length, drop one of them")
        return self

    @model_validator(mode="after")
    def _boosting_is_used(self) -> TrainConfig:
        unused = sorted(self.boosting.model_fields_set) if self.adapter.kind != "xgblora" else []
        if unused and self.boosting != BoostingConfig():
            raise ValueError(
                f"boosting.{unused[0]} is set, and adapter.kind={self.adapter.kind} does not boost: "
                "add adapter.kind=xgblora (--xgblora), or drop it"
            )
        return self

    def resolved(self) -> TrainConfig:
        """The same config with every default that depends on another key filled in."""
        zeroth_order, boosted = self.trainer == "spsa", self.adapter.kind == "xgblora"
        rank = self.adapter.rank or (1 if boosted else 8)
        alpha = self.adapter.alpha or (1.0 if boosted else 2.0) * rank
        steps = 1000 if self.max_steps is None and self.num_epochs is None else self.max_steps
        return self.model_copy(
            update={
                "optimizer": self.optimizer or ("sgd" if zeroth_order else "adamw"),
                "schedule": self.schedule or ("constant" if zeroth_order else "linear"),
                "learning_rate": (1e-4 if zeroth_order else 1e-3) if self.learning_rate is None else self.learning_rate,
                "max_steps": steps,
                "adapter": self.adapter.model_copy(update={"rank": rank, "alpha": alpha}),
            }
        )


class EvaluateConfig(Section):
    """Everything `lorica evaluate` takes beside the runs or adapters that it evaluates."""

    model: Annotated[ModelConfig | None, BeforeValidator(_name_alone)] = None
    task: Annotated[TaskConfig | None, BeforeValidator(_name_alone)] = None
    split: Literal["train", "dev", "test"] | None = Field(None, description="None: the run's own eval_split, or test")
    eval_batch_size: int | None = Field(None, ge=1, description="None: the run's own, or 64")
    device: str = "auto"


class PlanConfig(Section):
    """Everything `lorica plan` takes."""

    model: Model = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
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


class DemoConfig(Section):
    """Everything `lorica demo` takes."""

    output_dir: str | None = Field(None, description="None: a new folder under runs/")
    steps: int = Field(150, ge=1, description="steps by backprop, for each task")
    spsa_steps: int = Field(2000, ge=1, description="steps by spsa, on the one task that is trained both ways")
    learning_rate: float = Field(1e-2, gt=0)
    spsa_learning_rate: float = Field(1e-2, gt=0)
    epsilon: float = Field(1e-3, gt=0)
    seed: int = 0


@dataclass(frozen=True)
class Flag:
    """What a flag of the older tools sets: a key, and how its words translate; `constant` for a bare switch."""

    key: str
    words: dict[str, Any] | None = None
    constant: Any = None


FLAGS: dict[str, Flag] = {
    "model_name": Flag("model.name"),
    "task_name": Flag("task.name"),
    "trainer": Flag("trainer", words={"regular": "backprop", "zo": "spsa"}),
    "lora": Flag("adapter.kind", constant="lora"),
    "lora_r": Flag("adapter.rank"),
    "lora_alpha": Flag("adapter.alpha"),
    "lora_dropout": Flag("adapter.dropout"),
    "xgblora": Flag("adapter.kind", constant="xgblora"),
    "xgblora_steps_per_iteration": Flag("boosting.steps_per_iteration"),
    "xgblora_merge_frequency": Flag("boosting.merge_frequency"),
    "xgblora_use_adaptive_merge": Flag("boosting.use_adaptive_merge"),
    "xgblora_patience": Flag("boosting.patience"),
    "xgblora_ema_beta": Flag("boosting.ema_beta"),
    "xgblora_improvement_threshold": Flag("boosting.improvement_threshold"),
    "zo_eps": Flag("zo.epsilon"),
    "zo_num_perturbations": Flag("zo.num_directions"),
    "load_float16": Flag("model.dtype", constant="float16"),
    "load_bfloat16": Flag("model.dtype", constant="bfloat16"),
    "load_int8": Flag("model.quantization", constant="int8"),
    "max_length": Flag("task.max_length"),
    "num_train": Flag("task.num_train"),
    "num_dev": Flag("task.num_dev"),
    "num_eval": Flag("task.num_eval"),
    "train_set_seed": Flag("task.train_set_seed"),
    "train_as_classification": Flag("train_as", constant="classification"),
    "per_device_train_batch_size": Flag("batch_size"),
    "per_device_eval_batch_size": Flag("eval_batch_size"),
    "num_train_epochs": Flag("num_epochs"),
    "lr_scheduler_type": Flag("schedule"),
    "warmup_ratio": Flag("warmup"),
    "warmup_steps": Flag("warmup"),
}

AnyConfig = TypeVar("AnyConfig", bound=Section)


def read(schema: type[AnyConfig], words: Sequence[str]) -> AnyConfig:
    """A checked config from YAML paths, `key=value` words and flags.

    Raises ConfigError (bad value, contradiction), UnknownNameError (unknown key), MissingPathError (no such file).
    """
    tree: dict[str, Any] = {}
    given: dict[str, tuple[str, Any]] = {}
    for source, key, value in _assignments(schema, words):
        if key is None:
            _merge(tree, value)
            continue
        if key in given and given[key][1] != value:
            raise ConfigError(f"{given[key][0]} and {source} contradict each other: both set {key}, drop one")
        given[key] = (source, value)
    for key, (_, value) in given.items():
        _merge(tree, _nested(key, value))
    return check(schema, tree)


def check(schema: type[AnyConfig], tree: Any) -> AnyConfig:
    """`tree` (nested dicts) as a config, its first mistake told in one line that names the key and the value."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise _first_mistake(schema, error) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as nested dicts, by YAML 1.2's rules: `no` is a word, 1e-5 a number, a key given twice an error."""
    with files.open_regular(path, CONFIG_LIMIT_BYTES) as file:
        try:
            tree = yaml.load(file, Loader=_Yaml)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} is not YAML that can be read: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, not keys and values")
    return tree


def dump(config: Section) -> str:
    """The config as YAML that `read` gives back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def keys(schema: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a schema, with its type: sections and leaves."""
    found: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        section = _section_of(field.annotation)
        found[prefix + name] = bool if field.annotation is bool else field.annotation
        if section is not None:
            found |= keys(section, f"{prefix}{name}.")
    return found


def _section_of(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _assignments(schema: type[Section], words: Sequence[str]) -> Iterator[tuple[str, str | None, Any]]:
    """(what the user typed, key, value) for each word; key is None for a YAML file's whole tree."""
    known = keys(schema)
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word.startswith("--"):
            yield _flag(word, queue, known)
        elif re.match(r"[A-Za-z_][\w.]*=", word):
            key, text = word.split("=", 1)
            yield word, _known(key, known), _value(text)
        elif word.endswith((".yaml", ".yml")):
            if not Path(word).is_file():
                raise MissingPathError(f"no config file {word!r}")
            yield word, None, read_yaml(Path(word))
        else:
            raise ConfigError(f"cannot read {word!r}: give FILE.yaml, key=value or --flag VALUE")


def _flag(word: str, queue: list[str], known: dict[str, Any]) -> tuple[str, str, Any]:
    name, has_value, text = word.removeprefix("--").partition("=")
    name = name.replace("-", "_")
    flag = FLAGS.get(name) or (Flag(name) if name in known else None)
    if flag is None or flag.key not in known:
        names = [each for each, flag in FLAGS.items() if flag.key in known]
        raise UnknownNameError(plugins.unknown("flag", f"--{name}", [f"--{each}" for each in (*names, *known)]))
    switch = flag.constant is not None or known[flag.key] is bool
    if not has_value:
        text = _next_value(word, queue, switch)
    if flag.constant is not None:
        if text.lower() != "true":
            raise ConfigError(f"{word} is a switch: it takes no value but true, and was given {text!r}")
        return f"{word}", flag.key, flag.constant
    return f"{word} {text}", flag.key, (flag.words or {}).get(text, _value(text))


def _next_value(word: str, queue: list[str], switch: bool) -> str:
    if switch:
        return queue.pop(0) if queue and queue[0].lower() in ("true", "false") else "true"
    if not queue or queue[0].startswith("--"):
        raise ConfigError(f"{word} needs a value")
    return queue.pop(0)


def _known(key: str, known: dict[str, Any]) -> str:
    """The key, if the schema has it or it names an entry of one of the schema's dicts."""
    parent = key.rpartition(".")[0]
    if key in known or getattr(known.get(parent), "__origin__", None) is dict or "dict[" in str(known.get(parent)):
        return key
    raise UnknownNameError(plugins.unknown("key", key, known))


def _value(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Yaml) if text.strip() else text
    except yaml.YAMLError:
        return text


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _merge(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Lay `other` over `tree`; where one side has a bare name for a section and the other keys, both stay."""
    for key, value in other.items():
        here = tree.get(key)
        if isinstance(here, str) and isinstance(value, dict):
            here = tree[key] = {"name": here}
        if isinstance(here, dict) and isinstance(value, dict):
            _merge(here, value)
        elif isinstance(here, dict) and isinstance(value, str) and key in ("model", "task"):
            here["name"] = value
        else:
            tree[key] = value


def _first_mistake(schema: type[Section], error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
    if first["type"] == "extra_forbidden":
        return UnknownNameError(plugins.unknown("key", key, keys(schema)))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return ConfigError(message)
    return ConfigError(f"{key}={first['input']!r}: {message[0].lower()}{message[1:]}")


class _Yaml(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: PyYAML's own read `no` as False and 1e-5 as text."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)
