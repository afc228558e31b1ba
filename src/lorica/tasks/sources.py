"""A task found by its name: from the catalog, the hub, a local folder, or the user's own files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica import files, plugins
from lorica.errors import ConfigError, DataError, MissingPathError, ModelError, UnknownNameError
from lorica.plugins import Catalogue
from lorica.tasks.base import SPLITS, Example, Hub, Kind, Prompt, Split, Task, TaskSpec, complete_splits
from lorica.tasks.prompting import fields_of

CATALOG = Catalogue("lorica.tasks.catalog", "task")
MAX_LABELS = 1000

Row = tuple[str, dict[str, Any]]  # (where it stands, its columns)


@dataclass(frozen=True)
class Raw:
    """A source's rows as they are, and what the source itself says of them."""

    splits: Mapping[Split, list[Row]]
    labels: tuple[str, ...] | None = None
    prompt: Prompt | None = None


def load_task(
    name: str | None,
    *,
    kind: Kind,
    path: str | None = None,
    more_files: Mapping[Split, str] | None = None,
    columns: Mapping[str, str] | None = None,
    label_column: str = "label",
    labels: Sequence[str] | None = None,
    prompt: str | None = None,
    template: str | None = None,
    verbalizer: Mapping[str, str] | None = None,
    num_dev: int | None = None,
    num_eval: int | None = None,
    seed: int = 0,
) -> Task:
    """The task called `name`, read and checked: every row has the fields that are asked for and a known label.

    `name` is a catalog task, `hub:OWNER/NAME[:CONFIG]` or `file:TRAIN_FILE` (JSONL, CSV or Parquet; further splits in
    `more_files`); `path` reads a catalog task, or one described by its meta.json, from a local folder. Raises
    UnknownNameError, MissingPathError or DataError, in one line that names the row.
    """
    name, spec = _spec_of(name, path)
    columns = dict(columns or {})
    if more_files and not name.startswith("file:"):
        raise ConfigError(f"task.files goes with task.name=file:TRAIN_FILE, and the task is {name}: drop one of them")
    if name.startswith("file:"):
        raw = _read_files({"train": name.removeprefix("file:"), **(more_files or {})})
    elif path is not None:
        raw = _read_folder(Path(path))
    elif name.startswith("hub:"):
        repository, _, config = name.removeprefix("hub:").partition(":")
        raw = _read_hub(Hub(repository, config or None, label_column=label_column), None)
    else:
        assert spec is not None and spec.hub is not None
        raw = _read_hub(spec.hub, spec.labels)
        columns, label_column = {**spec.hub.columns, **columns}, spec.hub.label_column
    names = _label_names(name, labels, spec, raw, label_column)
    asked = _prompt(name, kind, spec, raw, prompt, template, verbalizer, names)
    texts = spec.texts if spec else tuple(columns) or ("text",)
    splits = {
        split: [
            _checked(
                place,
                _example(place, cells, spec, columns, label_column, raw.labels or names, names),
                texts,
                asked,
            )
            for place, cells in rows
        ]
        for split, rows in raw.splits.items()
    }
    whole = complete_splits(splits, num_dev=num_dev, num_eval=num_eval, seed=seed)
    return Task(name, kind, names, texts, asked, spec.metrics if spec else ("accuracy", "macro_f1"), whole)


def _spec_of(name: str | None, path: str | None) -> tuple[str, TaskSpec | None]:
    """The task's name and its catalog entry; a local folder may bring its own description instead."""
    if name is None and path is None:
        raise ConfigError("task.name is not given: name a task of `lorica list`, hub:OWNER/NAME or file:PATH")
    if name is None:
        assert path is not None
        meta = _read_meta(Path(path))
        name = str(meta.get("name") or Path(path).name)
        if "prompt" in meta:
            return name, None
    if name.startswith(("file:", "hub:")):
        return name, None
    known = name.lower().replace("-", "_")
    if known in CATALOG.names():
        return known, CATALOG.load(known, "TASK")
    if path is None:
        raise UnknownNameError(plugins.unknown("task", name, CATALOG.names()) + " (or hub:OWNER/NAME, or file:PATH)")
    return name, None


def _read_meta(folder: Path) -> dict[str, Any]:
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


def _read_folder(folder: Path) -> Raw:
    meta = _read_meta(folder)
    found = {split: folder / f"{split}.jsonl" for split in SPLITS if (folder / f"{split}.jsonl").is_file()}
    if not found:
        raise MissingPathError(f"task.path={str(folder)!r} has none of train.jsonl, dev.jsonl, test.jsonl")
    own = Prompt(meta["prompt"], meta["verbalizer"]) if "prompt" in meta and "verbalizer" in meta else None
    labels = tuple(str(label) for label in meta["labels"]) if "labels" in meta else None
    return Raw({split: list(_read_jsonl(path)) for split, path in found.items()}, labels, own)


def _read_files(paths: Mapping[Split, str]) -> Raw:
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


def _read_hub(hub: Hub, labels: Sequence[str] | None) -> Raw:
    import datasets

    try:
        found = datasets.load_dataset(hub.repository, hub.config)
    except Exception as error:  # the library raises a dozen kinds, none of ours
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"data set {hub.repository!r} cannot be loaded: {first[0]} (a local copy can be given by task.path)"
        ) from None
    feature = next(iter(found.values())).features.get(hub.label_column)
    names = tuple(getattr(feature, "names", None) or labels or ()) or None
    ours = _our_splits(hub, list(found))
    splits = {
        split: [(f"{hub.repository} {theirs}, row {i}", row) for i, row in enumerate(found[theirs])]
        for split, theirs in ours.items()
    }
    return Raw({split: rows for split, rows in splits.items() if rows}, names)


def _our_splits(hub: Hub, there: Sequence[str]) -> dict[Split, str]:
    usual: dict[Split, tuple[str, ...]] = {
        "train": ("train",),
        "dev": ("dev", "validation", "valid"),
        "test": ("test",),
    }
    if hub.repository and all(theirs in there for theirs in hub.splits.values()):
        return dict(hub.splits)
    return {split: name for split, names in usual.items() for name in names if name in there}


def _label_names(
    name: str, given: Sequence[str] | None, spec: TaskSpec | None, raw: Raw, label_column: str
) -> tuple[str, ...]:
    """The task's labels: as the user says, else as the catalog does, else as the data does, else those that occur."""
    if given is not None:
        return tuple(given)
    if spec is not None:
        if raw.labels is not None and set(raw.labels) != set(spec.labels):
            raise DataError(f"the data's labels are {', '.join(raw.labels)}, and {name} has {', '.join(spec.labels)}")
        return spec.labels
    if raw.labels is not None:
        return raw.labels
    occurring = {str(row[label_column]) for row in _rows(raw, "train") if row.get(label_column) is not None}
    if not 2 <= len(occurring) <= MAX_LABELS:
        raise DataError(
            f"the column task.label_column={label_column!r} holds {len(occurring)} different labels: name the column, "
            "or the labels in task.labels"
        )
    return tuple(sorted(occurring))


def _rows(raw: Raw, split: Split) -> list[dict[str, Any]]:
    return [row for _, row in raw.splits.get(split, [])]


def _prompt(
    name: str,
    kind: Kind,
    spec: TaskSpec | None,
    raw: Raw,
    version: str | None,
    template: str | None,
    verbalizer: Mapping[str, str] | None,
    labels: Sequence[str],
) -> Prompt | None:
    """The prompt of a choice task: the user's own template, the version asked for, or the first there is."""
    if kind == "classification":
        return None
    prompts = dict(spec.prompts) if spec else {"default": raw.prompt} if raw.prompt else {}
    if version is not None and version not in prompts:
        raise UnknownNameError(plugins.unknown("task.prompt", version, prompts))
    base = prompts[version] if version else next(iter(prompts.values()), None)
    if base is None and template is None:
        raise ConfigError(f"{name} has no prompt: give task.template, or task.kind=classification")
    words = verbalizer or (base.verbalizer if base else {label: label for label in labels})
    lacking = [label for label in labels if label not in words]
    if lacking:
        raise ConfigError(f"task.verbalizer has no word for the label {lacking[0]!r}: it has {', '.join(words)}")
    return Prompt(template or base.template, words) if base else Prompt(template or "", words)


def _example(
    place: str,
    cells: Mapping[str, Any],
    spec: TaskSpec | None,
    columns: Mapping[str, str],
    label_column: str,
    theirs: Sequence[str],
    ours: Sequence[str],
) -> Example:
    for column, key in [
        (label_column, "label_column"),
        *((column, f"columns.{field}") for field, column in columns.items()),
    ]:
        if cells.get(column) is None:
            raise DataError(f"{place}: no column {column!r} (task.{key}): it has {', '.join(cells)}")
    fields = {name: str(value) for name, value in cells.items() if name != label_column and value is not None}
    fields |= {field: str(cells[column]) for field, column in columns.items()}
    if spec is not None and spec.prepare is not None:
        fields = dict(spec.prepare(_with_all(place, fields, spec.texts)))
    return Example(fields, _label(place, cells[label_column], theirs, ours))


def _with_all(place: str, fields: dict[str, str], names: Sequence[str]) -> dict[str, str]:
    """The fields, if every one of `names` is among them."""
    missing = [name for name in names if name not in fields]
    if missing:
        raise DataError(
            f"{place}: no column {missing[0]!r}: it has {', '.join(fields)}; map it by task.columns.{missing[0]}=COLUMN"
        )
    return fields


def _label(place: str, value: Any, theirs: Sequence[str], ours: Sequence[str]) -> int:
    """The label's number among ours: by its name, or by its number among the data's own names."""
    if str(value) in ours:
        return list(ours).index(str(value))
    number = int(value) if isinstance(value, bool | int) or str(value).isdecimal() else -1
    if 0 <= number < len(theirs) and theirs[number] in ours:
        return list(ours).index(theirs[number])
    raise DataError(f"{place}: unknown label {value!r}: the labels are {', '.join(ours)} (task.labels)")


def _checked(place: str, example: Example, texts: Sequence[str], prompt: Prompt | None) -> Example:
    """The example, if it has every field that it is going to be asked with."""
    names = fields_of(prompt.template) if prompt is not None else texts
    _with_all(place, dict(example.fields), names)
    return example
