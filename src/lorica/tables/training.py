"""What training would need, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lorica.tables.cells import size

if TYPE_CHECKING:
    from lorica.planning import Plan


def plan(found: Plan) -> Table:
    """What each way to train would hold at once."""
    table = Table("training", "trainable", "share", "weights", "state", "peak of a step", "total")
    for way in found.ways:
        table.add_row(
            *(way.name, f"{way.num_trainable:,}", f"{way.num_trainable / found.num_parameters:.2%}"),
            *(size(each) for each in (way.weights_bytes, way.state_bytes, way.activations_bytes, way.total_bytes)),
        )
    table.caption = (
        f"{escape(found.model)}: {found.num_parameters:,} parameters; batch {found.batch_size} of {found.length} "
        f"tokens, {found.dtype}; rank {found.rank} on {found.num_targets} modules, {found.num_prefix} tokens "
        "of a prefix; spsa: one direction, one probe in a pass; not counted: kernels' workspaces"
        + (f"; no prefix: {escape(found.without)}" if found.without else "")
    )
    return table
