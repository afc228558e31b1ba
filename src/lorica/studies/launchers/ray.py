"""Tasks of a ray cluster, each of which runs one command. The cluster is RAY_ADDRESS's, or made here for the while.

The machines of a cluster need what this one needs: lorica, the base model and the data at the same paths, and a file
system that they share for the study's folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from lorica.errors import MissingExtraError
from lorica.studies import children
from lorica.studies.launcher import Ended, Job, ended

LOST = -9  # the exit code of a job whose machine or worker is gone: nobody saw how it ended


def launch(jobs: Sequence[Job], *, num_workers: int | None = None) -> Iterator[Ended]:
    """Run the jobs in order, at most `num_workers` at a time, or as many as the cluster has cores or devices for."""
    ray = _ray()
    num_workers = min(num_workers or len(jobs), max(1, len(jobs)))
    with _cluster(ray, num_workers):
        options = _share(ray.cluster_resources(), num_workers)
        task = ray.remote(max_retries=0, **options)(_run)
        waiting, running = list(reversed(jobs)), dict[Any, Job]()
        try:
            while waiting or running:
                while waiting and len(running) < num_workers:
                    job = waiting.pop()
                    running[task.remote(job, int(options["num_cpus"]))] = job
                (done,), _ = ray.wait(list(running))
                yield _told(ray, done, running.pop(done))
        finally:
            _end(ray, list(running))


def _ray() -> ModuleType:
    # Read when ray is imported or started: it asks nobody, and leaves the devices of a task without any as they are.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise MissingExtraError("launcher=ray needs ray: pip install lorica[ray]") from None
    return ray


@contextlib.contextmanager
def _cluster(ray: ModuleType, num_workers: int) -> Iterator[None]:
    """The cluster that is there already, for this process or at RAY_ADDRESS, or else one on this machine."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    size = {"num_cpus": max(num_workers, os.cpu_count() or 1)} if address == "local" else {}
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address=address, **quiet, **size)
    try:
        yield
    finally:
        ray.shutdown()


def _share(there: dict[str, float], num_workers: int) -> dict[str, float]:
    """What each task may use of the cluster."""
    return {
        "num_cpus": max(1, int(there.get("CPU", 1)) // num_workers),
        "num_gpus": min(1.0, there.get("GPU", 0.0) / num_workers),
    }


def _run(job: Job, num_threads: int) -> Ended:
    """The command, on whatever machine this is called."""
    begin = time.monotonic()
    with children.ended_by_sigterm():
        child = children.start(job.words, job.log, cwd=job.cwd, environment={"OMP_NUM_THREADS": str(num_threads)})
        try:
            exit_code = child.wait()
        finally:
            children.end([child])
    return ended(job, exit_code, time.monotonic() - begin)


def _end(ray: ModuleType, running: list[Any]) -> None:
    """Raise KeyboardInterrupt in the tasks, which ends their commands."""
    for each in running:
        ray.cancel(each)
    if running:
        ray.wait(running, num_returns=len(running), timeout=children.GRACE_SECONDS)


def _told(ray: ModuleType, done: Any, job: Job) -> Ended:
    """What the task returned; a worker that died is told as a job that did."""
    try:
        told: Ended = ray.get(done)
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1]
        return Ended(job, LOST, f"ray lost this run ({type(error).__name__}): {last}", 0.0)
    return told
