"""A merge judged on its adapters' own tasks: the base, the task's own adapter and the merge over the same examples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lorica import files, models, randomness
from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.config import EvalSubsetConfig, MergeConfig, ModelConfig, TaskConfig
from lorica.errors import ConfigError
from lorica.evaluation.evaluate import Evaluation
from lorica.evaluation.metrics import Array
from lorica.evaluation.recovery import Recovery, recovery
from lorica.merging.live import attach
from lorica.merging.merge import Merged
from lorica.runs.bodies import Bodies
from lorica.runs.merging.baselines import Baseline, baseline, predictions
from lorica.runs.ready import Ready, chosen
from lorica.runs.remembered import remembered
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
    model: ModelConfig
    baselines: Path

    @cached_property
    def base(self) -> Baseline:
        """The base model with the task's head: where d is 0."""
        return self._baseline("base", self.source.sha256 if self.source.adapter.heads else None, self._evaluated)

    @cached_property
    def single(self) -> Baseline:
        """The task's own adapter: where d is 1."""
        return self._baseline("own adapter", self.source.sha256, self._evaluated_alone)

    @cached_property
    def digest(self) -> dict[str, Any]:
        return digest_of(self.rows)

    def judged(self, merged: Iterable[Merged]) -> tuple[Evaluation, Recovery]:
        """The merge laid on the base model, and what it keeps of the task's own adapter."""
        with attach(self.ready.base.model, merged):
            found = self._evaluated()
        return found, self.recovered(predictions(found))

    def recovered(self, merged: Array) -> Recovery:
        """Predictions (n,) of the same examples against the base's and the own adapter's."""
        return recovery(
            self.source.name,
            self.ready.task.metrics[0],
            np.array([row.label for row in self.rows]),
            base=self.base.predictions,
            single=self.single.predictions,
            merged=merged,
            num_classes=len(self.ready.task.labels),
        )

    def _baseline(self, of: str, adapter: str | None, evaluated: Callable[[], Evaluation]) -> Baseline:
        key = {
            "of": of,
            "model": self.model.model_dump(mode="json"),
            "base": models.fingerprint(self.ready.base),
            "adapter": adapter,
            "task": self.ready.task.name,
            **({"sfc": True} if self.ready.task.sfc else {}),
            "split": self.split,
            "examples": self.digest,
            "device": self.ready.device,
        }
        return baseline(
            self.baselines, key, evaluated, num_examples=len(self.rows), num_classes=len(self.ready.task.labels)
        )

    def _evaluated_alone(self) -> Evaluation:
        live = injection.inject(self.ready.base.model, Adapter(self.source.adapter.updates))
        try:
            return self._evaluated()
        finally:
            injection.remove(live)

    def _evaluated(self) -> Evaluation:
        return self.ready.evaluated(self.split, self.rows, self.batch_size)


def open_arenas(sources: Sequence[Source], cfg: MergeConfig, split: Split, bodies: Bodies | None = None) -> list[Arena]:
    """Every source's task, on a model with the source's head in place; sources of one base model share its body."""
    bodies = bodies or Bodies(cfg.device, cfg.seed)
    return [_open(source, cfg, split, bodies) for source in sources]


def with_head(source: Source, ready: Ready) -> Ready:
    """The same, with the head of the source's adapter in the place of the model's, frozen like the body."""
    if source.adapter.heads:
        injection.inject(ready.base.model, Adapter({}, source.adapter.heads))
        ready.base.model.requires_grad_(False)
    return ready


def _open(source: Source, cfg: MergeConfig, split: Split, bodies: Bodies) -> Arena:
    task, model = task_of(source), model_of(source, cfg)
    ready = with_head(source, bodies.prepare(model, task))
    if not ready.task.labels:
        raise ConfigError(
            f"what a merge keeps of {source.name} cannot be told yet: {ready.task.name} has no labels that all its "
            "examples share; leave it out of eval_tasks"
        )
    artifacts = Path(cfg.artifacts_dir)
    chosen = _chosen(ready.task, split, source.name, cfg.eval_subset, task, artifacts / "subsets")
    return Arena(source, ready, split, ready.encoded(chosen), cfg.eval_batch_size, model, artifacts / "baselines")


def digest_of(rows: Sequence[Encoded]) -> dict[str, Any]:
    """The examples as the model sees them."""
    text = "\n".join(map(repr, rows))
    return {"num_examples": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}


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


def judged_sources(cfg: MergeConfig, sources: Sequence[Source]) -> list[Source]:
    """The sources whose tasks the merge is evaluated on."""
    by_name = {source.name.lower(): source for source in sources}
    if cfg.eval_tasks == ["all"]:
        return list(sources)
    unknown = [name for name in cfg.eval_tasks if name.lower() not in by_name]
    if unknown:
        raise ConfigError(
            f"eval_tasks={unknown[0]}: the merge has the tasks {', '.join(by_name)}; `all` is all of them"
        )
    return [by_name[name.lower()] for name in cfg.eval_tasks]


def evaluation_name(split: Split, subset: EvalSubsetConfig | None) -> str:
    """`test`, or `test_subset-<hash>`: a subset's results never stand where those of the whole split do."""
    if subset is None or not subset.enabled:
        return split
    return f"{split}_subset-{files.content_hash(subset.model_dump(mode='json'))}"


def _chosen(
    task: Task, split: Split, name: str, subset: EvalSubsetConfig | None, cfg: TaskConfig, folder: Path
) -> list[tasks.Example]:
    """The examples of a split that an evaluation looks at; `max_samples` of a task goes before that of all.

    Which ones a subset drew is kept in `folder`.
    """
    if subset is None or not subset.enabled:
        return chosen(task, split, cfg)
    examples = task.splits[split]
    own = subset.per_task.get(name)
    size = own.max_samples if own and own.max_samples else subset.max_samples
    if size is None or size >= len(examples):
        return list(examples)
    if not subset.shuffle:
        return list(examples[:size])
    settings = {"size": size, "seed": subset.seed, "stratified": subset.stratified}
    key = {"examples": task.fingerprint, "split": split, **settings}

    def drawn() -> list[int]:
        generator = randomness.python_generator(subset.seed, "subset", split)
        return tasks.draw([each.label for each in examples], size, generator, subset.stratified)

    indices = remembered(folder, key, drawn, lambda found: _are_places(found, size, len(examples)))
    return [examples[index] for index in indices]


def _are_places(found: Any, size: int, num_examples: int) -> bool:
    """Whether these are `size` different indices."""
    return (
        isinstance(found, list)
        and all(type(each) is int and 0 <= each < num_examples for each in found)
        and len(found) == len(set(found)) == size
    )
