"""`lorica verify` without a target: a small adapter trained on the spot, and every check of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from lorica import config, runs
from lorica.config import TrainConfig, VerifyConfig
from lorica.demo import language
from lorica.runs import Verification

TASK = "sentiment"


def prove(given: VerifyConfig, say: Console) -> Verification:
    """Train a few boosters of rank 1 on the embedded task, on the embedded model or the one given, and verify them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        language.write_tasks(folder / "data")
        tree = {
            "model": given.model.model_dump() if given.model else "demo",
            "task": {"path": str(folder / "data" / TASK), "num_train": 64, "num_eval": 16},
            "adapter": {"kind": "xgblora"},
            "boosting": {"steps_per_iteration": 4},
            "max_steps": 12,
            "learning_rate": 1e-2,
            "seed": given.seed,
            "device": given.device,
            "output_dir": str(folder / "run"),
        }
        trained = runs.train(config.check(TrainConfig, tree), Console(quiet=True))
        return runs.verify(str(trained.run.path), given, say)
