"""What the command line prints: results, plans and catalogues as tables. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lorica import config, plugins
from lorica.errors import UnknownNameError
from lorica.plugins import Catalogue

if TYPE_CHECKING:
    from lorica.evaluation.evaluate import Evaluation
    from lorica.planning import Plan

LISTS = ("tasks", "flags", "keys")


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
    return table


def plan(found: Plan) -> Table:
    """What each way to train would hold at once."""
    table = Table("training", "trainable", "share", "weights", "gradients + state", "peak of a step", "total")
    for way in found.ways:
        table.add_row(
            *(way.name, f"{way.num_trainable:,}", f"{way.num_trainable / found.num_parameters:.2%}"),
            *(_size(each) for each in (way.weights_bytes, way.state_bytes, way.activations_bytes, way.total_bytes)),
        )
    table.caption = (
        f"{escape(found.model)}: {found.num_parameters:,} parameters; batch {found.batch_size} of {found.length} "
        f"tokens, {found.dtype}; rank {found.rank} on {found.num_targets} modules"
    )
    return table


def listing(what: str) -> Table:
    """`tasks` with their descriptions, `flags` of the older tools with the keys they set, or `keys` of the config."""
    if what == "tasks":
        catalogue = Catalogue("lorica.tasks.catalog", "task")
        return _columns(("task", "what it asks"), [(name, catalogue.summary(name)) for name in catalogue.names()])
    if what == "flags":
        return _columns(("flag", "sets"), [(f"--{name}", _meaning(flag)) for name, flag in config.FLAGS.items()])
    if what == "keys":
        return _columns(("key", "default", "meaning"), config.documented(config.TrainConfig))
    raise UnknownNameError(plugins.unknown("list", what, LISTS))


def _meaning(flag: config.Flag) -> str:
    if flag.constant is not None:
        return f"{flag.key}={flag.constant}"
    words = "".join(f" ({old}: {new})" for old, new in (flag.words or {}).items())
    return f"{flag.key}{words}"


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*head)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _size(num_bytes: int) -> str:
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e9:.2f} GB"
