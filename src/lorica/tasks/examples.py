"""Examples read from the rows of a task's data; every fault in a row is named by where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lorica.errors import DataError
from lorica.tasks.base import Example, Gold, Option, Prompt, TaskSpec
from lorica.tasks.rows import Row
from lorica.tasks.templates import fields_of


@dataclass(frozen=True)
class Reading:
    """How a task's rows are read. `theirs` are the names of the data's label numbers, `ours` the task's labels.

    A row must have the fields `texts`, and those of the `prompt` if there is one.
    """

    spec: TaskSpec | None
    columns: Mapping[str, str]
    label_column: str
    theirs: Sequence[str]
    ours: Sequence[str]
    texts: Sequence[str]
    prompt: Prompt | None


def read_examples(rows: Sequence[Row], reading: Reading) -> list[Example]:
    """Every row's example, or examples. Raises DataError for a column or a label that a row lacks."""
    spread = reading.spec.rows if reading.spec else None
    if spread is not None:
        rows = [(place, cells) for place, row in rows for cells in _spread(place, row, spread)]
    return [_checked(place, _example(place, cells, reading), reading) for place, cells in rows]


def _example(place: str, cells: Mapping[str, Any], reading: Reading) -> Example:
    spec, columns = reading.spec, reading.columns
    has_label = spec is None or spec.golds is None
    for column, key in [
        *([(reading.label_column, "label_column")] if has_label else ()),
        *((column, f"columns.{field}") for field, column in columns.items()),
    ]:
        if cells.get(column) is None:
            raise DataError(f"{place}: no column {column!r} (task.{key}): it has {', '.join(cells)}")
    cells = {**cells, **{field: cells[column] for field, column in columns.items()}}
    label = _label(place, cells[reading.label_column], reading.theirs, reading.ours) if has_label else 0
    fields = {
        name: str(value)
        for name, value in cells.items()
        if name != reading.label_column and isinstance(value, str | int | float)
    }
    if spec is None:
        return Example(fields, label)
    fields |= {name: fields[name].strip() for name in spec.stripped if name in fields}
    if spec.prepare is not None:
        whole = _with_all(place, fields, spec.texts)
        with _faults_told(place, cells):
            fields = dict(spec.prepare(whole))
    return _with_answers(place, Example(fields, label), cells, spec)


def _with_answers(place: str, example: Example, cells: Mapping[str, Any], spec: TaskSpec) -> Example:
    """The example with its own options and right answers, where the task has such."""
    if spec.options is None and spec.golds is None:
        return example
    with _faults_told(place, cells):
        options: Sequence[Option] = spec.options({**cells, **example.fields}) if spec.options else ()
        golds: Sequence[Gold] = spec.golds(cells) if spec.golds else ()
    if spec.golds is not None and not all((golds, *golds)):
        raise DataError(f"{place}: no right answer stands there")
    whole = Example(example.fields, example.label, tuple(options), tuple(golds))
    if not options or not golds:
        return whole
    right = [number for number in range(len(options)) if whole.is_right(number)]
    if not right:
        raise DataError(f"{place}: none of its {len(options)} options is one of its right answers")
    return Example(example.fields, right[0], whole.options, whole.golds)


def _spread(
    place: str, row: Mapping[str, Any], spread: Callable[[Mapping[str, Any]], Iterable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    with _faults_told(place, row):
        return list(spread(row))


@contextmanager
def _faults_told(place: str, cells: Mapping[str, Any]) -> Iterator[None]:
    """What a task's own reading of a row stumbles over, as a DataError that says where."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{place}: no column {error}: it has {', '.join(cells)}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{place}: it cannot be read ({error}): it has {', '.join(cells)}") from None


def _with_all(place: str, fields: Mapping[str, str], names: Sequence[str]) -> Mapping[str, str]:
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


def _checked(place: str, example: Example, reading: Reading) -> Example:
    """The example, if it has every field that it is going to be asked with."""
    names = fields_of(reading.prompt.template) if reading.prompt is not None else reading.texts
    _with_all(place, example.fields, names)
    return example
