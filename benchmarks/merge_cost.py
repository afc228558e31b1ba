"""CPU and memory of a merge: lorica against PEFT and mergekit, and alone at the shapes of Llama 8B; one thread.

    make peers && python benchmarks/merge_cost.py [--repeats 5] [--work FOLDER]

Four random adapters of rank 16 on every linear module. Each measurement has a process of its own, a piece of
merge_cost_pieces.py, and lorica and PEFT take turns. `--repeats` is for what takes seconds; PEFT's and mergekit's dense
work is done once.

- `peft`: 112 modules of a Llama-like base (hidden 1024, 16 layers). CPU seconds of the merging call alone and its peak
  of resident memory above where it began, the adapters being in memory on both sides. `error` is that of the result: to
  the exact weighted sum, or for TIES to the dense update that the library's own TIES makes.
- `mergekit`: the same adapters, from files to a file of rank 16. mergekit merges four fused models by task arithmetic
  and extracts a LoRA from the result, lorica merges the four PEFT folders: CPU seconds of the whole processes, and of
  their imports.
- `llama_8b`: bf16 adapters, from files to a file of rank 16, by lorica alone; `peak_mib` is the whole process's and
  `process_cpu_seconds` has its imports in it.

`--modules-share` gives PEFT's dense merges fewer layers and scales their seconds up, to try things out; nothing is
recorded then. Writes a record to results/merge_cost.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorica import files, results

ROOT = Path(__file__).resolve().parents[1]
PIECES = ROOT / "benchmarks" / "merge_cost_pieces.py"
MERGEKIT = ROOT / ".venv-mergekit" / "bin"
CASES = {"cat": False, "rank 16": True, "ties, rank 16": True}  # whether PEFT makes dense updates
Figures = dict[str, Any]
Run = Callable[..., Figures]


def main() -> None:
    arguments = _arguments()
    if not MERGEKIT.exists():
        raise SystemExit(f"{MERGEKIT.parent} is not there: make peers")
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        run = functools.partial(_piece, Path(folder))
        inputs = run("inputs")
        record = {
            "what": "CPU seconds and peak of resident memory of merging four adapters of rank 16, by one thread",
            "inputs": inputs,
            "peft": {case: _against_peft(run, case, arguments) for case in CASES},
            "llama_8b": _medians([run("files", "llama_8b") for _ in range(arguments.repeats)]),
            "mergekit": _against_mergekit(run, Path(folder), arguments.repeats),
            "peers": {"peft": version("peft"), "mergekit": _mergekit_version()},
            "origin": results.origin(0, "cpu", places=["--work"]),
        }
    print(json.dumps(record, indent=2))
    if arguments.modules_share == 1:
        (ROOT / "results").mkdir(exist_ok=True)
        files.write_json(ROOT / "results/merge_cost.json", record)


def _against_peft(run: Run, case: str, arguments: argparse.Namespace) -> Figures:
    dense_in_peft = CASES[case]
    share = arguments.modules_share if dense_in_peft else 1
    ours, theirs = [], []
    for turn in range(arguments.repeats):
        ours.append(run("lorica", case))
        if turn == 0 or not dense_in_peft:
            theirs.append(run("peft", case, share))
        _say(f"{case}, turn {turn}: lorica {ours[-1]}, PEFT {theirs[-1]}")
    found = {"lorica": _medians(ours), "peft": _medians(theirs)}
    return {**found, "times_less_cpu": found["peft"]["cpu_seconds"] / found["lorica"]["cpu_seconds"]}


def _against_mergekit(run: Run, work: Path, repeats: int) -> Figures:
    ours = _medians([run("files", "small") for _ in range(repeats)])  # before gigabytes wait to be written to the disk
    ours["error"] = run("error", "small/merged")["error"]
    theirs = _mergekit(run, work)
    without_imports = theirs["process_cpu_seconds"] - theirs["import_cpu_seconds"]
    _say(f"files to a file: lorica {ours}, mergekit {theirs}")
    return {
        "lorica": ours,
        "mergekit": theirs,
        "times_less_cpu": theirs["process_cpu_seconds"] / ours["process_cpu_seconds"],
        "times_less_cpu_of_the_call": theirs["process_cpu_seconds"] / ours["merge_cpu_seconds"],
        "times_less_cpu_without_our_imports": theirs["process_cpu_seconds"] / ours["cpu_seconds"],
        "times_less_cpu_without_imports": without_imports / ours["cpu_seconds"],
    }


def _mergekit(run: Run, work: Path) -> Figures:
    """Its two commands as they come, but for the tokenizer, which the base does not have."""
    weights = run("models")["weights"]
    base, merged, extracted = (work / name for name in ("models/base", "models/merged", "extracted"))
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [
            {"model": str(work / "models" / name), "parameters": {"weight": weight}} for name, weight in weights.items()
        ],
        "dtype": "float32",
    }
    files.write_json(work / "recipe.yaml", recipe)  # JSON is YAML
    options = ["--no-copy-tokenizer", "--num-threads", 1]
    merge = _timed(MERGEKIT / "mergekit-yaml", work / "recipe.yaml", merged, *options)[1]
    paths = ["--model", merged, "--base-model", base, "--out-path", extracted]
    extract = _timed(MERGEKIT / "mergekit-extract-lora", *paths, "--max-rank", 16, *options)[1]
    imports = [
        _timed(MERGEKIT / "python", "-c", f"import mergekit.scripts.{script}")[1]["process_cpu_seconds"]
        for script in ("run_yaml", "extract_lora")
    ]
    return {
        "process_cpu_seconds": merge["process_cpu_seconds"] + extract["process_cpu_seconds"],
        "merge_cpu_seconds": merge["process_cpu_seconds"],
        "extract_cpu_seconds": extract["process_cpu_seconds"],
        "import_cpu_seconds": sum(imports),
        "process_peak_mib": max(merge["process_peak_mib"], extract["process_peak_mib"]),
        "error": run("error", "extracted")["error"],
    }


def _mergekit_version() -> str:
    code = "from importlib.metadata import version; print(version('mergekit'))"
    return _timed(MERGEKIT / "python", "-c", code)[0].strip()


def _piece(work: Path, *words: object) -> Figures:
    """What a piece reports, and what its whole process cost."""
    said, cost = _timed(sys.executable, PIECES, work, *words)
    return {**cost, **json.loads(said.splitlines()[-1])}


def _timed(*command: object) -> tuple[str, Figures]:
    """What a command prints, and the CPU seconds and the peak memory of its process, from beginning to end."""
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    environment = {**os.environ, **one_thread, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as complained:
        process = subprocess.Popen([str(word) for word in command], stdout=printed, stderr=complained, env=environment)
        _, status, usage = os.wait4(process.pid, 0)  # what the other children used is not in it
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (printed, complained):
            file.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed: {complained.read()[-2000:]}")
        cpu_seconds = usage.ru_utime + usage.ru_stime
        return printed.read(), {"process_cpu_seconds": cpu_seconds, "process_peak_mib": usage.ru_maxrss / 1024}


def _medians(runs: Sequence[Figures]) -> Figures:
    """The median of every figure, and the range of the seconds."""
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    seconds = sorted(run["cpu_seconds"] for run in runs)
    return {**medians, "cpu_seconds_spread": [seconds[0], seconds[-1]], "repeats": len(runs)}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU and memory of a merge against PEFT and mergekit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", help="a folder with 6 GB to spare; the system's temporary one if none is given")
    parser.add_argument("--modules-share", type=float, default=1.0, help="of PEFT's layers where its work is dense")
    return parser.parse_args()


if __name__ == "__main__":
    main()
