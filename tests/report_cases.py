"""Folders as the commands leave them, made on the spot: what a report is tried on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tiny
from lorica import files
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter

ORIGIN: dict[str, Any] = {
    "command": ["lorica", "train", "model=demo"],
    "lorica": "0.1.0",
    "commit": "0123abc",
    "python": "3.11.7",
    "platform": "Linux",
    "libraries": {"torch": "2.13.0", "numpy": "2.4.6"},
    "device": "cpu",
    "num_cpus": 2,
    "seed": 0,
    "started": "2026-01-02T03:04:05Z",
}
LEVELS = {"lora": 0.90, "xgblora": 0.87, "full": 0.91, "prefix": 0.72}
NUM_STEPS = 120


def run(
    folder: Path,
    task: str = "mood",
    seed: int = 0,
    *,
    arm: str = "lora",
    score: float | None = 0.9,
    rounds: bool = False,
    adapter: bool = True,
    **config: Any,
) -> Path:
    """A training run's folder; without a score it is not finished."""
    folder.mkdir(parents=True)
    tree = {"model": {"name": "demo"}, "task": {"name": None, "path": f"data/{task}"}, "adapter": {"kind": arm}}
    tree |= {"seed": seed, "learning_rate": 1e-3, "eval_split": "test", "output_dir": str(folder), **config}
    (folder / "config.yaml").write_text(json.dumps(tree), "utf-8")
    files.write_json(folder / "origin.json", ORIGIN | {"seed": seed})
    (folder / "training_loss.jsonl").write_text("".join(map(files.record_line, losses(seed, arm))), "utf-8")
    if rounds:
        lines = [ended(number) for number in range(4)]
        (folder / "ledger.jsonl").write_text("".join(map(files.record_line, lines)), "utf-8")
    if adapter:
        generator = torch.Generator().manual_seed(seed)
        updates = {
            f"model.layers.{layer}.{name}": tiny.update((24, 16), 4, 0.5, generator)
            for layer in range(2)
            for name in ("q_proj", "v_proj")
        }
        peft_format.write(Adapter(updates, {}, "demo"), folder / "adapter", task_type="CAUSAL_LM")
    if score is not None:
        files.write_json(folder / "eval_results_test.json", evaluation(task, score))
        record = {
            "config": tree,
            "metrics": {"test_accuracy": score},
            "origin": ORIGIN | {"seed": seed},
            "timing": {"seconds": 12.5 + seed, "peak_bytes": 600_000_000 + 1_000_000 * len(arm)},
            "efficiency": {"num_trainable": 1024 * len(arm), "num_parameters": 948_864, "forwards": NUM_STEPS},
        }
        files.write_json(folder / "record.json", record)
    return folder


def losses(seed: int, arm: str) -> list[dict[str, Any]]:
    """A line for each step; one of them was not applied."""
    generator = np.random.default_rng([seed, len(arm)])
    noise = generator.normal(size=NUM_STEPS)
    floor = 1.1 - LEVELS.get(arm, 0.8)
    return [
        {
            "step": step,
            "loss": floor + 2 * math.exp(-step / 25) + 0.12 * float(noise[step - 1]),
            "learning_rate": 1e-3,
            "forwards": 2 * step,
            "tokens": 64 * step,
            "seconds": 0.05 * step,
            "applied": step != 7,
        }
        for step in range(1, NUM_STEPS + 1)
    ]


def ended(number: int) -> dict[str, Any]:
    """A round's line in the ledger: laid on, rolled back or rejected."""
    return {
        "round": number,
        "first_step": 30 * number,
        "last_step": 30 * (number + 1),
        "reason": "patience",
        "accepted": number != 2,
        "rolled_back": number == 1,
    }


def evaluation(task: str, score: float) -> dict[str, Any]:
    metric = {"value": score, "low": score - 0.03, "high": min(1.0, score + 0.03), "n": 600, "higher_is_better": True}
    return {"task": task, "split": "test", "loss": 0.3, "metrics": {"accuracy": metric}, "num_truncated": 0}


def study(
    folder: Path,
    arms: tuple[str, ...] = ("lora", "xgblora", "full"),
    tasks: tuple[str, ...] = ("mood", "topic"),
    seeds: tuple[int, ...] = (0, 1, 2),
    *,
    title: str = "LoRA and its rivals",
    finished: bool = True,
) -> Path:
    """A study's folder; of an unfinished one the last arm has a failed run and missing ones."""
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text("tasks: []\n", "utf-8")
    files.write_json(folder / "origin.json", ORIGIN | {"command": ["lorica", "compare", "--seeds", "0", "1", "2"]})
    runs, cells = [], []
    for at, arm in enumerate(arms):
        for task in tasks:
            scores = {}
            for seed in seeds:
                place = f"runs/{files.slug(arm)}-{at}/{files.slug(task)}/seed{seed}"
                state = "finished" if finished or at < len(arms) - 1 else "failed" if seed == seeds[0] else "missing"
                if state == "finished":
                    scores[str(seed)] = round(LEVELS.get(arm, 0.8) - 0.05 * tasks.index(task) + 0.01 * seed, 4)
                    run(folder / place, task, seed, arm=arm, score=scores[str(seed)], rounds=arm == "xgblora")
                line = {"arm": arm, "task": task, "seed": seed, "learning_rate": 1e-3, "role": "final", "folder": place}
                error = "the loss was NaN in 10 steps" if state == "failed" else None
                runs.append({**line, "state": state, "error": error, "hash": f"{at}{seed}"})
            if scores:
                cells.append(cell(arm, task, scores, 1024 * 4 ** (at + 1)))
    record = {
        "format": 1,
        "kind": "compare",
        "title": title,
        "finished": finished,
        "budget": {"unit": "steps", "amount": NUM_STEPS},
        "arms": [{"name": arm, "overrides": {"adapter.kind": arm}} for arm in arms],
        "tasks": list(tasks),
        "seeds": list(seeds),
        "tuning": {"learning_rates": [1e-4, 1e-3], "seeds": [100], "by": "dev loss"},
        "runs": runs,
        "cells": cells,
        "differences": [difference(cells, arm, arms[0], task) for arm in arms[1:] for task in (*tasks, None)],
    }
    files.write_json(folder / "study.json", record)
    return folder


def cell(arm: str, task: str, scores: dict[str, float], num_trainable: int) -> dict[str, Any]:
    values = list(scores.values())
    mean = sum(values) / len(values)
    return {
        "arm": arm,
        "task": task,
        "learning_rate": 1e-3,
        "metric": "accuracy",
        "higher_is_better": True,
        "scores": scores,
        "mean": mean,
        "low": mean - 0.025,
        "high": mean + 0.025,
        "num_trainable": num_trainable,
        "num_parameters": 948_864,
        "peak_bytes": 5e8 + 1e4 * num_trainable,
        "seconds": 12.0 + len(arm),
        "forwards": NUM_STEPS,
        "diverged": 0,
    }


def difference(cells: list[dict[str, Any]], arm: str, against: str, task: str | None) -> dict[str, Any]:
    means = {
        name: [each["mean"] for each in cells if each["arm"] == name and task in (None, each["task"])]
        for name in (arm, against)
    }
    place = {"task": task, "arm": arm, "against": against}
    if not means[arm]:
        return {**place, "mean": None, "low": None, "high": None, "num_pairs": 0, "verdict": "no difference shown"}
    mean = sum(means[arm]) / len(means[arm]) - sum(means[against]) / len(means[against])
    verdict = "no difference shown" if abs(mean) < 0.02 else "better" if mean > 0 else "worse"
    return {**place, "mean": mean, "low": mean - 0.018, "high": mean + 0.018, "num_pairs": 3, "verdict": verdict}


def merge(folder: Path, method: str = "ties", deltas: tuple[float | None, ...] = (0.83, 0.41, None, -0.2)) -> Path:
    """A merge's folder, its tasks evaluated."""
    folder.mkdir(parents=True)
    files.write_json(folder / "merge_metadata.json", {"method": method, "origin": ORIGIN})
    tasks = [kept(name, delta) for name, delta in zip(("mood", "topic", "intent", "emotion"), deltas, strict=False)]
    summary = {"method": method, "optimizer": None, "total_error": 0.01, "tasks": tasks}
    files.write_json(folder / "summary.json", summary)
    return folder


def kept(task: str, delta: float | None) -> dict[str, Any]:
    merged = 0.3 + 0.6 * (delta or 0)
    found = None if delta is None else [delta, delta - 0.05, delta + 0.05]
    scores = {"base": 0.3, "single": 0.9 if delta is not None else 0.3, "merged": merged}
    return {
        "task": task,
        "metric": "accuracy",
        **scores,
        "interference_delta": found,
        "headroom": [0.6, 0.5, 0.7],
        "n": 600,
    }


def sweep(folder: Path, *, finished: bool = True) -> Path:
    """A sweep's folder: one trial came to nothing, one may not be chosen."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("search: {}\n", "utf-8")
    files.write_json(folder / "origin.json", ORIGIN)
    files.write_json(folder / "identity.json", {"method": "ties", "split": "dev"})
    trials = [trial(number) for number in range(12)]
    (folder / "trials.jsonl").write_text("".join(map(files.record_line, trials)), "utf-8")
    if finished:
        best = max((each for each in trials if each["feasible"]), key=lambda each: each["minimum"][0])
        files.write_json(folder / "summary.json", {"best": best, "final": {"split": "test"}})
        merge(folder / "best", deltas=(0.78, 0.5))
    return folder


def trial(number: int) -> dict[str, Any]:
    value = 0.7 - (number - 7) ** 2 / 90
    line = {"number": number, "params": {"lambda": 0.1 * number, "density": 0.5}, "seconds": 1.0}
    if number == 3:
        return {
            **line,
            "tasks": {},
            "minimum": None,
            "mean": None,
            "feasible": False,
            "reason": "the merge is not finite",
        }
    return {
        **line,
        "tasks": {task: kept(task, value + 0.1 * at) for at, task in enumerate(("mood", "topic"))},
        "minimum": [value, value - 0.05, value + 0.05],
        "mean": [value + 0.05, value, value + 0.1],
        "feasible": number != 8,
        "reason": "below the base model on mood" if number == 8 else None,
    }


def matrix(folder: Path) -> Path:
    """An evaluation matrix of three targets on two tasks; one cell is empty."""
    folder.mkdir(parents=True)
    rows, columns = ("base", "mood", "average"), ("mood", "topic")
    cells = [
        {"row": row, "column": column, **evaluation(column, 0.3 + 0.2 * y + 0.1 * x), "seconds": 1.0, "reason": None}
        for y, row in enumerate(rows)
        for x, column in enumerate(columns)
    ]
    cells[-1] = {"row": "average", "column": "topic", "seconds": None, "reason": "it has no head for topic"}
    names = {key: [{"name": name} for name in given] for key, given in (("rows", rows), ("columns", columns))}
    files.write_json(folder / "matrix.json", {**names, "cells": cells, "origin": ORIGIN, "timing": {"seconds": 6.0}})
    return folder
