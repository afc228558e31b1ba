"""More processes for one sweep: each joins the sweep's folder as a second machine would."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from lorica.studies import children
from lorica.studies.children import Child


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
    started: list[Child] = []
    with _threads_shared(num_colleagues + 1), children.ended_by_sigterm():
        try:
            for log in logs:
                started.append(_started(folder, device, log))
            yield
            codes = [each.wait() for each in started]
        except BaseException:
            children.end(started)
            for log in logs[: len(started)]:
                log.unlink()
            raise
        children.end(started)
    for code, log in zip(codes, logs, strict=True):
        if code:
            said = f"warning: a worker ended with exit code {code}, and the others took its trials over: see {log}"
            say.print(said, highlight=False, markup=False, soft_wrap=True)
        else:
            log.unlink()


def _started(folder: Path, device: str, log: Path) -> Child:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return children.start(["sweep", f"resume={folder}", f"device={device}"], log, environment=threads)


@contextlib.contextmanager
def _threads_shared(num_processes: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // num_processes))
    try:
        yield
    finally:
        torch.set_num_threads(before)
