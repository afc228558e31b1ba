"""TensorBoard: event files in the run's folder, which `tensorboard --logdir` shows with those of the runs beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorica.training.tracker import Figures, Tracked


@dataclass(frozen=True)
class TensorBoard:
    """A writer of torch's, which has no network in it."""

    writer: Any

    def log(self, figures: Figures, step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


def start(run: Tracked) -> TensorBoard:
    """Event files in `tensorboard/`. A run that is gone on with takes back what stands behind its checkpoint."""
    from torch.utils.tensorboard import SummaryWriter

    behind = run.first_step + 1 if run.first_step else None
    return TensorBoard(SummaryWriter(str(run.folder / "tensorboard"), purge_step=behind))  # type: ignore[no-untyped-call]
