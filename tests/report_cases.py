"""Folders as the commands leave them, made on the spot: what a report is tried on; and how its page is read."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

import tiny
from lorica import config, files, results
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter
from lorica.config import CompareConfig
from lorica.config.studies import KINDS
from lorica.report import page, reading
from lorica.runs.studying.outcome import FAILURES, State, chosen_rates, found_runs, outcome
from lorica.runs.studying.plan import Planned, planned

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
LEVELS = {"lora": 0.90, "xgblora": 0.87, "full": 0.90, "prefix": 0.72}
SLOPES = {"full": 0.02}  # by seed
SIZES = {"lora": 4096, "xgblora": 1024, "full": 948_864, "prefix": 2048}  # in trainable parameters
RATES = (1e-4, 1e-3, 1e-2)
NUM_STEPS, NUM_EXAMPLES = 120, 200
VOID = {"meta", "link", "input", "br", "hr", "img"}


def run(
    folder: Path,
    task: str = "mood",
    seed: int = 0,
    *,
    arm: str = "lora",
    score: float | None = 0.9,
    rounds: bool = False,
    adapter: bool = True,
    **keys: Any,
) -> Path:
    """A training run's folder; without a score it is not finished."""
    tree = {"model": {"name": "demo"}, "task": {"name": None, "path": f"data/{task}"}, "adapter": {"kind": arm}}
    tree |= {"seed": seed, "learning_rate": 1e-3, "eval_split": "test", "output_dir": str(folder), **keys}
    return left(folder, tree, score, rounds=rounds, adapter=adapter)


def left(
    folder: Path, tree: Mapping[str, Any], score: float | None, *, rounds: bool = False, adapter: bool = True
) -> Path:
    """What a run with the config `tree` leaves."""
    begin(folder, tree)
    if rounds:
        lines = [ended(number) for number in range(4)]
        (folder / "ledger.jsonl").write_text("".join(map(files.record_line, lines)), "utf-8")
    if adapter:
        generator = torch.Generator().manual_seed(tree["seed"])
        updates = {
            f"model.layers.{layer}.{name}": tiny.update((24, 16), 4, 0.5, generator)
            for layer in range(2)
            for name in ("q_proj", "v_proj")
        }
        peft_format.write(Adapter(updates, {}, "demo"), folder / "adapter", task_type="CAUSAL_LM")
    if score is not None:
        end(folder, tree, score)
    return folder


def begin(folder: Path, tree: Mapping[str, Any]) -> None:
    """What a run has left before it is evaluated."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(tree), "utf-8")
    files.write_json(folder / "origin.json", ORIGIN | {"seed": tree["seed"]})
    lines = losses(tree["seed"], tree["adapter"]["kind"])
    (folder / "training_loss.jsonl").write_text("".join(map(files.record_line, lines)), "utf-8")


def end(folder: Path, tree: Mapping[str, Any], score: float, loss: float = 0.3) -> None:
    """Its evaluation, and the record that says that it is finished."""
    kind, seed, split = tree["adapter"]["kind"], tree["seed"], tree["eval_split"]
    files.write_json(folder / f"eval_results_{split}.json", evaluation(tree["task"]["name"], score, loss))
    record = {
        "config": tree,
        "metrics": {f"{split}_accuracy": score},
        "origin": ORIGIN | {"seed": seed},
        "timing": {"seconds": 12.5 + seed + len(kind), "peak_bytes": 600_000_000 + 1_000_000 * len(kind)},
        "efficiency": {"num_trainable": SIZES[kind], "num_parameters": 948_864, "forwards": NUM_STEPS},
    }
    files.write_json(folder / "record.json", record)


def losses(seed: int, arm: str) -> list[dict[str, Any]]:
    """A line for each step; one of them was not applied."""
    noise = np.random.default_rng([seed, KINDS.index(arm)]).normal(size=NUM_STEPS)
    floor = 0.2 + 0.1 * KINDS.index(arm)
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


def evaluation(task: str | None, score: float, loss: float = 0.3) -> dict[str, Any]:
    metric = {"value": score, "low": score - 0.03, "high": min(1.0, score + 0.03), "n": 600, "higher_is_better": True}
    return {"task": task, "split": "test", "loss": loss, "metrics": {"accuracy": metric}, "num_truncated": 0}


def study(
    folder: Path,
    arms: Sequence[str] = ("lora", "xgblora", "full"),
    tasks: Sequence[str] = ("mood", "topic"),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    title: str = "LoRA and its rivals",
    grids: Mapping[str, Sequence[float]] | None = None,
    state: Callable[[Planned], State] = lambda run: "finished",
    **keys: Any,
) -> Path:
    """A study's folder: runs as its plan has them and `state` says, and what is told of every study told of them.

    `grids` are the learning rates of arms that have their own, `keys` what `lorica compare` takes beside. The best rate
    of every arm is 1e-3.
    """
    given = {"arms": [arm_of(name, (grids or {}).get(name)) for name in arms], "tasks": list(tasks), "title": title}
    given |= {"seeds": list(seeds), "max_steps": NUM_STEPS, "learning_rates": list(RATES), "run": {"model": "demo"}}
    given |= keys
    plan = planned(config.check(CompareConfig, given).resolved())
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text("tasks: []\n", "utf-8")
    files.write_json(folder / "origin.json", ORIGIN | {"command": ["lorica", "compare", "--seeds", "0", "1", "2"]})
    tuning = plan.tuning()
    for each in tuning:
        tried(folder, each, state(each))
    for each in plan.finals(chosen_rates(plan, found_runs(tuning, folder))):
        compared(folder, each, state(each), list(tasks).index(each.task))
    files.write_json(folder / "study.json", outcome(plan, folder))
    return folder


def arm_of(name: str, grid: Sequence[float] | None) -> dict[str, Any]:
    """A kind of adapter stands for itself; any other name is an arm of LoRA with a scale of its own."""
    overrides = {} if name in KINDS else {"adapter.kind": "lora", "adapter.alpha": float(len(name))}
    return {"name": name, "overrides": overrides, "learning_rates": None if grid is None else list(grid)}


def tried(folder: Path, planned: Planned, state: State) -> None:
    """A run that chooses a rate."""
    assert planned.learning_rate is not None
    place, tree = folder / planned.folder, planned.cfg.model_dump(mode="json")
    if state == "finished":
        begin(place, tree)
        distance = abs(math.log10(planned.learning_rate) + 3)
        end(place, tree, 0.5, loss=1 + distance + 0.1 * KINDS.index(planned.cfg.adapter.kind))
    elif state == "failed":
        failed(folder, planned)


def compared(folder: Path, planned: Planned, state: State, place: int) -> None:
    """A run that is compared; tasks are the harder the later they come."""
    kind, tree = planned.cfg.adapter.kind, planned.cfg.model_dump(mode="json")
    if state == "finished":
        score = LEVELS[kind] - 0.05 * place + SLOPES.get(kind, 0.01) * planned.seed
        num_right = round(score * NUM_EXAMPLES)
        at = left(folder / planned.folder, tree, num_right / NUM_EXAMPLES, rounds=kind == "xgblora")
        answers = ["yes" if example < num_right else "no" for example in range(NUM_EXAMPLES)]
        rows = {"prediction": answers, "golds": [["yes"]] * NUM_EXAMPLES}
        pyarrow.parquet.write_table(pyarrow.table(rows), results.RunFolder(at).predictions("test"))
    elif state == "failed":
        failed(folder, planned)


def failed(folder: Path, planned: Planned) -> None:
    begin(folder / planned.folder, planned.cfg.model_dump(mode="json"))
    line = {"hash": planned.hash, "folder": str(planned.folder), "error": "the loss was NaN in 10 steps"}
    files.append_record(folder / FAILURES, line)


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


class Page(HTMLParser):
    """A page's elements, its visible text, and every tag closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data

    def having(self, tag: str, key: str = "") -> Iterator[dict[str, str | None]]:
        return (attrs for name, attrs in self.elements if name == tag and (not key or key in attrs))


def written(targets: list[Path], folder: Path) -> Page:
    return Page(page.write(reading.read(targets), folder).read_text("utf-8"))


def table(reported: Path, name: str) -> list[dict[str, str]]:
    with open(reported / "figures" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
