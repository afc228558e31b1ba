"""A study's runs as far as they come without their base's weights: what a run would refuse then is refused before any.

Each task is read once for all arms that ask it alike, each tokenizer and each base's shapes once for all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lorica import models, planning
from lorica.adapters import bypass, injection
from lorica.adapters.prefix import Reparameterized
from lorica.config import ModelConfig, TaskConfig, TrainConfig
from lorica.evaluation.probing import check_classes
from lorica.models import Base, Kind
from lorica.runs.ready import Ready, chosen, kinds, ready, task_of, train_as_of
from lorica.runs.studying.plan import (
    Before,
    Key,
    Planned,
    StudyPlan,
    forwards_of,
    looked_at,
    told_of,
    within_budget,
)
from lorica.runs.training import lora
from lorica.runs.training.first_look import has_classes
from lorica.runs.training.learning import Rows, num_steps, parted, splits_of
from lorica.runs.training.train import check_machine
from lorica.runs.training.xgblora import targets_of_round
from lorica.tasks.base import Split
from lorica.tasks.prompting import Encoded

OF_A_RUN = {"num_train", "demonstrations", "stratified", "max_length"}  # of a task, what does not change how it is read


@dataclass(frozen=True)
class Rehearsed:
    """What is known of an arm's run on a task before it begins."""

    cfg: TrainConfig  # of its first run
    kind: Kind  # of the base
    before: Before
    num_trainable: int
    length: int  # tokens of the longest row that is trained on

    @property
    def num_steps(self) -> int | None:
        """None: as many as its seconds allow."""
        return num_steps(self.cfg, self.before.num_rows) if self.cfg.max_seconds is None else None

    @property
    def num_forwards(self) -> int | None:
        """None where the clock decides."""
        steps = self.num_steps
        return None if steps is None else forwards_of(self.cfg, steps, self.before)


def rehearsed(plan: StudyPlan) -> tuple[StudyPlan, dict[Key, Rehearsed]]:
    """For each (arm, task), a run up to where it would load its base's weights. Its errors name both.

    Beside it the plan, whose runs are as long as their budget allows by what has been seen of their data.
    """
    found = _each(plan)
    plan = within_budget(plan, {key: each.before for key, each in found.items()})
    cfgs = {(each.arm, each.task): each.cfg for each in reversed(_runs(plan))}
    return plan, {key: replace(each, cfg=cfgs[key]) for key, each in found.items()}


def _runs(plan: StudyPlan) -> list[Planned]:
    """Those of every arm on every task, one at least of each."""
    return [*plan.tuning(), *plan.finals(plan.every_choice()[0])]


def _each(plan: StudyPlan) -> dict[Key, Rehearsed]:
    runs, bases, found = _runs(plan), _Held(), {}
    for task in plan.tasks:
        data = _Held()  # of one task at a time: examples take memory
        for arm in [each.name for each in plan.given.arms]:
            with told_of(arm, task):
                own = [each for each in runs if (each.arm, each.task) == (arm, task)]
                if plan.given.launcher != "ray":  # whose runs have the devices and compilers of other machines
                    check_machine(own[0].cfg)
                found[arm, task] = _rehearsed(own, bases, data)
    return found


@dataclass(frozen=True)
class _Held:
    """What was made once, by what decides it."""

    made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


def _rehearsed(runs: Sequence[Planned], bases: _Held, data: _Held) -> Rehearsed:
    cfg = runs[0].cfg
    stage = _stage(cfg, bases, data)
    splits = dict.fromkeys(split for each in runs for split in splits_of(each.cfg))
    said = (cfg.model.model_dump_json(), cfg.task.model_dump_json(exclude={"kind"}), stage.base.kind, stage.max_length)
    rows: Rows = {split: data.once((*said, split), partial(_encoded, stage, cfg.task, split)) for split in splits}
    train_as_of(cfg.train_as, cfg.zo.objective, stage.task)
    if cfg.adapter.kind == "linear_probe":
        check_classes([row.label for row in rows["train"]], len(stage.task.labels))
    trained_on, _ = parted(cfg, rows["train"])
    looked = looked_at(cfg, len(trained_on))
    return Rehearsed(
        cfg=cfg,
        kind=stage.base.kind,
        before=Before(len(trained_on), looked if looked and has_classes(cfg, stage.task) else 0),
        num_trainable=NUM_TRAINABLE[cfg.adapter.kind](cfg, stage),
        length=max(row.length for row in trained_on),
    )


def _stage(cfg: TrainConfig, bases: _Held, data: _Held) -> Ready:
    """The task and the base as a run has them, the base without weights."""
    kind, task_kind = kinds(cfg.model, cfg.task)
    # A head is asked for by the task's kind or by the base's: the data is the same.
    ignored = OF_A_RUN | ({"kind"} if task_kind == "classification" else set())
    read = (cfg.task.model_dump_json(exclude=ignored), task_kind)
    task = data.once(read, lambda: task_of(cfg.task, task_kind))
    num_labels = len(task.labels)
    said = (cfg.model.model_dump_json(), kind, num_labels)
    return ready(bases.once(said, lambda: _base(cfg.model, kind, num_labels)), task, cfg.task, "meta", cfg.num_prefix)


def _encoded(stage: Ready, task: TaskConfig, split: Split) -> list[Encoded]:
    return stage.encoded(chosen(stage.task, split, task))


def _base(model: ModelConfig, kind: Kind, num_labels: int) -> Base:
    source: Mapping[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    outline = models.on_meta(model.name, kind=kind, num_labels=num_labels, dtype=model.dtype, **source)
    return models.with_tokenizer(outline, **source)


def _of_low_rank(cfg: TrainConfig, stage: Ready) -> int:
    model, ranks = stage.base.model, cfg.boosting.ranks or [cfg.adapter.rank or 1]
    paths = lora.targets(stage.base, cfg.adapter)
    with torch.device("meta"):
        for rank in ranks[1:]:
            injection.create(model, paths, rank=rank, alpha=1.0)  # which refuses a rank that is too large
        first = targets_of_round(cfg, paths, 0)
        return lora.num_trainable(cfg, injection.create(model, first, rank=ranks[0], alpha=1.0, heads=stage.base.heads))


def _of_prefix(cfg: TrainConfig, stage: Ready) -> int:
    tokens = torch.zeros(cfg.prefix.num_tokens, dtype=torch.long)
    values = planning.made(lambda: models.past(stage.base, tokens))
    if not cfg.prefix.reparameterize:
        return values.numel()
    with torch.device("meta"):
        return _count(Reparameterized(values, cfg.seed))


def _of_linear_probe(cfg: TrainConfig, stage: Ready) -> int:
    model = stage.base.model
    return _count(model.get_submodule(bypass.last_linear(model, stage.base.heads, len(stage.task.labels))))


def _of_full(cfg: TrainConfig, stage: Ready) -> int:
    return _count(stage.base.model)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# How many numbers a run trains at once; each refuses a base that cannot be trained so.
NUM_TRAINABLE: dict[str, Callable[[TrainConfig, Ready], int]] = {
    "lora": _of_low_rank,
    "xgblora": _of_low_rank,
    "prefix": _of_prefix,
    "linear_probe": _of_linear_probe,
    "full": _of_full,
}
