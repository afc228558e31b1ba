"""The card of a study: its question, what the arms came to, and what that shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Study = Mapping[str, Any]

TEMPLATE = """# {title}

{num_runs} runs under one budget of {amount:g} {unit} each; {rates}

{table}

{verdicts}

Means over seeds {seeds}, with 95 % intervals over seeds and test examples. Memory and seconds are medians of what the
runs took on the machine that ran them. Every run is a folder of its own under `runs/`, `study.json` has every figure,
`study.csv` a line for each run, `{figure}` the losses.

```sh
{command}
```
"""


def study_card(study: Study, command: str, figure: str) -> str:
    """The README of a study's folder, as Markdown; every figure comes from `study`, the content of study.json."""
    head, *rows = table(study)
    lines = [f"| {' | '.join(map(_plain, row))} |" for row in (head, ["---"] * len(head), *rows)]
    return TEMPLATE.format(
        title=_plain(study["title"]),
        num_runs=len(study["runs"]),
        amount=study["budget"]["amount"],
        unit=study["budget"]["unit"],
        rates=f"{rates(study) or 'rates are as given'}." + ("" if study["finished"] else " It is not finished."),
        table="\n".join(lines),
        verdicts="\n".join(f"- {_plain(each)}" for each in [*verdicts(study), *remarks(study)]),
        seeds=", ".join(map(str, study["seeds"])),
        command=command,
        figure=figure,
    )


def table(study: Study) -> list[list[str]]:
    """The head, and a row for each arm on each task."""
    head = ["task", "arm", "rate", "metric", "mean, 95 %", "trainable", "memory", "seconds", "forwards"]
    rows = sorted(study["cells"], key=lambda each: study["tasks"].index(each["task"]))
    return [head, *(_row(each) for each in rows)]


def verdicts(study: Study) -> list[str]:
    """What each difference shows, in words."""
    return [_verdict(each) for each in study["differences"]]


def remarks(study: Study) -> list[str]:
    """What a reader must know of the runs: of their rates, and what failed or is missing."""
    return [*remarks_on_rates(study), *_failures(study["runs"])]


def rates(study: Study) -> str | None:
    """How the learning rates were chosen, arm by arm where their grids differ; None if all rates were given."""
    tuning = study["tuning"]
    if tuning is None:
        return None
    grids = {each["arm"]: _grid(each) for each in tuning["found"]}
    among = [f"among {', '.join(f'{rate:g}' for rate in grid)}" for grid in grids.values()]
    told = among[0] if len(set(among)) == 1 else "; ".join(map(" ".join, zip(grids, among, strict=True)))
    runs = (each for each in study["runs"] if each["arm"] not in grids and each["learning_rate"] is not None)
    given = dict.fromkeys(each["arm"] for each in runs)
    return (
        f"rates chosen for each arm and task by {tuning['by']} (seed {', '.join(map(str, tuning['seeds']))}), {told}"
        + (f"; those of {', '.join(given)} as given" if given else "")
    )


def remarks_on_rates(study: Study) -> list[str]:
    """Arms without a rate, and those whose best has no neighbour on one side: a wider grid may change what is found."""
    tuning, found = study["tuning"] or {"found": []}, []
    missing = {(each["arm"], each["task"]) for each in study["runs"] if each["state"] == "missing"}
    for each in tuning["found"]:
        grid, place = _grid(each), f"{each['arm']} on {each['task']}"
        if each["chosen"] is None and (each["arm"], each["task"]) not in missing:
            found.append(f"{place}: a run failed at every rate, so that none was chosen")
        elif len(grid) > 1 and each["chosen"] in (grid[0], grid[-1]):
            edge = "least" if each["chosen"] == grid[0] else "largest"
            found.append(f"{place}: the best rate, {each['chosen']:g}, is the grid's {edge}")
    return found


def _grid(found: Mapping[str, Any]) -> list[float]:
    return sorted(line["learning_rate"] for line in found["tried"])


def _row(cell: Mapping[str, Any]) -> list[str]:
    score = "–" if cell["mean"] is None else f"{cell['mean']:.3f}"
    if cell["low"] is not None:
        score += f" ± {max(cell['mean'] - cell['low'], cell['high'] - cell['mean']):.3f}"  # an end may be cut off
    if cell["diverged"]:
        score += f", {cell['diverged']} diverged"
    trainable = _known(cell["num_trainable"], lambda count: f"{count / cell['num_parameters']:.3%}")
    return [
        *(cell["task"], cell["arm"], _known(cell["learning_rate"], lambda rate: f"{rate:g}"), cell["metric"] or "–"),
        *(score, trainable, _known(cell["peak_bytes"], lambda size: f"{size / 1e6:,.0f} MB")),
        *(_known(cell["seconds"], lambda seconds: f"{seconds:.1f}"), _known(cell["forwards"], lambda n: f"{n:,}")),
    ]


def _known(value: Any, told: Any) -> str:
    return "–" if value is None else str(told(value))


def _verdict(found: Mapping[str, Any]) -> str:
    where = "all tasks together" if found["task"] is None else found["task"]
    pair = f"{found['arm']} against {found['against']} on {where}: {found['verdict']}"
    if found["mean"] is None:
        return f"{pair}, for no pair of runs has finished"
    if found["low"] is None:
        return f"{pair}; {100 * found['mean']:+.2f} points in the one pair that has finished"
    points = f"{100 * found['mean']:+.2f} points, 95 % {100 * found['low']:+.2f} to {100 * found['high']:+.2f}"
    return f"{pair}; {points} ({found['num_pairs']} pairs)"


def _failures(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    failed = [f"failed: {each['folder']}: {each['error']}" for each in runs if each["state"] == "failed"]
    return [*failed, *_missing(runs)]


def _missing(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those apart that are compared, of which there are more once every rate is chosen."""
    roles = [each["role"] for each in runs if each["state"] == "missing"]
    what = {"tuning": "that rates are chosen by", "final": "that are compared"}
    return [f"missing: {roles.count(role)} of the runs {told}" for role, told in what.items() if role in roles]


def _plain(text: str) -> str:
    """Text that stays in its cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
