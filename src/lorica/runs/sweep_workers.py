"""More processes for one sweep: each joins the sweep's folder as a second machine would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console


@contextlib.contextmanager
def colleagues(folder: Path, num_colleagues: int, device: str, say: Console) -> Iterator[None]:
    """So many more processes at work on a sweep's folder during the block, its cores shared out among all.

    They end with the sweep, which the block completes, or are ended with the block by an error, Ctrl-C or SIGTERM. One
    that fails costs nothing but its help, and is told with the file that says why.
    """
    if not num_colleagues:
        yield
        return
    logs = [folder / f"worker-{os.getpid()}-{number}.log" for number in range(1, num_colleagues + 1)]
    started: list[subprocess.Popen[bytes]] = []
    with _threads_shared(num_colleagues + 1), _ended_by_sigterm():
        try:
            for log in logs:
                started.append(_started(folder, device, log))
            yield
            codes = [each.wait() for each in started]
        except BaseException:
            for each, log in zip(started, logs, strict=False):
                each.terminate()
                each.wait()
                log.unlink()
            raise
    for code, log in zip(codes, logs, strict=True):
        if code:
            said = f"warning: a worker ended with exit code {code}, and the others took its trials over: see {log}"
            say.print(said, highlight=False, markup=False, soft_wrap=True)
        else:
            log.unlink()


def _started(folder: Path, device: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lorica.cli", "sweep", f"resume={folder}", f"device={device}"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(log, "xb") as said:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=os.environ | threads)


@contextlib.contextmanager
def _threads_shared(num_processes: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // num_processes))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
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
