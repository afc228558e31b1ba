"""What a merge's work takes on this machine: operations counted by hand, over rates measured in a few milliseconds.

The counts hold the products, decompositions and copies that grow with the matrices; what is left out is small beside
them, or is the disk's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorica.adapters.compression import NUM_ITERATIONS, OVERSAMPLING
from lorica.merging.parallel import ordered_map

GEMM_SIZE = 384
EIGH_SIZE = 64
COPIED_BYTES = 1 << 23
NUM_TRIALS = 5
DOUBLE = 2  # a float64 operation in float32 ones
RULE_PASSES = 16  # over each adapter's entries, in copies of as many bytes: a product's result and an election on it


@dataclass(frozen=True)
class Work:
    """Counted work: float32 operations of products, bytes copied, and decompositions in those of 64 × 64."""

    flops: float = 0.0
    copied_bytes: float = 0.0
    num_eighs: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.copied_bytes + other.copied_bytes, self.num_eighs + other.num_eighs)


@dataclass(frozen=True)
class Speed:
    """What one thread of this machine does."""

    flops_per_second: float
    bytes_per_second: float
    eigh_seconds: float

    def seconds(self, work: Work) -> float:
        copying = work.copied_bytes / self.bytes_per_second
        return work.flops / self.flops_per_second + copying + work.num_eighs * self.eigh_seconds


def calibrate() -> Speed:
    """Time a product, a copy and an eigendecomposition by one thread; the best of a few trials each."""
    (speed,) = ordered_map(lambda _: _measured(), [None], num_workers=1)
    return speed


def _measured() -> Speed:
    square = torch.ones(GEMM_SIZE, GEMM_SIZE)
    symmetric = torch.ones(EIGH_SIZE, EIGH_SIZE, dtype=torch.float64) + torch.arange(EIGH_SIZE).diag()
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Speed(
        flops_per_second=2 * GEMM_SIZE**3 / _best(lambda: square @ square),
        bytes_per_second=COPIED_BYTES / _best(lambda: target.copy_(source)),
        eigh_seconds=_best(lambda: torch.linalg.eigh(symmetric)),
    )


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(NUM_TRIALS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return max(min(seconds), 1e-9)


def concatenating(shape: tuple[int, int], rank: int) -> Work:
    """Factors of rank R = Σ r, scaled and copied into one pair."""
    return Work(copied_bytes=2 * 4 * rank * sum(shape))


def sharing_bases(shape: tuple[int, int], rank: int, num_adapters: int, num_passes: int) -> Work:
    """Bases of all updates' rows and columns (QR, R × R work in float64), a rule there, the way back; as often."""
    side = sum(shape)
    decompositions = DOUBLE * 4 * rank**2 * side
    there_and_back = (2 + DOUBLE * 2) * rank**2 * side
    copied = 4 * 8 * rank * side + RULE_PASSES * 4 * num_adapters * rank * shape[1]  # the larger space is R × in
    flops = decompositions + there_and_back
    return Work(num_passes * flops, num_passes * copied, num_passes * 4 * cubes(rank))


def electing(shape: tuple[int, int], rank: int, num_adapters: int, num_passes: int) -> Work:
    """Each update's entries, made from factors of Σ r = `rank`, through an elementwise rule, `num_passes` times."""
    num_entries = num_passes * shape[0] * shape[1]
    return Work(2.0 * num_entries * rank, RULE_PASSES * 4.0 * num_entries * num_adapters)


def compressing(shape: tuple[int, int], rank: int, kept: int) -> Work:
    """Singular values of factors of `rank` from their Grams, and the factors of the first `kept`."""
    side = sum(shape)
    return Work(DOUBLE * 2 * rank**2 * side + 2.0 * kept * rank * side, 8 * 2 * rank * side, 4 * cubes(rank))


def compressing_dense(shape: tuple[int, int], kept: int | None) -> Work:
    """Block Krylov iteration for `kept` directions of a dense update, or with None all of its singular values."""
    num_entries, least = shape[0] * shape[1], min(shape)
    if kept is None:
        return Work(4.0 * num_entries * least, 8 * 2 * least**2, cubes(least))
    krylov = krylov_width(shape, kept)
    products = 2.0 * num_entries * 2 * krylov
    return Work(products + 12.0 * krylov**2 * sum(shape), 0, cubes(krylov))


def krylov_width(shape: tuple[int, int], kept: int) -> int:
    """Columns of the block Krylov space in which `kept` directions are looked for."""
    return min((NUM_ITERATIONS + 1) * (kept + OVERSAMPLING), *shape)


def cubes(size: int) -> float:
    """Decompositions of (size, size) in those of 64 × 64, as their cubes."""
    return (size / EIGH_SIZE) ** 3
