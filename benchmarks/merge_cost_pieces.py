"""The single measurements of merge_cost.py, each run in a process of its own: its figures are printed as JSON.

    python benchmarks/merge_cost_pieces.py FOLDER PIECE [WORD ...]

PEFT and transformers are imported where they are used: what lorica's own processes import is a part of their cost.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.merging import method as methods
from lorica.merging.merge import Merge, Size, prepare
from lorica.merging.method import Update

RANK, SCALE, DENSITY = 16, 2.0, 0.2
WEIGHTS = {"task0": 0.7, "task1": 0.4, "task2": 0.3, "task3": 0.6}
NAMES = list(WEIGHTS)
Result = TypeVar("Result")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Shapes:
    """The sizes of a Llama."""

    hidden: int
    keys: int  # width of k_proj and v_proj
    intermediate: int
    num_layers: int
    dtype: str

    def modules(self) -> dict[str, tuple[int, int]]:
        """The path of every linear module -> (out, in)."""
        wide, narrow, inner = self.hidden, self.keys, self.intermediate
        attention = {"q_proj": (wide, wide), "k_proj": (narrow, wide), "v_proj": (narrow, wide), "o_proj": (wide, wide)}
        mlp = {"gate_proj": (inner, wide), "up_proj": (inner, wide), "down_proj": (wide, inner)}
        layer = {f"self_attn.{name}": shape for name, shape in attention.items()}
        layer |= {f"mlp.{name}": shape for name, shape in mlp.items()}
        return {f"model.layers.{at}.{name}": shape for at in range(self.num_layers) for name, shape in layer.items()}


BASES = {
    "small": Shapes(1024, 1024, 2816, 16, "float32"),
    "llama_8b": Shapes(4096, 1024, 14336, 32, "bfloat16"),
}


@dataclass(frozen=True)
class Case:
    """One merge as both libraries call it."""

    method: str
    size: Size
    peft: Mapping[str, Any]
    params: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "cat": Case("uniform_scalar_delta", Size(), {"combination_type": "cat"}),
    "rank 16": Case("uniform_scalar_delta", Size(RANK), {"combination_type": "svd", "svd_rank": RANK}),
    "ties, rank 16": Case(
        "ties",
        Size(RANK),
        {"combination_type": "ties_svd", "svd_rank": RANK, "density": DENSITY},
        {"density": DENSITY, "preset": "paper", "scope": "adapter", "space": "full"},
    ),
}


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as lorica's command line does, or a look at all that was imported falls into what is measured
    folder, piece, *words = sys.argv[1:]
    print(json.dumps(PIECES[piece](Path(folder), *words)))


def inputs(work: Path) -> Figures:
    """Random adapters as PEFT folders, BASE/NAME."""
    for base, shapes in BASES.items():
        for seed, name in enumerate(NAMES):
            generator = torch.Generator().manual_seed(seed)
            updates = {}
            for path, (out, width) in shapes.modules().items():
                A = torch.randn(RANK, width, generator=generator) / width**0.5
                B = torch.randn(out, RANK, generator=generator) * 0.02
                updates[path] = LowRank(A, B, SCALE).to(getattr(torch, shapes.dtype))
            peft_format.write(Adapter(updates), work / base / name, task_type="CAUSAL_LM")
    shapes_of = {base: {**asdict(shapes), "num_modules": len(shapes.modules())} for base, shapes in BASES.items()}
    return {"rank": RANK, "scale": SCALE, "weights": WEIGHTS, "density": DENSITY, **shapes_of}


def lorica(work: Path, name: str) -> Figures:
    """A merge of adapters that are in memory: they are mapped from their files, and reading looks at every number."""
    case, adapters = CASES[name], _adapters(work, "small")
    method = methods.load(case.method, case.params, len(NAMES))

    def merge(size: Size) -> Merge:
        return prepare(adapters, method, weights=WEIGHTS, size=size, num_workers=1)

    made, cost = _cost(lambda: list(merge(case.size).modules()))
    uncut = merge(Size())

    def exact(path: str) -> Update:
        return uncut.module(path).update if case.method == "ties" else _sum(adapters, path)

    return {**cost, "error": _error((each.update, exact(each.path)) for each in made)}


def peft(work: Path, name: str, share: str) -> Figures:
    """The same by PEFT, on a share of the layers: the seconds are scaled up to all of them."""
    import peft
    import transformers
    from peft.utils.merge_utils import ties

    warnings.simplefilter("ignore")  # of modules that a share of the layers does not have
    config = _llama(round(float(share) * BASES["small"].num_layers))
    model = transformers.LlamaForCausalLM(config)
    first, *others = NAMES
    wrapped = peft.PeftModel.from_pretrained(model, work / "small" / first, first)
    for other in others:
        wrapped.load_adapter(work / "small" / other, other)
    options = CASES[name].peft
    _, cost = _cost(lambda: wrapped.add_weighted_adapter(NAMES, list(WEIGHTS.values()), "merged", **options))
    adapters = _adapters(work, "small")

    def exact(path: str) -> Update:
        if "density" not in options:
            return _sum(adapters, path)
        dense = [adapter.updates[path].dense() for adapter in adapters.values()]
        merged: Tensor = ties(dense, torch.tensor(list(WEIGHTS.values())), DENSITY)
        return merged

    layers = {path: layer for path, layer in model.named_modules() if path in adapters[first].updates}
    error = _error((_of_peft(layer, "merged"), exact(path)) for path, layer in layers.items())
    scaled = cost["cpu_seconds"] * BASES["small"].num_layers / config.num_hidden_layers
    return {**cost, "cpu_seconds": scaled, "error": error}


def _of_peft(layer: Any, name: str) -> LowRank:
    """The update of one adapter of PEFT's layer."""
    return LowRank(layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), layer.scaling[name])


def models(work: Path) -> Figures:
    """The base, and the base with each adapter fused, as transformers saves them."""
    import transformers

    base = transformers.LlamaForCausalLM(_llama(BASES["small"].num_layers))
    base.save_pretrained(work / "models" / "base")
    for name, adapter in _adapters(work, "small").items():
        fused = copy.deepcopy(base)
        for path, update in adapter.updates.items():
            fused.get_submodule(path).weight.data.add_(update.dense())
        fused.save_pretrained(work / "models" / name)
    return {"weights": WEIGHTS}


def from_files_to_file(work: Path, base: str) -> Figures:
    """Task arithmetic of four PEFT folders to one of rank 16; the seconds of a part are those since the last."""
    imported = time.process_time()
    adapters = _adapters(work, base)
    read = time.process_time()
    method = methods.load("uniform_scalar_delta", {}, len(NAMES))
    made = prepare(adapters, method, weights=WEIGHTS, size=Size(RANK), num_workers=1).modules()
    updates = {each.path: each.update for each in made if isinstance(each.update, LowRank)}
    merged = time.process_time()
    peft_format.write(Adapter(updates), work / base / "merged", task_type="CAUSAL_LM")
    written = time.process_time()
    return {
        "cpu_seconds": written - imported,
        "import_cpu_seconds": imported,
        "read_cpu_seconds": read - imported,
        "merge_cpu_seconds": merged - read,
        "write_cpu_seconds": written - merged,
        "peak_mib": _status("VmHWM"),
    }


def error(work: Path, folder: str) -> Figures:
    """How far the adapter in a folder is from the exact weighted sum."""
    adapters, merged = _adapters(work, "small"), peft_format.read(work / folder)
    assert merged.updates.keys() == adapters[NAMES[0]].updates.keys()
    return {"error": _error((each, _sum(adapters, path)) for path, each in merged.updates.items())}


def _adapters(work: Path, base: str) -> dict[str, Adapter]:
    return {name: peft_format.read(work / base / name) for name in NAMES}


def _llama(num_layers: int) -> Any:
    import transformers

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
    )


def _sum(adapters: Mapping[str, Adapter], path: str) -> LowRank:
    """Σ w_i·Δ_i in float64."""
    updates = {name: adapter.updates[path].to(torch.float64) for name, adapter in adapters.items()}
    B = [each.B * (WEIGHTS[name] * each.scale) for name, each in updates.items()]
    return LowRank(torch.cat([each.A for each in updates.values()]), torch.cat(B, dim=1))


def _error(pairs: Iterable[tuple[Update, Update]]) -> float:
    """‖made - exact‖ / ‖exact‖ over all modules together, in float64."""
    lost = total = 0.0
    for made, exact in pairs:
        expected = _dense(exact)
        lost += float((_dense(made) - expected).norm()) ** 2
        total += float(expected.norm()) ** 2
    return math.sqrt(lost / total)


def _dense(update: Update) -> Tensor:
    return update.to(torch.float64).dense() if isinstance(update, LowRank) else update.double()


def _cost(work: Callable[[], Result]) -> tuple[Result, Figures]:
    """What `work()` returns, its CPU seconds, and the peak of resident memory above where it began."""
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
    done.set()
    watcher.join()
    return made, {"cpu_seconds": cpu_seconds, "peak_mib": max(seen) - before}


def _status(name: str) -> float:
    """A line of the kernel's account of this process's memory, in MiB."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


PIECES: dict[str, Callable[..., Figures]] = {
    "inputs": inputs,
    "lorica": lorica,
    "peft": peft,
    "models": models,
    "files": from_files_to_file,
    "error": error,
}

if __name__ == "__main__":
    main()
