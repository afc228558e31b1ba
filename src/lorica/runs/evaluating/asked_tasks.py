"""The tasks that the targets of a matrix are asked: those that are named, or those that its runs trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica import files, plugins
from lorica.config import EvaluateConfig, TaskConfig
from lorica.errors import ConfigError, MissingPathError
from lorica.runs.evaluating.targets import Target
from lorica.runs.sources import task_name, unused
from lorica.tasks.base import Split
from lorica.tasks.sources import bare, called

PLACE = "{task}"  # of a task's name in task.path


@dataclass(frozen=True)
class Asked:
    """One task of a matrix: what it is called there, and the split that is evaluated."""

    name: str
    task: TaskConfig
    split: Split


def asked_tasks(targets: Sequence[Target], given: EvaluateConfig) -> list[Asked]:
    """The tasks of a matrix, each once.

    They are those of `tasks`, else the one of `task.name` or `task.path`, else the own tasks of all the runs. A task
    that a run trained on comes with all that the run said of it; what else the config sets of `task` goes for every
    one. Raises ConfigError if there is none.
    """
    check_shown(given.task, given.split)
    changes = changes_of(given.task)
    own = [(each.cfg.task, each.cfg.eval_split) for each in targets if each.cfg is not None]
    found: list[tuple[TaskConfig, Split]]
    if given.tasks:
        found = [_named(name, own, changes) for name in given.tasks]
    elif given.task is not None and changes.keys() & {"name", "path"}:
        found = [(given.task, "test")]
    else:
        found = [(_of_catalog(task).model_copy(update=changes), split) for task, split in own]
    if not found:
        raise ConfigError("no target is a run, which would bring its task: give --tasks NAME..., or task=NAME")
    kept = dict.fromkeys(  # a section holds dicts, so it is told by what it says
        (_looked_at(task, given.split or split).model_dump_json(), given.split or split) for task, split in found
    )
    asked: list[Asked] = []
    for said, split in kept:
        task = TaskConfig.model_validate_json(said)
        asked.append(Asked(unused(files.slug(task_name(task)), [each.name for each in asked]), task, split))
    return asked


def _looked_at(task: TaskConfig, split: Split) -> TaskConfig:
    """The task without what the evaluation of a split does not look at, so that two runs on one task have it once."""
    size = {} if split == "train" else {"num_train": None}
    return task.model_copy(update={"demonstrations": "one_set", **size})


def check_shown(task: TaskConfig | None, split: str | None) -> None:
    """Raise ConfigError for demonstrations: an evaluation shows none."""
    if task is not None and (task.demonstrations != "one_set" or (task.num_train and split != "train")):
        raise ConfigError(
            "task.num_train and task.demonstrations show solved examples under `lorica train trainer=none`, and an "
            "evaluation shows none: drop them, or use that"
        )


def changes_of(task: TaskConfig | None) -> dict[str, Any]:
    """What a section sets to something else than the default: a written config states every key."""
    fields = {} if task is None else type(task).model_fields
    return {key: getattr(task, key) for key, field in fields.items() if getattr(task, key) != field.default}


def _named(name: str, own: Sequence[tuple[TaskConfig, Split]], changes: dict[str, Any]) -> tuple[TaskConfig, Split]:
    """The task of a name: read from the folder that `task.path` makes of it, else as a run has it, else as it is."""
    if "path" in changes:
        # The folder says what it is: its own description goes before the catalog's task of that name.
        return TaskConfig(**{**changes, "path": folder_of(name, changes["path"])}), "test"
    known = [each for each in own if _is_called(each[0], name)]
    task, split = known[0] if known else (TaskConfig(name=name), "test")
    return _of_catalog(task).model_copy(update=changes), split


def _is_called(task: TaskConfig, name: str) -> bool:
    return told_apart_by(task) == bare(called(name)) or task_name(task).lower() == name.lower()


def told_apart_by(task: TaskConfig) -> str:
    """The same for all ways to write one task's name; a folder's name is its own, whatever the catalog means by it."""
    return bare(task_name(task) if task.name is None else called(task.name))


def _of_catalog(task: TaskConfig) -> TaskConfig:
    """The task by the catalog's name for it, however it is written: two ways to write one are one task."""
    return task if task.name is None else task.model_copy(update={"name": called(task.name)})


def folder_of(name: str, pattern: str) -> str:
    """The folder that `task.path` makes of a task's name. Raises MissingPathError, with the nearest."""
    path = Path(pattern.replace(PLACE, name))
    if path.is_dir():
        return str(path)
    others = [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
    near = plugins.nearest(path.name, others)
    hint = f": did you mean {' or '.join(near)}?" if near else ""
    raise MissingPathError(f"task.path={str(path)!r}: there is no such folder{hint}")
