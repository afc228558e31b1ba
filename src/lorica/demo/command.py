"""`lorica demo`: an adapter for each embedded task, what averaging costs, four ways to train, a report on it all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lorica import config, files, runs
from lorica.config import CompareConfig, DemoConfig, MergeConfig, ReportConfig, TrainConfig
from lorica.demo import language
from lorica.evaluation.recovery import Recovery
from lorica.runs import Studied, Trained

COMPARED = "topic"  # of the four tasks, the one that forward passes alone learn in a few hundred of them
BOOSTER_STEPS = 50


def run(words: list[str], out: Console, say: Console) -> None:
    """Run the demo, print its tables, and print the path of the report last."""
    given = config.read(DemoConfig, words)
    begin = time.monotonic()
    folder = files.claim_folder(Path(given.output_dir)) if given.output_dir else files.new_folder(Path("runs"), "demo")
    language.write_tasks(folder / "data")
    singles = [runs.train(_training(given, folder, task), say) for task in language.TASKS]
    average = runs.merge(_averaging(folder, singles), say)
    compared = runs.study(_comparison(given, folder), say)
    page = runs.report([str(folder)], ReportConfig(title="lorica demo"))
    out.print(_tasks_table(average.recoveries, singles))
    out.print(_ways_table(compared))
    took = f"{time.monotonic() - begin:.0f} s"
    out.print(f"{took}; try: lorica evaluate {singles[0].run.path}; the report:", highlight=False, soft_wrap=True)
    out.print(str(page), highlight=False, markup=False, soft_wrap=True)


def _training(given: DemoConfig, folder: Path, task: str) -> TrainConfig:
    return config.check(
        TrainConfig,
        {
            "model": "demo",
            "task": {"path": str(folder / "data" / task)},
            "learning_rate": given.learning_rate,
            "max_steps": given.steps,
            "seed": given.seed,
            "logging_steps": max(1, given.steps // 3),
            "output_dir": str(folder / task),
        },
    )


def _averaging(folder: Path, singles: Sequence[Trained]) -> MergeConfig:
    """The mean of the adapters' updates, exact, judged on the task of each."""
    return config.check(
        MergeConfig,
        {
            "adapters": [str(each.run.path) for each in singles],
            "method": "uniform_delta",
            "eval_tasks": ["all"],
            "artifacts_dir": str(folder / "artifacts"),
            "output_dir": str(folder / "average"),
        },
    )


def _comparison(given: DemoConfig, folder: Path) -> CompareConfig:
    """LoRA and XGBLoRA, each by backprop and by zeroth order, one after the other in this process."""
    rates = {
        ("lora", "backprop"): given.learning_rate,
        ("xgblora", "backprop"): given.learning_rate,
        ("lora", "zo"): given.zo_learning_rate,
        # A booster of rank 1 has an eighth of the directions to be lost in.
        ("xgblora", "zo"): 2 * given.zo_learning_rate,
    }
    return config.check(
        CompareConfig,
        {
            "title": "Four ways to train one adapter",
            "arms": [
                {
                    "name": f"{kind} by {trainer}",
                    "overrides": {"adapter.kind": kind, "trainer": trainer, "learning_rate": rate},
                }
                for (kind, trainer), rate in rates.items()
            ],
            "model": "demo",
            "task": {"path": str(folder / "data" / COMPARED)},
            "boosting": {"steps_per_iteration": BOOSTER_STEPS},
            "max_steps": given.comparison_steps,
            "seeds": [given.seed],
            "launcher": "inline",
            "output_dir": str(folder / "comparison"),
        },
    )


def _tasks_table(recoveries: Sequence[Recovery], singles: Sequence[Trained]) -> Table:
    table = Table("task", "zero-shot", "its own adapter", "average of all four", "kept", title="test accuracy")
    for found, single in zip(recoveries, singles, strict=True):
        own = _with_interval(single)
        kept = f"{found.delta.value:.2f}" if found.has_headroom else "no headroom"
        table.add_row(found.task, f"{found.base:.3f}", own, f"{found.merged:.3f}", kept)
    return table


def _with_interval(single: Trained) -> str:
    score = single.evaluation.metrics["accuracy"]
    return f"{score.value:.3f}  {score.low:.2f} to {score.high:.2f}"


def _ways_table(compared: Studied) -> Table:
    """What each arm reaches and takes: a step by zeroth order is several forward passes and no backward one."""
    verdicts = {each["arm"]: each["verdict"] for each in compared.outcome["differences"] if each["task"] is not None}
    first, *_ = compared.outcome["arms"]
    table = Table("way", "test accuracy", f"against {first['name']}", "forward passes", "seconds", title=COMPARED)
    for cell in compared.outcome["cells"]:
        table.add_row(cell["arm"], _score(cell), verdicts.get(cell["arm"], ""), *_costs(cell))
    return table


def _score(cell: Mapping[str, Any]) -> str:
    return f"{cell['mean']:.3f}" if cell["mean"] is not None else "failed"


def _costs(cell: Mapping[str, Any]) -> list[str]:
    return ["" if cell[key] is None else f"{cell[key]:,.0f}" for key in ("forwards", "seconds")]
