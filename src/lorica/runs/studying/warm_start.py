"""Earlier sweeps as the beginning of a new one: their points count where everything else was the same."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica import files
from lorica.config import SearchConfig
from lorica.errors import DataError, LoricaError, MissingPathError
from lorica.runs.studying.sweep_bench import space_of
from lorica.runs.training.resuming import differing
from lorica.studies.ledger import TRIALS
from lorica.studies.search import Trial, ranked
from lorica.studies.space import Space, key

IDENTITY = "identity.json"
VALUES = ("minimum", "mean")  # by which trials are ranked
Record = Mapping[str, Any]


@dataclass(frozen=True)
class WarmStart:
    """The points taken from earlier sweeps, each with its folder, and why the other sweeps were passed over."""

    points: Sequence[Record] = ()
    passed_over: Sequence[tuple[str, str]] = ()  # (folder, reason)

    def as_record(self) -> dict[str, Any]:
        return {"points": list(self.points), "passed_over": [list(each) for each in self.passed_over]}

    @classmethod
    def of_record(cls, record: Record) -> WarmStart:
        return cls(record["points"], [(folder, reason) for folder, reason in record["passed_over"]])

    def lines(self) -> list[str]:
        """What a person should read."""
        folders = {each["sweep"] for each in self.points}
        taken = [f"warm start: {len(self.points)} points of {len(folders)} sweeps"] if self.points else []
        return [*taken, *(f"warning: {folder} gives no warm start: {reason}" for folder, reason in self.passed_over)]


def warm_start(search: SearchConfig, identity: Record) -> WarmStart:
    """The points of the sweeps that the config names, each once; the best so many, if it says how many.

    Raises MissingPathError for a name, not a pattern, that nothing is at.
    """
    if search.type == "grid":
        unused = [(word, "search.type=grid tries its own points alone") for word in search.warm_start_sweeps]
        return WarmStart((), unused)
    found: dict[str, dict[str, Any]] = {}
    passed_over = []
    for word in search.warm_start_sweeps:
        folders = _folders(word)
        if not folders:
            passed_over.append((word, "no sweep's folder fits it"))
        for folder in folders:
            try:
                records = _matching(folder, identity, space_of(search))
            except (LoricaError, OSError) as error:
                passed_over.append((str(folder), str(error)))
                continue
            for record in records:
                found.setdefault(key(record["params"]), {**record, "sweep": str(folder)})
    return WarmStart(_best(list(found.values()), search.warm_start_max_points), passed_over)


def trial(number: int, record: Record) -> Trial:
    """A trial's line as the search sees it."""
    values = tuple(record[name][0] for name in VALUES if record[name] is not None)
    deltas = {task: each["interference_delta"] for task, each in record["tasks"].items()}
    parts = {task: delta[0] for task, delta in deltas.items() if delta is not None}
    return Trial(number, dict(record["params"]), values, bool(record["feasible"]), parts)


def _best(points: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    if limit is None:
        return points
    best = ranked([trial(place, each) for place, each in enumerate(points)])[:limit]
    return [points[each.number] for each in best]


def _folders(word: str) -> list[Path]:
    """The sweeps' folders that a file in one, a folder or a pattern means; a folder need be no sweep's."""
    if Path(word).exists():
        return [Path(word) if Path(word).is_dir() else Path(word).parent]
    if not glob.has_magic(word):
        raise MissingPathError(f"search.warm_start_sweeps={word}: nothing is there")
    paths = [Path(each) for each in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207 - takes absolute patterns
    folders = dict.fromkeys(path if path.is_dir() else path.parent for path in paths)
    return [folder for folder in folders if (folder / IDENTITY).is_file()]


def _matching(folder: Path, identity: Record, space: Space) -> list[dict[str, Any]]:
    """The finished trials of a sweep whose identity is the same. Raises a LoricaError that says what is not."""
    then = files.read_json(folder / IDENTITY)
    others = list(differing(then, identity)) if isinstance(then, dict) else [IDENTITY]
    if others:
        raise DataError(f"it was made with another {', '.join(others)}")
    records = files.read_records(folder / TRIALS)
    unsound = [number for number, each in enumerate(records, 1) if not _is_sound(each, space, identity)]
    if unsound:
        raise DataError(f"{TRIALS}, line {unsound[0]} is no trial of this search")
    return records


def _is_sound(record: Any, space: Space, identity: Record) -> bool:
    """Whether a line from another folder is a trial: a point of the space, with all its values finite or none there."""
    if not isinstance(record, dict) or not space.holds(record.get("params")):
        return False
    tasks = record.get("tasks")
    if not isinstance(tasks, dict) or not isinstance(record.get("feasible"), bool):
        return False
    if all(record.get(name, 0) is None for name in VALUES):
        return not record["feasible"]
    deltas = [each.get("interference_delta") if isinstance(each, dict) else 0 for each in tasks.values()]
    intervals = [*(record.get(name) for name in VALUES), *(each for each in deltas if each is not None)]
    return set(tasks) == set(identity["eval_tasks"]) and all(map(_is_interval, intervals))


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(each, float | int) for each in value)
