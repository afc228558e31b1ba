"""What a Bayes sweep of 20 points finds and costs, against a grid of 20 points and against 20 evaluations.

    LORICA_SHARED=FOLDER python benchmarks/sweep_cost.py [--work FOLDER] [--seeds 5]

The six adapters that merge_recovery.py trains and keeps in `--work` are merged by TIES, whose `k` and `lambda` are
looked for: by a grid of round values, the factors as merge_recovery.py has them, and by Bayes over the same range, with
one surrogate (single) and one for each task (composite). A point is judged by the least recovery of two tasks on a
subset of dev. The cost of a sweep is the seconds of all of it over those of its evaluations alone (merging at the
point, scoring the tasks); the rest is opening the adapters, the base and the tasks, scoring the base and the own
adapters (once: later sweeps of the same adapters find those scores), proposals and records. One sweep is killed by
SIGKILL and gone on with. Writes results/sweep_cost.json.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorica import config, files, results, runs
from lorica.config import MergeConfig, SweepConfig

TASKS = ("sst2", "emotion", "ag_news", "banking77", "snips", "langid")
JUDGED = ("emotion", "banking77")  # of which TIES keeps the least
DEV_SAMPLES = 200
GRID = {"k": [10, 20, 40, 60, 80], "lambda": [0.5, 1.0, 1.5, 2.0]}
SPACE = {name: {"type": "float", "min": min(values), "max": max(values)} for name, values in GRID.items()}
NUM_POINTS = 20
KILLED_AFTER = 8  # trials
Record = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        base = _base([str(Path(arguments.work).resolve() / "runs" / task) for task in TASKS], Path(name))
        grid = _swept(base, {"type": "grid", "grid": GRID})
        found = {
            acquisition: [_swept(base, _bayes(acquisition, seed)) for seed in range(arguments.seeds)]
            for acquisition in ("single", "composite")
        }
        merge_seconds = _merge_seconds(base)
        restarted = _restarted(base, Path(name), found["single"][0]["points"])
    record = {
        "what": "least recovery on dev of the best of 20 points of TIES, and the cost of the sweep in evaluations",
        "tasks": TASKS,
        "judged": JUDGED,
        "dev_samples": DEV_SAMPLES,
        "grid_values": GRID,
        "merge_seconds": merge_seconds,
        "rows": [_row("grid", [grid], grid), *(_row(name, sweeps, grid) for name, sweeps in found.items())],
        "restarted": restarted,
        "origin": results.origin(0, "cpu", places=["--work"]),
    }
    files.write_json(Path("results/sweep_cost.json"), record)


def _base(adapters: Sequence[str], folder: Path) -> Record:
    return {
        "adapters": adapters,
        "method": "ties",
        "eval_tasks": list(JUDGED),
        "eval_subset": {"max_samples": DEV_SAMPLES},
        "artifacts_dir": str(folder / "artifacts"),
        "num_workers": 1,
        "device": "cpu",
        "save_merged": False,
        "final_split": None,
    }


def _bayes(acquisition: str, seed: int) -> Record:
    return {"type": "bayes", "budget": NUM_POINTS, "seed": seed, "acquisition": acquisition, "space": SPACE}


def _swept(base: Mapping[str, Any], search: Record) -> Record:
    """A whole sweep: what it found, and what it cost."""
    cfg = config.check(SweepConfig, {**base, "search": search})
    begin = time.monotonic()
    swept = runs.sweep(cfg, Console(quiet=True))
    seconds = time.monotonic() - begin
    best, trial_seconds = swept.summary["best"], swept.summary["timing"]["trial_seconds"]
    found = {
        "minimum": best["minimum"][0],
        "mean": best["mean"][0],
        "params": best["params"],
        "seconds": seconds,
        "evaluation_seconds": trial_seconds / NUM_POINTS,
        "ratio": seconds / trial_seconds,
    }
    print(search.get("acquisition", "grid"), search.get("seed"), found, flush=True)
    return {**found, "points": [each["params"] for each in files.read_records(swept.folder / "trials.jsonl")]}


def _merge_seconds(base: Mapping[str, Any]) -> float:
    """Of one `lorica merge` that is judged on the same examples and saves nothing."""
    tree = {key: value for key, value in base.items() if key in MergeConfig.model_fields}
    merge = config.check(MergeConfig, {**tree, "split": "dev"})
    begin = time.monotonic()
    runs.merge(merge, Console(quiet=True))
    return time.monotonic() - begin


def _restarted(base: Mapping[str, Any], folder: Path, uninterrupted: Sequence[Record]) -> Record:
    """A sweep killed by SIGKILL in the middle and gone on with: which trials ran, and whether they are the same."""
    cfg = config.check(SweepConfig, {**base, "search": _bayes("single", 0), "output_dir": str(folder / "killed")})
    (folder / "killed.yaml").write_text(config.dump(cfg))
    trials = folder / "killed" / "trials.jsonl"
    command = [sys.executable, "-m", "lorica.cli", "sweep"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, str(folder / "killed.yaml")], env=environment) as process:
        while process.poll() is None and not (trials.exists() and len(files.read_records(trials)) >= KILLED_AFTER):
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    before = [each["number"] for each in files.read_records(trials)]
    subprocess.run([*command, f"resume={folder / 'killed'}"], env=environment, check=True)
    lines = files.read_records(trials)
    return {
        "finished_before": len(before),
        "finished_after": len(lines),
        "repeated": len(lines) - len({each["number"] for each in lines}),
        "as_uninterrupted": [each["params"] for each in lines] == list(uninterrupted),
    }


def _row(name: str, sweeps: Sequence[Record], grid: Record) -> Record:
    return {
        "search": name,
        "sweeps": [{key: value for key, value in each.items() if key != "points"} for each in sweeps],
        "at_least_grid": sum(each["minimum"] >= grid["minimum"] for each in sweeps),
        **_spread("minimum", [each["minimum"] for each in sweeps]),
        **_spread("ratio", [each["ratio"] for each in sweeps]),
    }


def _spread(name: str, values: Sequence[float]) -> Record:
    return {name: statistics.median(values), f"{name}_spread": [min(values), max(values)]}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what a sweep finds and costs")
    parser.add_argument("--work", default="runs/merge_recovery", help="where merge_recovery.py keeps its adapters")
    parser.add_argument("--seeds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
