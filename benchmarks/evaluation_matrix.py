"""Cost of a matrix: eight adapters on eight tasks against evaluating each by itself, on real data and a small model.

    LORICA_SHARED=FOLDER python benchmarks/evaluation_matrix.py [--examples 16] [--rounds 3]

The adapters are LoRA r=8 on query and value of every block of the small causal model, or of its last two, with random
factors: what a pass costs does not depend on their values. `alone` is one adapter on one task as `lorica evaluate` does
it, from the base model's file to the metrics and the predictions' file, without the start of the process; the eight of
the diagonal are timed, each on its own task. `matrix` is the whole, files included, several adapters in a pass or
one after the other; `ratio` is its cost against that of as many evaluations alone, diagonal and rest in proportion.
`scoring` is the part of the evaluations alone that no sharing could save: with base and tokens at hand, the passes and
the metrics. CPU seconds, one process of one thread, in turns, ratios round by round. `difference` is the largest
between two scores. Writes a record to results/evaluation_matrix.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from rich.console import Console

from lorica import files, models, results
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.config import EvaluateConfig, ModelConfig, TaskConfig
from lorica.evaluation.matrix import Matrix
from lorica.evaluation.predictions import write_predictions
from lorica.runs import evaluate_matrix
from lorica.runs.evaluating.targets import Target
from lorica.runs.ready import chosen, prepare

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LORICA_SHARED", "shared")).resolve()
MODEL = ModelConfig(name=str(SHARED / "models" / "tinystories3m_chat"), kind="causal")
TASKS = ("sst2", "emotion", "snips", "ag_news", "mr", "rte", "copa", "boolq")
DEPTHS = {"all": 8, "the last two": 2}  # blocks of the eight that carry an adapter
WAYS = {"one after the other": 1, "four in a pass": 4}
BATCH_SIZE, MAX_LENGTH = 64, 256


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["LORICA_CACHE"] = place
        rows = [
            row
            for name, depth in DEPTHS.items()
            for row in _compare(name, depth, arguments.examples, arguments.rounds, Path(place))
        ]
    record = {
        "what": "CPU seconds of evaluating eight adapters on eight tasks, together and each by itself",
        "tasks": list(TASKS),
        "examples": arguments.examples,
        "rounds": arguments.rounds,
        "rows": rows,
        "origin": results.origin(0, "cpu"),
    }
    files.write_json(ROOT / "results" / "evaluation_matrix.json", record)


def _compare(name: str, depth: int, num_examples: int, rounds: int, place: Path) -> list[dict[str, Any]]:
    folders = _adapters(depth, place / str(depth))
    base = {"model": MODEL, "eval_batch_size": BATCH_SIZE}
    task = TaskConfig(path=str(SHARED / "data" / "{task}"), num_eval=num_examples, max_length=MAX_LENGTH)
    whole = {**base, "tasks": list(TASKS), "task": task, "targets": [str(folder) for folder in folders]}
    turns: list[dict[str, float]] = []
    found: dict[str, Matrix] = {}
    for number in range(rounds):
        taken = dict.fromkeys(("alone", "scoring"), 0.0)
        for folder, each in zip(folders, TASKS, strict=True):
            for part, seconds in _alone(folder, _task(each, num_examples), place).items():
                taken[part] += seconds
        for way, branches in WAYS.items():
            out = place / f"{depth}-{number}-{branches}"
            given = EvaluateConfig(**whole, branches=branches, output_dir=str(out))
            begin = time.process_time()
            found[way] = evaluate_matrix(given, Console(quiet=True))
            taken[way] = time.process_time() - begin
        turns.append(taken)
        print(json.dumps(taken), flush=True)
    difference = _difference(*found.values())
    return [{"adapted": name, "way": way, **_figures(turns, way), "difference": difference} for way in WAYS]


def _figures(turns: Sequence[dict[str, float]], way: str) -> dict[str, Any]:
    num_rows = len(TASKS)  # of the matrix; `alone` and `scoring` are of its diagonal
    found: dict[str, Any] = {
        "matrix_seconds": statistics.median(turn[way] for turn in turns),
        "alone_seconds": num_rows * statistics.median(turn["alone"] for turn in turns),
        "scoring_seconds": num_rows * statistics.median(turn["scoring"] for turn in turns),
    }
    for name, part in (("ratio", "alone"), ("scoring_ratio", "scoring")):
        ratios = [turn[way] / (num_rows * turn[part]) for turn in turns]
        found |= {name: statistics.median(ratios), f"{name}_spread": [min(ratios), max(ratios)]}
    return found


def _alone(folder: Path, task: TaskConfig, place: Path) -> dict[str, float]:
    """CPU seconds of one adapter on its own task, the whole, and of that the passes and the metrics."""
    begin = time.process_time()
    ready = prepare(MODEL, task, "cpu", 0)
    with Target(MODEL, folder).laid_on(ready):
        rows = ready.encoded(chosen(ready.task, "test", task))
        before = time.process_time()
        found = ready.evaluated("test", rows, BATCH_SIZE)
        scoring = time.process_time() - before
    write_predictions(place / "alone.parquet", ready.task, rows, found)
    return {"alone": time.process_time() - begin, "scoring": scoring}


def _task(name: str, num_examples: int) -> TaskConfig:
    return TaskConfig(path=str(SHARED / "data" / name), num_eval=num_examples, max_length=MAX_LENGTH)


def _adapters(depth: int, place: Path) -> list[Path]:
    """Folders of random adapters, one for each task, on the last `depth` blocks."""
    ready = prepare(MODEL, _task("sst2", 8), "cpu", 0)
    targets = models.target_modules(ready.base, "standard")
    per_block = len(targets) // DEPTHS["all"]
    made = []
    for seed, task in enumerate(TASKS):
        drawn = injection.create(ready.base.model, targets[-depth * per_block :], rank=8, alpha=16, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        updates = {
            path: LowRank(each.A, torch.randn(each.B.shape, generator=generator) * 0.05, each.scale)
            for path, each in drawn.updates.items()
        }
        peft_format.write(Adapter(updates, base_model=MODEL.name), place / task)
        made.append(place / task)
    return made


def _difference(one: Matrix, other: Matrix) -> float:
    """The largest between two scores that the two wrote down."""
    return max(
        abs(mine - theirs)
        for cell in one.cells
        for rows in zip(*(_scores(matrix, cell.row, cell.column) for matrix in (one, other)), strict=True)
        for mine, theirs in zip(*rows, strict=True)
    )


def _scores(matrix: Matrix, row: str, column: str) -> list[list[float]]:
    table = pyarrow.parquet.read_table(matrix.folder / "cells" / row / f"{column}.parquet", columns=["scores"])
    return table["scores"].to_pylist()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a matrix of evaluations against each by itself")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
