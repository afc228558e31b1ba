"""CPU and memory of a merge: lorica against PEFT and mergekit, and alone at the shapes of Llama 8B; one thread.

    make peers && python benchmarks/merge_cost.py [--repeats 5] [--work FOLDER]

Four random adapters of rank 16 on every linear module. What is measured runs in a process of its own, lorica and PEFT
taking turns in one run; `--repeats` is for what takes seconds, PEFT's and mergekit's dense work is done once.

- `peft`: 112 modules of a Llama-like base (hidden 1024, 16 layers). CPU seconds of the merging call alone and its peak of
  resident memory above where it began, the adapters being in memory on both sides. `error` is that of the result: to the
  exact weighted sum, or for TIES to the dense update that the library's own TIES makes.
- `mergekit`: the same base and adapters, from files to a file of rank 16. mergekit merges four fused models by task
  arithmetic and extracts a LoRA from the result; lorica merges the four PEFT folders. CPU seconds of the whole processes,
  and of their imports.
- `llama_8b`: bf16 adapters from files to a file of rank 16, by lorica; CPU seconds and the whole process's peak.

`--modules-share` gives PEFT fewer layers and scales its seconds up, to try things out: nothing is recorded then. Writes
a record to results/merge_cost.json.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorica import files, results
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.merging import method as methods
from lorica.merging.merge import Merge, Size, prepare

ROOT = Path(__file__).resolve().parents[1]
MERGEKIT = ROOT / ".venv-mergekit" / "bin"
RANK, SCALE, DENSITY = 16, 2.0, 0.2
WEIGHTS = (0.7, 0.4, 0.3, 0.6)
NAMES = tuple(f"task{number}" for number in range(len(WEIGHTS)))
MIB = 1 << 20
Result = TypeVar("Result")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Shapes:
    """The sizes of a Llama: what its linear modules are."""

    hidden: int
    keys: int  # width of k_proj and v_proj
    intermediate: int
    num_layers: int
    dtype: torch.dtype

    def modules(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in)."""
        wide, narrow, inner = self.hidden, self.keys, self.intermediate
        attention = {"q_proj": (wide, wide), "k_proj": (narrow, wide), "v_proj": (narrow, wide), "o_proj": (wide, wide)}
        mlp = {"gate_proj": (inner, wide), "up_proj": (inner, wide), "down_proj": (wide, inner)}
        named = {f"self_attn.{name}": shape for name, shape in attention.items()}
        named |= {f"mlp.{name}": shape for name, shape in mlp.items()}
        return {f"model.layers.{at}.{name}": shape for at in range(self.num_layers) for name, shape in named.items()}


BASES = {
    "small": Shapes(1024, 1024, 2816, 16, torch.float32),
    "llama_8b": Shapes(4096, 1024, 14336, 32, torch.bfloat16),
}


@dataclass(frozen=True)
class Case:
    """One merge as both libraries call it."""

    method: str
    size: Size
    peft: Mapping[str, Any]
    params: Mapping[str, Any] = field(default_factory=dict)
    dense_in_peft: bool = True


CASES = {
    "cat": Case("uniform_scalar_delta", Size(), {"combination_type": "cat"}, dense_in_peft=False),
    "rank 16": Case("uniform_scalar_delta", Size(RANK), {"combination_type": "svd", "svd_rank": RANK}),
    "ties, rank 16": Case(
        "ties",
        Size(RANK),
        {"combination_type": "ties_svd", "svd_rank": RANK, "density": DENSITY},
        {"density": DENSITY, "preset": "paper", "scope": "adapter", "space": "full"},
    ),
}


def main() -> None:
    arguments = _arguments()
    if arguments.piece:
        print(json.dumps(_piece(arguments.piece, Path(arguments.work), arguments.modules_share)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        run = functools.partial(_child, work=Path(folder), share=arguments.modules_share)
        run(["inputs"])
        record = {
            "what": "CPU seconds and peak of resident memory of merging four adapters of rank 16, one thread",
            "weights": WEIGHTS,
            "peft": {name: _against_peft(name, run, arguments.repeats) for name in CASES},
            "mergekit": _against_mergekit(Path(folder), run, arguments.repeats),
            "llama_8b": _medians([run(["files", "llama_8b"]) for _ in range(arguments.repeats)]),
            "versions": run(["versions"]),
            "origin": results.origin(0, "cpu"),
        }
    print(json.dumps(record, indent=2))
    if arguments.modules_share == 1:
        (ROOT / "results").mkdir(exist_ok=True)
        files.write_json(ROOT / "results/merge_cost.json", record)


def _against_peft(name: str, run: Callable[[Sequence[str]], Figures], repeats: int) -> Figures:
    ours, theirs = [], []
    for turn in range(repeats):
        ours.append(run(["lorica", name]))
        if turn == 0 or not CASES[name].dense_in_peft:
            theirs.append(run(["peft", name]))
        print(name, ours[-1], theirs[-1], file=sys.stderr, flush=True)
    found: Figures = {"lorica": _medians(ours), "peft": _medians(theirs)}
    return {**found, "times_less_cpu": found["peft"]["cpu_seconds"] / found["lorica"]["cpu_seconds"]}


def _against_mergekit(work: Path, run: Callable[[Sequence[str]], Figures], repeats: int) -> Figures:
    """mergekit's two commands as they come, but for the tokenizer that the base does not have."""
    if not MERGEKIT.exists():
        raise SystemExit(f"{MERGEKIT.parent} is not there: make peers")
    run(["models"])
    merged, options = work / "merged", ["--no-copy-tokenizer", "--num-threads", "1"]
    sources = [
        {"model": str(work / "models" / name), "parameters": {"weight": weight}}
        for name, weight in zip(NAMES, WEIGHTS, strict=True)
    ]
    base = str(work / "models" / "base")
    recipe = {"merge_method": "task_arithmetic", "base_model": base, "models": sources, "dtype": "float32"}
    files.write_json(work / "recipe.yaml", recipe)  # JSON is YAML
    merge = _timed([MERGEKIT / "mergekit-yaml", work / "recipe.yaml", merged, *options])[1]
    to_lora = ["--model", merged, "--base-model", base, "--out-path", work / "extracted", "--max-rank", RANK]
    extract = _timed([MERGEKIT / "mergekit-extract-lora", *to_lora, *options])[1]
    imports = [
        _timed([MERGEKIT / "python", "-c", f"import mergekit.scripts.{module}"])[1]["process_cpu_seconds"]
        for module in ("run_yaml", "extract_lora")
    ]
    theirs = {
        "process_cpu_seconds": merge["process_cpu_seconds"] + extract["process_cpu_seconds"],
        "merge_cpu_seconds": merge["process_cpu_seconds"],
        "extract_cpu_seconds": extract["process_cpu_seconds"],
        "import_cpu_seconds": sum(imports),
        "peak_mib": max(merge["process_peak_mib"], extract["process_peak_mib"]),
        **run(["extracted"]),
    }
    ours = _medians([run(["files", "small"]) for _ in range(repeats)])
    return {
        "lorica": ours,
        "mergekit": theirs,
        "times_less_cpu": theirs["process_cpu_seconds"] / ours["process_cpu_seconds"],
        "times_less_cpu_without_imports": (theirs["process_cpu_seconds"] - theirs["import_cpu_seconds"])
        / ours["cpu_seconds"],
    }


def _child(piece: Sequence[str], work: Path, share: float) -> Figures:
    """What a piece of this benchmark reports from a process of its own, and what the whole process cost."""
    options = ["--piece", *piece, "--work", work, "--modules-share", share]
    said, cost = _timed([sys.executable, Path(__file__).resolve(), *options])
    return {**json.loads(said.splitlines()[-1]), **cost}


def _timed(command: Sequence[object]) -> tuple[str, Figures]:
    """What a command prints, and the CPU seconds and the peak of its process, from beginning to end."""
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    environment = {**os.environ, **one_thread, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as complained:
        process = subprocess.Popen([str(word) for word in command], stdout=printed, stderr=complained, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0), complained.seek(0)
        if process.returncode:
            raise SystemExit(f"{command} failed: {complained.read()[-2000:]}")
        cpu_seconds = usage.ru_utime + usage.ru_stime
        return printed.read(), {"process_cpu_seconds": cpu_seconds, "process_peak_mib": usage.ru_maxrss / 1024}


def _medians(runs: Sequence[Figures]) -> Figures:
    """The median of every figure, and the range of the seconds."""
    found: Figures = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    seconds = [run["cpu_seconds"] for run in runs]
    return {**found, "cpu_seconds_spread": [min(seconds), max(seconds)], "repeats": len(runs)}


def _piece(words: Sequence[str], work: Path, share: float) -> Figures:
    torch.set_num_threads(1)
    pieces: dict[str, Callable[..., Figures]] = {
        "inputs": _inputs,
        "lorica": _lorica,
        "peft": functools.partial(_peft, share=share),
        "models": _models,
        "files": _from_files_to_file,
        "extracted": _extracted,
        "versions": _versions,
    }
    return pieces[words[0]](work, *words[1:])


def _inputs(work: Path) -> Figures:
    """Random adapters as PEFT folders, BASE/NAME."""
    for base, shapes in BASES.items():
        for seed, name in enumerate(NAMES):
            generator = torch.Generator().manual_seed(seed)
            updates = {}
            for path, (out, width) in shapes.modules().items():
                A = torch.randn(RANK, width, generator=generator) / width**0.5
                B = torch.randn(out, RANK, generator=generator) / RANK**0.5
                updates[path] = LowRank(A, B * 0.05, SCALE).to(shapes.dtype)
            peft_format.write(Adapter(updates), work / base / name, task_type="CAUSAL_LM")
    return {}


def _adapters(work: Path, base: str = "small") -> dict[str, Adapter]:
    """Mapped from their files; reading looks at every number, so all of them are in memory afterwards."""
    return {name: peft_format.read(work / base / name) for name in NAMES}


def _lorica(work: Path, name: str) -> Figures:
    case, adapters = CASES[name], _adapters(work)
    method = methods.load(case.method, case.params, len(NAMES))

    def merge(size: Size) -> Merge:
        return prepare(adapters, method, weights=WEIGHTS, size=size, num_workers=1)

    made, cost = _cost(lambda: list(merge(case.size).modules()))
    uncut = merge(Size())

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for each in made:
            assert isinstance(each.update, LowRank)
            exact = uncut.module(each.path).update if case.method == "ties" else _sum(adapters, each.path)
            assert isinstance(exact, Tensor)
            yield each.update.dense(), exact

    return {**cost, "error": _error(pairs())}


def _peft(work: Path, name: str, share: float) -> Figures:
    import peft  # here and below: what lorica's own processes import is a part of what they cost
    import transformers
    from peft.utils.merge_utils import ties

    warnings.simplefilter("ignore")  # of modules that a share of the layers does not have
    share = share if CASES[name].dense_in_peft else 1.0
    config = _llama(transformers, max(1, round(share * BASES["small"].num_layers)))
    first, *others = NAMES
    model = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(config), work / "small" / first, first)
    for other in others:
        model.load_adapter(work / "small" / other, other)
    options = CASES[name].peft
    _, cost = _cost(lambda: model.add_weighted_adapter(list(NAMES), list(WEIGHTS), "merged", **options))
    adapters = _adapters(work)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for path, layer in model.base_model.model.named_modules():
            if path not in adapters[first].updates:
                continue
            made = layer.get_delta_weight("merged").detach()
            if options["combination_type"] == "ties_svd":
                yield (
                    made,
                    ties([each.updates[path].dense() for each in adapters.values()], torch.tensor(WEIGHTS), DENSITY),
                )
            else:
                yield made, _sum(adapters, path)

    scale = BASES["small"].num_layers / config.num_hidden_layers
    return {**cost, "cpu_seconds": cost["cpu_seconds"] * scale, "error": _error(pairs())}


def _llama(transformers: Any, num_layers: int) -> Any:
    shapes = BASES["small"]
    return transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=shapes.hidden // 64,
        num_key_value_heads=shapes.keys // 64,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )


def _models(work: Path) -> Figures:
    """The base and the base with each adapter fused, as transformers saves them."""
    import transformers

    base = transformers.LlamaForCausalLM(_llama(transformers, BASES["small"].num_layers))
    base.save_pretrained(work / "models" / "base")
    for name, adapter in _adapters(work).items():
        fused = copy.deepcopy(base)
        for path, update in adapter.updates.items():
            fused.get_submodule(path).weight.data.add_(update.dense())
        fused.save_pretrained(work / "models" / name)
    return {}


def _from_files_to_file(work: Path, base: str) -> Figures:
    """Task arithmetic of four PEFT folders to one of rank 16."""
    imported = time.process_time()
    adapters = _adapters(work, base)
    read = time.process_time()
    method = methods.load("uniform_scalar_delta", {}, len(NAMES))
    made = prepare(adapters, method, weights=WEIGHTS, size=Size(RANK), num_workers=1).modules()
    updates = {each.path: each.update for each in made if isinstance(each.update, LowRank)}
    merged = time.process_time()
    peft_format.write(Adapter(updates), work / f"{base}_merged", task_type="CAUSAL_LM")
    written = time.process_time()
    found = {
        "cpu_seconds": written - imported,
        "import_cpu_seconds": imported,
        "read_cpu_seconds": read - imported,
        "merge_cpu_seconds": merged - read,
        "write_cpu_seconds": written - merged,
        "peak_mib": _status("VmHWM"),
    }
    del updates
    return {**found, **_distance(work, base, peft_format.read(work / f"{base}_merged"))} if base == "small" else found


def _extracted(work: Path) -> Figures:
    return _distance(work, "small", peft_format.read(work / "extracted"))


def _distance(work: Path, base: str, merged: Adapter) -> Figures:
    adapters = _adapters(work, base)
    return {"error": _error((update.dense(), _sum(adapters, path)) for path, update in merged.updates.items())}


def _versions(work: Path) -> Figures:
    from importlib.metadata import version

    code = "from importlib.metadata import version; print(version('mergekit'))"
    return {"peft": version("peft"), "mergekit": _timed([MERGEKIT / "python", "-c", code])[0].strip()}


def _sum(adapters: Mapping[str, Adapter], path: str) -> Tensor:
    """Σ w_i·Δ_i, (out, in)."""
    updates = [adapter.updates[path] for adapter in adapters.values()]
    B = torch.cat([update.B * (weight * update.scale) for update, weight in zip(updates, WEIGHTS, strict=True)], dim=1)
    return B @ torch.cat([update.A for update in updates])


def _error(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    """‖made - exact‖ / ‖exact‖ over all modules together."""
    squares = [(float((made - exact).norm()) ** 2, float(exact.norm()) ** 2) for made, exact in pairs]
    lost, total = map(sum, zip(*squares, strict=True))
    return float(lost / total) ** 0.5


def _cost(work: Callable[[], Result]) -> tuple[Result, Figures]:
    """What `work()` returns, the CPU seconds of this process, and its peak of resident memory above where it began."""
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    except OSError:
        return _watched(work, before)
    begin = time.process_time()
    made = work()
    cpu_seconds = time.process_time() - begin
    return made, {"cpu_seconds": cpu_seconds, "peak_mib": _status("VmHWM") - before}


def _watched(work: Callable[[], Result], before: float) -> tuple[Result, Figures]:
    """The same where the kernel does not let go of a peak: memory is looked at every 5 ms."""
    seen, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(_status("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.thread_time()
    made = work()
    cpu_seconds = time.thread_time() - begin
    done.set(), watcher.join()
    return made, {"cpu_seconds": cpu_seconds, "peak_mib": max(seen) - before}


def _status(name: str) -> float:
    """A line of this process's memory account, in MiB."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024 / MIB


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU and memory of a merge against PEFT and mergekit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", help="where the files are made, 6 GB; the system's temporary folder if none is given")
    parser.add_argument("--modules-share", type=float, default=1.0, help="of PEFT's layers where its work is dense")
    parser.add_argument("--piece", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
