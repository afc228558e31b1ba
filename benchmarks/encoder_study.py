"""LoRA of rank 8, XGBLoRA and full tuning of the encoder on MRPC, SST-2 and emotion: a study of three seeds.

    LORICA_SHARED=FOLDER python benchmarks/encoder_study.py [--study FOLDER] [--steps 1000] [--workers 2]

It is one `lorica compare`, which it prints: every arm's rate is chosen on dev from three, and what is told is of 1,000
test examples. The arm `lora` updates every linear layer, as full tuning does; those called `_qv` query and value alone,
which is the default. The eight boosters of XGBLoRA are as large as LoRA's update there. The same command goes on where
a study was left. Its outcome and where that comes from are written to results/encoder_study.json.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from lorica import config, files, results, runs, tables
from lorica.config import CompareConfig

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LORICA_SHARED", "shared")).resolve()
ARMS = [
    "{name: lora, overrides: {adapter.targets: all-linear}, learning_rates: [3e-4, 1e-3, 3e-3]}",
    "{name: full, learning_rates: [3e-5, 1e-4, 3e-4]}",
    "{name: lora_qv, overrides: {adapter.kind: lora}, learning_rates: [5e-4, 1e-3, 2e-3]}",
    "{name: xgblora_qv, overrides: {adapter.kind: xgblora}, learning_rates: [1e-3, 3e-3, 1e-2]}",
]
WORDS = [
    f"arms=[{', '.join(ARMS)}]",
    "tasks=[mrpc, sst2, emotion]",
    "seeds=[0, 1, 2]",
    "tuning_seeds=[3]",
    "batch_size=8",
    "warmup=0.1",
    "boosting.steps_per_iteration=125",
    "task.num_dev=300",
    "task.num_eval=1000",
]


def main() -> None:
    arguments = _arguments()
    words = [
        *WORDS,
        f"task.path={SHARED}/data/{{task}}",
        f"model={SHARED}/models/minilm",
        f"max_steps={arguments.steps}",
        f"num_workers={arguments.workers}",
        f"output_dir={arguments.study}",
    ]
    console = Console()
    done = runs.study(config.read(CompareConfig, words), console)
    for line in tables.study(done.outcome):
        console.print(line)
    origin = results.origin(0, "cpu", places=["--study"])
    files.write_json(ROOT / "results" / "encoder_study.json", {**done.outcome, "origin": origin})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="LoRA, XGBLoRA and full tuning of the encoder, compared")
    parser.add_argument("--study", default="artifacts/studies/encoder")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
