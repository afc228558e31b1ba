"""`lorica demo`: an adapter for each embedded task, LoRA by backprop against LoRA by spsa, and what averaging costs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lorica import config, files, runs
from lorica.adapters import peft_format
from lorica.config import DemoConfig, EvaluateConfig, TrainConfig
from lorica.demo import language
from lorica.evaluation.evaluate import Evaluation
from lorica.runs import Trained

BOTH_WAYS = "sentiment"


@dataclass(frozen=True)
class Row:
    """What the demo found for one task."""

    task: str
    zero_shot: Evaluation
    single: Trained
    averaged: Evaluation


def run(words: list[str], out: Console, say: Console) -> None:
    """Run the demo, print its tables, and print its folder's path last."""
    given = config.read(DemoConfig, words)
    begin = time.monotonic()
    folder = files.claim_folder(Path(given.output_dir)) if given.output_dir else files.new_folder(Path("runs"), "demo")
    language.write_tasks(folder / "data")
    tasks = list(language.TASKS)
    singles = {task: runs.train(_training(given, folder, task, "backprop"), say) for task in tasks}
    by_spsa = runs.train(_training(given, folder, BOTH_WAYS, "zo"), say)
    average = _average(folder, list(singles.values()))
    rows = [
        Row(task, _evaluated(folder, task, None), singles[task], _evaluated(folder, task, average)) for task in tasks
    ]
    out.print(_tasks_table(rows))
    out.print(_ways_table(rows, by_spsa))
    out.print(f"{time.monotonic() - begin:.0f} s; try: lorica evaluate {singles[tasks[0]].run.path}", highlight=False)
    out.print(str(folder), highlight=False, soft_wrap=True)


def _training(given: DemoConfig, folder: Path, task: str, trainer: str) -> TrainConfig:
    zeroth_order = trainer == "zo"
    return config.check(
        TrainConfig,
        {
            "model": "demo",
            "task": {"path": str(folder / "data" / task)},
            "trainer": trainer,
            "learning_rate": given.spsa_learning_rate if zeroth_order else given.learning_rate,
            "max_steps": given.spsa_steps if zeroth_order else given.steps,
            "zo": {"epsilon": given.epsilon, "estimator": "spsa"} if zeroth_order else {},
            "adapter": {"init": "kaiming"},  # the tables compare estimators, from one start
            "seed": given.seed,
            "logging_steps": max(1, (given.spsa_steps if zeroth_order else given.steps) // 4),
            "output_dir": str(folder / f"{task}-{trainer}"),
        },
    )


def _average(folder: Path, trained: list[Trained]) -> Path:
    """The mean of the adapters' updates, exact, as an adapter folder."""
    adapters = [peft_format.read(each.run.adapter) for each in trained]
    path = folder / "average"
    peft_format.write(reduce(add, adapters) * (1 / len(adapters)), path, task_type="CAUSAL_LM")
    return path


def _evaluated(folder: Path, task: str, adapter: Path | None) -> Evaluation:
    tree = {"model": "demo", "task": {"path": str(folder / "data" / task)}, "split": "test"}
    return runs.evaluate_target(str(adapter) if adapter else None, config.check(EvaluateConfig, tree))


def _tasks_table(rows: list[Row]) -> Table:
    table = Table("task", "zero-shot", "its own adapter", "average of all four", "seconds", title="test accuracy")
    for row in rows:
        found = (row.zero_shot, row.single.evaluation, row.averaged)
        table.add_row(row.task, *(_with_interval(each) for each in found), f"{row.single.seconds:.0f}")
    return table


def _ways_table(rows: list[Row], by_spsa: Trained) -> Table:
    table = Table("LoRA by", "test accuracy", "forward passes", "seconds", title=f"{BOTH_WAYS}, two ways to train")
    by_backprop = next(row.single for row in rows if row.task == BOTH_WAYS)
    for name, trained in (("backprop", by_backprop), ("spsa", by_spsa)):
        forwards = files.read_records(trained.run.training_loss)[-1]["forwards"]
        table.add_row(name, _with_interval(trained.evaluation), f"{forwards:,}", f"{trained.seconds:.0f}")
    return table


def _with_interval(evaluation: Evaluation) -> str:
    score = evaluation.metrics["accuracy"]
    return f"{score.value:.3f}  {score.low:.2f} to {score.high:.2f}"
