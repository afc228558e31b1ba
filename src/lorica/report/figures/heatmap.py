"""Tables of numbers as tiles: what merges keep of each task, and what targets make of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorica.report import words
from lorica.report.figures import canvas
from lorica.report.figures.canvas import Figure, Panel, View
from lorica.report.subjects import Matrix, Merge, Sweep

Places = Mapping[tuple[str, str], float]
STRONGEST = 0.62  # opacity of a full tile: what is written on it can be read in both of the page's colours
TILE_INCHES, NAME_INCHES = (0.72, 0.42), 1.35


def draw_recovery(merges: Sequence[Merge], sweeps: Sequence[Sweep]) -> Figure | str | None:
    """A row for each merge, a column for each task; None without merges, the reason if no task was evaluated."""
    rows = [*merges, *(_of_sweep(sweep) for sweep in sweeps if sweep.kept)]
    rows += [_final(sweep) for sweep in sweeps if sweep.final is not None and sweep.final.kept]
    if not rows:
        return None
    found = {(each.name, kept.task): kept for each in rows for kept in each.kept}
    deltas = {place: kept.delta[0] for place, kept in found.items() if kept.delta is not None}
    if not deltas:
        return "No recovery: no merge was evaluated on a task that its adapter had learned (eval_tasks=all asks)."
    names, tasks = (list(dict.fromkeys(place[at] for place in found)) for at in (0, 1))
    alt = "Share of each adapter's gain that a merge keeps. " + " ".join(_row(name, tasks, deltas) for name in names)
    shown = {place: words.delta(value) for place, value in deltas.items()} | {
        place: "no\nheadroom" for place, kept in found.items() if kept.delta is None
    }
    return Figure(
        name="merges-recovery",
        title="Merges and their tasks",
        lede="0 is the base model, 1 the task's own adapter; above 1 the other adapters help. A task whose own adapter "
        "is not surely better than the base has no headroom to keep any of.",
        views=[View("", [_tiles("merges-recovery-tiles", "recovery by task", alt, names, tasks, deltas, shown)])],
        head=("merge", "task", "metric", "base", "own_adapter", "merged", "recovery", "low", "high"),
        rows=[
            (name, task, kept.metric, kept.base, kept.single, kept.merged, *(kept.delta or (None, None, None)))
            for (name, task), kept in found.items()
        ],
    )


def _of_sweep(sweep: Sweep) -> Merge:
    return Merge(f"{sweep.name}: best on {sweep.split}", sweep.method, sweep.kept, None)


def _final(sweep: Sweep) -> Merge:
    assert sweep.final is not None
    return Merge(f"{sweep.name}: best on {sweep.final_split}", sweep.method, sweep.final.kept, None)


def _row(name: str, tasks: Sequence[str], values: Places) -> str:
    each = [f"{task} {words.delta(values[name, task])}" for task in tasks if (name, task) in values]
    return f"{name}: {', '.join(each) or 'nothing that can be told'}."


def draw_matrix(matrix: Matrix) -> Figure | str:
    """A row for each target, a column for each task; the reason if every cell is empty."""
    if not matrix.scores:
        return f"No matrix for {matrix.name}: no target could be asked any of the tasks."
    values = {place: score.value for place, score in matrix.scores.items()}
    shown = {place: words.bare_score(each.value, each.metric) for place, each in matrix.scores.items()}
    shown |= dict.fromkeys(matrix.reasons, "–")
    metric = words.listed(sorted({score.metric for score in matrix.scores.values()}))
    alt = f"{metric} of {len(matrix.rows)} targets on {len(matrix.columns)} tasks. " + " ".join(
        f"{row}: {', '.join(f'{column} {shown[row, column]}' for column in matrix.columns if (row, column) in shown)}."
        for row in matrix.rows
    )
    return Figure(
        name=f"{matrix.slug}-matrix",
        title=matrix.name,
        lede=f"{metric.replace('_', ' ').capitalize()}; shares in per cent. Dash: cannot be asked.",
        views=[
            View("", [_tiles(f"{matrix.slug}-tiles", metric, alt, matrix.rows, matrix.columns, _scaled(values), shown)])
        ],
        head=("target", "task", "metric", "value", "low", "high", "n", "reason"),
        rows=[
            *(
                (*place, each.metric, each.value, each.low, each.high, each.n, None)
                for place, each in matrix.scores.items()
            ),
            *((*place, None, None, None, None, None, reason) for place, reason in matrix.reasons.items()),
        ],
    )


def _scaled(values: Places) -> dict[tuple[str, str], float]:
    """Opacity by the share of the largest value of all: 0 to 1."""
    largest = max(map(abs, values.values())) or 1.0
    return {place: value / largest for place, value in values.items()}


def _tiles(
    name: str,
    title: str,
    alt: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Places,
    shown: Mapping[tuple[str, str], str],
) -> Panel:
    """Blue above zero, red below, the stronger the further; from one on as strong as can be read on."""

    def on(axes: Any) -> None:
        for y, row in enumerate(rows):
            for x, column in enumerate(columns):
                _tile(axes, x, y, values.get((row, column)), shown.get((row, column), ""))
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), [words.short(column, 12) for column in columns])
        axes.set_yticks(range(len(rows)), [words.short(row, 26) for row in rows])
        axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    width = max(canvas.WIDTH, NAME_INCHES + TILE_INCHES[0] * len(columns))
    return canvas.panel(name, title, alt, on, height=0.9 + TILE_INCHES[1] * len(rows), width=width)


def _tile(axes: Any, x: int, y: int, value: float | None, text: str) -> None:
    from matplotlib.patches import Rectangle

    if value is not None:
        colour = canvas.GAIN if value >= 0 else canvas.LOSS
        strength = 0.06 + (STRONGEST - 0.06) * min(1.0, abs(value))
        axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, color=colour, alpha=strength, linewidth=0))
    ink = canvas.MUTED if value is None else canvas.INK
    axes.text(x, y, text, ha="center", va="center", size=6.5 if "\n" in text else 9.5, color=ink)
