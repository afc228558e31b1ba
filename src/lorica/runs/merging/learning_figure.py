"""How coefficients were learned, as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorica import files

Entry = Mapping[str, Any]
MOST_NAMED = 12  # lines; more would hide behind their legend


def draw_learning(history: Sequence[Entry], path: Path) -> None:
    """The objective's values and the adapters' mean coefficients over the steps, as a PNG."""
    # Not through pyplot, whose backend and open figures are global to the caller's process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panes = (figure.add_subplot(1, 2, 1, ylabel="value"), figure.add_subplot(1, 2, 2, ylabel="mean coefficient"))
    for axes, lines in zip(panes, (_series(history, _values), _series(history, _coefficients)), strict=True):
        for label, (steps, values) in lines.items():
            axes.plot(steps, values, marker="o", markersize=3, label=label)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if 0 < len(lines) <= MOST_NAMED:
            axes.legend()
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})


def _series(history: Sequence[Entry], read: Any) -> dict[str, tuple[list[int], list[float]]]:
    """Label -> (steps, values); a fit of one group of several (`node`) has lines of its own."""
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for entry in history:
        for name, value in read(entry):
            label = f"{entry['node']}: {name}" if "node" in entry else name
            steps, values = lines.setdefault(label, ([], []))
            steps.append(entry["step"])
            values.append(value)
    return lines


def _values(entry: Entry) -> Iterator[tuple[str, float]]:
    """What an entry says of the objective: by descent its value, of a trial the least recovery."""
    yield from ((name, entry[name]) for name in ("objective", "validation") if name in entry)
    if "recoveries" in entry:
        yield "least recovery", min(entry["recoveries"].values())


def _coefficients(entry: Entry) -> Iterator[tuple[str, float]]:
    yield from entry.get("coefficients", entry.get("point", {})).items()
