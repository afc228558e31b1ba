"""LoRA against XGBLoRA on real data: test accuracy after the same number of backprop steps, the rate tuned per arm.

    LORICA_SHARED=FOLDER python benchmarks/boosting_arms.py [--tasks sst2 emotion snips] [--steps 300] [--seeds 0 1 2]

Arms: LoRA r=8 and r=1, XGBLoRA (rank-1 boosters, scale 1) whose rounds end by steps, adaptively, or by steps with the
probe as judge. Each arm's learning rate is the best of one grid on dev at the first seed; test is scored at that rate
alone, once a seed. The rate is constant in every arm: one that falls to zero over the run leaves the late boosters
nothing to learn with. Writes a record to results/boosting_arms.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorica import config, files, results, runs
from lorica.config import TrainConfig

SHARED = Path(os.environ.get("LORICA_SHARED", "shared")).resolve()
RATES = (1e-3, 3e-3, 5e-3, 1e-2)
NUM_ROUNDS = 4
ARMS: dict[str, dict[str, Any]] = {
    "LoRA r=8": {"adapter": {"rank": 8, "alpha": 16}},
    "LoRA r=1": {"adapter": {"rank": 1, "alpha": 2}},
    "XGBLoRA steps": {"boosting": {}},
    "XGBLoRA adaptive": {"boosting": {"use_adaptive_merge": True, "patience": 30}},
    "XGBLoRA probe": {"boosting": {"judge": "probe", "probe_size": 256}},
}
Found = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    cells = [(arm, task) for task in arguments.tasks for arm in ARMS]
    first = arguments.seeds[0]
    with multiprocessing.get_context("spawn").Pool(arguments.workers, torch.set_num_threads, (1,)) as pool:
        tuning = [(arm, task, arguments.steps, rate, "dev", first) for arm, task in cells for rate in RATES]
        on_dev = dict(zip(tuning, pool.imap(_run, tuning), strict=True))
        best = {
            (arm, task): max(RATES, key=lambda rate: on_dev[arm, task, arguments.steps, rate, "dev", first]["accuracy"])
            for arm, task in cells
        }
        final = [
            (arm, task, arguments.steps, best[arm, task], "test", seed)
            for arm, task in cells
            for seed in arguments.seeds
        ]
        on_test = dict(zip(final, pool.imap(_run, final), strict=True))
    rows = [_row(arm, task, best[arm, task], on_dev, on_test) for arm, task in cells]
    record = {
        "what": "test accuracy after the same steps; learning rate tuned per arm on dev",
        "steps": arguments.steps,
        "rates": RATES,
        "rows": rows,
        "means": _means(rows),
        "origin": results.origin(first, "cpu"),
    }
    files.write_json(Path("results/boosting_arms.json"), record)
    print(json.dumps(record["means"], indent=2))


def _run(job: tuple[str, str, int, float, str, int]) -> Found:
    arm, task, steps, rate, split, seed = job
    with tempfile.TemporaryDirectory() as folder:
        cfg = _config(arm, task, steps, rate, split, seed, folder)
        trained = runs.train(cfg, Console(quiet=True))
        ledger = trained.run.path / "ledger.jsonl"
        rounds = files.read_records(ledger) if ledger.exists() else []
        score = trained.evaluation.metrics["accuracy"]
        found = {
            "accuracy": score.value,
            "num_rounds": len(rounds),
            "accepted": sum(each["accepted"] for each in rounds),
        }
    print(f"{arm}, {task}, rate {rate:g}, {split}, seed {seed}: {found}", flush=True)
    return found


def _config(arm: str, task: str, steps: int, rate: float, split: str, seed: int, folder: str) -> TrainConfig:
    options = {key: dict(value) for key, value in ARMS[arm].items()}
    if "boosting" in options:
        options["adapter"] = {"kind": "xgblora"}
        if arm != "XGBLoRA adaptive":
            options["boosting"]["steps_per_iteration"] = steps // NUM_ROUNDS
    tree = {
        "model": str(SHARED / "models" / "minilm"),
        "task": {"name": task, "path": str(SHARED / "data" / task)},
        "learning_rate": rate,
        "schedule": "constant",
        "max_steps": steps,
        "max_grad_norm": 1.0,
        "save_steps": None,
        "eval_split": split,
        "seed": seed,
        "output_dir": f"{folder}/run",
        **options,
    }
    return config.check(TrainConfig, tree)


def _row(arm: str, task: str, rate: float, on_dev: dict[Any, Found], on_test: dict[Any, Found]) -> dict[str, Any]:
    scores = [found for job, found in on_test.items() if job[:2] == (arm, task)]
    tuned = {str(job[3]): round(found["accuracy"], 4) for job, found in on_dev.items() if job[:2] == (arm, task)}
    accuracies = [each["accuracy"] for each in scores]
    return {
        "arm": arm,
        "task": task,
        "rate": rate,
        "dev": tuned,
        "test": [round(each, 4) for each in accuracies],
        "mean": round(statistics.mean(accuracies), 4),
        "spread": round(max(accuracies) - min(accuracies), 4),
        "num_rounds": [each["num_rounds"] for each in scores],
        "accepted": [each["accepted"] for each in scores],
    }


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean test accuracy of each arm over the tasks."""
    return {arm: round(statistics.mean(row["mean"] for row in rows if row["arm"] == arm), 4) for arm in ARMS}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="LoRA against XGBLoRA by backprop")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "emotion", "snips"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
