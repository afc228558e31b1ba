"""What trackers are told of a run, by namespace: plain figures, from what the run has at hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.injection import Live
from lorica.analysis import spectrum
from lorica.evaluation.evaluate import Evaluation
from lorica.training.fit import Step
from lorica.training.ledger import Entry

Figures = dict[str, float]


def of_step(step: Step, before: Step | None) -> Figures:
    """`train/*`, `training_efficiency/*` and `efficiency/tokens_per_second`, since the step that was told before."""
    tokens, seconds = (step.tokens - before.tokens, step.seconds - before.seconds) if before else (0, 0.0)
    return {
        "train/loss": step.loss,
        "train/learning_rate": step.learning_rate,
        "training_efficiency/steps": step.step,
        "training_efficiency/forwards": step.forwards,
        "training_efficiency/tokens": step.tokens,
        "training_efficiency/seconds": step.seconds,
        **({"efficiency/tokens_per_second": tokens / seconds} if seconds > 0 else {}),
    }


def of_slopes(step: Step, num_left_out: int) -> Figures:
    """`zo/*`: the root mean square of the slopes as they were applied, the loss's trend, the probes left out so far."""
    usable = len(step.weights) - step.num_left_out
    slope = math.hypot(*step.weights) * math.sqrt(usable)  # a weight is its slope over the number of usable ones
    trend = {} if step.trend_t is None else {"zo/t_statistic": step.trend_t}
    return {"zo/slope": slope, "zo/skipped_probes": num_left_out, **trend}


@torch.no_grad()
def of_factors(live: Live) -> Figures:
    """`lora_adapters/*`: the norms of A and of B, over all modules and over those of each name."""
    factors: list[Tensor] = [factor for layer in live.layers.values() for factor in (layer.A, layer.B)]
    if not factors:
        return {}
    norms = torch.stack(torch._foreach_norm(factors)).cpu().view(-1, 2)  # (modules, 2), copied off the device once
    groups = {"": list(range(len(live.layers)))} | _by_name(live.layers)
    return {
        f"lora_adapters/{group}{which}_norm": float(torch.linalg.vector_norm(norms[places, at]))
        for group, places in groups.items()
        for at, which in enumerate("AB")
    }


def of_spectra(adapter: Adapter) -> Figures:
    """`lora_rank/*`: the mean effective rank, stable rank and rank utilisation of all updates, and of each name's."""
    found = [spectrum.of_update(update) for update in adapter.updates.values()]
    groups = {"": list(range(len(found)))} | _by_name(adapter.updates) if found else {}
    return {
        f"lora_rank/{group}{name}": statistics.fmean(getattr(found[place], name) for place in places)
        for group, places in groups.items()
        for name in ("effective_rank", "stable_rank", "rank_utilisation")
    }


def of_evaluation(found: Evaluation) -> Figures:
    """The loss and every metric under the split's name."""
    values = {name: score.value for name, score in found.metrics.items()}
    return {f"{found.split}/{name}": value for name, value in {"loss": found.loss, **values}.items()}


def of_rounds(entries: Sequence[Entry]) -> Figures:
    """`boosting/*` at the end of the last of these rounds."""
    last = entries[-1]
    best = {} if last.best_loss is None else {"boosting/best_loss": last.best_loss}
    return {
        "boosting/rounds": len(entries),
        "boosting/laid_on": sum(entry.accepted for entry in entries),
        "boosting/rolled_back": sum(entry.rolled_back for entry in entries),
        "boosting/norm": last.norm,
        **best,
    }


def of_share(num_trainable: int, num_parameters: int) -> Figures:
    """`efficiency/*` that does not change while a run goes on."""
    return {"efficiency/num_trainable": num_trainable, "efficiency/trainable_share": num_trainable / num_parameters}


def of_checks(checks: Mapping[str, bool]) -> Figures:
    """`verification/*`: 1 for each check that holds, 0 for one that fails, and how many fail."""
    held = {f"verification/{name}": float(holds) for name, holds in checks.items()}
    return {**held, "verification/num_failed": sum(not holds for holds in checks.values())}


def _by_name(paths: Iterable[str]) -> dict[str, list[int]]:
    """`name/` -> the places of the modules that are called so, whatever layer they are in."""
    groups: dict[str, list[int]] = {}
    for place, path in enumerate(paths):
        groups.setdefault(f"{path.rpartition('.')[2]}/", []).append(place)
    return groups
