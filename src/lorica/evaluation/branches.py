"""Several adapters of one base on one task in one pass: what runs below the first adapted block is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.branches import branched, can_share
from lorica.adapters.delta import LowRank
from lorica.evaluation.scoring import Collate, score_batches
from lorica.tasks.batching import Batch, repeated
from lorica.tasks.objectives import scores
from lorica.tasks.prompting import Encoded


def score_branches(
    model: nn.Module,
    adapters: Sequence[Adapter],
    rows: Sequence[Encoded],
    collate: Collate,
    *,
    batch_size: int,
    description: str = "evaluating",
) -> Tensor:
    """(G, n, options) float32 on the CPU: of each adapter what `score_all` gives with it alone on the model.

    The adapters have updates alone, of any ranks and modules, and the model is the bare base before and afterwards.
    Raises AdapterFormatError for one that does not fit the model.
    """
    for adapter in adapters:
        for path, update in adapter.updates.items():
            injection.check_fits(model, path, update)
    stacked = _stacked(adapters)
    live = injection.inject(model, Adapter({path: _zero_like(A, B) for path, (A, B) in stacked.items()}))
    factors = {f"{path}.{name}": each for path, pair in stacked.items() for name, each in zip("AB", pair, strict=True)}
    at_blocks = can_share(model, list(factors))
    pass_of = _Pass(model)

    def score(batch: Batch) -> Tensor:
        whole = repeated(batch, len(adapters))
        if at_blocks:
            whole = replace(whole, inputs=batch.inputs)
        with branched(model, list(factors), num_branches=len(adapters), at_blocks=at_blocks):
            values = {f"model.{name}": value.to(batch.labels.device) for name, value in factors.items()}
            found: Tensor = torch.func.functional_call(pass_of, values, (whole,), tie_weights=False)
        return found.view(len(adapters), len(batch.labels), -1)

    try:
        return score_batches(
            model,
            rows,
            collate,
            score,
            batch_size=batch_size,
            num_branches=len(adapters),
            description=description,
        )
    finally:
        injection.remove(live)


def _stacked(adapters: Sequence[Adapter]) -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> A (G, r, in) and scale · B (G, out, r), r the largest rank there; what an adapter lacks is zero."""
    shapes = {path: update.shape for adapter in adapters for path, update in adapter.updates.items()}
    found = {}
    for path, (num_out, num_in) in shapes.items():
        updates = [adapter.updates.get(path) for adapter in adapters]
        rank = max(update.rank for update in updates if update is not None)
        A, B = torch.zeros(len(updates), rank, num_in), torch.zeros(len(updates), num_out, rank)
        for branch, update in enumerate(updates):
            if update is not None:
                A[branch, : update.rank] = update.A
                B[branch, :, : update.rank] = update.scaled_B()
        found[path] = A, B
    return found


def _zero_like(A: Tensor, B: Tensor) -> LowRank:
    return LowRank(torch.zeros(A.shape[1:]), torch.zeros(B.shape[1:]))


class _Pass(nn.Module):
    """A model's scores as a module, so that `torch.func.functional_call` can ask for them at other parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return scores(self.model, batch)
