"""Other processes that run `lorica` for this one: started, and ended with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

PROGRAM = ("-m", "lorica.studies.attached")
GRACE_SECONDS = 60.0  # for the step under way and a checkpoint
Child = subprocess.Popen[bytes]


def start(
    words: Sequence[str],
    log: Path,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    cores: Collection[int] = (),
) -> Child:
    """`lorica WORDS` in a process that dies with this one, on these cores alone if any are named.

    What it says is appended to `log`. It has a session of its own, so that Ctrl-C reaches it once: from here.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as said:
        child = subprocess.Popen(
            [sys.executable, *PROGRAM, *words],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    if cores and sys.platform == "linux":
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            os.sched_setaffinity(child.pid, cores)
    return child


def end(children: Iterable[Child]) -> None:
    """Ask them to stop, which lets a run save where it stands; kill those that do not.

    A second Ctrl-C, while this waits, kills all.
    """
    children = list(children)
    for child in children:
        child.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for child in children:
            _kill(child)
            if child.stdin is not None:
                child.stdin.close()


def _kill(child: Child) -> None:
    """With all that it started itself."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM as an exit by which the block is cleaned up; it would end the process where it stands."""
    try:
        before = signal.signal(signal.SIGTERM, _leave)
    except ValueError:  # only the main thread may set handlers; elsewhere the signal keeps its meaning
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)
