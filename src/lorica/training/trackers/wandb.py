"""Weights & Biases: a run of theirs in the run's folder, which `wandb sync` sends later; or sent as it goes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from lorica.training.tracker import Figures, Tracked


@dataclass(frozen=True)
class Wandb:
    """A run of theirs."""

    run: Any

    def log(self, figures: Figures, step: int) -> None:
        self.run.log(dict(figures), step=step)

    def finish(self) -> None:
        self.run.finish()


def start(run: Tracked) -> Wandb:
    """Their run under `wandb/`. Of this machine it is told the figures and the run's config, and nothing else."""
    if not run.online:
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # read when it is imported: its own mistakes stay here too
    import wandb

    silent = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        silent=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
    )
    return Wandb(
        wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            config=dict(run.config),
            dir=str(run.folder),
            mode="online" if run.online else "offline",
            settings=silent,
        )
    )
