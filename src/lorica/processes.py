"""Processes that take the steps of one run together, as torchrun starts them. Alone, everything here does nothing."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.errors import ConfigError, LostProcessError

MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # where the processes find each other
Value = TypeVar("Value")


@dataclass
class Processes:
    """The processes of a run, of which this is number `rank`. Every method is called by all of them, in one order.

    `wants_stop` is this process's wish; `stops` is whether any of them had it at the last `summed`, which all know.
    """

    rank: int = 0
    num: int = 1
    wants_stop: bool = False
    stops: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def own_names(self) -> tuple[int, ...]:
        """What the names of a random stream get that each process draws for itself; a process alone draws as ever."""
        return (self.rank,) if self.rank else ()

    def summed(self, values: Tensor) -> Tensor:
        """(n,) float64 on the CPU: the sum over the processes, the same bits in each. The wish to stop goes along."""
        if self.num == 1:
            return values
        carried = torch.cat([values, values.new_tensor([self.wants_stop])])
        with _exchange():
            dist.all_reduce(carried)
        self.stops = bool(carried[-1] > 0)
        return carried[:-1]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of these, which all processes have in one order, by its mean over the processes."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _exchange():
            dist.all_reduce(flat)
        parts = torch.split(flat.div_(self.num), [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def of_first(self, value: Value) -> Value:
        """The value that the first process gives."""
        carried = [value]
        if self.num > 1:
            with _exchange():
                dist.broadcast_object_list(carried, src=0)
        return carried[0]

    def gathered(self, value: Value) -> list[Value]:
        """Every process's value, by rank."""
        found = [value] * self.num
        if self.num > 1:
            with _exchange():
                dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Go on when all are here."""
        if self.num > 1:
            with _exchange():
                dist.barrier()


ALONE = Processes()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started with this one; this one alone where it did not.

    Raises ConfigError where the environment names several processes and not how they find each other.
    """
    num = _num_started()
    if num == 1:
        yield Processes()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Scalars go over the CPU whatever the model is on: nothing waits for a device that a number must be copied to.
    # The first one may evaluate for hours while the others wait; one that dies is noticed at once all the same.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    try:
        with _exchange():  # one that is refused at once must not be gone while another is still connecting to it
            dist.barrier()
        yield Processes(dist.get_rank(), num)
    finally:
        dist.destroy_process_group()


def _num_started() -> int:
    """How many processes the environment names: torchrun's, or what a cluster's scheduler has left there."""
    text = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in MEETING if name not in os.environ]
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE={text!r} in the environment is no number of processes: unset it")
    if int(text) > 1 and missing:
        raise ConfigError(
            f"the environment has WORLD_SIZE={text} without {', '.join(missing)}: start with torchrun, or unset it"
        )
    return int(text)


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    """Tell a process that is gone from a fault of this one. Raises LostProcessError."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError("another process of this run has ended, and its own message says why") from error
