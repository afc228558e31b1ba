"""trackio: a database on this machine, which `trackio show` opens in a browser; or a Space of the project's name."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorica.training.tracker import Figures, Tracked

ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL")  # each would send figures away


@dataclass(frozen=True)
class Trackio:
    """A run of theirs."""

    run: Any

    def log(self, figures: Figures, step: int) -> None:
        self.run.log(dict(figures), step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.run.finish()


def start(run: Tracked) -> Trackio:
    """Their run, in the folder TRACKIO_DIR or their own; what they print is for the person, and goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr), contextlib.nullcontext() if run.online else _nowhere_else():
        import trackio

        return Trackio(
            trackio.init(
                run.project,
                name=run.name,
                space_id=run.project if run.online else None,
                config=dict(run.config),
                resume="allow" if run.first_step else "never",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        )


@contextlib.contextmanager
def _nowhere_else() -> Iterator[None]:
    """Without the environment's word on where figures go."""
    before = {name: os.environ.pop(name) for name in ELSEWHERE if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
