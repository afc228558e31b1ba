"""Processes on this machine, side by side, each with its own share of the cores and a device of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lorica.studies import children
from lorica.studies.children import Child
from lorica.studies.launcher import Ended, Job, ended

MAX_WORKERS = 8  # where nobody says how many: each holds a model of its own
LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Place:
    """Where one process runs at a time."""

    cores: tuple[int, ...]
    device: str | None  # as CUDA_VISIBLE_DEVICES names it

    @property
    def environment(self) -> dict[str, str]:
        """As many threads as cores: more would wait for each other."""
        threads = {"OMP_NUM_THREADS": str(len(self.cores))}
        return threads if self.device is None else {**threads, "CUDA_VISIBLE_DEVICES": self.device}


@dataclass(frozen=True)
class Running:
    """A job under way."""

    job: Job
    place: Place
    child: Child
    begin: float


def launch(jobs: Sequence[Job], *, num_workers: int | None = None) -> Iterator[Ended]:
    """Run the jobs in order, each as soon as a place is free; yield each as it ends."""
    devices, num_workers = _devices(), min(num_places(num_workers), max(1, len(jobs)))
    waiting, free = list(reversed(jobs)), places(_cores(), devices, num_workers)
    running: list[Running] = []
    with children.ended_by_sigterm():
        try:
            while waiting or running:
                while waiting and free:
                    running.append(_started(waiting.pop(), free.pop(0)))
                done = [each for each in running if each.child.poll() is not None]
                running = [each for each in running if each not in done]
                free += [each.place for each in done]
                yield from (_told(each) for each in done)
                if not done:
                    time.sleep(LOOK_SECONDS)
        finally:
            children.end(each.child for each in running)


def num_places(num_workers: int | None) -> int:
    """As many as are asked for, else as there are devices, else cores, up to a limit."""
    return num_workers or len(_devices()) or min(len(_cores()), MAX_WORKERS)


def places(cores: Sequence[int], devices: Sequence[str], num_places: int) -> list[Place]:
    """So many places that share out the cores, in order, and the devices, in turn.

    Where there are more places than cores, several share one.
    """
    firsts = [number * len(cores) // num_places for number in range(num_places + 1)]
    parts = [tuple(cores[first : max(end, first + 1)]) for first, end in itertools.pairwise(firsts)]
    return [Place(part, devices[at % len(devices)] if devices else None) for at, part in enumerate(parts)]


def _cores() -> list[int]:
    """The numbers of the cores that this process may run on."""
    with contextlib.suppress(AttributeError):  # not every system tells
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _devices() -> list[str]:
    """The CUDA devices that this process may use, as their variable names them."""
    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def _started(job: Job, place: Place) -> Running:
    child = children.start(job.words, job.log, cwd=job.cwd, environment=place.environment, cores=place.cores)
    return Running(job, place, child, time.monotonic())


def _told(run: Running) -> Ended:
    children.end([run.child])
    return ended(run.job, run.child.returncode, time.monotonic() - run.begin)
