"""One function per verb: a config comes in, components are called with plain arguments, a record goes out.

This is the only room that knows both the config and the components.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorica import card, config, files, models, planning, results
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.config import EvaluateConfig, ModelConfig, PlanConfig, TaskConfig, TrainConfig
from lorica.errors import ConfigError, MissingPathError
from lorica.evaluation.evaluate import Evaluation, evaluate
from lorica.evaluation.scoring import Collate
from lorica.models import Base, Kind
from lorica.optim.backprop import Estimator, backprop
from lorica.optim.schedules import multiplier
from lorica.optim.updates import update_rule
from lorica.optim.zeroth_order import Spsa
from lorica.planning import Plan
from lorica.randomness import torch_generator
from lorica.results import RunFolder
from lorica.tasks import base as tasks
from lorica.tasks.base import Split, Task
from lorica.tasks.batching import TrainingStream, collate
from lorica.tasks.objectives import LossModule
from lorica.tasks.prompting import Encoded, encode
from lorica.tasks.sources import load_task
from lorica.training import callbacks
from lorica.training.fit import Step, fit
from lorica.training.trackers import JsonLines


@dataclass(frozen=True)
class Trained:
    """What a training run leaves: its folder and what the evaluation at its end found."""

    run: RunFolder
    evaluation: Evaluation
    seconds: float


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

    def collate(self, *, gold_only: bool = False) -> Collate:
        """The function that makes a batch of encoded rows."""
        return partial(
            collate,
            pad_token_id=self.base.tokenizer.pad_token_id,
            device=self.device,
            gold_only=gold_only,
            decoder_start_token_id=self.base.model.config.decoder_start_token_id if self.is_encoder_decoder else None,
        )


def train(given: TrainConfig, say: Console) -> Trained:
    """Train one adapter, evaluate it, and leave a run folder; `say` takes what a person should read."""
    cfg = given.resolved()
    begin = time.monotonic()
    if cfg.output_dir is not None:
        results.check_free(cfg.output_dir)
    ready = prepare(cfg.model, cfg.task, cfg.device, cfg.seed)
    rows = {split: ready.encoded(chosen(ready.task, split, cfg.task)) for split in _splits_of(cfg)}
    _warn_of_truncation(rows, ready.max_length, say)
    adapter = _new_adapter(cfg, ready.base)
    live = injection.inject(ready.base.model, adapter, cfg.adapter.dropout)
    run = results.new_run(cfg.output_dir, f"{ready.task.name}-{Path(cfg.model.name).name}-{cfg.trainer}")
    files.write_atomic(run.config, config.dump(cfg))
    files.write_json(run.origin, results.origin(cfg.seed, ready.device))
    say.print(_headline(cfg, ready, live, rows), highlight=False)
    steps = _train(cfg, ready, live, rows, run, say)
    trained = injection.extract(live)
    _write_adapter(cfg, ready, trained, run)
    found = evaluate(
        ready.base.model,
        ready.task,
        cfg.eval_split,
        rows[cfg.eval_split],
        ready.collate(),
        batch_size=cfg.eval_batch_size,
    )
    _leave_record(cfg, ready, run, trained, rows, found, steps, time.monotonic() - begin)
    return Trained(run, found, time.monotonic() - begin)


def evaluate_target(target: str | None, given: EvaluateConfig) -> Evaluation:
    """Evaluate a run folder, a PEFT adapter folder, or (target None) the base model alone.

    A run brings its own model and task; an adapter brings its base model, and needs `task`. With a run, the line is
    appended to its `evaluations.jsonl` too.
    """
    model, task, folder, run = _resolve_target(target, given)
    cfg = config.check(TrainConfig, config.read_yaml(run.config)) if run else None
    split = given.split or (cfg.eval_split if cfg else "test")
    ready = prepare(model, task, given.device, cfg.seed if cfg else 0)
    if folder is not None:
        injection.inject(ready.base.model, peft_format.read(folder))
    found = evaluate(
        ready.base.model,
        ready.task,
        split,
        ready.encoded(chosen(ready.task, split, task)),
        ready.collate(),
        batch_size=given.eval_batch_size or (cfg.eval_batch_size if cfg else 64),
    )
    if run:
        line = {**found.as_record(), "model": model.name, "finished": time.time()}
        files.append_record(run.evaluations, line)
    return found


def plan(given: PlanConfig) -> Plan:
    """What training would need, without loading weights."""
    return planning.plan(
        given.model.name,
        dtype=given.model.dtype,
        targets=given.adapter.targets,
        rank=given.adapter.rank,
        optimizer=given.optimizer,
        batch_size=given.batch_size,
        length=given.length,
        kind=None if given.model.kind == "auto" else given.model.kind,
        revision=given.model.revision,
        trust_remote_code=given.model.trust_remote_code,
    )


def prepare(model: ModelConfig, task: TaskConfig, device: str, seed: int) -> Ready:
    """Load the task and the base model, each as the other needs it; the task first: it is the cheaper to get wrong."""
    on = models.choose_device(device)
    kind, task_kind = _kinds(model, task)
    loaded = load_task(
        task.name,
        kind=task_kind,
        path=task.path,
        more_files=task.files,
        columns=task.columns,
        label_column=task.label_column,
        labels=task.labels,
        prompt=task.prompt,
        template=task.template,
        verbalizer=task.verbalizer,
        num_dev=task.num_dev,
        num_eval=task.num_eval,
        seed=task.train_set_seed,
    )
    base = models.load(
        model.name,
        kind=kind,
        num_labels=len(loaded.labels),
        dtype=model.dtype,
        device=on,
        quantization=model.quantization,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        attention=model.attention,
        seed=seed,
    )
    return Ready(base, loaded, on, min(task.max_length, models.longest_input(base)))


def chosen(task: Task, split: Split, cfg: TaskConfig) -> list[tasks.Example]:
    """The split's examples, or the seeded subset that the config asks for."""
    size = {"train": cfg.num_train, "dev": cfg.num_dev, "test": cfg.num_eval}[split]
    return tasks.subset(task, split, size, seed=cfg.train_set_seed, stratified=cfg.stratified)


def _kinds(model: ModelConfig, task: TaskConfig) -> tuple[Kind, tasks.Kind]:
    """The model's and the task's kind: what is not said follows from what is, or from the checkpoint's family."""
    natural = models.natural_kind(models.read_config(model.name, model.revision, model.trust_remote_code))
    if model.kind != "auto":
        kind: Kind = model.kind
    elif task.kind == "classification":
        kind = "classification"
    else:
        kind = natural
    task_kind: tasks.Kind = "classification" if kind == "classification" else "choice"
    if task.kind not in ("auto", task_kind):
        raise ConfigError(
            f"task.kind={task.kind} and the model do not fit: {model.name} is used as a {kind} model, which needs "
            f"task.kind={task_kind}"
        )
    return kind, task_kind


def _splits_of(cfg: TrainConfig) -> list[Split]:
    during: list[Split] = ["dev"] if cfg.eval_steps else []
    return list(dict.fromkeys(["train", *during, cfg.eval_split]))


def _new_adapter(cfg: TrainConfig, base: Base) -> Adapter:
    assert cfg.adapter.alpha is not None
    return injection.create(
        base.model,
        models.target_modules(base, cfg.adapter.targets),
        rank=cfg.adapter.rank,
        alpha=cfg.adapter.alpha,
        init=cfg.adapter.init,
        init_std=cfg.adapter.init_std,
        seed=cfg.seed,
        heads=base.heads,
        base_model=cfg.model.name,
    )


def _train(
    cfg: TrainConfig,
    ready: Ready,
    live: injection.Live,
    rows: dict[Split, list[Encoded]],
    run: RunFolder,
    say: Console,
) -> list[Step]:
    """The training itself: every component made from the config, then `fit`."""
    assert cfg.optimizer and cfg.schedule and cfg.learning_rate is not None
    lm = cfg.train_as == "lm"
    train_rows, make_batch = rows["train"], ready.collate(gold_only=lm)
    stream = TrainingStream([row.length for row in train_rows], cfg.batch_size, cfg.seed, cfg.bucketing)
    num_steps = _num_steps(cfg, stream)
    ready.base.model.train(cfg.base_dropout)
    live.set_training(cfg.trainer == "backprop")
    live.set_dropout_generator(torch_generator(cfg.seed, "dropout", device=ready.device))
    steps: list[Step] = []
    with callbacks.shown(num_steps, cfg.logging_steps, say) as show:
        watch = [callbacks.write_steps(JsonLines(run.training_loss)), show, steps.append]
        if cfg.eval_steps:
            look = partial(
                evaluate,
                *(ready.base.model, ready.task, "dev", rows["dev"], ready.collate()),
                batch_size=cfg.eval_batch_size,
            )
            watch.append(callbacks.evaluate_every(cfg.eval_steps, look, JsonLines(run.eval_loss), say))
        fit(
            LossModule(ready.base.model, "lm" if lm else "classification"),
            live.trainable(),
            (make_batch([train_rows[index] for index in batch]) for batch in stream.indices()),
            estimator=_estimator(cfg),
            optimizer=update_rule(
                cfg.optimizer,
                live.trainable().values(),
                learning_rate=cfg.learning_rate,
                weight_decay=cfg.weight_decay,
            ),
            learning_rate=_rate(cfg, num_steps),
            num_steps=num_steps,
            batches_per_step=cfg.gradient_accumulation_steps,
            max_grad_norm=cfg.max_grad_norm,
            on_step=callbacks.on_each(*watch),
        )
    return steps


def _estimator(cfg: TrainConfig) -> Estimator:
    if cfg.trainer == "spsa":
        return Spsa(cfg.zo.epsilon, cfg.zo.num_directions, cfg.seed)
    return backprop


def _rate(cfg: TrainConfig, num_steps: int) -> Any:
    assert cfg.schedule and cfg.learning_rate is not None
    peak, schedule = cfg.learning_rate, cfg.schedule
    return lambda step: peak * multiplier(schedule, step, num_steps, cfg.warmup)


def _num_steps(cfg: TrainConfig, stream: TrainingStream) -> int:
    if cfg.num_epochs is not None:
        return math.ceil(cfg.num_epochs * stream.batches_per_epoch / cfg.gradient_accumulation_steps)
    assert cfg.max_steps is not None
    return cfg.max_steps


def _write_adapter(cfg: TrainConfig, ready: Ready, adapter: Adapter, run: RunFolder) -> None:
    peft_format.write(
        adapter,
        run.adapter,
        profile=cfg.adapter.profile,
        layout=injection.linear_modules(ready.base.model),
        task_type=models.TASK_TYPES[ready.base.kind],
        dropout=cfg.adapter.dropout,
        fan_in_fan_out=models.is_transposed(ready.base, adapter.updates),
    )


def _leave_record(
    cfg: TrainConfig,
    ready: Ready,
    run: RunFolder,
    adapter: Adapter,
    rows: dict[Split, list[Encoded]],
    found: Evaluation,
    steps: list[Step],
    seconds: float,
) -> None:
    files.write_json(run.evaluation(found.split), found.as_record())
    losses = [step.loss for step in steps if step.applied]
    text = card.run_card(
        config=cfg.model_dump(mode="json"),
        task=ready.task.name,
        base_model=cfg.model.name,
        kind=ready.base.kind,
        num_labels=len(ready.task.labels),
        modules=list(adapter.updates),
        heads=list(adapter.heads),
        num_parameters=adapter.num_parameters(),
        num_examples={split: len(examples) for split, examples in rows.items()},
        evaluation=found.as_record(),
        losses=losses,
        last_step=asdict(steps[-1]) if steps else {},
        folder=str(run.path),
    )
    files.write_atomic(run.card, text)
    metrics = {name: score.value for name, score in found.metrics.items()}
    results.finish(
        run,
        cfg.model_dump(mode="json"),
        {f"{found.split}_{name}": value for name, value in metrics.items()},
        {"seconds": seconds},
    )


def _resolve_target(
    target: str | None, given: EvaluateConfig
) -> tuple[ModelConfig, TaskConfig, Path | None, RunFolder | None]:
    """(model, task, adapter folder, run) that an evaluation is about."""
    if target is None:
        if given.model is None or given.task is None:
            raise ConfigError("nothing to evaluate: name a run or an adapter folder, or give model=M task=T")
        return given.model, given.task, None, None
    path = Path(target)
    if (path / "config.yaml").is_file():
        run = results.open_run(path)
        cfg = config.check(TrainConfig, config.read_yaml(run.config))
        return given.model or cfg.model, given.task or cfg.task, run.adapter, run
    if not (path / peft_format.CONFIG_FILE).is_file():
        raise MissingPathError(f"{target!r} is neither a run folder (config.yaml) nor an adapter (adapter_config.json)")
    model = given.model or ModelConfig(name=peft_format.read(path).base_model or "")
    if given.task is None:
        raise ConfigError(f"{target!r} is an adapter, which knows no task: give task=NAME")
    return model, given.task, path, None


def _headline(cfg: TrainConfig, ready: Ready, live: injection.Live, rows: dict[Split, list[Encoded]]) -> str:
    count = sum(parameter.numel() for parameter in live.trainable().values())
    total = sum(parameter.numel() for parameter in ready.base.model.parameters())
    sizes = ", ".join(f"{len(examples)} {split}" for split, examples in rows.items())
    return (
        f"{ready.task.name} ({ready.task.kind}; {sizes}) on {cfg.model.name} ({cfg.model.dtype}, {ready.device}): "
        f"{cfg.trainer}, rank {cfg.adapter.rank}, alpha {cfg.adapter.alpha:g} on {len(live.layers)} modules, "
        f"{count:,} of {total:,} parameters trainable ({count / total:.2%})"
    )


def _warn_of_truncation(rows: dict[Split, list[Encoded]], max_length: int, say: Console) -> None:
    for split, examples in rows.items():
        count = sum(row.truncated for row in examples)
        if count:
            say.print(
                f"warning: {count} of {len(examples)} {split} examples were cut to {max_length} tokens (max_length)"
            )
