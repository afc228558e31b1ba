"""Zeroth order on real data: our default setting against MeZO's LoRA, dev loss by forward passes.

    LORICA_SHARED=FOLDER python benchmarks/zo_defaults.py [--arms mezo lorica xgblora probes backprop]
        [--models encoder causal] [--tasks sst2 emotion snips] [--seeds 0 1 2] [--workers 2]

- `mezo`: LoRA r=8, alpha=16, two-sided, batch 16, 10,000 forwards; the rate and epsilon of its published grid that end
  lowest on dev at the first seed, for each task and model apart.
- `lorica`: what `trainer=zo` does unless told otherwise, with one rate for all; a third of the forwards, those of its
  first look at the examples and of its warm start among them, where a batch counts as two and a quarter.
- `xgblora`: the same with boosting.
- `probes`: `lorica` without the warm start, by forward passes alone.
- `backprop`: LoRA r=8 by backprop, a forward and a backward counted as three forwards.

The encoder has a head, the causal model is prompted. `needed` is after how many forwards an arm's dev loss, in the mean
over the seeds, is first at or below the one that MeZO's ends with. Every finished run is a line of
results/zo_defaults_runs.jsonl, and is not run again; results/zo_defaults.json is written when none is missing, and
`python benchmarks/draw_curves.py` draws it. Seconds are a run's CPU seconds, laid out along its passes: runs share a
machine, and may have to wait for each other.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorica import config, files, results, runs
from lorica.config import TrainConfig
from lorica.runs.studying.plan import Before, forwards_of, looked_at
from lorica.runs.training.first_look import NUM_EXAMPLES

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LORICA_SHARED", "shared")).resolve()
RUNS = ROOT / "results" / "zo_defaults_runs.jsonl"
MODELS = {"encoder": ("minilm", "classification"), "causal": ("tinystories3m_chat", "choice")}
FORWARDS, NUM_LOOKS = 10_000, 20
GRID = [{"learning_rate": rate, "zo.epsilon": 1e-2} for rate in (1e-4, 5e-5)]  # arXiv 2305.17333, table 15
MEZO = {
    "trainer": "zo",
    "adapter.rank": 8,
    "adapter.alpha": 16,
    "adapter.init": "kaiming",
    "zo.estimator": "spsa",
    "zo.num_directions": 1,
    "zo.distribution": "gaussian",
    "zo.normalize": "none",
    "zo.train": "both",
    "stratified": "false",
    "zo.warm_start_steps": 0,
}
ARMS: dict[str, dict[str, Any]] = {
    "mezo": MEZO,
    "lorica": {"trainer": "zo"},
    "xgblora": {"trainer": "zo", "adapter.kind": "xgblora"},
    "probes": {"trainer": "zo", "zo.warm_start_steps": 0},
    "backprop": {"trainer": "backprop"},
}
SHARES = {"mezo": 1.0, "lorica": 1 / 3, "xgblora": 1 / 3, "probes": 1 / 3, "backprop": 0.1}
Run = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    cells = list(itertools.product(arguments.models, arguments.tasks))
    first, *others = arguments.seeds
    tuning = [_run("mezo", *cell, first, point) for cell in cells for point in GRID if "mezo" in arguments.arms]
    _do(tuning, arguments.workers)
    best = {cell: _best(*cell, first) for cell in cells}
    rest = [_run("mezo", *cell, seed, best[cell]) for cell in cells for seed in others if "mezo" in arguments.arms]
    rest += [
        _run(arm, *cell, seed, {})
        for arm in arguments.arms
        if arm != "mezo"
        for cell in cells
        for seed in arguments.seeds
    ]
    _do(rest, arguments.workers)
    record = {
        "what": "dev loss by forward passes: our zeroth-order defaults against MeZO's LoRA",
        "forwards": FORWARDS,
        "seeds": arguments.seeds,
        "rows": [_row(*cell, best[cell], arguments) for cell in cells],
        "origin": results.origin(first, "cpu"),
    }
    files.write_json(ROOT / "results" / "zo_defaults.json", record)


def _run(arm: str, model: str, task: str, seed: int, point: dict[str, float]) -> Run:
    return {"arm": arm, "model": model, "task": task, "seed": seed, "point": point}


def _do(wanted: Sequence[Run], workers: int) -> None:
    """Run what is not in the file yet."""
    done = [line["run"] for line in _lines()]
    missing = [run for run in wanted if run not in done]
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        for line in pool.imap_unordered(_measured, missing):
            files.append_record(RUNS, line)
            print(json.dumps({**line["run"], "last": line["curve"][-1]}), flush=True)


def _measured(run: Run) -> dict[str, Any]:
    """The run, its dev loss and accuracy by forwards and by CPU seconds."""
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        cfg = _config(run, f"{folder}/run")
        trained = runs.train(cfg, Console(quiet=True))
        steps = {line["step"]: line for line in files.read_records(trained.run.training_loss)}
        curve = [
            {
                "forwards": steps[look["step"]]["forwards"] * (3 if run["arm"] == "backprop" else 1),
                "seconds": round(steps[look["step"]]["seconds"], 2),
                "loss": look["loss"],
            }
            for look in files.read_records(trained.run.eval_loss)
        ]
        score = trained.evaluation.metrics["accuracy"].value
    seconds = round(time.process_time() - begin, 1)
    return {
        "run": run,
        "curve": curve,
        "accuracy": score,
        "cpu_seconds": seconds,
        "origin": results.origin(run["seed"], "cpu"),
    }


def _config(run: Run, folder: str) -> TrainConfig:
    name, kind = MODELS[run["model"]]
    words = {"batch_size": 16, **ARMS[run["arm"]], **run["point"]}
    steps = _num_steps(run["arm"], words)
    words |= {
        "model": SHARED / "models" / name,
        "task": run["task"],
        "task.path": SHARED / "data" / run["task"],
        "task.kind": kind,
        "task.num_dev": 500,
        "max_steps": steps,
        "eval_steps": max(1, steps // NUM_LOOKS),
        "eval_split": "dev",
        "save_steps": "null",
        "seed": run["seed"],
        "output_dir": folder,
    }
    return config.read(TrainConfig, [f"{key}={value}" for key, value in words.items()])


def _num_steps(arm: str, words: dict[str, Any]) -> int:
    """As many as the arm's share of the forwards allows, with all that it counts beside its steps."""
    allowed = FORWARDS * SHARES[arm]
    if arm == "backprop":
        return int(allowed / 3)

    def passes(num_steps: int) -> int:
        given = [f"{key}={value}" for key, value in (words | {"max_steps": num_steps}).items()]
        cfg = config.read(TrainConfig, given).resolved()
        before = Before(NUM_EXAMPLES, looked_at(cfg, NUM_EXAMPLES))  # of more rows a first look takes no more
        return forwards_of(cfg, num_steps, before)

    return bisect.bisect_right(range(1, FORWARDS), allowed, key=passes)


def _best(model: str, task: str, seed: int) -> dict[str, float]:
    """The point of the grid that ends lowest on dev."""
    ends = {
        json.dumps(line["run"]["point"]): line["curve"][-1]["loss"]
        for line in _lines()
        if line["run"] == _run("mezo", model, task, seed, line["run"]["point"])
    }
    found: dict[str, float] = json.loads(min(ends, key=ends.__getitem__))
    return found


def _row(model: str, task: str, best: dict[str, float], arguments: argparse.Namespace) -> dict[str, Any]:
    """Each arm's mean curve in a cell, and after how many forwards it reaches what MeZO's ends with."""
    wanted = {
        arm: [_run(arm, model, task, seed, best if arm == "mezo" else {}) for seed in arguments.seeds]
        for arm in arguments.arms
    }
    lines = {arm: [line for line in _lines() if line["run"] in runs] for arm, runs in wanted.items()}
    curves = {arm: _mean_curve(found) for arm, found in lines.items()}
    target = curves["mezo"][-1]["loss"] if "mezo" in curves else None
    return {
        "model": model,
        "task": task,
        "point": best,
        "target": target,
        "needed": {
            arm: next((look["forwards"] for look in curve if target is not None and look["loss"] <= target), None)
            for arm, curve in curves.items()
        },
        "curves": curves,
        "ends": {
            arm: [line["curve"][-1]["loss"] for line in sorted(found, key=lambda line: line["run"]["seed"])]
            for arm, found in lines.items()
        },
        "accuracy": {arm: [line["accuracy"] for line in found] for arm, found in lines.items()},
    }


def _mean_curve(lines: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The mean over the seeds, look by look."""
    names = ("forwards", "seconds", "loss")
    return [
        {name: statistics.mean(look[name] for look in looks) for name in names}
        for looks in zip(*map(_timed, lines), strict=True)
    ]


def _timed(line: dict[str, Any]) -> list[dict[str, float]]:
    """A run's looks by its CPU seconds."""
    all_forwards = line["curve"][-1]["forwards"]
    return [look | {"seconds": line["cpu_seconds"] * look["forwards"] / all_forwards} for look in line["curve"]]


def _lines() -> list[dict[str, Any]]:
    return files.read_records(RUNS) if RUNS.exists() else []


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="our default zeroth-order setting against MeZO's LoRA on real data")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", default=["sst2", "emotion", "snips"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
