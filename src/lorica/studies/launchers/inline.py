"""In this very process, one after the other: nothing is imported anew, and Ctrl-C ends the run under way."""

from __future__ import annotations

import contextlib
import runpy
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence

from lorica.studies.launcher import Ended, Job, ended

STOPPED = {128 + number: number for number in (signal.SIGINT, signal.SIGTERM)}


def launch(jobs: Sequence[Job], *, num_workers: int | None = None) -> Iterator[Ended]:
    """Run the jobs in order; `num_workers` has no meaning here. A signal that stops a run stops this process too."""
    for job in jobs:
        begin = time.monotonic()
        exit_code = _exit_code(job)
        if exit_code in STOPPED:
            signal.raise_signal(STOPPED[exit_code])
        yield ended(job, exit_code, time.monotonic() - begin)


def num_places(num_workers: int | None) -> int:
    """One, whatever is asked for."""
    return 1


def _exit_code(job: Job) -> int:
    """What a process of its own would exit with."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    words = sys.argv
    with (
        open(job.log, "a") as said,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        contextlib.chdir(job.cwd),
        warnings.catch_warnings(),
    ):
        try:
            sys.argv = ["lorica", *job.words]
            runpy.run_module("lorica", run_name="__main__", alter_sys=True)
        except SystemExit as left:
            return left.code if isinstance(left.code, int) else int(left.code is not None)
        except Exception:  # a bug of one run, which must not end the study
            traceback.print_exc()
            return 1
        finally:
            sys.argv = words
    return 0
