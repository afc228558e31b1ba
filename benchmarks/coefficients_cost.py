"""What learnable coefficients cost: a pass with four adapters on the model against the frozen model's, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/coefficients_cost.py [--repeats 15]

A Llama-like base (4 layers, hidden 1024, 256 tokens, one row), four random adapters of rank 16, a coefficient for each
adapter and layer. CPU seconds of forward and backward; in every round each way takes its turn, and its ratio to the
frozen pass is that of the round.

- `frozen`: the base alone, backward through to the input embeddings.
- a `merge_impl`: the same inputs, with a gradient for the coefficients. It is asked for the embeddings' gradient too,
  so that the layers below the first adapter are no saving. `dense` holds every ΔW as a matrix (`gpu_cache`).
- `saved_values` are the numbers that the backward pass keeps beyond the frozen pass's, in tensors with a row for each
  token (a merged weight is not among them); `bound` is tokens × R of all modules.

Writes a record to results/coefficients_cost.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lorica import files, models, randomness, results
from lorica.adapters import injection
from lorica.adapters.delta import LowRank
from lorica.merging.fitting.layout import layout, ranks_of
from lorica.merging.runtime import mount

ROOT = Path(__file__).resolve().parents[1]
NUM_LAYERS, WIDTH, INNER, NUM_TOKENS, RANK = 4, 1024, 2816, 256, 16
NAMES = ("a", "b", "c", "d")
TARGETS: dict[str, str | tuple[str, ...]] = {"all-linear": "", "q and v": ("q_proj", "v_proj")}
WAYS: dict[str, dict[str, Any]] = {
    "fused_lora_linear": {"merge_impl": "fused_lora_linear"},
    "fused_linear": {"merge_impl": "fused_linear"},
    "streaming_parametrize": {"merge_impl": "streaming_parametrize"},
    "streaming_parametrize, dense": {"merge_impl": "streaming_parametrize", "delta_residency": "gpu_cache"},
    "functional_clone_legacy": {"merge_impl": "functional_clone_legacy"},
}
Updates = Mapping[str, Sequence[LowRank]]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    model = _model()
    x = torch.empty(1, NUM_TOKENS, WIDTH).normal_(std=0.02, generator=randomness.torch_generator(0, "inputs"))
    record: dict[str, Any] = {
        "what": "CPU seconds of forward and backward under learnable coefficients; ratio to the frozen pass, by round",
        "tokens": NUM_TOKENS,
        "layers": NUM_LAYERS,
        "hidden": WIDTH,
        "adapters": len(NAMES),
        "rank": RANK,
        "repeats": arguments.repeats,
        "targets": {
            name: _costs(model, _updates(model, suffixes), x, arguments.repeats) for name, suffixes in TARGETS.items()
        },
        "origin": results.origin(0, "cpu"),
    }
    print(json.dumps(record["targets"], indent=2))
    files.write_json(ROOT / "results/coefficients_cost.json", record)


def _costs(model: nn.Module, updates: Updates, x: Tensor, repeats: int) -> dict[str, Any]:
    """Medians and ranges of each way, and what each keeps for the backward pass."""
    ways = {"frozen": partial(_frozen_pass, model, x)}
    ways |= {name: partial(_pass, model, updates, x, options) for name, options in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            spent = way()
            if turn > 0:  # the first round warms up
                seconds[name].append(spent)
        print(f"round {turn} of {repeats}", file=sys.stderr, flush=True)
    kept = {name: _saved_values(way) for name, way in ways.items()}
    return {
        "bound": NUM_TOKENS * RANK * len(NAMES) * len(updates),
        **{
            name: _figures(seconds[name], seconds["frozen"]) | {"saved_values": kept[name] - kept["frozen"]}
            for name in ways
        },
    }


def _figures(seconds: Sequence[float], frozen: Sequence[float]) -> dict[str, Any]:
    ratios = sorted(own / base for own, base in zip(seconds, frozen, strict=True))
    return {
        "cpu_seconds": round(statistics.median(seconds), 4),
        "cpu_seconds_spread": [round(min(seconds), 4), round(max(seconds), 4)],
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(each, 3) for each in statistics.quantiles(ratios, n=4)],
    }


def _frozen_pass(model: nn.Module, x: Tensor) -> float:
    begin = time.process_time()
    _loss(model(inputs_embeds=x.clone().requires_grad_())).backward()  # type: ignore[no-untyped-call]
    return time.process_time() - begin


def _pass(model: nn.Module, updates: Updates, x: Tensor, options: Mapping[str, Any]) -> float:
    """The same under coefficients; laying the adapters on the model is done once in a merge and not counted."""
    where = layout(ranks_of(updates), NAMES, "layer")
    with mount(model, updates, where, **options) as mounted:
        begin = time.process_time()
        c = where.uniform(0.3).requires_grad_()
        found = mounted(model, inputs_embeds=x.clone().requires_grad_(), coefficients=c)
        _loss(found).backward()  # type: ignore[no-untyped-call]
        return time.process_time() - begin


def _loss(outputs: Any) -> Tensor:
    return outputs.logits.square().mean()  # type: ignore[no-any-return]


def _saved_values(way: Callable[[], float]) -> int:
    """How many numbers the pass keeps for its backward in tensors with a row for each token; a storage counts once."""
    kept: dict[int, Tensor] = {}

    def pack(saved: Tensor) -> Tensor:
        if NUM_TOKENS in saved.shape:
            kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        way()
    return sum(each.untyped_storage().nbytes() // each.element_size() for each in kept.values())


def _model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_heads=16,
        num_hidden_layers=NUM_LAYERS,
    )
    torch.manual_seed(0)
    with models.quiet():
        made: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return made.eval().requires_grad_(False)


def _updates(model: nn.Module, suffixes: str | tuple[str, ...]) -> Updates:
    """Random adapters on the linear modules whose paths end in one of `suffixes`."""
    generator = randomness.torch_generator(0, "adapters")

    def update(out_features: int, in_features: int) -> LowRank:
        A = torch.empty(RANK, in_features).normal_(std=in_features**-0.5, generator=generator)
        return LowRank(A, torch.empty(out_features, RANK).normal_(std=0.02, generator=generator), 2.0)

    shapes = injection.linear_modules(model, ("lm_head",))
    return {path: [update(*shapes[path]) for _ in NAMES] for path in shapes if path.endswith(suffixes)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what learnable coefficients cost beside the frozen model")
    parser.add_argument("--repeats", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
