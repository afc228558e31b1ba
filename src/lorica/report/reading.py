"""Folders as the subjects of a report: what each is, is told by the files in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorica import files, plugins
from lorica.errors import DataError, LoricaError, MissingPathError
from lorica.report import records
from lorica.report.grouping import grouped
from lorica.report.reading_runs import read_run, read_study
from lorica.report.subjects import Kept, Matrix, Merge, Record, Run, Score, Study, Subjects, Sweep, Trial

DEPTH = 2  # folders below a target in which runs and studies are looked for
Found = tuple[str, Path]  # what a folder is, and where


def read(targets: Sequence[Path]) -> Subjects:
    """Everything that the targets are or hold, in their order; runs that belong to no study become one together.

    A target is the folder of a run, study, merge, sweep or matrix, or one that holds such folders. What it holds and
    cannot be read is a remark; a target itself that cannot is a DataError, or a MissingPathError.
    """
    found: dict[str, list[Any]] = {kind: [] for kind in READERS}
    remarks: list[str] = []
    for target in targets:
        for kind, path in _within(target):
            try:
                found[kind].append(_read_as(kind, path))
            except LoricaError as error:
                if path == target:
                    raise
                remarks.append(records.text(str(error)))
    runs: list[Run] = found["run"]
    studies: list[Study] = found["study"] + ([grouped(runs)] if runs else [])
    return Subjects(
        tuple(_told_apart(studies)),
        tuple(_told_apart(found["merge"])),
        tuple(_told_apart(found["sweep"])),
        tuple(_told_apart(found["matrix"])),
        tuple(remarks),
    )


def _within(target: Path) -> list[Found]:
    if not target.is_dir():
        raise MissingPathError(f"nothing to report on at {str(target)!r}: {_hint(target)}")
    found = list(_search(target, DEPTH))
    if not found:
        raise MissingPathError(
            f"{str(target)!r} holds no run, study, merge, sweep or evaluation matrix, nor do the folders in it: "
            "name a folder that a lorica command left"
        )
    return found


def _hint(target: Path) -> str:
    """The nearest names of the folders beside it; or what to name."""
    beside = target.parent
    others = [each.name for each in sorted(beside.iterdir()) if each.is_dir()] if beside.is_dir() else []
    near = [str(target.with_name(name)) for name in plugins.nearest(target.name, others)]
    return f"did you mean {' or '.join(near)}?" if near else "name the folder of a run, study or merge"


def _search(folder: Path, depth: int) -> Iterator[Found]:
    kind = _kind(folder)
    if kind is not None:
        yield kind, folder
    elif depth:
        for each in sorted(folder.iterdir()):
            if each.is_dir() and not each.is_symlink() and not each.name.startswith("."):
                yield from _search(each, depth - 1)


def _kind(folder: Path) -> str | None:
    """What a folder is, by the file that only its kind has."""
    signs = {
        "study": ("study.yaml", "study.json"),
        "matrix": ("matrix.json",),
        "sweep": ("identity.json",),
        "merge": ("merge_metadata.json",),
        "run": ("training_loss.jsonl", "record.json"),
    }
    return next((kind for kind, names in signs.items() if any((folder / name).is_file() for name in names)), None)


def _read_as(kind: str, folder: Path) -> Any:
    try:
        return READERS[kind](folder)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, LoricaError):
            raise
        raise DataError(f"{folder} is not as a {kind} leaves it: {type(error).__name__} {error}") from None


def _told_apart(subjects: Sequence[Any]) -> list[Any]:
    """The same with names whose slugs differ, by which their figures are called."""
    taken: set[str] = set()
    apart = []
    for subject in subjects:
        name, count = subject.name, 2
        while files.slug(name) in taken:
            name, count = f"{subject.name}-{count}", count + 1
        taken.add(files.slug(name))
        apart.append(subject if name == subject.name else replace(subject, name=name))
    return apart


def _read_merge(folder: Path) -> Merge:
    metadata, summary = (records.read_json(folder / name) for name in ("merge_metadata.json", "summary.json"))
    return Merge(
        records.text(folder.resolve().name),
        summary["optimizer"] or summary["method"],
        tuple(map(_kept, summary["tasks"])),
        records.number(summary["total_error"]),
        metadata["origin"],
    )


def _kept(record: Record) -> Kept:
    base, single, merged = (float(record[key]) for key in ("base", "single", "merged"))
    delta = records.interval(record["interference_delta"])
    return Kept(record["task"], record["metric"], base, single, merged, delta)


def _read_sweep(folder: Path) -> Sweep:
    """A sweep, finished or not; its winner is read with it."""
    identity, summary = records.read_json(folder / "identity.json"), records.read_json_or(folder / "summary.json", None)
    trials = sorted(map(_trial, records.read_lines(folder / "trials.jsonl")), key=lambda each: each.number)
    best = summary["best"] if summary else None
    final = folder / "best"
    return Sweep(
        records.text(folder.resolve().name),
        identity["method"],
        identity["split"],
        summary is not None,
        tuple(trials),
        _trial({"number": -1, **best}) if best else None,
        tuple(map(_kept, best["tasks"].values())) if best else (),
        replace(_read_merge(final), name="best") if summary and (final / "merge_metadata.json").is_file() else None,
        ((summary or {}).get("final") or {}).get("split"),
        records.origin_of(folder),
    )


def _trial(record: Record) -> Trial:
    return Trial(
        record["number"],
        record["params"],
        records.interval(record["minimum"]),
        records.interval(record["mean"]),
        record["feasible"],
        record["reason"],
    )


def _read_matrix(folder: Path) -> Matrix:
    record = records.read_json(folder / "matrix.json")
    by_place = {(each["row"], each["column"]): each for each in record["cells"]}
    return Matrix(
        records.text(folder.resolve().name),
        tuple(each["name"] for each in record["rows"]),
        tuple(each["name"] for each in record["columns"]),
        {place: _first_score(each) for place, each in by_place.items() if each["reason"] is None},
        {place: each["reason"] for place, each in by_place.items() if each["reason"] is not None},
        record["origin"],
    )


def _first_score(record: Record) -> Score:
    name, found = next(iter(record["metrics"].items()))
    return Score(name, found["value"], found["low"], found["high"], found["higher_is_better"], found["n"])


READERS: dict[str, Callable[[Path], Any]] = {
    "study": read_study,
    "run": read_run,
    "merge": _read_merge,
    "sweep": _read_sweep,
    "matrix": _read_matrix,
}
