"""What a matrix is going to do: its targets and tasks found, and each task read as each base model is asked it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorica import files
from lorica.config import EvaluateConfig, ModelConfig
from lorica.errors import ConfigError, UnknownNameError
from lorica.models import Kind
from lorica.runs.evaluating.asked_tasks import Asked, asked_tasks
from lorica.runs.evaluating.targets import BASE, Target, resolve_target
from lorica.runs.ready import chosen, kinds, task_of
from lorica.runs.sources import known_as, unused
from lorica.tasks import base as tasks
from lorica.tasks.base import Example, Task


@dataclass(frozen=True)
class Row:
    """One target of a matrix, and what it is called there."""

    name: str
    word: str
    target: Target


@dataclass(frozen=True)
class Seat:
    """A task as a kind of model is asked it, by a head or by a prompt, and the examples that are evaluated."""

    kind: Kind
    task: Task
    examples: Sequence[Example]


@dataclass(frozen=True)
class Plan:
    """What a matrix is going to do; for a base model and a task there is a seat, or the reason why there is none."""

    given: EvaluateConfig
    rows: tuple[Row, ...]
    columns: tuple[Asked, ...]
    seats: Mapping[tuple[ModelConfig, str], Seat | str]

    @property
    def bases(self) -> list[ModelConfig]:
        return list(dict.fromkeys(row.target.model for row in self.rows))


def planned(given: EvaluateConfig) -> Plan:
    """Every target and every task read, before any base model is."""
    rows = _rows(given)
    columns = asked_tasks([row.target for row in rows], given)
    read: dict[tuple[str, tasks.Kind], tuple[Task, list[Example]]] = {}
    seats = {
        (model, asked.name): _seat(model, asked, read)
        for model in dict.fromkeys(row.target.model for row in rows)
        for asked in columns
    }
    reasons = [seat for seat in seats.values() if isinstance(seat, str)]
    if len(reasons) == len(seats):
        raise ConfigError(reasons[0])
    return Plan(given, tuple(rows), tuple(columns), seats)


def _rows(given: EvaluateConfig) -> list[Row]:
    """The targets; `base` stands for the model of the config, or else for that of each of the others."""
    words = given.targets or [BASE]
    found = {word: [resolve_target(word, given.model)] for word in words if word != BASE}
    if given.model is not None:
        found[BASE] = [Target(given.model)]
    else:
        models = dict.fromkeys(target.model for (target,) in found.values() if not target.is_whole)
        found[BASE] = [Target(model) for model in models]
    if BASE in words and not found[BASE]:
        raise ConfigError("there is no base model to evaluate: give model=M, or a run or an adapter beside `base`")
    rows: list[Row] = []
    for word in words:
        for target in found[word]:
            _ = target.adapter  # a file that cannot be read is told now
            name = BASE if word == BASE and len(found[BASE]) == 1 else _name(word, target)
            rows.append(Row(unused(name, [row.name for row in rows]), word, target))
    return rows


def _name(word: str, target: Target) -> str:
    """A folder is called by its name, an adapter inside a run by the run's, a base by its model's."""
    if word == BASE:
        kind = "" if target.model.kind == "auto" else f"-{target.model.kind}"
        return f"{BASE}-{files.slug(Path(target.model.name).name)}{kind}"
    whole = known_as(Path(word))
    return files.slug(whole.parent.name if whole.name in ("adapter", "model") else whole.name)


def _seat(
    model: ModelConfig, asked: Asked, read: dict[tuple[str, tasks.Kind], tuple[Task, list[Example]]]
) -> Seat | str:
    try:
        kind, task_kind = kinds(model, asked.task)
        if (asked.name, task_kind) not in read:
            task = task_of(asked.task, task_kind)
            read[asked.name, task_kind] = task, chosen(task, asked.split, asked.task)
    except UnknownNameError:
        raise
    except ConfigError as error:  # a task that goes by a prompt alone, more examples than it has
        return str(error)
    return Seat(kind, *read[asked.name, task_kind])
