"""Write the records of results/ into the pages that quote them: nobody types a figure.

    python benchmarks/write_tables.py [--check]

A page holds a pair of comments, `<!-- results:NAME -->` and `<!-- end -->`; what stands between them is the table of
results/NAME.json. `--check` writes nothing and fails if a page differs.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorica.card import studies

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(
    ROOT / name
    for name in ("README.md", "docs/boosting.md", "docs/benchmarks.md", "docs/merging.md", "docs/studies.md")
)
BLOCK = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Record = dict[str, Any]


def main() -> None:
    differing = []
    for page in PAGES:
        old = page.read_text("utf-8")
        new = BLOCK.sub(lambda block: block[1] + table(block[2]) + block[3], old)
        if new != old:
            differing.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(new, "utf-8")
    if differing:
        print(f"{'differ' if '--check' in sys.argv else 'written'}: {', '.join(differing)}")
        sys.exit("--check" in sys.argv)


def table(name: str) -> str:
    """The Markdown table of a record, with a line that says where it comes from."""
    record = json.loads((ROOT / "results" / f"{name}.json").read_text("utf-8"))
    return f"\n{TABLES[name](record)}\n\n{_provenance(name, record)}\n\n"


def _provenance(name: str, record: Record) -> str:
    origin = record["origin"]
    versions = ", ".join(f"{library} {origin['libraries'][library]}" for library in ("torch", "transformers"))
    cores = f"{origin['num_cpus']} core{'s' if origin['num_cpus'] > 1 else ''}"
    return f"`{' '.join(origin['command'])}`: {cores}, {versions}; `results/{name}.json`."


def _step_time(record: Record) -> str:
    rows = [
        (
            name,
            f"{row['lorica_ms']:.0f} ms",
            f"{row['peft_trainer_ms']:.0f} ms",
            f"{row['ratio_median']:.2f}",
            _range(row),
        )
        for name, row in record["rows"].items()
    ]
    return _markdown(("backprop step, encoder, batch 16", "lorica", "PEFT + Trainer", "ratio", "spread"), rows)


def _range(row: Record) -> str:
    low, high = row["ratio_spread"]
    return f"{low:.2f} to {high:.2f}"


def _zo_step(record: Record) -> str:
    rows = [
        (
            f"{row['shape']}, {row['dtype']}, {row['batch_size']} × {row['length']}",
            f"{row['lorica_ms']:.0f} ms",
            f"{row['mezo_ms']:.0f} ms",
            _spread(row, "speedup"),
            f"{row['work']:.2f}",
            _spread(row, "floor"),
            row["branches"],
            f"{row['difference']:.1e}",
            f"{row['memory']['step_mib']:.0f} and {row['memory']['inference_mib']:.0f} MiB",
            f"{_whole(row['memory'], 'step') / _whole(row['memory'], 'inference'):.3f}",
            f"{row['memory']['full_step_mib']:.0f} MiB, "
            f"{_whole(row['memory'], 'full_step') / _whole(row['memory'], 'inference'):.3f}",
        )
        for row in record["rows"]
    ]
    head = (
        *(f"{record['device']}, {record['threads']} thread(s)", "lorica", "MeZO", "MeZO / lorica", "counted work"),
        *("lorica / two bare passes", "branches a pass", "losses differ by"),
        *("peak above the model, step and inference", "with the model", "of a step without an adapter"),
    )
    return _markdown(head, rows)


def _zo_compile(record: Record) -> str:
    rows = [
        (
            f"{row['shape']}, {row['dtype']}, {row['batch_size']} × {row['length']}",
            f"{row['plain_ms']:.0f} ms",
            f"{row['compiled_ms']:.0f} ms",
            f"{row['speedup']:.2f} ({row['speedup_quartiles'][0]:.2f} to {row['speedup_quartiles'][1]:.2f})",
            f"{row['first_step_seconds']:.0f} s",
            f"{row['difference']:.1e}",
        )
        for row in record["rows"]
    ]
    head = (
        *(f"{record['device']}, {record['threads']} thread(s)", "plain", "compiled", "ratio (quartiles)"),
        *("first step on such a batch", "losses differ by"),
    )
    return _markdown(head, rows)


def _zo_defaults(record: Record) -> str:
    rows = [
        (
            f"{row['model']}, {row['task']}, {len(record['seeds'])} seed(s)",
            f"{row['target']:.4f}",
            *(_needed(row["needed"][arm], record["forwards"]) for arm in ("lorica", "xgblora", "probes", "backprop")),
            *(f"{row['curves'][arm][-1]['loss']:.4f}" for arm in ("lorica", "xgblora", "probes", "backprop")),
            _paired(row["ends"]["xgblora"], row["ends"]["lorica"]),
        )
        for row in record["rows"]
    ]
    arms = ("LoRA", "XGBLoRA", "LoRA by probes alone", "backprop")
    head = (
        "",
        f"MeZO after {record['forwards']:,} forwards",
        *(f"{arm} needs" for arm in arms),
        *(f"{arm} ends" for arm in arms),
        "XGBLoRA less LoRA, by seed",
    )
    return _markdown(head, rows)


def _paired(left: Sequence[float], right: Sequence[float]) -> str:
    """The differences of two arms' losses, and their mean."""
    apart = [one - other for one, other in zip(left, right, strict=True)]
    return f"{statistics.mean(apart):+.4f} ({', '.join(f'{each:+.4f}' for each in apart)})"


def _needed(forwards: float | None, of: int) -> str:
    return "does not get there" if forwards is None else f"{forwards:,.0f}, {of / forwards:.1f} times fewer"


def _evaluation_speed(record: Record) -> str:
    rows = [
        (
            row["model"],
            f"{row['task']}, {row['tokens']:.0f} tokens, {row['options']:.0f} options",
            row["threads"],
            f"{row['lorica_ms']:.1f} ms",
            f"{row['reference_ms']:.1f} ms",
            _spread(row, "speedup"),
            f"{row['work']:.2f}",
            f"{row['difference']:.0e}",
        )
        for row in record["rows"]
    ]
    head = ("model", "an example of", "threads", "lorica", "one option at a time", "ratio", "counted work")
    return _markdown((*head, "scores differ by"), rows)


def _evaluation_matrix(record: Record) -> str:
    rows = [
        (
            f"{row['adapted']}, {row['way']}",
            f"{row['matrix_seconds']:.1f} s",
            f"{row['alone_seconds']:.1f} s",
            _spread(row, "ratio"),
            f"{row['scoring_seconds']:.1f} s",
            _spread(row, "scoring_ratio"),
            f"{row['difference']:.0e}",
        )
        for row in record["rows"]
    ]
    head = (
        *(f"{len(record['tasks'])} × {len(record['tasks'])} cells of {record['examples']} examples, blocks adapted",),
        *("matrix", "each alone", "ratio", "passes and metrics alone", "ratio", "scores differ by"),
    )
    return _markdown(head, rows)


def _spread(row: Record, name: str) -> str:
    low, high = row[f"{name}_spread"]
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"


def _whole(memory: Record, what: str) -> float:
    return float(memory["model_mib"] + memory[f"{what}_mib"])


def _quality_vs_peft(record: Record) -> str:
    rows = [
        (
            f"{row['model']}, {row['task']}",
            row["steps"],
            f"{row['lorica_mean']:.4f}",
            f"{row['peft_mean']:.4f}",
            f"{row['difference']:+.4f}",
            f"{row['peft_trainer_mean']:.4f}" if "peft_trainer_mean" in row else "",
        )
        for row in record["rows"]
    ]
    head = ("dev accuracy, 3 seeds", "steps", "lorica", "PEFT, same start", "difference", "PEFT in a Trainer, 1 seed")
    return _markdown(head, rows)


def _boosting_arms(record: Record) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in record["rows"]))
    found = {(row["arm"], row["task"]): row for row in record["rows"]}
    rows = []
    for arm, mean in record["means"].items():
        cells = [_cell(found[arm, task]) for task in tasks]
        rows.append((arm, *cells, f"{mean:.4f}"))
    return _markdown((f"test accuracy after {record['steps']} steps", *tasks, "mean"), rows)


def _cell(row: Record) -> str:
    rounds = f"; {row['accepted'][0]} of {row['num_rounds'][0]} rounds laid on" if row["num_rounds"][0] else ""
    return f"{row['mean']:.4f} ± {row['spread'] / 2:.4f} (rate {row['rate']:g}{rounds})"


def _merge_cost(record: Record) -> str:
    rows = []
    for case, found in record["peft"].items():
        ours, theirs = found["lorica"], found["peft"]
        rows.append((f"{case}, against PEFT", *_cost(ours), f"{theirs['cpu_seconds']:.2f}", _errors(ours, theirs)))
    ours, theirs = record["mergekit"]["lorica"], record["mergekit"]["mergekit"]
    without_imports = theirs["process_cpu_seconds"] - theirs["import_cpu_seconds"]
    for what, seconds, peer in (
        ("task arithmetic, files to a file, against mergekit", "process_cpu_seconds", theirs["process_cpu_seconds"]),
        ("the same without imports", "cpu_seconds", without_imports),
        ("the same, our reading and writing left out too", "merge_cpu_seconds", without_imports),
    ):
        rows.append((what, f"{ours[seconds]:.3g}", f"{ours['peak_mib']:.0f}", f"{peer:.1f}", _errors(ours, theirs)))
    large = record["llama_8b"]
    rows.append(("8B shapes, bf16 files to a file of rank 16", *_cost(large), "", ""))
    head = ("one thread", "lorica, CPU s", "peak, MiB", "peer, CPU s", "error, lorica and peer")
    return _markdown(head, rows)


def _cost(found: Record) -> tuple[str, str]:
    low, high = found["cpu_seconds_spread"]
    return f"{found['cpu_seconds']:.3g} ({low:.3g} to {high:.3g})", f"{found['peak_mib']:.0f}"


def _errors(ours: Record, theirs: Record) -> str:
    return f"{ours['error']:.4f}, {theirs['error']:.4f}"


def _merge_recovery(record: Record) -> str:
    rows = [
        (
            f"{row['method']}{'' if row['tasks'] > 2 else ', ' + ' and '.join(record['pair']) + ' alone'}",
            *_recovered(row["default"]),
            f"{row['parameter']} = {row['value']:g}" if row["tuned"] else "",
            *(_recovered(row["tuned"]) if row["tuned"] else ("", "")),
        )
        for row in sorted(record["rows"], key=_tuned_minimum, reverse=True)
    ]
    methods = _markdown(("method", "minimum, default", "mean, default", "tuned", "minimum", "mean"), rows)
    controls = [(name, *_recovered(found)) for name, found in record["controls"].items()]
    return f"{methods}\n\n{_markdown(('control', 'minimum', 'mean'), controls)}"


def _merge_learned(record: Record) -> str:
    """Best first in each part."""
    static = [
        (row["row"] if row["value"] is None else f"{row['row']}, tuned to {row['value']:g}", *_recovered(row), "")
        for row in record["static"]
    ]
    learned = [(row["row"], *_recovered(row), row["num_coefficients"]) for row in record["learned"]]
    controls = [(f"control: {name}", *_recovered(row), "") for name, row in record["controls"].items()]
    rows = [*sorted(learned, key=_falling), *sorted(static, key=_falling), *controls]
    return _markdown((f"{len(record['tasks'])} tasks, test", "minimum", "mean", "coefficients"), rows)


def _falling(row: Sequence[Any]) -> float:
    return -float(row[1].split()[0])


def _coefficients_cost(record: Record) -> str:
    rows = []
    for targets, found in record["targets"].items():
        for way, row in found.items():
            if way != "bound":
                low, _, high = row["ratio_quartiles"]
                ratio = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
                rows.append((targets, way, f"{row['cpu_seconds']:.2f}", ratio, f"{row['saved_values']:,}"))
    head = ("adapters on", "way", "CPU s", "of the frozen pass (quartiles)", "values kept for the gradient")
    return _markdown(head, rows)


def _sweep_cost(record: Record) -> str:
    rows = []
    for row in record["rows"]:
        alone = row["search"] == "grid"
        name = "grid, the first sweep of its adapters" if alone else f"bayes, {row['search']}"
        beaten = "" if alone else f"{row['at_least_grid']} of {len(row['sweeps'])}"
        rows.append((name, _of_seeds(row, "minimum", 3), beaten, _of_seeds(row, "ratio", 2)))
    head = ("20 points of TIES", "least recovery on dev", "seeds at least the grid's", "cost, of 20 evaluations")
    killed = record["restarted"]
    after = "as if it had not been" if killed["as_uninterrupted"] else "otherwise"
    said = f"{killed['finished_after']} trials, {killed['repeated']} of them repeated, its points {after}"
    return f"{_markdown(head, rows)}\n\nKilled after {killed['finished_before']} trials and gone on with: {said}."


def _of_seeds(row: Record, name: str, num_digits: int) -> str:
    """The median, and the spread where there are several."""
    low, high = row[f"{name}_spread"]
    spread = f" ({low:.{num_digits}f} to {high:.{num_digits}f})" if len(row["sweeps"]) > 1 else ""
    return f"{row[name]:.{num_digits}f}{spread}"


def _tuned_minimum(row: Record) -> tuple[bool, float]:
    """All tasks first, then by the tuned minimum."""
    return row["tasks"] > 2, (row["tuned"] or row["default"])["recovery"]["minimum"][0]


def _recovered(found: Record) -> tuple[str, str]:
    minimum, mean = (found["recovery"][name] for name in ("minimum", "mean"))
    return tuple(f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in (minimum, mean))  # type: ignore[return-value]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _encoder_study(record: Record) -> str:
    """As the study's own card has it."""
    head, *rows = studies.table(record)
    lines = [f"- {line}" for line in [*studies.verdicts(record), *studies.remarks(record)]]
    return "\n".join([_markdown(head, rows), "", *lines])


TABLES: dict[str, Callable[[Record], str]] = {
    "step_time": _step_time,
    "evaluation_speed": _evaluation_speed,
    "evaluation_matrix": _evaluation_matrix,
    "zo_step": _zo_step,
    "zo_step_gpu": _zo_step,
    "zo_compile": _zo_compile,
    "zo_defaults": _zo_defaults,
    "quality_vs_peft": _quality_vs_peft,
    "boosting_arms": _boosting_arms,
    "merge_cost": _merge_cost,
    "merge_recovery": _merge_recovery,
    "merge_learned": _merge_learned,
    "coefficients_cost": _coefficients_cost,
    "sweep_cost": _sweep_cost,
    "encoder_study": _encoder_study,
}

if __name__ == "__main__":
    main()
