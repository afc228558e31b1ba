"""Accuracy of LoRA r=8 by lorica and by PEFT, side by side: same model class, data, steps, batch, rate and seeds.

    LORICA_SHARED=FOLDER python benchmarks/quality_vs_peft.py [--models encoder causal] [--seeds 0 1 2]

Three arms, all scored on dev.jsonl by the same evaluation:

- `lorica`: what `lorica train` reaches with its defaults; `lorica evaluate` must give the same record from its folder.
- `peft`: PEFT's model in a plain loop over the same batches from the same first factors, the base's own dropout off as
  lorica leaves it. The two should differ by rounding alone.
- `peft_trainer` (encoder): PEFT in a HF Trainer as it comes: its own draws, random batches, the base's dropout on.

Writes a record to results/quality_vs_peft.json.
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
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from rich.console import Console
from torch.nn import functional as F

from lorica import config, files, models, results, runs
from lorica.adapters import injection
from lorica.config import EvaluateConfig, ModelConfig, TaskConfig, TrainConfig
from lorica.evaluation.evaluate import evaluate
from lorica.runs import Ready
from lorica.tasks.batching import TrainingStream
from lorica.tasks.objectives import scores

SHARED = Path(os.environ.get("LORICA_SHARED", "shared")).resolve()
STEPS = {"sst2": 500, "emotion": 300, "snips": 300}
SPLIT = {"sst2": "dev", "emotion": "dev", "snips": "test"}  # the one that is dev.jsonl: SNIPS has no further test file
MODELS = {"encoder": ("minilm", 1e-3), "causal": ("tinystories3m_chat", 2e-3)}
ARMS = ("lorica", "peft", "peft_trainer")
RECORD = Path("results/quality_vs_peft.json")
Job = tuple[str, str, str, int]  # arm, model, task, seed
PROJECTIONS = {"encoder": ["query", "value"], "causal": ["q_proj", "v_proj"]}


def main() -> None:
    arguments = _arguments()
    pairs = [(model, task) for model in arguments.models for task in STEPS]
    jobs = [job for model, task in pairs for job in _jobs(model, task, arguments.seeds) if job[0] in arguments.arms]
    before = files.read_json(RECORD)["rows"] if RECORD.exists() else []
    rows = {(row["model"], row["task"]): row for row in before}
    with multiprocessing.get_context("spawn").Pool(arguments.workers, _one_thread) as pool:
        found = dict(zip(jobs, pool.imap(_run, jobs), strict=True))
    for model, task in pairs:
        here = {job: accuracy for job, accuracy in found.items() if job[1:3] == (model, task)}
        rows[model, task] = _row(model, task, here, rows.get((model, task), {}))
        print(json.dumps(rows[model, task]), flush=True)
    record = {
        "what": "dev accuracy, LoRA r=8 alpha=16",
        "rows": list(rows.values()),
        "origin": results.origin(0, "cpu"),
    }
    files.write_json(RECORD, record)


def _jobs(model: str, task: str, seeds: Sequence[int]) -> list[Job]:
    """Every arm and seed of a row; the Trainer, slow and only there to be seen, at the first seed alone."""
    jobs = [(arm, model, task, seed) for arm in ("lorica", "peft") for seed in seeds]
    return [*jobs, ("peft_trainer", model, task, seeds[0])] if model == "encoder" else jobs


def _run(job: Job) -> float:
    arm, model, task, seed = job
    accuracy = {"lorica": _lorica, "peft": _peft, "peft_trainer": _peft_trainer}[arm](model, task, seed)
    print(f"{arm} {model} {task} seed {seed}: {accuracy:.4f}", flush=True)
    return accuracy


def _one_thread() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()


def _row(model: str, task: str, found: dict[Job, float], before: dict[str, Any]) -> dict[str, Any]:
    """The row's arms as found now; an arm that was not run again stays as it was."""
    arms: dict[str, list[float]] = {arm: before[arm] for arm in ARMS if arm in before}
    for arm in {job[0] for job in found}:
        arms[arm] = [round(accuracy, 4) for job, accuracy in found.items() if job[0] == arm]
    means = {f"{arm}_mean": round(statistics.mean(each), 4) for arm, each in arms.items()}
    row = {"model": model, "task": task, "steps": STEPS[task], **arms, **means}
    return {**row, "difference": round(means["lorica_mean"] - means["peft_mean"], 4)}


def _config(model: str, task: str, seed: int, folder: str) -> TrainConfig:
    name, rate = MODELS[model]
    return config.check(
        TrainConfig,
        {
            "model": str(SHARED / "models" / name),
            "task": {"name": task, "path": str(SHARED / "data" / task)},
            "adapter": {"rank": 8, "alpha": 16},
            "learning_rate": rate,
            "max_steps": STEPS[task],
            "max_grad_norm": 1.0,
            "eval_split": SPLIT[task],
            "seed": seed,
            "output_dir": f"{folder}/run",
        },
    )


def _lorica(model: str, task: str, seed: int) -> float:
    """The accuracy that `lorica train` prints, which `lorica evaluate` must give again from the saved folder."""
    with tempfile.TemporaryDirectory() as folder:
        trained = runs.train(_config(model, task, seed, folder), Console(quiet=True))
        again = runs.evaluate_target(str(trained.run.path), EvaluateConfig())
        if again.as_record() != trained.evaluation.as_record():
            raise SystemExit(f"evaluate gives {again.as_record()}, train gave {trained.evaluation.as_record()}")
        return trained.evaluation.metrics["accuracy"].value


def _peft(model: str, task: str, seed: int) -> float:
    """PEFT over the same batches from the same first factors and head."""
    ready, wrapped = _wrapped(model, task, seed)
    start = injection.create(
        models.load(ready.base.name, kind=ready.base.kind, num_labels=len(ready.task.labels), seed=seed).model,
        models.target_modules(ready.base, "standard"),
        rank=8,
        alpha=16,
        seed=seed,
    )
    modules = dict(wrapped.base_model.model.named_modules())
    for path, update in start.updates.items():
        modules[path].lora_A["default"].weight.data.copy_(update.A)
    _train_plainly(ready, STEPS[task], MODELS[model][1], seed)
    return _accuracy(ready, task)


def _peft_trainer(model: str, task: str, seed: int) -> float:
    """PEFT in a HF Trainer, as it comes."""
    transformers.set_seed(seed)
    ready, wrapped = _wrapped(model, task, seed)
    examples = ready.task.splits["train"]
    encoded = ready.base.tokenizer([example.fields["text"] for example in examples], truncation=True, max_length=512)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": example.label}
        for ids, mask, example in zip(encoded["input_ids"], encoded["attention_mask"], examples, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=STEPS[task],
            per_device_train_batch_size=16,
            learning_rate=MODELS[model][1],
            seed=seed,
            logging_steps=10_000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        collator = transformers.DataCollatorWithPadding(ready.base.tokenizer)
        trainer = transformers.Trainer(wrapped, arguments, collator, rows)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return _accuracy(ready, task)


def _wrapped(model: str, task: str, seed: int) -> tuple[Ready, Any]:
    """The same base and task as lorica loads, and PEFT's model over it."""
    name = str(SHARED / "models" / MODELS[model][0])
    ready = runs.prepare(ModelConfig(name=name), TaskConfig(name=task, path=str(SHARED / "data" / task)), "cpu", seed)
    ready.base.model.requires_grad_(True)  # as transformers hands it to PEFT
    kind = TaskType.SEQ_CLS if model == "encoder" else TaskType.CAUSAL_LM
    options = LoraConfig(kind, r=8, lora_alpha=16, target_modules=PROJECTIONS[model])
    return ready, get_peft_model(ready.base.model, options)


def _accuracy(ready: Ready, task: str) -> float:
    """PEFT lives inside the base model, which is asked itself: its wrapper hides what the forward takes (positions)."""
    rows = ready.encoded(ready.task.splits[SPLIT[task]])
    found = evaluate(ready.base.model, ready.task, SPLIT[task], rows, ready.collate(), batch_size=64)
    return found.metrics["accuracy"].value


def _train_plainly(ready: Ready, steps: int, rate: float, seed: int) -> None:
    model = ready.base.model.eval()
    rows = ready.encoded(ready.task.splits["train"])
    stream = TrainingStream([row.length for row in rows], 16, seed)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    collate = ready.collate()
    batches = stream.indices()
    for _ in range(steps):
        batch = collate([rows[index] for index in next(batches)])
        optimizer.zero_grad()
        F.cross_entropy(scores(model, batch), batch.labels).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="accuracy of LoRA by lorica and by PEFT")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="run these; the record keeps the others")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
