"""Which layer of which tower a module belongs to, told from its path."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Layer:
    """`encoder.layer.3.attention.self.query` is in layer 3 of the tower `encoder.layer`."""

    tower: str
    index: int

    def __str__(self) -> str:
        return f"{self.tower}.{self.index}"


def layer_of(path: str) -> Layer | None:
    """The layer that the first whole number in the module path names; None if there is no number in it.

    Towers keep their own count: an encoder's layer 0 and a decoder's are two layers (MATH section 6.1, transforms).
    """
    found = re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", path)
    return Layer(found[1] or "", int(found[2])) if found else None
