"""What the adapters use of their rank: the singular values of their updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from lorica.adapters import peft_format
from lorica.analysis import spectrum
from lorica.analysis.spectrum import Spectra
from lorica.errors import LoricaError
from lorica.report import words
from lorica.report.figures import canvas
from lorica.report.figures.canvas import Figure, Panel, View
from lorica.report.subjects import Array, Run, Study

FLOOR = 1e-4  # of the largest singular value: what is smaller is drawn here
HEAD = ("arm", "task", "seed", "module", "index", "sigma", "stable_rank", "effective_rank", "rank_utilisation")


@dataclass(frozen=True, eq=False)
class Measured:
    """An adapter's updates, module by module."""

    run: Run
    modules: dict[str, Spectra]

    def profiles(self) -> Array:
        """(modules, k): σ_i / σ_1, with nothing behind a module's rank; k is the largest rank."""
        alive = [each.sigma.numpy() for each in self.modules.values() if each.norm > 0]
        found = np.full((len(alive), max(map(len, alive), default=0)), np.nan)
        for row, sigma in zip(found, alive, strict=True):
            row[: len(sigma)] = sigma / sigma[0]
        return found


def draw(study: Study) -> Figure | str | None:
    """A panel for each task, of one seed of each arm; None without adapters, the reason if none can be measured."""
    folders = [(arm, task, study.of(arm, task)) for task in study.tasks for arm in study.arms]
    runs = [next((run for run in each if run.adapter is not None), None) for _, _, each in folders]
    found, failed = _measured([run for run in runs if run is not None])
    if not found:
        if not failed:
            return None
        return f"No singular values: {failed[0]}"
    tasks = [task for task in study.tasks if any(each.run.task == task for each in found)]
    arms = [arm for arm in study.arms if any(each.run.arm == arm for each in found)]
    left_out = f" Left out: {words.listed(failed, 2)}" if failed else ""
    return Figure(
        name=f"{study.slug}-spectra",
        title=study.title,
        lede="Singular values of each update over its largest. Faint: single modules. Bold: their median. A line that "
        f"falls early uses few of the directions that it could.{_of_seeds(study)}{left_out}",
        views=[View("", [_panel(study, task, [each for each in found if each.run.task == task]) for task in tasks])],
        head=HEAD,
        rows=[row for each in found for row in _rows(each)],
        legend=[(canvas.variable(study.arms.index(arm)), arm) for arm in arms],
    )


def _of_seeds(study: Study) -> str:
    return " One seed of each." if study.num_seeds > 1 else ""


def _measured(runs: Sequence[Run]) -> tuple[list[Measured], list[str]]:
    """The adapters that hold low-rank updates, and why the others cannot be measured."""
    found, failed = [], []
    for run in runs:
        assert run.adapter is not None
        try:
            updates = peft_format.read(run.adapter).updates
        except LoricaError as error:
            failed.append(f"{run.arm} on {run.task} ({' '.join(str(error).split())})")
            continue
        modules = {path: spectrum.of_update(update) for path, update in updates.items()}
        if any(each.norm > 0 for each in modules.values()):
            found.append(Measured(run, modules))
        else:
            failed.append(f"{run.arm} on {run.task} (it holds no low-rank update but zero)")
    return found, failed


def _panel(study: Study, task: str, measured: Sequence[Measured]) -> Panel:
    def on(axes: Any) -> None:
        for each in measured:
            place = study.arms.index(each.run.arm)
            profiles = np.clip(each.profiles(), FLOOR, None)
            x = np.arange(1, profiles.shape[1] + 1)
            for row in profiles:
                axes.plot(x, row, color=canvas.colour(place), alpha=0.22, linewidth=0.7)
            axes.plot(
                x, np.nanmedian(profiles, axis=0), color=canvas.colour(place), linewidth=2, marker="o", markersize=3.5
            )
        axes.set_yscale("log")
        axes.set_ylim(FLOOR * 0.8, 1.3)
        axes.set_yticks([1, 1e-1, 1e-2, 1e-3, 1e-4], ["1", "0.1", "0.01", "0.001", "0.0001"])
        axes.minorticks_off()
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        axes.set_xlabel("singular value, from the largest")
        axes.set_ylabel("over the largest")

    name = f"{study.slug}-spectra-{study.tasks.index(task)}"
    alt = f"Singular values of the adapters for {task}. " + " ".join(map(_said, measured))
    return canvas.panel(name, words.short(task, 44), alt, on)


def _said(measured: Measured) -> str:
    alive = [each for each in measured.modules.values() if each.norm > 0]
    ranks = max(each.nominal_rank for each in alive)
    effective, stable = (median(getattr(each, name) for each in alive) for name in ("effective_rank", "stable_rank"))
    return (
        f"{measured.run.arm}: {words.numbered(len(alive), 'module')} of rank up to {ranks}, median effective rank "
        f"{effective:.1f}, median stable rank {stable:.1f}."
    )


def _rows(measured: Measured) -> list[tuple[Any, ...]]:
    run = measured.run
    return [
        (run.arm, run.task, run.seed, path, at, value, each.stable_rank, each.effective_rank, each.rank_utilisation)
        for path, each in measured.modules.items()
        for at, value in enumerate(each.sigma.tolist(), 1)
    ]
