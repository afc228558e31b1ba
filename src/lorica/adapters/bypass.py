"""A head's last linear layer: where it is, and what comes in to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lorica.errors import ModelError


def last_linear(model: nn.Module, heads: Sequence[str], num_labels: int) -> str:
    """The path of the layer that gives the logits: of the heads' linear layers, the last with an output a label."""
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == num_labels
        and any(path == head or path.startswith(f"{head}.") for head in heads)
    ]
    if not found:
        raise ModelError(f"no linear layer of the heads {', '.join(heads) or '(none)'} has {num_labels} outputs")
    return found[-1]


@contextmanager
def bypassed(model: nn.Module, path: str) -> Iterator[None]:
    """Within the block the module at `path` hands on what comes in: a classifier's logits are its pooled features."""
    parent, _, name = path.rpartition(".")
    owner, module = model.get_submodule(parent), model.get_submodule(path)
    setattr(owner, name, nn.Identity())
    try:
        yield
    finally:
        setattr(owner, name, module)
