"""One seed, many named streams: a draw depends on what it is for, never on what was drawn before it.

Nothing here touches a global generator, so two parts of a run cannot disturb each other, and a run that resumes
asks for the same names and gets the same numbers.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
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
    bits = np.random.Generator(np.random.Philox(key=key(seed, *names)))
    return torch.from_numpy(bits.standard_normal(size, dtype=np.float32))


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
    num_words = -(-size // 64)
    words = np.random.Philox(key=key(seed, *names)).random_raw(num_words).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=size, bitorder="little")
    return torch.from_numpy(bits.astype(np.float32)).mul_(2.0).sub_(1.0)
