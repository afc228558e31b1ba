"""A base model and a task, each loaded as the other needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from lorica import files, models
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.peft_format import Profile
from lorica.config import ModelConfig, TaskConfig
from lorica.errors import ConfigError
from lorica.evaluation.evaluate import Evaluation, evaluate
from lorica.evaluation.scoring import Collate
from lorica.models import Base, Kind
from lorica.tasks import base as tasks
from lorica.tasks.base import Split, Task, TrainAs
from lorica.tasks.batching import collate
from lorica.tasks.prompting import Encoded, encode
from lorica.tasks.sources import load_task


@dataclass(frozen=True)
class Ready:
    """A base model and a task that fit each other, and the device they are used on."""

    base: Base
    task: Task
    device: str
    max_length: int

    @property
    def is_encoder_decoder(self) -> bool:
        return self.base.kind == "seq2seq"

    def encoded(self, examples: Sequence[tasks.Example]) -> list[Encoded]:
        """The examples as tokens, at most as long as the model can read."""
        return encode(
            self.task,
            examples,
            self.base.tokenizer,
            max_length=self.max_length,
            is_encoder_decoder=self.is_encoder_decoder,
        )

    def write(self, adapter: Adapter, folder: Path, *, profile: Profile, dropout: float) -> None:
        """The adapter as a PEFT folder for this base."""
        write_adapter(self.base, adapter, folder, profile=profile, dropout=dropout)

    def write_model(self, folder: Path) -> None:
        """The base model with its tokenizer, as it stands, as a transformers checkpoint."""
        with files.staged_folder(folder) as staging, models.quiet():
            self.base.model.save_pretrained(staging)
            self.base.tokenizer.save_pretrained(staging)

    def evaluated(self, split: Split, rows: Sequence[Encoded], batch_size: int) -> Evaluation:
        """What the model, as it stands, makes of encoded examples of a split."""
        return evaluate(
            self.base.model,
            self.task,
            split,
            rows,
            self.collate(),
            batch_size=batch_size,
            tokenizer=self.base.tokenizer,
        )

    def collate(self, *, gold_only: bool = False) -> Collate:
        """The function that makes a batch of encoded rows."""
        return partial(
            collate,
            pad_token_id=self.base.tokenizer.pad_token_id,
            device=self.device,
            gold_only=gold_only,
            max_length=self.max_length,
            decoder_start_token_id=self.base.model.config.decoder_start_token_id if self.is_encoder_decoder else None,
        )


def write_adapter(base: Base, adapter: Adapter, folder: Path, *, profile: Profile, dropout: float = 0.0) -> None:
    """An adapter for a base model as a PEFT folder."""
    peft_format.write(
        adapter,
        folder,
        profile=profile,
        layout=injection.linear_modules(base.model),
        task_type=models.TASK_TYPES[base.kind],
        dropout=dropout,
        fan_in_fan_out=models.is_transposed(base, adapter.updates),
    )


def prepare(model: ModelConfig, task: TaskConfig, device: str, seed: int, num_prefix: int = 0) -> Ready:
    """Load the task and the base model, each as the other needs it; the task first: it is the cheaper to get wrong.

    Inputs leave `num_prefix` of the model's positions free.
    """
    on = models.choose_device(device)
    kind, asked = loaded_task(model, task)
    return ready(load_base(model, kind, on, seed, len(asked.labels)), asked, task, on, num_prefix)


def loaded_task(model: ModelConfig, task: TaskConfig) -> tuple[Kind, Task]:
    """The task, and what kind the model must be of."""
    kind, task_kind = kinds(model, task)
    return kind, task_of(task, task_kind)


def task_of(task: TaskConfig, kind: tasks.Kind) -> Task:
    """The task that a config names, asked by a prompt (`choice`) or by a head."""
    loaded = load_task(
        task.name,
        kind=kind,
        path=task.path,
        more_files=task.files,
        columns=task.columns,
        label_column=task.label_column,
        labels=task.labels,
        prompt=task.prompt,
        template=task.template,
        verbalizer=task.verbalizer,
        sfc=task.sfc,
        num_dev=task.num_dev,
        num_eval=task.num_eval,
        seed=task.train_set_seed,
    )
    if task.kind not in ("auto", loaded.kind):
        raise ConfigError(f"task.kind={task.kind}, and {loaded.name} is a task of {loaded.kind}: drop task.kind")
    return loaded


def train_as_of(asked: Literal["auto", "classification", "lm"], objective: str, task: Task) -> TrainAs:
    """The loss that a task is trained by: as asked for, else the task's own; a metric compares all options.

    Raises ConfigError for a task that does not have it.
    """
    if task.kind == "generation" and (asked == "classification" or objective != "loss"):
        wanted = "train_as=classification" if objective == "loss" else f"zo.objective={objective}"
        raise ConfigError(f"{wanted} compares options, and {task.name}, whose answers are written, has none: drop it")
    if task.kind == "classification" and asked == "lm":
        raise ConfigError(f"train_as=lm trains the words of an answer, and {task.name} goes by a head: drop it")
    if asked != "auto":
        return asked
    return "classification" if task.kind == "classification" or objective != "loss" else task.train_as


def load_base(model: ModelConfig, kind: Kind, device: str, seed: int, num_labels: int | None = None) -> Base:
    """The base model that a config names, as `models.load` has it."""
    return models.load(
        model.name,
        kind=kind,
        num_labels=num_labels,
        dtype=model.dtype,
        device=device,
        quantization=model.quantization,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        attention=model.attention,
        seed=seed,
    )


def ready(base: Base, task: Task, cfg: TaskConfig, device: str, num_prefix: int = 0) -> Ready:
    """The two together; inputs are as long as the config and the model allow beside a prefix."""
    return Ready(base, task, device, min(cfg.max_length, models.longest_input(base) - num_prefix))


def chosen(task: Task, split: Split, cfg: TaskConfig) -> list[tasks.Example]:
    """The split's examples, or the seeded subset that the config asks for: all of them if there are fewer."""
    return tasks.subset(task, split, asked_size(split, cfg), seed=cfg.train_set_seed, stratified=cfg.stratified)


def asked_size(split: Split, cfg: TaskConfig) -> int | None:
    """How many of a split's examples are wanted at most."""
    return {"train": cfg.num_train, "dev": cfg.num_dev, "test": cfg.num_eval}[split]


def kinds(model: ModelConfig, task: TaskConfig) -> tuple[Kind, tasks.Kind]:
    """The model's and the task's kind: what is not said follows from what is, or from the checkpoint's family."""
    natural = models.natural_kind(models.read_config(model.name, model.revision, model.trust_remote_code))
    if model.kind != "auto":
        kind: Kind = model.kind
    elif task.kind == "classification":
        kind = "classification"
    else:
        kind = natural
    task_kind: tasks.Kind = "classification" if kind == "classification" else "choice"
    if task.kind != "auto" and (task.kind == "classification") != (task_kind == "classification"):
        raise ConfigError(
            f"task.kind={task.kind} and the model do not fit: {model.name} is used as a {kind} model, which needs "
            f"task.kind={task_kind}"
        )
    return kind, task_kind
