"""One seed, many named streams: a draw depends on what it is for, never on what was drawn before it.

Nothing here touches a global generator, so two parts of a run cannot disturb each other, and a run that resumes
asks for the same names and gets the same numbers.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Name = str | int


def key(seed: int, *names: Name) -> int:
    """A 128-bit key for the stream `names` of `seed`: the start of the SHA-256 of both."""
    text = "\x1f".join([str(seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def python_generator(seed: int, *names: Name) -> random.Random:
    """A generator for order and choice (data order, subsets)."""
    return random.Random(key(seed, *names))


def torch_generator(seed: int, *names: Name, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator for tensors. torch's CPU engine uses 32 bits of its seed, so the key is cut to those."""
    return torch.Generator(device).manual_seed(key(seed, *names) & 0xFFFF_FFFF)


def normals(seed: int, *names: Name, size: int) -> Tensor:
    """(size,) float32 draws from N(0, 1), from the counter-based generator Philox keyed by (seed, names).

    The draw is made on the CPU, so it is the same whatever device the model is on (MATH section 3).
    """
    return normal_rows(seed, *names, rows=range(1), width=size)[0]


def uniforms(seed: int, *names: Name, size: int) -> Tensor:
    """(size,) float32 draws from [0, 1) in steps of 2⁻²⁴, from Philox's raw bits: the same on every platform."""
    words = np.random.Philox(key=key(seed, *names)).random_raw(-(-size // 2)).astype("<u8", copy=False)
    steps = words.view("<u4")[:size] >> np.uint32(8)
    return torch.from_numpy(steps.astype(np.float32)).mul_(2.0**-24)


def bernoulli(seed: int, *names: Name, size: int, probability: float) -> Tensor:
    """(size,) bool draws, each True with `probability`, from Philox's raw bits: the same on every platform.

    One byte decides all but one draw in 256, which takes 64 bits more: as exact as the number given, at a byte a draw.
    """
    bits = np.random.Philox(key=key(seed, *names))
    whole, rest = divmod(probability * 256, 1)
    first = bits.random_raw(-(-size // 8)).astype("<u8", copy=False).view(np.uint8)[:size]
    drawn = first < int(whole)
    undecided = np.flatnonzero(first == int(whole))
    drawn[undecided] = bits.random_raw(len(undecided)) < rest * 2.0**64
    return torch.from_numpy(drawn)


def signs(seed: int, *names: Name, size: int) -> Tensor:
    """(size,) float32 Rademacher draws, ±1, from Philox's raw bits: the same on every platform."""
    return sign_rows(seed, *names, rows=range(1), width=size)[0]


# Draws for a matrix of which only some rows are wanted. Row r has a place of its own in the stream, so that it comes
# out the same whichever rows are drawn with it, and a matrix that is drawn in parts need never be whole.


def sign_rows(seed: int, *names: Name, rows: Sequence[int], width: int, device: str | torch.device = "cpu") -> Tensor:
    """(len(rows), width) float32 Rademacher draws, ±1, the same on every platform. `rows` ascend."""
    bits = torch.from_numpy(_row_words(seed, names, rows, width, num_bits=1).view(np.uint8)).to(device)
    signs = _signs_of_bytes(torch.device(device)).index_select(0, bits.flatten().int())  # (bytes, 8)
    return signs.view(len(rows), -1)[:, :width]


def normal_rows(seed: int, *names: Name, rows: Sequence[int], width: int, device: str | torch.device = "cpu") -> Tensor:
    """(len(rows), width) float32 draws from N(0, 1), none beyond ±5.3. `rows` ascend.

    Each is the quantile of a uniform draw in 2²³ steps, since a method of rejection would not know where a row begins.
    """
    steps = _row_words(seed, names, rows, width, num_bits=32).view("<u4")[:, :width] >> np.uint32(9)
    uniform = torch.from_numpy(steps.astype(np.float32)).to(device).add_(0.5).mul_(2.0**-22).sub_(1.0)  # in (-1, 1)
    return uniform.erfinv_().mul_(math.sqrt(2.0))


def uniform_rows(
    seed: int, *names: Name, rows: Sequence[int], width: int, device: str | torch.device = "cpu"
) -> Tensor:
    """(len(rows), width) float32 draws from [0, 1) in steps of 2⁻¹⁶, the same on every platform. `rows` ascend."""
    steps = _row_words(seed, names, rows, width, num_bits=16).view("<u2")[:, :width]
    return torch.from_numpy(steps.astype(np.float32)).to(device).mul_(2.0**-16)


def _row_words(
    seed: int, names: Sequence[Name], rows: Sequence[int], width: int, *, num_bits: int
) -> npt.NDArray[np.uint64]:
    """(len(rows), words): each row's raw words, at least `width` · `num_bits` bits of them."""
    num_counts = -(-width * num_bits // 256)  # Philox makes four words of 64 bits at each count
    stream, found = key(seed, *names), np.empty((len(rows), 4 * num_counts), dtype="<u8")
    for start, stop in _runs(rows):
        bits = np.random.Philox(key=stream, counter=rows[start] * num_counts)
        found[start:stop] = bits.random_raw((stop - start) * 4 * num_counts).reshape(stop - start, -1)
    return found


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the places between which the rows follow one another without a gap."""
    if isinstance(rows, range):
        yield 0, len(rows)
        return
    breaks = [at for at in range(1, len(rows)) if rows[at] != rows[at - 1] + 1]
    yield from zip([0, *breaks], [*breaks, len(rows)], strict=True)


@functools.cache
def _signs_of_bytes(device: torch.device) -> Tensor:
    """(256, 8) float32: the signs that a byte's bits stand for."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(bits.astype(np.float32)).mul_(2.0).sub_(1.0).to(device)
