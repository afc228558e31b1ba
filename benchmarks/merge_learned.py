"""Six real tasks merged with coefficients learned on dev, against what is merged without learning; scored on test.

    LORICA_SHARED=FOLDER python benchmarks/merge_learned.py [--work FOLDER] [--steps 100] [--workers 2]

The adapters are those of merge_recovery.py, trained where `--work` does not have them. Every learner fits on the same
examples of dev, a part of them set aside for its best step. Beside them: the mean of the updates, the three best static
methods of results/merge_recovery.json as tuned there, and controls: a fresh LoRA of the same rank trained on the very
examples that the coefficients were fitted to, under the same heads, its rate chosen by what was set aside, and
coefficients learned for random adapters of the same norms. Writes results/merge_learned.json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import merge_recovery as study
import torch
from merge_recovery import TASKS, TEST_SAMPLES, Judged
from rich.console import Console

from lorica import config, files, results
from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.config import MergeConfig
from lorica.merging.merge import Merged
from lorica.runs.merging.learned import Lesson, learn, lesson_of
from lorica.runs.merging.settling import learner_of, settle
from lorica.tasks.batching import TrainingStream
from lorica.tasks.objectives import mean_loss

QUIET = Console(quiet=True)
FITTING = {"learning_rate": 1e-2, "eval_steps": 20, "progress_bar": False}
FRESH_RATES = (3e-4, 1e-3, 3e-3)
NUM_STATIC = 3
DESCENDING: dict[str, tuple[str, dict[str, Any]]] = {  # row -> learner, its options
    "adamerging, by task": ("adamerging", {}),
    "adamerging, by layer": ("adamerging", {"variant": "layer_wise"}),
    "adamerging++, by layer": ("adamerging", {"variant": "layer_wise", "plus_plus": True}),
    "gradient, by task": ("gradient", {}),
    "supermerge, by task": ("supermerge", {}),
    "supermerge, by layer": ("supermerge", {"variant": "layer_wise"}),
    "supermerge, by module": ("supermerge", {"variant": "module_wise"}),
    "regret_smoothmax, by task": ("regret_smoothmax", {}),
    "regret_smoothmax, by layer": ("regret_smoothmax", {"variant": "layer_wise"}),
}
BAYES = "bayes, by task"


def main() -> None:
    arguments = _arguments()
    with multiprocessing.get_context("spawn").Pool(arguments.workers, study.start, (str(arguments.work),)) as pool:
        pool.map(functools.partial(study.train, steps=300), TASKS, chunksize=1)
        learned = pool.map_async(functools.partial(_learned, steps=arguments.steps), [*DESCENDING, BAYES], chunksize=1)
        random = pool.apply_async(_learned, ("supermerge, by layer", arguments.steps, True))
        fresh = pool.map_async(functools.partial(_fresh, steps=arguments.steps), FRESH_RATES, chunksize=1)
        static = pool.map_async(_static, [("uniform_delta", None), *_best_static()], chunksize=1)
        controls = {
            "random adapters, supermerge by layer": random.get(),
            "fresh LoRA on the fitted examples": min(fresh.get(), key=lambda found: found["validation"]),
        }
        record = {
            "what": f"recovery of {len(TASKS)} tasks on test, coefficients learned on dev; paired bootstrap, 95 %",
            "tasks": TASKS,
            "steps": arguments.steps,
            "fitting": FITTING,
            "test_samples": TEST_SAMPLES,
            "static": static.get(),
            "learned": learned.get(),
            "controls": controls,
            "origin": results.origin(0, "cpu", places=["--work"]),
        }
    files.write_json(Path("results/merge_learned.json"), record)
    for row in [*record["static"], *record["learned"], *controls.values()]:
        print(row.get("row"), json.dumps(row["recovery"]["minimum"]), json.dumps(row["recovery"]["mean"]))


def _learned(row: str, steps: int, random: bool = False) -> Judged:
    sources = list(study.sources(TASKS))
    if random:
        sources = [
            dataclasses.replace(each, adapter=study.randomised(each.adapter, number))
            for number, each in enumerate(sources)
        ]
    cfg = _config(row, steps, "random" if random else "artifacts")
    merge, record = learn(settle(cfg, sources), cfg, sources, study.bodies(), QUIET)
    looks = [each["validation"] for each in record["history"] if "validation" in each]
    found = {
        "row": row,
        "validation": min(looks, default=None),
        "best_step": record["best_step"],
        "stopped": record["stopped"],
        "seconds": record["seconds"],
        "num_coefficients": len(record["coefficients"]),
        "mean_coefficients": record["mean_coefficients"],
        **study.recovered(TASKS, "test", list(merge.modules())),
    }
    print(row, found["recovery"]["minimum"], f"{record['seconds']:.0f} s", flush=True)
    return found


def _config(row: str, steps: int, artifacts: str = "artifacts") -> MergeConfig:
    if row == BAYES:
        optimizer: dict[str, Any] = {"name": "bayes", "params": {"budget": 30}}
    else:
        name, params = DESCENDING[row]
        optimizer = {"name": name, "params": {**params, "steps": steps, **FITTING}}
    folder = str(study.work_folder() / artifacts)  # what is learned is kept there, by the hash of the adapters' files
    tree = {"optimizer": optimizer, "num_workers": 1, "device": "cpu", "artifacts_dir": folder}
    return config.check(MergeConfig, tree)


def _best_static() -> list[tuple[str, float]]:
    """The methods of all six tasks that kept the most of the worst one, as tuned on dev."""
    rows = json.loads(Path("results/merge_recovery.json").read_text("utf-8"))["rows"]
    tuned = [row for row in rows if row["tuned"] and row["tasks"] == len(TASKS)]
    tuned.sort(key=lambda row: row["tuned"]["recovery"]["minimum"][0], reverse=True)
    return [(row["method"], row["value"]) for row in tuned[:NUM_STATIC]]


def _static(job: tuple[str, float | None]) -> Judged:
    name, value = job
    return {"row": name, "value": value, **study.judge((name, value, "test"))}


def _fresh(rate: float, steps: int) -> Judged:
    """One LoRA for all tasks, trained on the fitted examples under the heads that the adapters came with.

    As many steps, over as many examples of every task each, as the coefficients had.
    """
    cfg = _config("supermerge, by task", steps)
    assert cfg.optimizer is not None
    descent = learner_of(cfg.optimizer, cfg.seed).descent
    sources = study.sources(TASKS)
    lessons = [lesson_of(source, cfg, descent, study.bodies()) for source in sources]
    model = lessons[0].ready.base.model
    first = sources[0].adapter.updates
    rank = next(iter(first.values())).rank
    live = injection.inject(model, injection.create(model, list(first), rank=rank, alpha=2 * rank))
    best, looks = _descended(lessons, live, rate, steps, descent.batch_size)
    injection.remove(live)
    modules = [Merged(path, update, update.rank) for path, update in best.updates.items()]
    found = study.recovered(TASKS, "test", modules)
    print("fresh LoRA", rate, found["recovery"]["minimum"], flush=True)
    return {"row": "fresh LoRA", "learning_rate": rate, "validation": min(looks), "rank": rank, **found}


def _descended(
    lessons: Sequence[Lesson], live: injection.Live, rate: float, steps: int, batch_size: int
) -> tuple[Adapter, list[float]]:
    """The adapter at its best step by the validation rows, and their losses."""
    optimizer = torch.optim.AdamW(live.trainable().values(), lr=rate, weight_decay=0.0)
    streams = [
        TrainingStream([row.length for row in each.rows], batch_size, seed).indices()
        for seed, each in enumerate(lessons)
    ]
    best, looks = injection.extract(live), [_validation(lessons, batch_size)]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for lesson, stream in zip(lessons, streams, strict=True):
            batch = lesson.ready.collate()([lesson.rows[place] for place in next(stream)])
            loss = mean_loss(lesson.ready.base.model, batch, "classification") / len(lessons)
            torch.autograd.backward(loss)
        optimizer.step()
        if step % FITTING["eval_steps"] == 0:
            looks.append(_validation(lessons, batch_size))
            if looks[-1] == min(looks):
                best = copy.copy(injection.extract(live))
    return best, looks


@torch.no_grad()
def _validation(lessons: Sequence[Lesson], batch_size: int) -> float:
    total = 0.0
    for lesson in lessons:
        rows, model = sorted(lesson.validation, key=lambda row: row.length), lesson.ready.base.model
        parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        losses = [float(mean_loss(model, lesson.ready.collate()(part), "classification")) * len(part) for part in parts]
        total += sum(losses) / len(rows) / len(lessons)
    return total


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="six real tasks merged with learned coefficients")
    parser.add_argument("--work", default="runs/merge_recovery", type=Path, help="where the trained adapters are kept")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    return arguments


if __name__ == "__main__":
    main()
