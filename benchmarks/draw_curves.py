"""The curves of results/zo_defaults.json as docs/figures/zo_defaults.svg: dev loss by forward passes and by seconds.

    python benchmarks/draw_curves.py

A curve is an arm's mean over the seeds; the dotted line is where MeZO's ends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorica import files

ROOT = Path(__file__).resolve().parents[1]
ARMS = {  # what an arm is called, and its colour (Okabe and Ito's, which most eyes tell apart)
    "mezo": ("MeZO's LoRA", "#000000"),
    "lorica": ("LoRA", "#0072b2"),
    "xgblora": ("XGBLoRA", "#d55e00"),
    "probes": ("LoRA by probes alone", "#cc79a7"),
    "backprop": ("LoRA by backprop", "#009e73"),
}
AXES = {"forwards": "forward passes", "seconds": "CPU seconds"}


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "lorica"  # the same bytes for the same record
    record = json.loads((ROOT / "results" / "zo_defaults.json").read_text("utf-8"))
    rows = record["rows"]
    figure = Figure(figsize=(4 * len(rows), 6), layout="constrained")
    grid = figure.subplots(len(AXES), len(rows), squeeze=False)
    for column, row in enumerate(rows):
        for line, name in enumerate(AXES):
            _draw(grid[line][column], row, name)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    path = ROOT / "docs" / "figures" / "zo_defaults.svg"
    path.parent.mkdir(exist_ok=True)
    with files.replacing(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


def _draw(axes: Axes, row: dict[str, Any], name: str) -> None:
    """A cell's curves along one axis."""
    for arm, curve in row["curves"].items():
        label, colour = ARMS[arm]
        axes.plot([look[name] for look in curve], [look["loss"] for look in curve], color=colour, label=label)
    axes.axhline(row["target"], color="#777777", linestyle=":", linewidth=1)
    axes.set(title=f"{row['model']}, {row['task']}", xlabel=AXES[name], ylabel="loss on dev", xscale="log")
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
