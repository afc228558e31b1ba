"""A merge before, after, and looked at: its plan, its result, its adapters' diagnosis and an audit, as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from lorica.tables.cells import columns, interval, seconds, share, size, span

if TYPE_CHECKING:
    from lorica.merging.audit import Audit, AuditedModule
    from lorica.merging.diagnosis import Diagnosis
    from lorica.merging.plan import MergePlan
    from lorica.runs import MergedRun

NUM_WORST = 5  # modules of an audit that are shown


def merged(done: MergedRun) -> list[Table | str]:
    """What a merge made, what it lost, and what survives of each task."""
    record = done.as_record()
    form = f"rank {record['max_rank']}" if record["max_rank"] else "dense"
    said: list[Table | str] = [f"{done.method}: {record['num_modules']} modules, {form}, {_lost(record)}"]
    if done.learning:
        found = ", ".join(f"{name} {value:.3f}" for name, value in done.learning["mean_coefficients"].items())
        said.append(f"coefficients learned by {record['optimizer']} ({done.learning['stopped']}), in the mean: {found}")
    if record["distance"] is not None:
        said.append(f"the mean of factors lies up to {record['distance']:.3f} from the exact merge (worst module)")
    if done.dropped:
        named = ", ".join(done.dropped[:3])
        said.append(f"{len(done.dropped)} modules that not every adapter has were dropped: {named}")
    if not record["tasks"]:
        return said
    table = Table("task", "metric", "n", "base", "own adapter", "merged", "recovered, 95 % interval")
    for each in record["tasks"]:
        scores = (f"{each[name]:.4f}" for name in ("base", "single", "merged"))
        table.add_row(
            escape(each["task"]), each["metric"], str(each["n"]), *scores, interval(each["interference_delta"])
        )
    summary = record["recovery"]
    if summary:
        table.caption = f"minimum {interval(summary['minimum'])}, mean {interval(summary['mean'])}"
    return [*said, table]


def _lost(record: Mapping[str, Any]) -> str:
    if not record["total_error"]:
        return "exact"
    return f"relative error {record['total_error']:.3g} in all, {record['worst_error']:.3g} in the worst module"


def merge_plan(found: MergePlan) -> Group:
    """What a merge reads, and what it comes to."""
    sources = columns(
        ("adapter", "modules", "rank", "read"),
        [(each.name, str(each.num_modules), span(each.ranks), size(each.num_bytes)) for each in found.sources],
    )
    memory = found.memory
    parts = (("files", memory.inputs_bytes), ("work", memory.work_bytes), ("merged updates", memory.kept_bytes))
    rows = [
        ("modules", f"{len(found.modules)} merged by {found.method}, {len(found.dropped)} dropped"),
        ("rank", _ranks_of(found)),
        ("error of compression", _error_of(found)),
        ("time", f"{seconds(found.seconds)} of {found.num_workers} cores, beside the disk's"),
        ("memory", f"{size(memory.total_bytes)}: {', '.join(f'{name} {size(each)}' for name, each in parts)}"),
        ("written", f"{'' if found.ranks_are_exact else 'about '}{size(found.written_bytes)}"),
        *(("dropped", path) for path in found.dropped),
        *(("needed", need) for need in found.needs),
    ]
    return Group(sources, columns(("the merge", ""), rows))


def _ranks_of(found: MergePlan) -> str:
    made = [each.full_rank for each in found.modules if each.full_rank is not None]
    kept = [each.rank for each in found.modules if each.rank is not None]
    cut = "" if kept == made else f", cut from {span(made) or 'dense updates'}"
    return f"{'' if found.ranks_are_exact else 'about '}{span(kept)}{cut}" if kept else "dense"


def _error_of(found: MergePlan) -> str:
    if found.error is None:
        return "told by the merge alone: what is compressed is dense, or needs inputs"
    if not found.num_sampled:
        return "none: nothing is compressed"
    return f"{found.error:.4f}, told by {found.num_sampled} of {len(found.modules)} modules"


def merge_diagnosis(found: Diagnosis) -> Group:
    """Adapters by themselves, in pairs, and what follows."""
    adapters = columns(
        ("adapter", "norm", "rank", "effective rank", "modules", "heads"),
        [
            (
                *(each.name, f"{each.norm:.4g}", span(each.ranks), f"{each.effective_rank:.1f}"),
                *(str(each.num_modules), ", ".join(each.heads)),
            )
            for each in found.adapters
        ],
    )
    pairs = columns(
        ("pair", "cosine", "sign conflict", "overlap of outputs", "overlap of inputs"),
        [
            (
                *(f"{each.first}, {each.second}", f"{each.cosine:.4f}", f"{each.sign_conflict:.2%}"),
                *(f"{each.left_overlap:.2%}", f"{each.right_overlap:.2%}"),
            )
            for each in found.pairs
        ],
    )
    rows = "all entries" if found.row_stride == 1 else f"every {found.row_stride}th row of each module"
    pairs.caption = f"norms within a factor of {found.norm_imbalance:.2f}; signs of {rows}"
    return Group(adapters, pairs, *(escape(f"- {advice}") for advice in found.advice))


def merge_audit(found: Audit) -> Group:
    """What was asked for and what was found, the modules that are furthest off, and the verdicts."""
    coefficients = columns(
        ("adapter", "weight", "found"),
        [(name, f"{value:.4f}", f"{found.coefficients[name]:.4f}") for name, value in found.weights.items()],
    )
    coefficients.caption = f"{found.residual:.2%} of the merged adapter is in no sum of these"
    furthest = sorted(found.modules, key=_apartness, reverse=True)[:NUM_WORST]
    modules = columns(
        ("module", "rank", "distance from the exact merge", "least possible"),
        [(each.path, str(each.rank), share(each.distance), share(each.best_distance)) for each in furthest],
    )
    modules.add_section()
    modules.add_row(f"all {len(found.modules)}", "", share(found.distance), share(found.best_distance))
    return Group(coefficients, modules, *(escape(f"- {verdict}") for verdict in found.verdicts))


def _apartness(module: AuditedModule) -> float:
    return math.inf if module.distance is None else module.distance
