"""A merge laid on a live model, and taken off again without a trace."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.merging.merge import Merged


@dataclass(frozen=True)
class Attached:
    """A merge on a model. After `detach`, or the `with` block, each module and parameter is the very one before."""

    undo: ExitStack

    def detach(self) -> None:
        self.undo.close()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *failure: Any) -> None:
        self.detach()


def attach(model: nn.Module, merged: Iterable[Merged]) -> Attached:
    """Lay a merge on the model: low-rank updates beside their modules, dense ones as new weights cast(W0 + ΔW).

    Of a dense update the new weight alone is kept. Raises what `injection.inject` and `injection.fused_weight` do, and
    what the merge itself does; the model is as it was then.
    """
    updates, weights = {}, {}
    for each in merged:
        if isinstance(each.update, LowRank):
            updates[each.path] = each.update
        else:
            fused = injection.fused_weight(model, each.path, each.update)
            weights[each.path] = nn.Parameter(fused, requires_grad=False)
        del each  # or a dense update would live on while the next is made
    with ExitStack() as undo:
        for path, weight in weights.items():
            module = model.get_submodule(path)
            undo.callback(setattr, module, "weight", module.weight)
            module.weight = weight
        undo.callback(injection.remove, injection.inject(model, Adapter(updates)))
        return Attached(undo.pop_all())
