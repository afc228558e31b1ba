"""Time of evaluating choice tasks: lorica against one option at a time, on real data, side by side.

    LORICA_SHARED=FOLDER python benchmarks/evaluation_speed.py [--tasks sst2 boolq copa] [--examples 48] [--rounds 5]

The reference is what the definition says (MATH section 4): each option behind its prompt alone in a batch of one, the
logits of every position, their log-softmax, the mean over the option's tokens. Both score the same examples by the
small causal model, in one process of one thread, in turns; CPU seconds, ratios round by round. `difference` is the
largest between two scores. Writes a record to results/evaluation_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica import files, results
from lorica.config import ModelConfig, TaskConfig
from lorica.evaluation.scoring import score_all
from lorica.runs.ready import Ready, chosen, prepare
from lorica.tasks.prompting import Choice

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LORICA_SHARED", "shared")).resolve()
BATCH_SIZE = 64  # as `lorica evaluate` has it


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    rows = [_compare(task, arguments.examples, arguments.rounds) for task in arguments.tasks]
    record = {
        "what": "CPU seconds of scoring the options of choice tasks, against one option at a time",
        "examples": arguments.examples,
        "rounds": arguments.rounds,
        "rows": rows,
        "origin": results.origin(0, "cpu"),
    }
    files.write_json(ROOT / "results" / "evaluation_speed.json", record)


def _compare(task: str, num_examples: int, rounds: int) -> dict[str, Any]:
    cfg = TaskConfig(name=task, path=str(SHARED / "data" / task), num_eval=num_examples, max_length=256)
    ready = prepare(ModelConfig(name=str(SHARED / "models" / "tinystories3m_chat"), kind="causal"), cfg, "cpu", 0)
    rows = [row for row in ready.encoded(chosen(ready.task, "test", cfg)) if isinstance(row, Choice)]
    works = (lambda: _one_by_one(ready, rows), lambda: _ours(ready, rows))
    plain, ours = (work() for work in works)
    turns = [[_seconds(work) for work in works] for _ in range(rounds)]
    ratios = [alone / together for alone, together in turns]
    found = {
        "task": task,
        "tokens": statistics.mean(len(row.prompts[0]) for row in rows),
        "options": statistics.mean(len(row.options) for row in rows),
        "reference_ms": 1e3 * statistics.median(alone for alone, _ in turns) / len(rows),
        "lorica_ms": 1e3 * statistics.median(together for _, together in turns) / len(rows),
        "speedup": statistics.median(ratios),
        "speedup_spread": [min(ratios), max(ratios)],
        "difference": float((plain - ours).abs().max()),
    }
    print(json.dumps(found), flush=True)
    return found


def _ours(ready: Ready, rows: Sequence[Choice]) -> Tensor:
    """(n, options)"""
    return score_all(ready.base.model, rows, ready.collate(), batch_size=BATCH_SIZE)


@torch.no_grad()
def _one_by_one(ready: Ready, rows: Sequence[Choice]) -> Tensor:
    """(n, options), each option in a pass of its own."""
    return torch.tensor(
        [[_score(ready.base.model, *each) for each in zip(row.prompts, row.options, strict=True)] for row in rows]
    )


def _score(model: Any, prompt: tuple[int, ...], option: tuple[int, ...]) -> float:
    log_p = model(input_ids=torch.tensor([prompt + option])).logits[0].float().log_softmax(dim=-1)  # (t, vocabulary)
    predicting = log_p[len(prompt) - 1 : -1]
    return float(predicting.gather(1, torch.tensor(option).unsqueeze(1)).mean())


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="evaluating choice tasks against one option at a time")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "boolq", "copa", "emotion"])
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
