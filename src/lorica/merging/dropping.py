"""Entries dropped at random: the masks of DARE, for all that use them.

Source: Yu et al. 2024, arXiv 2311.03099.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lorica.merging.coordinates import Space
from lorica.merging.method import Site
from lorica.randomness import bernoulli


def drop_(stack: Tensor, drop_rate: float, seed: int, site: Site, space: Space, block: int) -> Tensor:
    """(T, rows, columns), one block of the module, in place: each entry becomes zero with probability `drop_rate`.

    An adapter's mask is keyed by the seed, its name, the module, the space and the block: it does not depend on the
    other adapters, on anybody's order, or on what was dropped before.
    """
    for name, entries in zip(site.names, stack.numpy(), strict=True):
        keys = ("dare", name, site.path, space, block)
        kept = bernoulli(seed, *keys, size=entries.size, probability=1 - drop_rate)
        np.multiply(entries, kept.numpy().reshape(entries.shape), out=entries)  # in torch several times slower
    return stack
