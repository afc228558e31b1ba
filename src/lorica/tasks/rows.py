"""The rows of a task's data as they stand: from a local folder, from the user's own files, or from the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorica import files
from lorica.errors import ConfigError, DataError, MissingPathError, ModelError
from lorica.tasks.base import SPLITS, Hub, Prompt, Split

UNLABELLED = -1  # what a hub data set has for the label of a split whose labels are withheld
Row = tuple[str, dict[str, Any]]  # (where it stands, its columns)


@dataclass(frozen=True)
class Raw:
    """A source's rows as they are, and what the source itself says of them."""

    splits: Mapping[Split, list[Row]]
    labels: tuple[str, ...] | None = None
    prompt: Prompt | None = None

    def without(self, left_out: Sequence[str], label_column: str) -> Raw:
        """The rows whose label, by its name or number, is none of those."""
        labels = self.labels or ()
        numbers = (str(labels.index(name)) for name in left_out if name in labels)
        out = {*left_out, *numbers}
        kept = {
            split: [row for row in rows if str(row[1].get(label_column)) not in out]
            for split, rows in self.splits.items()
        }
        return replace(self, splits=kept) if out else self


def read_meta(folder: Path) -> dict[str, Any]:
    """What a folder's meta.json says. Raises MissingPathError or DataError if there is none to be read."""
    if not folder.is_dir():
        raise MissingPathError(f"task.path={str(folder)!r}: there is no such folder")
    if not (folder / "meta.json").is_file():
        raise MissingPathError(f"task.path={str(folder)!r} has no meta.json, which names the labels")
    with files.open_regular(folder / "meta.json", 1 << 20) as file:
        try:
            meta = json.load(file)
        except ValueError as error:
            raise DataError(f"{folder / 'meta.json'} is not JSON: {error}") from None
    if not isinstance(meta, dict):
        raise DataError(f"{folder / 'meta.json'} must hold an object")
    return meta


def read_folder(folder: Path) -> Raw:
    """The splits train.jsonl, dev.jsonl and test.jsonl of a folder, as far as they are there."""
    meta = read_meta(folder)
    found = {split: folder / f"{split}.jsonl" for split in SPLITS if (folder / f"{split}.jsonl").is_file()}
    if not found:
        raise MissingPathError(f"task.path={str(folder)!r} has none of train.jsonl, dev.jsonl, test.jsonl")
    own = Prompt(meta["prompt"], meta["verbalizer"]) if "prompt" in meta and "verbalizer" in meta else None
    labels = tuple(str(label) for label in meta["labels"]) if meta.get("labels") else None
    return Raw({split: list(_read_jsonl(path)) for split, path in found.items()}, labels, own)


def read_files(paths: Mapping[Split, str]) -> Raw:
    """JSONL, CSV or Parquet files, one a split."""
    return Raw({split: list(_read_file(Path(path), split)) for split, path in paths.items()})


def _read_file(path: Path, split: str) -> Iterator[Row]:
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ConfigError(f"task file {str(path)!r}: its name must end in one of {', '.join(readers)}")
    if not path.is_file():
        raise MissingPathError(f"the {split} file {str(path)!r} of the task is not there")
    yield from readers[path.suffix](path)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: an example is an object, not {type(row).__name__}")
            yield f"{path}, line {number}", row


def _read_csv(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path}, line {reader.line_num}: the number of cells is not that of the header")
            yield f"{path}, line {reader.line_num}", row


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def read_hub(hub: Hub, labels: Sequence[str] | None) -> Raw:
    """A hub data set; `labels` are the names of its label numbers where it does not tell them itself."""
    import datasets

    try:
        found = datasets.load_dataset(hub.repository, hub.config)
    except Exception as error:  # the library raises a dozen kinds, none of ours
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"data set {hub.repository!r} cannot be loaded: {first[0]} (a local copy can be given by task.path)"
        ) from None
    feature = next(iter(found.values())).features.get(hub.label_column)
    theirs = tuple(getattr(feature, "names", None) or ())
    splits = {
        split: [(f"{hub.repository} {name}, row {i}", row) for i, row in enumerate(found[name])]
        for split, name in _our_splits(hub, list(found)).items()
    }
    labelled = {
        split: rows
        for split, rows in splits.items()
        if any(row.get(hub.label_column) != UNLABELLED for _, row in rows)  # so too none of no rows
    }
    return Raw(labelled, hub.labels or theirs or tuple(labels or ()) or None)


def _our_splits(hub: Hub, there: Sequence[str]) -> dict[Split, str]:
    usual: dict[Split, tuple[str, ...]] = {
        "train": ("train",),
        "dev": ("dev", "validation", "valid"),
        "test": ("test",),
    }
    if hub.splits and all(theirs in there for theirs in hub.splits.values()):
        return dict(hub.splits)
    return {split: name for split, names in usual.items() for name in names if name in there}
