"""Six real tasks merged by every method, at its defaults and tuned on dev; how much of each task survives, on test.

    LORICA_SHARED=FOLDER python benchmarks/merge_recovery.py [--work FOLDER] [--steps 300] [--workers 2]

One LoRA adapter (rank 8, query and value) is trained for each task on the encoder, with the task's head; `--work` keeps
them for the next time. A method is tuned over one grid of its one main parameter by the largest minimum recovery on a
subset of dev (MATH section 6.2), and the test split is scored at the default and at the tuned value. Controls: the base
with each task's head (0 by definition), the best single adapter, the whole curve of task arithmetic, random adapters of
the same norms, and one adapter trained on the union of the data. Writes results/merge_recovery.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorica import config, files, randomness, results, runs
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.config import MergeConfig, TrainConfig
from lorica.evaluation.recovery import Recovery, summarise
from lorica.evaluation.scoring import score_all
from lorica.merging.merge import Merged
from lorica.runs.bodies import Bodies
from lorica.runs.merging.evaluation import Arena, open_arenas
from lorica.runs.merging.settling import settle
from lorica.runs.sources import Source, resolve
from lorica.tasks.base import Split

SHARED = Path(os.environ.get("LORICA_SHARED", "shared")).resolve()
TASKS = ("sst2", "emotion", "ag_news", "banking77", "snips", "langid")
PAIR = ("sst2", "emotion")
DEV_SAMPLES, TEST_SAMPLES = 200, 600
FACTORS = (0.5, 1.0, 1.5, 2.0, 3.0)
SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
MIXES = (0.1, 0.3, 0.5, 0.7, 0.9)
GRIDS: dict[str, tuple[str | None, Sequence[float]]] = {  # method -> its one main parameter
    "uniform": (None, ()),
    "uniform_delta": (None, ()),
    "task_vector": (None, ()),
    "model_stock": (None, ()),
    "uniform_scalar_delta": ("scale", SCALES),
    "weighted_delta_n": (None, ()),
    "sce": ("select_topk", (0.1, 0.2, 0.5, 1.0)),
    "regmean": ("alpha", (0.1, 0.5, 0.7, 0.9, 1.0)),
    "regmean_pp": ("alpha", (0.1, 0.5, 0.7, 0.9, 1.0)),
    **dict.fromkeys(("ties", "dare", "dare_ties", "della", "magmax", "tsv", "wudi", "cart"), ("lambda", FACTORS)),
    **dict.fromkeys(("iso_c", "iso_cts"), ("lambda", FACTORS)),
    "breadcrumbs": ("lambda", SCALES),
    "knots": ("rule_params.lambda", FACTORS),
    "core": ("rule_params.lambda", FACTORS),
    "weighted": ("lambda", MIXES),
    "weighted_delta": ("lambda", MIXES),
    "slerp": ("t", MIXES),
}
Judged = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    work = Path(arguments.work).resolve()
    with multiprocessing.get_context("spawn").Pool(arguments.workers, start, (str(work),)) as pool:
        union = pool.apply_async(train, ("union", arguments.steps * len(TASKS)))
        pool.map(functools.partial(train, steps=arguments.steps), TASKS, chunksize=1)
        methods = {name: grid for name, grid in GRIDS.items() if name in (arguments.methods or GRIDS)}
        default = [(name, None, "test") for name in methods]
        tuning = [(name, value, "dev") for name, (_, grid) in methods.items() for value in grid]
        first = dict(zip([*default, *tuning], pool.imap(judge, [*default, *tuning]), strict=True))
        tuned = [(name, _best(first, name, grid), "test") for name, (_, grid) in methods.items() if grid]
        last = dict(zip(tuned, pool.imap(judge, tuned), strict=True))
        union.get()
        controls = dict(zip(CONTROLS, pool.imap(_control, CONTROLS), strict=True))
    jobs = {job[0]: job for job in tuned}
    rows = [_row(name, first[name, None, "test"], jobs.get(name), last) for name in methods]
    record = {
        "what": f"recovery of {len(TASKS)} tasks after the merge; intervals are paired bootstrap, 95 %",
        "tasks": TASKS,
        "pair": PAIR,
        "steps": arguments.steps,
        "dev_samples": DEV_SAMPLES,
        "test_samples": TEST_SAMPLES,
        "rows": rows,
        "controls": controls,
        "origin": results.origin(0, "cpu", places=["--work"]),
    }
    files.write_json(Path("results/merge_recovery.json"), record)
    for row in rows:
        print(row["method"], json.dumps(row["default"]["recovery"]), json.dumps((row["tuned"] or {}).get("recovery")))


def start(work: str) -> None:
    torch.set_num_threads(1)
    os.environ["LORICA_MERGE_WORK"] = work


def work_folder() -> Path:
    return Path(os.environ["LORICA_MERGE_WORK"])


def train(task: str, steps: int) -> None:
    """Train a task's adapter, unless an earlier run of this benchmark left it."""
    output = work_folder() / "runs" / task
    if (output / "record.json").exists():
        return
    path = _union() if task == "union" else SHARED / "data" / task
    tree = {
        "model": {"name": str(SHARED / "models" / "minilm"), "kind": "classification"},
        "task": {"path": str(path), "name": task if task in ("sst2", "emotion", "ag_news", "snips") else None},
        "adapter": {"rank": 8, "alpha": 16},
        "learning_rate": 3e-3,
        "max_steps": steps,
        "max_grad_norm": 1.0,
        "save_steps": None,
        "output_dir": str(output),
    }
    runs.train(config.check(TrainConfig, tree), Console(quiet=True))


def _union() -> Path:
    """All tasks' training data as one task, its labels told apart by the task's name."""
    folder = work_folder() / "union"
    folder.mkdir(parents=True, exist_ok=True)
    labels: list[str] = []
    rows: list[str] = []
    for task in TASKS:
        meta = json.loads((SHARED / "data" / task / "meta.json").read_text("utf-8"))
        for line in (SHARED / "data" / task / "train.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            rows.append(json.dumps({"text": row["text"], "label": row["label"] + len(labels)}))
        labels += [f"{task}: {label}" for label in meta["labels"]]
    files.write_atomic(folder / "train.jsonl", "\n".join(rows) + "\n")
    files.write_json(folder / "meta.json", {"name": "union", "labels": labels})
    return folder


@functools.cache
def sources(tasks: Sequence[str]) -> list[Source]:
    return resolve([str(work_folder() / "runs" / task) for task in tasks], work_folder() / "runs")


@functools.cache
def arena(task: str, split: Split) -> Arena:
    limit = DEV_SAMPLES if split == "dev" else TEST_SAMPLES
    tree = {"eval_subset": {"max_samples": limit}, "artifacts_dir": str(work_folder() / "artifacts")}
    (opened,) = open_arenas(sources((task,)), config.check(MergeConfig, tree), split, bodies())
    return opened


@functools.cache
def bodies() -> Bodies:
    """One base model for all tasks and splits."""
    return Bodies("auto", 0)


def _settled(name: str, params: dict[str, Any]) -> Any:
    tasks = PAIR if name in ("weighted", "weighted_delta", "slerp") else TASKS
    cfg = config.check(MergeConfig, {"method": name, "method_params": params, "num_workers": 1, "device": "cpu"})
    return tasks, settle(cfg, sources(tasks))


def judge(job: tuple[str, float | None, Split]) -> Judged:
    name, value, split = job
    tasks, merge = _settled(name, {} if value is None else _params(name, value))
    found = recovered(tasks, split, list(merge.modules()))
    print(f"{name} {value} {split}: {found['recovery']}", flush=True)
    return found


def _params(name: str, value: float) -> dict[str, Any]:
    parameter = GRIDS[name][0] or ""
    outer, _, inner = parameter.partition(".")
    return {outer: {inner: value}} if inner else {outer: value}


def recovered(tasks: Sequence[str], split: Split, modules: Sequence[Merged]) -> Judged:
    return summary_of([arena(task, split).judged(modules)[1] for task in tasks])


def summary_of(found: Sequence[Recovery]) -> Judged:
    summary = summarise(found)
    assert summary is not None
    return {"recovery": summary.as_record(), "tasks": [each.as_record() for each in found]}


def _best(found: dict[Any, Judged], name: str, grid: Sequence[float]) -> float:
    """The value with the largest minimum recovery on dev, ties by the mean."""

    def rank(value: float) -> tuple[float, float]:
        summary = found[name, value, "dev"]["recovery"]
        return summary["minimum"][0], summary["mean"][0]

    return max(grid, key=rank)


def _row(name: str, default: Judged, job: Any, last: dict[Any, Judged]) -> Judged:
    return {
        "method": name,
        "tasks": len(default["tasks"]),
        "default": default,
        "parameter": GRIDS[name][0],
        "value": job[1] if job else None,
        "tuned": last[job] if job else None,
    }


CONTROLS = ("best single", *(f"task arithmetic {scale}" for scale in SCALES), "random adapters", "joint adapter")


def _control(name: str) -> Judged:
    if name == "best single":
        return max((_single(task) for task in TASKS), key=lambda found: found["recovery"]["mean"][0])
    if name == "joint adapter":
        return _joint()
    if name == "random adapters":
        return max((_random(scale) for scale in (0.2, 0.5)), key=lambda found: found["recovery"]["minimum"][0])
    return judge(("uniform_scalar_delta", float(name.split()[-1]), "test"))


def _single(task: str) -> Judged:
    """One task's adapter used for all tasks."""
    (source,) = sources((task,))
    modules = [Merged(path, update, update.rank) for path, update in source.adapter.updates.items()]
    return {**recovered(TASKS, "test", modules), "adapter": task}


def _random(scale: float) -> Judged:
    """Task arithmetic of random updates that have the trained ones' norms, ranks and modules."""
    made = [
        dataclasses.replace(source, adapter=randomised(source.adapter, number))
        for number, source in enumerate(sources(TASKS))
    ]
    tree = {"method": "uniform_scalar_delta", "method_params": {"scale": scale}, "num_workers": 1}
    cfg = config.check(MergeConfig, tree)
    return {**recovered(TASKS, "test", list(settle(cfg, made).modules())), "scale": scale}


def randomised(adapter: Adapter, number: int) -> Adapter:
    updates = {}
    for path, update in adapter.updates.items():
        out, width = update.shape
        A = randomness.normals(number, "A", path, size=update.rank * width).view(update.rank, width)
        B = randomness.normals(number, "B", path, size=out * update.rank).view(out, update.rank)
        drawn = LowRank(A, B)
        updates[path] = drawn * (update.norm() / drawn.norm())
    return Adapter(updates, adapter.heads, adapter.base_model)


def _joint() -> Judged:
    """One adapter and one head trained on the union; a task's answer is the best of its own labels."""
    adapter = peft_format.read(work_folder() / "runs" / "union" / "adapter")
    cfg = config.check(TrainConfig, config.read_yaml(work_folder() / "runs" / "union" / "config.yaml"))
    ready = runs.prepare(cfg.model, cfg.task, "cpu", cfg.seed)
    injection.inject(ready.base.model, adapter)
    found, first = [], 0
    for task in TASKS:
        own = arena(task, "test")
        num_labels = len(own.ready.task.labels)
        scores = score_all(ready.base.model, own.rows, own.ready.collate(), batch_size=own.batch_size)
        answers = scores[:, first : first + num_labels].argmax(dim=1).numpy()
        first += num_labels
        found.append(own.recovered(answers))
    return summary_of(found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="six real tasks merged by every method")
    parser.add_argument("--work", default="runs/merge_recovery", help="where the trained adapters are kept")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--methods", nargs="+", choices=sorted(GRIDS))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
