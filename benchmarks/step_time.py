"""Time of a backprop step on an encoder: lorica against PEFT in a HF Trainer, side by side in one process.

    LORICA_SHARED=FOLDER python benchmarks/step_time.py [--steps 60] [--rounds 5]

Both train LoRA r=8 on query and value and the head, AdamW, batch 16, the same sentences; the two take turns, and the
ratio is taken round by round. Three pairs:

- `defaults`: each as it comes. The Trainer draws batches at random and the encoder's own dropout is on; lorica draws
  batches of similar length and leaves the frozen encoder's dropout off.
- `random batches`: the same, but both draw their batches at random, and so pad alike.
- `random batches, dropout`: and both with the encoder's dropout on.

Writes a record to results/step_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model

from lorica import files, models, results
from lorica.adapters import injection
from lorica.optim.backprop import backprop
from lorica.optim.updates import update_rule
from lorica.runs import Ready
from lorica.tasks.batching import TrainingStream
from lorica.tasks.objectives import LossModule
from lorica.tasks.sources import load_task
from lorica.training.fit import fit

SHARED = Path(os.environ.get("LORICA_SHARED", "shared"))
BATCH, RANK, ALPHA, RATE, MAX_LENGTH = 16, 8, 16, 1e-3, 256


def main() -> None:
    arguments = _arguments()
    rows = {}
    for name, bucketing, dropout in (
        ("defaults", True, False),
        ("random batches", False, False),
        ("random batches, dropout", False, True),
    ):
        rows[name] = _pair(name, arguments.task, arguments.steps, arguments.rounds, bucketing, dropout)
    record = {
        "what": "milliseconds per backprop step; ratio is lorica / PEFT + Trainer, round by round",
        "model": arguments.model,
        "task": arguments.task,
        "batch_size": BATCH,
        "rows": rows,
        "origin": results.origin(0, "cpu"),
    }
    Path("results").mkdir(exist_ok=True)
    files.write_json(Path("results/step_time.json"), record)
    print(json.dumps(rows, indent=2))


def _pair(name: str, task: str, steps: int, rounds: int, bucketing: bool, dropout: bool) -> dict[str, Any]:
    """Median milliseconds of each, and the ratio's median and spread over the rounds."""
    ours, theirs = _ours(task, bucketing, dropout), _theirs(task)
    ours(5), theirs(5)
    times = [(ours(steps), theirs(steps)) for _ in range(rounds)]
    ratios = sorted(mine / other for mine, other in times)
    found = {
        "lorica_ms": round(1e3 * statistics.median(mine for mine, _ in times), 2),
        "peft_trainer_ms": round(1e3 * statistics.median(other for _, other in times), 2),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_spread": [round(ratios[0], 3), round(ratios[-1], 3)],
    }
    print(name, found, flush=True)
    return found


def _ours(task: str, bucketing: bool, dropout: bool) -> Callable[[int], float]:
    """A function that trains some steps and returns seconds per step."""
    loaded = load_task(task, kind="classification", path=str(SHARED / "data" / task))
    base = models.load(str(SHARED / "models/minilm"), kind="classification", num_labels=len(loaded.labels))
    ready = Ready(base, loaded, "cpu", MAX_LENGTH)
    rows = ready.encoded(loaded.splits["train"])
    targets = models.target_modules(base, "standard")
    live = injection.inject(base.model, injection.create(base.model, targets, rank=RANK, alpha=ALPHA, heads=base.heads))
    base.model.train(dropout)
    stream = TrainingStream([row.length for row in rows], BATCH, seed=0, bucketing=bucketing)
    collate = ready.collate()
    batches = (collate([rows[index] for index in batch]) for batch in stream.indices())

    def run(steps: int) -> float:
        begin = time.perf_counter()
        fit(
            LossModule(base.model, "classification"),
            live.trainable(),
            batches,
            estimator=backprop,
            optimizer=update_rule("adamw", live.trainable().values(), learning_rate=RATE),
            learning_rate=lambda step: RATE,
            num_steps=steps,
            max_grad_norm=1.0,
        )
        return (time.perf_counter() - begin) / steps

    return run


def _theirs(task: str) -> Callable[[int], float]:
    """The same for PEFT in a HF Trainer; the batches are tokenised beforehand and padded to their longest row."""
    loaded = load_task(task, kind="classification", path=str(SHARED / "data" / task))
    name = str(SHARED / "models/minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    with models.quiet():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(loaded.labels))
    wrapped = get_peft_model(
        model, LoraConfig(TaskType.SEQ_CLS, r=RANK, lora_alpha=ALPHA, target_modules=["query", "value"])
    )
    texts = [example.fields["text"] for example in loaded.splits["train"]]
    encoded = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)
    labels = [example.label for example in loaded.splits["train"]]
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], labels, strict=True)
    ]

    def run(steps: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            trainer = transformers.Trainer(wrapped, _training_arguments(folder, steps), _collator(tokenizer), rows)
            trainer.remove_callback(transformers.PrinterCallback)
            begin = time.perf_counter()
            trainer.train()
            return (time.perf_counter() - begin) / steps

    return run


def _training_arguments(folder: str, steps: int) -> Any:
    return transformers.TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        logging_steps=10_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def _collator(tokenizer: Any) -> Callable[[Sequence[Any]], Any]:
    return transformers.DataCollatorWithPadding(tokenizer)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="time of a backprop step against PEFT + HF Trainer")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
