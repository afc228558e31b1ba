"""Time and memory of a zeroth-order step: lorica against a MeZO step, at the shapes of OPT, side by side.

    python benchmarks/zo_step.py [--rounds 7] [--threads 1] [--shapes opt-125m opt-350m] [--device cpu] [--compile]

Random weights, LoRA r=8 on query and value, two options of one token each. `length` is that of the prompt; MeZO's rows
have the option behind it. In one process a MeZO step, our step, and two bare forward passes of the body take turns, and
the ratios are taken round by round:

- `speedup`: a MeZO step's time / our step's.
- `work`: the same ratio of the multiplications in matrix products, counted, not timed: what the speedup would be if
  each took as long on both sides.
- `floor`: our step's time / that of two bare passes over the same tokens.
- `difference`: of the two losses from the reference's at the same z, before any step; the reference in bfloat16 rounds
  its logits, so there it tells of the reference.

On the CPU, times are CPU seconds, which other work on the machine disturbs less than the clock. `memory` is the peak of
resident memory above the loaded model in a process of its own, of five steps, of five steps of the whole model without
an adapter (`full_step`), and of scoring the same batch, and the model's own size. Writes a record to
results/zo_step.json (on a GPU: results/zo_step_gpu.json).

With `--compile` our step takes turns with itself over compiled blocks instead, as many branches a pass on both sides;
`first_step_seconds`, by the clock, is what the first compiled step on a batch took, most of it the compiler's. That
record is results/zo_compile.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from zo_step_pieces import SHAPES, Mezo, Ours, Prompts, body, prompts, random_opt, sharing, with_adapters

from lorica import files, results
from lorica.adapters.branches import blocks_of
from lorica.optim.compiled import CompiledBlocks
from lorica.optim.probes import Probing

ROOT = Path(__file__).resolve().parents[1]
PIECES = ROOT / "benchmarks" / "zo_step_pieces.py"
BATCHES = ((16, 24), (4, 24), (1, 12))
DTYPES = ("float32", "bfloat16")
AGAINST_MEZO = "time of a zeroth-order step against a MeZO step and against two bare forward passes; peak memory"
COMPILED = "time of a zeroth-order step, and of the same with the model's blocks compiled"
Figures = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    compare = _compare_compiled if arguments.compile else _compare
    rows = [
        row
        for shape in arguments.shapes
        for dtype in arguments.dtypes
        for row in compare(shape, dtype, arguments.device, arguments.rounds)
    ]
    record = {
        "what": COMPILED if arguments.compile else AGAINST_MEZO,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "device": arguments.device if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "rows": rows,
        "origin": results.origin(0, arguments.device),
    }
    name = ("zo_compile" if arguments.compile else "zo_step") + ("" if arguments.device == "cpu" else "_gpu")
    (ROOT / "results").mkdir(exist_ok=True)
    files.write_json(ROOT / f"results/{name}.json", record)


def _compare(shape: str, dtype: str, device: str, rounds: int) -> list[Figures]:
    model = random_opt(shape, dtype, device)
    bare = sharing(model)
    live, mezo = with_adapters(model)
    ours = Ours(live)
    batches = [prompts(batch_size, length, device) for batch_size, length in BATCHES]
    differences = [_difference(mezo, ours, batch) for batch in batches]  # before a step parts the two
    rows = []
    for (batch_size, length), batch, difference in zip(BATCHES, batches, differences, strict=True):
        row = {
            "shape": shape,
            "dtype": dtype,
            "batch_size": batch_size,
            "length": length,
            **_times(mezo, ours, body(bare, batch), batch, rounds),
            "work": _work(mezo, ours, batch),
            "difference": difference,
            "memory": _memory(shape, dtype, batch_size, length, device),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def _compare_compiled(shape: str, dtype: str, device: str, rounds: int) -> list[Figures]:
    model = random_opt(shape, dtype, device)
    live, _ = with_adapters(model)
    plain, compiled = (Ours(live, Probing()) for _ in range(2))
    compiled.estimator = CompiledBlocks(blocks_of(model), print).around(compiled.estimator)
    rows = []
    for batch_size, length in BATCHES:
        batch = prompts(batch_size, length, device)
        expected, begin = plain.loss(batch), time.perf_counter()
        found = compiled.loss(batch)
        first_step_seconds = time.perf_counter() - begin
        row = {
            "shape": shape,
            "dtype": dtype,
            "batch_size": batch_size,
            "length": length,
            **_times_compiled(plain, compiled, batch, rounds),
            "first_step_seconds": first_step_seconds,
            "difference": abs(found - expected),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def _times_compiled(plain: Ours, compiled: Ours, batch: Prompts, rounds: int) -> Figures:
    """Median milliseconds of each, and the median and quartiles of their ratio."""
    for ours in (plain, compiled):
        ours.step(batch)
    turns = [[_seconds(lambda ours=ours: ours.step(batch)) for ours in (plain, compiled)] for _ in range(rounds)]
    plain_ms, compiled_ms = (1e3 * statistics.median(each) for each in zip(*turns, strict=True))
    low, middle, high = statistics.quantiles([one / other for one, other in turns], n=4, method="inclusive")
    return {
        "plain_ms": plain_ms,
        "compiled_ms": compiled_ms,
        "speedup": middle,
        "speedup_quartiles": [low, high],
    }


def _difference(mezo: Mezo, ours: Ours, batch: Prompts) -> float:
    """The largest difference of the two losses, both at θ ± εz with the reference's z."""
    pairs = zip(ours.losses(batch, mezo.direction(0)), mezo.losses(batch, 0), strict=True)
    return max(abs(mine - theirs) for mine, theirs in pairs)


def _times(mezo: Mezo, ours: Ours, one_pass: Callable[[], Any], batch: Prompts, rounds: int) -> Figures:
    """Median milliseconds of each, and the medians and ranges of their ratios."""
    works = (lambda: mezo.step(batch), lambda: ours.step(batch), lambda: (one_pass(), one_pass()))
    for work in works:
        work()
    turns = [[_seconds(work) for work in works] for _ in range(rounds)]
    milliseconds = [1e3 * statistics.median(each) for each in zip(*turns, strict=True)]
    return {
        **dict(zip(("mezo_ms", "lorica_ms", "two_passes_ms"), milliseconds, strict=True)),
        **_ratio("speedup", [theirs / mine for theirs, mine, _ in turns]),
        **_ratio("floor", [mine / passes for _, mine, passes in turns]),
        "branches": ours.num_branches(batch),
    }


def _work(mezo: Mezo, ours: Ours, batch: Prompts) -> float:
    return _operations(lambda: mezo.step(batch)) / _operations(lambda: ours.step(batch))


def _operations(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _seconds(work: Callable[[], Any]) -> float:
    """CPU seconds where the work is the CPU's, else seconds until the device is done."""
    if not torch.cuda.is_available():
        begin = time.process_time()
        work()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _ratio(name: str, values: Sequence[float]) -> Figures:
    return {name: statistics.median(values), f"{name}_spread": [min(values), max(values)]}


def _memory(shape: str, dtype: str, batch_size: int, length: int, device: str) -> Figures:
    found: Figures = {}
    for what in ("step", "full_step", "warm_start", "inference"):
        words = [what, shape, dtype, str(batch_size), str(length), device]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, str(PIECES), *words], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} failed: {done.stderr[-2000:]}")
        measured = json.loads(done.stdout.splitlines()[-1])
        found |= {f"{what}_mib": measured["peak_mib"], "model_mib": measured["model_mib"]}
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="time and memory of a zeroth-order step against MeZO's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["opt-125m", "opt-350m"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compare with compiled blocks, not with MeZO")
    return parser.parse_args()


if __name__ == "__main__":
    main()
