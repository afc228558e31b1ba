"""The adapters of a merge, found by what the user calls them."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorica import config, files, plugins, results
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter
from lorica.config import TaskConfig, TrainConfig
from lorica.errors import MissingPathError


@dataclass(frozen=True)
class Place:
    """Where an adapter lies, its name in the merge, and the config of the run that made it, if known."""

    name: str
    folder: Path
    run: TrainConfig | None


@dataclass(frozen=True)
class Source(Place):
    """One adapter to merge."""

    adapter: Adapter

    @cached_property
    def sha256(self) -> str:
        """Of the config, whose alpha and ranks scale the factors, and the weights."""
        found = hashlib.sha256()
        for name in (peft_format.CONFIG_FILE, peft_format.WEIGHTS_FILE):
            with files.open_regular(self.folder / name) as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()

    def as_record(self) -> dict[str, Any]:
        ranks = sorted({update.rank for update in self.adapter.updates.values()})
        return {
            "name": self.name,
            "folder": str(self.folder),
            "sha256": self.sha256,
            "base_model": self.adapter.base_model,
            "ranks": ranks,
            "num_modules": len(self.adapter.updates),
            "heads": list(self.adapter.heads),
        }


def resolve(words: Sequence[str], runs_dir: Path) -> list[Source]:
    """The adapters that `words` name, read."""
    return [
        Source(place.name, place.folder, place.run, peft_format.read(place.folder)) for place in locate(words, runs_dir)
    ]


def locate(words: Sequence[str], runs_dir: Path) -> list[Place]:
    """Where the adapters lie that `words` name, in their order, each with a name of its own.

    A word is a PEFT folder, a run folder, the name of a run in `runs_dir`, or a task, which means its newest finished
    run there. Raises MissingPathError, with the nearest names, for any other.
    """
    found = []
    for word in words:
        folder, run = _found(word, runs_dir)
        found.append((folder, config.check(TrainConfig, config.read_yaml(run.config)) if run else None))
    names = _apart([_name(folder, cfg) for folder, cfg in found], [folder.resolve() for folder, _ in found])
    return [Place(name, folder, cfg) for name, (folder, cfg) in zip(names, found, strict=True)]


def _apart(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Equal names told apart by the folders around, then by number, in the folders' order.

    Random masks are keyed by names, so a name must not hang on where its adapter stands among the words.
    """
    apart = list(names)
    taken: list[str] = []
    for at in sorted(range(len(names)), key=lambda at: (folders[at], at)):
        around = {_around(folder) for name, folder in zip(names, folders, strict=True) if name == names[at]}
        longer = files.slug(f"{names[at]}-{_around(folders[at])}")
        apart[at] = unused(names[at] if len(around) == 1 else longer, taken)
        taken.append(apart[at])
    return apart


def _around(folder: Path) -> str:
    """The name of the folder that an adapter's own lies in."""
    return known_as(folder).parent.name


def _found(word: str, runs_dir: Path) -> tuple[Path, results.RunFolder | None]:
    """The PEFT folder that a word means, and the run that it belongs to."""
    for path in (Path(word), runs_dir / word):
        if (path / peft_format.CONFIG_FILE).is_file():
            beside = path.parent / "config.yaml"
            return path, results.open_run(path.parent) if path.name == "adapter" and beside.is_file() else None
        if (path / "config.yaml").is_file():
            run = results.open_run(path)
            return run.adapter, run
    by_task = _newest_by_task(runs_dir)
    if word.lower() in by_task:
        run = by_task[word.lower()]
        return run.adapter, run
    near = plugins.nearest(word, [*by_task, *(run.path.name for run in by_task.values())])
    hint = f": did you mean {' or '.join(near)}?" if near else f" in {runs_dir}/ (runs_dir=)"
    raise MissingPathError(
        f"no adapter {word!r}: it is no PEFT folder, no run folder, and no task of a finished run{hint}"
    )


def _newest_by_task(runs_dir: Path) -> dict[str, results.RunFolder]:
    """Task, in small letters -> its newest finished run."""
    index = runs_dir / "index.jsonl"
    newest: dict[str, results.RunFolder] = {}
    for line in files.read_records(index) if index.is_file() else []:
        run = results.RunFolder(runs_dir / files.slug(str(line["run"]), limit=200))
        if run.config.is_file() and run.adapter.is_dir():
            newest[task_name(config.check(TrainConfig, config.read_yaml(run.config)).task).lower()] = run
    return newest


def task_name(task: TaskConfig) -> str:
    """What a task is called by those who name it: its own name, or its folder's."""
    return (task.name or Path(task.path or "adapter").name).rpartition("/")[2]


def _name(folder: Path, cfg: TrainConfig | None) -> str:
    """A run's adapter is called by its task, another by its folder."""
    if cfg is not None:
        return files.slug(task_name(cfg.task))
    whole = known_as(folder)
    return files.slug(whole.parent.name if whole.name == "adapter" else whole.name)


def known_as(folder: Path) -> Path:
    """The folder, resolved; a snapshot in the hub's cache, which is a hash, goes by its repository: OWNER/NAME."""
    return Path(re.sub(r"/models--([^/]+)/snapshots/[^/]+", _repository, str(folder.resolve())))


def _repository(snapshot: re.Match[str]) -> str:
    return f"/{snapshot[1].replace('--', '/')}"


def unused(name: str, taken: Collection[str]) -> str:
    """The name, or `name-2` and so on where it is taken."""
    numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(each for each in numbered if each not in taken)
