"""Evaluations, and what training would need, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lorica.tables.cells import size

if TYPE_CHECKING:
    from lorica.evaluation.evaluate import Evaluation
    from lorica.planning import Plan


def evaluations(found: Sequence[tuple[str, Evaluation]]) -> Table:
    """One row for each evaluation: metrics with their 95 % intervals."""
    metrics = list(dict.fromkeys(name for _, evaluation in found for name in evaluation.metrics))
    table = Table("adapter", "task", "split", "n", *metrics, "loss")
    for name, evaluation in found:
        cells = []
        for metric in metrics:
            score = evaluation.metrics.get(metric)
            cells.append(f"{score.value:.4f} [{score.low:.3f}, {score.high:.3f}]" if score else "")
        table.add_row(
            *(
                escape(name),
                escape(evaluation.task),
                evaluation.split,
                str(max(each.n for each in evaluation.metrics.values())),
            ),
            *(escape(cell) for cell in cells),
            f"{evaluation.loss:.4f}",
        )
    cut = [f"{run.num_truncated} of {escape(run.task)} ({escape(name)})" for name, run in found if run.num_truncated]
    if cut:
        table.caption = f"examples that were cut to what the model reads: {', '.join(cut)}"
    return table


def plan(found: Plan) -> Table:
    """What each way to train would hold at once."""
    table = Table("training", "trainable", "share", "weights", "gradients + state", "peak of a step", "total")
    for way in found.ways:
        table.add_row(
            *(way.name, f"{way.num_trainable:,}", f"{way.num_trainable / found.num_parameters:.2%}"),
            *(size(each) for each in (way.weights_bytes, way.state_bytes, way.activations_bytes, way.total_bytes)),
        )
    table.caption = (
        f"{escape(found.model)}: {found.num_parameters:,} parameters; batch {found.batch_size} of {found.length} "
        f"tokens, {found.dtype}; rank {found.rank} on {found.num_targets} modules"
    )
    return table
