"""A merge judged on its adapters' own tasks: the base, the task's own adapter and the merge over the same examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lorica import files
from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.config import EvalSubsetConfig, MergeConfig, ModelConfig, TaskConfig
from lorica.errors import ConfigError
from lorica.evaluation.evaluate import Evaluation, evaluate
from lorica.evaluation.recovery import Recovery, recovery
from lorica.merging.live import attach
from lorica.merging.merge import Merged
from lorica.runs.ready import Ready, prepare
from lorica.runs.sources import Source
from lorica.tasks import base as tasks
from lorica.tasks.base import Split, Task
from lorica.tasks.prompting import Encoded


@dataclass(frozen=True)
class Arena:
    """One task with its examples, tokenised, on a base model that carries the head of the task's adapter, if any."""

    source: Source
    ready: Ready
    split: Split
    rows: list[Encoded]
    batch_size: int

    @cached_property
    def base(self) -> Evaluation:
        """The base model with the task's head: where d is 0."""
        return self._evaluated()

    @cached_property
    def single(self) -> Evaluation:
        """The task's own adapter: where d is 1."""
        live = injection.inject(self.ready.base.model, Adapter(self.source.adapter.updates))
        try:
            return self._evaluated()
        finally:
            injection.remove(live)

    def judged(self, merged: Iterable[Merged]) -> tuple[Evaluation, Recovery]:
        """The merge laid on the base model, and what it keeps of the task's own adapter."""
        with attach(self.ready.base.model, merged):
            found = self._evaluated()
        return found, self.recovered(found)

    def recovered(self, found: Evaluation) -> Recovery:
        """An evaluation over the same examples against the base's and the own adapter's."""
        metric = self.ready.task.metrics[0]
        return recovery(
            self.source.name,
            metric,
            np.array([row.label for row in self.rows]),
            base=_predictions(self.base),
            single=_predictions(self.single),
            merged=_predictions(found),
            num_classes=len(self.ready.task.labels),
        )

    def _evaluated(self) -> Evaluation:
        return evaluate(
            self.ready.base.model,
            self.ready.task,
            self.split,
            self.rows,
            self.ready.collate(),
            batch_size=self.batch_size,
        )


def open_arena(source: Source, cfg: MergeConfig, split: Split) -> Arena:
    """Load a source's base model and task, the model with the source's head in place."""
    task = task_of(source)
    ready = prepare(model_of(source, cfg), task, cfg.device, cfg.seed)
    if source.adapter.heads:
        injection.inject(ready.base.model, Adapter({}, source.adapter.heads))
    chosen = _chosen(ready.task, split, source.name, cfg.eval_subset, task)
    return Arena(source, ready, split, ready.encoded(chosen), cfg.eval_batch_size)


def task_of(source: Source) -> TaskConfig:
    """The task of the run that made the adapter; of an adapter without a run, the catalog's task of its name."""
    return source.run.task if source.run else TaskConfig(name=source.name)


def model_of(source: Source, cfg: MergeConfig) -> ModelConfig:
    """The base model: as the config says, else as the run had it, else as the adapter names it."""
    if cfg.model is not None:
        return cfg.model
    if source.run is not None:
        return source.run.model
    if source.adapter.base_model is None:
        raise ConfigError(f"adapter {source.name} does not say which base model it is for: give model=NAME")
    return ModelConfig(name=source.adapter.base_model)


def evaluation_name(split: Split, subset: EvalSubsetConfig | None) -> str:
    """`test`, or `test_subset-<hash>`: a subset's results never stand where those of the whole split do."""
    if subset is None or not subset.enabled:
        return split
    return f"{split}_subset-{files.content_hash(subset.model_dump(mode='json'))}"


def _chosen(
    task: Task, split: Split, name: str, subset: EvalSubsetConfig | None, cfg: TaskConfig
) -> list[tasks.Example]:
    """The examples of a split that an evaluation looks at; `max_samples` of a task goes before that of all."""
    if subset is None or not subset.enabled:
        size = {"train": cfg.num_train, "dev": cfg.num_dev, "test": cfg.num_eval}[split]
        return tasks.subset(task, split, size, seed=cfg.train_set_seed, stratified=cfg.stratified)
    own = subset.per_task.get(name)
    limit = own.max_samples if own and own.max_samples else subset.max_samples
    num_examples = len(task.splits[split])
    if limit is None or limit >= num_examples:
        return list(task.splits[split])
    if not subset.shuffle:
        return list(task.splits[split][:limit])
    return tasks.subset(task, split, limit, seed=subset.seed, stratified=subset.stratified)


def _predictions(found: Evaluation) -> np.ndarray:
    assert found.scores is not None
    return found.scores.argmax(dim=1).numpy()
