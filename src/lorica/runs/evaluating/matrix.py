"""`lorica evaluate` of many targets on many tasks: each base loaded once, each task tokenised once for it.

A matrix's folder holds its config, matrix.json and matrix.csv, and of each cell what was found and every prediction:
cells/ROW/COLUMN.json and .parquet. A finished cell is not evaluated again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from lorica import config, files, models, progress, results
from lorica.config import EvaluateConfig, ModelConfig
from lorica.errors import ConfigError, MissingPathError
from lorica.evaluation.matrix import Cell, Matrix
from lorica.results import RunFolder
from lorica.runs.bodies import Bodies
from lorica.runs.evaluating.asked_tasks import Asked
from lorica.runs.evaluating.matrix_bench import Bench
from lorica.runs.evaluating.matrix_plan import Plan, planned

MATRIX, CSV = "matrix.json", "matrix.csv"
SEED = 0  # of heads that no checkpoint has: none of these is asked anything


def evaluate_matrix(given: EvaluateConfig, say: Console) -> Matrix:
    """Evaluate every target on every task, and leave a folder; whatever can be refused is refused before there is one.

    A target that cannot be asked a task (its head is of another one, it has no head for it) leaves a cell empty, with
    the reason; so does a task that the base model's kind cannot be asked. Several adapters that are low-rank updates
    alone are evaluated in one pass, as many as `branches`.
    """
    if given.resume is not None:
        return _resumed(given, say)
    if given.output_dir is not None:
        results.check_free(given.output_dir)
    plan = planned(given)
    run = RunFolder(_folder(given))
    with files.locked_folder(run.path):
        files.write_json(run.origin, results.origin(SEED, models.choose_device(given.device)))
        files.write_atomic(run.config, config.dump(given))
        say.print(f"after a crash: lorica evaluate resume={run.path}", highlight=False, markup=False, soft_wrap=True)
        return _completed(plan, run)


def _folder(given: EvaluateConfig) -> Path:
    if given.output_dir is not None:
        return files.claim_folder(Path(given.output_dir))
    return files.new_folder(Path(given.artifacts_dir) / "evaluations", "matrix")


def _resumed(given: EvaluateConfig, say: Console) -> Matrix:
    """The matrix of a folder's own config; of the words given only `device` counts beside it."""
    assert given.resume is not None
    extra = sorted(given.model_fields_set - {"resume", "device"})
    if extra:
        raise ConfigError(f"resume={given.resume} takes its config from the matrix: drop {', '.join(extra)}")
    run = results.open_run(given.resume)
    tree = config.read_yaml(run.config)
    if "targets" not in tree:
        raise MissingPathError(f"{given.resume!r} is not a matrix's folder: its config names no targets")
    cfg = config.check(EvaluateConfig, tree)
    if (run.path / MATRIX).is_file():
        say.print(f"{run.path} is finished: nothing to resume", highlight=False, markup=False, soft_wrap=True)
        return _read(run.path)
    if "device" in given.model_fields_set:
        cfg = cfg.model_copy(update={"device": given.device})
    with files.locked_folder(run.path):
        return _completed(planned(cfg), run)


def _completed(plan: Plan, run: RunFolder) -> Matrix:
    """Every cell, one base model and one task after the other; with matrix.json the matrix is finished."""
    begin, found = time.monotonic(), {}
    with progress.bar() as shown:
        bar = shown.add_task("cells", total=len(plan.rows) * len(plan.columns), note="")
        for model in plan.bases:
            bodies = Bodies(plan.given.device, SEED)
            for asked in plan.columns:
                for cell in _of_column(plan, model, asked, bodies, run.path / "cells"):
                    found[cell.row, cell.column] = cell
                    shown.update(bar, advance=1, note=f"{cell.row} on {cell.column}")
    rows, columns = tuple(row.name for row in plan.rows), tuple(asked.name for asked in plan.columns)
    matrix = Matrix(run.path, rows, columns, tuple(found[row, column] for row in rows for column in columns))
    _write(plan, matrix, run, time.monotonic() - begin)
    if plan.given.output_dir is None:
        line = {"folder": str(run.path), "split": plan.given.split, "finished": time.time(), **_summary(matrix)}
        files.append_record(run.path.parent / "index.jsonl", line)
    return matrix


def _of_column(plan: Plan, model: ModelConfig, asked: Asked, bodies: Bodies, folder: Path) -> Iterator[Cell]:
    """The cells of all targets of one base model on one task; a prefix leaves less room."""
    rows, seat = [row for row in plan.rows if row.target.model == model], plan.seats[model, asked.name]
    for num_prefix in dict.fromkeys(row.target.num_prefix for row in rows):
        alike = [row for row in rows if row.target.num_prefix == num_prefix]
        if isinstance(seat, str):
            yield from (Cell(row.name, asked.name, reason=seat) for row in alike)
            continue
        ready = bodies.with_task(model, seat.kind, seat.task, asked.task, num_prefix)
        try:
            encoded = ready.encoded(seat.examples)
        except ConfigError as error:  # what must stay of a prompt is longer than the model reads
            yield from (Cell(row.name, asked.name, reason=str(error)) for row in alike)
            continue
        yield from Bench(plan.given, ready, asked, encoded, folder).cells(alike)


def _write(plan: Plan, matrix: Matrix, run: RunFolder, seconds: float) -> None:
    record = {
        "rows": [{"name": row.name, "target": row.word, "model": row.target.model.name} for row in plan.rows],
        "columns": [
            {"name": asked.name, "split": asked.split, "task": asked.task.model_dump(mode="json")}
            for asked in plan.columns
        ],
        "cells": [cell.as_record() for cell in matrix.cells],
        "origin": files.read_json(run.origin),
        "timing": {"seconds": seconds},
    }
    files.write_atomic(run.path / CSV, matrix.as_csv())
    files.write_json(run.path / MATRIX, record)


def _read(folder: Path) -> Matrix:
    record = files.read_json(folder / MATRIX)
    rows, columns = (tuple(each["name"] for each in record[key]) for key in ("rows", "columns"))
    return Matrix(folder, rows, columns, tuple(Cell.of_record(each) for each in record["cells"]))


def _summary(matrix: Matrix) -> dict[str, Any]:
    """A line of the index: the first metric of every cell that has one."""
    scores = {(cell.row, cell.column): cell.score for cell in matrix.cells}
    return {
        "matrix": {
            row: {column: score.value for column in matrix.columns if (score := scores[row, column]) is not None}
            for row in matrix.rows
        }
    }
