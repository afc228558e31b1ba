"""What a sweep found, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from lorica.tables.cells import columns, interval

NUM_BEST = 5  # points of a ranking that are shown


def sweep(summary: Mapping[str, Any]) -> list[Table | str]:
    """The best points of a sweep, what the best keeps of each task, and what is left of that on the final split."""
    best, ranking = summary["best"], summary["ranking"]
    feasible = [line for line in ranking if line["feasible"]]
    said: list[Table | str] = [_head(summary, len(feasible))]
    if best is None:
        return [*said, *dict.fromkeys(escape(f"infeasible: {line['reason']}") for line in ranking[:NUM_BEST])]
    names = list(best["params"])
    table = Table("trial", *map(escape, names), "minimum, 95 % interval", "mean")
    for line in feasible[:NUM_BEST]:
        number = "earlier" if line["number"] is None else str(line["number"])
        values = (escape(_cell(line["params"][name])) for name in names)
        table.add_row(number, *values, interval(line["minimum"]), interval(line["mean"]))
    said.append(table)
    return [*said, _tasks(summary["split"], best["tasks"], summary["final"])]


def _head(summary: Mapping[str, Any], num_feasible: int) -> str:
    total = summary["num_trials"]
    warm = f" and {summary['num_warm_start']} of earlier sweeps" if summary["num_warm_start"] else ""
    chosen = f"{summary['method']}: {total} trials{warm} on {summary['split']}"
    return f"{chosen}, {num_feasible} feasible" if num_feasible < len(summary["ranking"]) else chosen


def _tasks(split: str, tasks: Mapping[str, Any], final: Mapping[str, Any] | None) -> Table:
    """A row for each task: what the best point keeps where it was chosen, and where it was not."""
    head = ["task", f"recovered on {split}"]
    found = [tasks]
    if final is not None:
        head.append(f"on {final['split']}")
        found.append({each["task"]: each for each in final["tasks"]})
    return columns(head, [[name, *(_plain(each[name]["interference_delta"]) for each in found)] for name in tasks])


def _plain(found: Sequence[float] | None) -> str:
    return "no headroom" if found is None else f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]"


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
