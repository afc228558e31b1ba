"""Modules in parallel, each by one thread: a small QR or SVD runs many times slower when threads share it."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`function` of each item, in order, at most `num_workers` at a time and one result each ahead of the reader."""
    with _one_thread_each():
        if num_workers <= 1:
            yield from map(function, items)
            return
        waiting = iter(items)
        with ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            running: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(waiting, num_workers))
            while running:
                done = running.popleft().result()
                running.extend(pool.submit(function, item) for item in islice(waiting, 1))
                yield done


def default_num_workers() -> int:
    """One for each core that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
