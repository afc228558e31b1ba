"""Time of evaluating choice tasks: lorica against one option at a time, on real data, side by side.

    LORICA_SHARED=FOLDER python benchmarks/evaluation_speed.py [--tasks sst2 boolq copa] [--threads 1 2] [--rounds 3]

The reference is what the definition says (MATH section 4): each option behind its prompt alone in a batch of one, the
logits of every position, their log-softmax, the mean over the option's tokens. It scores every eighth example in order
of length, ours scores all, as batches need many; figures are those of an example. The two take turns in one process,
with as many threads, and the ratios are taken round by round. Each side has a model of its own from the same file: the
reference's as transformers loads it, ours as lorica does.

The small causal model (GPT-Neo) goes through every task. The others go through two, one of short prompts and one of
long: a smaller one (Llama, two layers), random weights in the shape of OPT-125m, with its vocabulary, which reads fewer
of the first model's prompts, and the tests' tiny OPT, Llama and GPT-2, whose tokens are letters and whose prompts have
at most 128. Tiny models are all calls and next to no products; in OPT-125m it is the other way round.

- `speedup`: the reference's time / ours: CPU seconds with one thread, by the clock with more.
- `work`: the same ratio of the multiplications in matrix products, counted, padding included: what the speedup would be
  if each took as long on both sides.
- `difference`: the largest between two scores.

Writes a record to results/evaluation_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zo_step_pieces import random_opt

from lorica import files, results
from lorica.config import ModelConfig, TaskConfig
from lorica.evaluation.scoring import Collate, score_all
from lorica.runs.ready import chosen, prepare
from lorica.tasks.prompting import Choice

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LORICA_SHARED", "shared")).resolve()
SMALL, SMALLER = "tinystories3m_chat", "tinystories656k"
SHORT_AND_LONG = ("sst2", "boolq")
BATCH_SIZE = 64  # as `lorica evaluate` has it
APART = 8  # in order of length, the examples that the reference scores
NUM_WARMING = 4  # examples, before the clock runs


@dataclass(frozen=True)
class Case:
    """Rows of a task, from the shortest to the longest, and a model to score them: by lorica, and by the reference."""

    shape: str
    task: str
    model: Any
    reference: Any
    collate: Collate
    rows: Sequence[Choice]


def main() -> None:
    arguments = _arguments()
    cases = [*_cases(arguments.tasks, arguments.examples)]
    rows = [row for case in cases for row in _compared(case, arguments.threads, arguments.rounds)]
    record = {
        "what": "time of scoring the options of choice tasks, against one option at a time",
        "examples": arguments.examples,
        "rounds": arguments.rounds,
        "rows": rows,
        "origin": results.origin(0, "cpu"),
    }
    files.write_json(ROOT / "results" / "evaluation_speed.json", record)


def _cases(tasks: Sequence[str], num_examples: int) -> Iterator[Case]:
    for task in tasks:
        yield _case(SHARED / "models" / SMALL, task, num_examples)
    yield from _of_opt(num_examples)
    for task in SHORT_AND_LONG:
        yield _case(SHARED / "models" / SMALLER, task, num_examples)
    with tempfile.TemporaryDirectory() as folder:
        for family in ("opt", "llama", "gpt2"):
            tiny = _saved_tiny(Path(folder) / f"tiny-{family}", family)
            for task in SHORT_AND_LONG:
                yield _case(tiny, task, num_examples)


def _case(model: Path, task: str, num_examples: int) -> Case:
    cfg = TaskConfig(name=task, path=str(SHARED / "data" / task), num_eval=num_examples, max_length=256)
    ready = prepare(ModelConfig(name=str(model), kind="causal"), cfg, "cpu", 0)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model).eval().requires_grad_(False)
    rows = [row for row in ready.encoded(chosen(ready.task, "test", cfg)) if isinstance(row, Choice)]
    rows.sort(key=lambda row: row.length)
    return Case(model.name, task, ready.base.model, reference, ready.collate(), rows)


def _of_opt(num_examples: int) -> Iterator[Case]:
    """The small model's tokens, all of them in the larger vocabulary; lorica changes nothing in this model."""
    model = random_opt("opt-125m", "float32", "cpu")
    for task, count in zip(SHORT_AND_LONG, (num_examples // 2, num_examples // 8), strict=True):
        case = _case(SHARED / "models" / SMALL, task, count)
        yield replace(case, shape="opt-125m", model=model, reference=model)


def _saved_tiny(folder: Path, family: str) -> Path:
    sys.path.append(str(ROOT / "tests"))
    import tiny

    return tiny.save(folder, family)


def _compared(case: Case, numbers_of_threads: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    sample = replace(case, rows=case.rows[APART // 2 :: APART])
    sides = (lambda: _one_by_one(sample), lambda: _ours(case))
    alone, together = (_operations(side) / len(each.rows) for side, each in zip(sides, (sample, case), strict=True))
    of_case = {
        "model": case.shape,
        "task": case.task,
        "tokens": statistics.mean(len(row.prompts[0]) for row in case.rows),
        "options": statistics.mean(len(row.options) for row in case.rows),
        "work": alone / together,
    }
    for threads in numbers_of_threads:
        row = {**of_case, "threads": threads, **_times(case, sample, threads, rounds)}
        print(json.dumps(row), flush=True)
        yield row


def _times(case: Case, sample: Case, threads: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds an example of both, and the median and range of their ratio."""
    torch.set_num_threads(threads)
    for side in (_one_by_one, _ours):
        side(replace(case, rows=case.rows[:NUM_WARMING]))
    seconds = time.process_time if threads == 1 else time.perf_counter
    turns = [
        (_timed(lambda: _one_by_one(sample), seconds), _timed(lambda: _ours(case), seconds)) for _ in range(rounds)
    ]
    reference_ms = [1e3 * taken / len(sample.rows) for (taken, _), _ in turns]
    lorica_ms = [1e3 * taken / len(case.rows) for _, (taken, _) in turns]
    ratios = [alone / together for alone, together in zip(reference_ms, lorica_ms, strict=True)]
    (_, expected), (_, found) = turns[0]
    return {
        "reference_ms": statistics.median(reference_ms),
        "lorica_ms": statistics.median(lorica_ms),
        "speedup": statistics.median(ratios),
        "speedup_spread": [min(ratios), max(ratios)],
        "difference": float((expected - found[APART // 2 :: APART]).abs().max()),
    }


def _ours(case: Case) -> Tensor:
    """(n, options)"""
    return score_all(case.model, case.rows, case.collate, batch_size=BATCH_SIZE)


@torch.no_grad()
def _one_by_one(case: Case) -> Tensor:
    """(n, options), each option in a pass of its own."""
    return torch.tensor(
        [[_score(case.reference, *each) for each in zip(row.prompts, row.options, strict=True)] for row in case.rows]
    )


def _score(model: Any, prompt: tuple[int, ...], option: tuple[int, ...]) -> float:
    log_p = model(input_ids=torch.tensor([prompt + option])).logits[0].float().log_softmax(dim=-1)  # (t, vocabulary)
    predicting = log_p[len(prompt) - 1 : -1]
    return float(predicting.gather(1, torch.tensor(option).unsqueeze(1)).mean())


def _timed(work: Callable[[], Tensor], seconds: Callable[[], float]) -> tuple[float, Tensor]:
    begin = seconds()
    found = work()
    return seconds() - begin, found


def _operations(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="evaluating choice tasks against one option at a time")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "boolq", "copa", "emotion"])
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    return parser.parse_args()


if __name__ == "__main__":
    main()
