"""The inputs that modules see, for the merge methods that need them: a few batches of every adapter's own task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from lorica import randomness
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.config import MergeConfig
from lorica.merging.grams import Grams, collect, merge_sequentially
from lorica.merging.layers import layer_of
from lorica.merging.merge import Merge
from lorica.runs.bodies import Bodies
from lorica.runs.merging.evaluation import model_of, task_of
from lorica.runs.ready import chosen
from lorica.runs.sources import Source
from lorica.tasks.batching import Batch
from lorica.tasks.objectives import scores

BATCH_SIZE = 16
Settle = Callable[[Grams], Merge]


def grams_for(
    cfg: MergeConfig, sources: Sequence[Source], paths: Sequence[str], settle: Settle | None, bodies: Bodies
) -> Grams:
    """XᵀX of the inputs of every module at `paths`, for each source over batches of its own training data.

    With `settle`, which makes the merge from the Grams so far, a layer's inputs are those behind the merged layers
    before it (RegMean++); else behind the source's own adapter.
    """
    feed = _Feed()
    model = feed.load(cfg, sources, bodies)
    adapters = {source.name: Adapter(source.adapter.updates) for source in sources}
    batches = {name: partial(feed.run, model, name) for name in adapters}
    ordered = [path for path, _ in model.named_modules() if path in set(paths)]
    if settle is None:
        return collect(model, adapters, ordered, batches, feed.mask)
    found: Grams = {}

    def merge_layer(layer: Sequence[str], grams: Grams) -> Mapping[str, LowRank]:
        found.update(grams)
        merge = settle(found)
        updates = {path: merge.module(path).update for path in layer}
        return {path: update for path, update in updates.items() if isinstance(update, LowRank)}

    cut = {name: _only(adapter, ordered) for name, adapter in adapters.items()}
    merge_sequentially(model, cut, _layers(ordered), batches, merge_layer, feed.mask)
    return found


class _Feed:
    """Every task's batches, and one base model that reads them all: what a head answers does not matter here."""

    def __init__(self) -> None:
        self._batches: dict[str, list[Batch]] = {}
        self._running: Batch | None = None

    def load(self, cfg: MergeConfig, sources: Iterable[Source], bodies: Bodies) -> nn.Module:
        """Draw the batches of each source's task, and return a base model."""
        for source in sources:
            task = task_of(source)
            ready = bodies.prepare(model_of(source, cfg), task)
            examples = chosen(ready.task, "train", task)
            order = randomness.python_generator(cfg.seed, "calibration", source.name)
            picked = order.sample(examples, min(len(examples), cfg.calibration_batches * BATCH_SIZE))
            rows = sorted(ready.encoded(picked), key=lambda row: row.length)
            starts = range(0, len(rows), BATCH_SIZE)
            self._batches[source.name] = [ready.collate()(rows[start : start + BATCH_SIZE]) for start in starts]
        return ready.base.model

    @torch.no_grad()
    def run(self, model: nn.Module, name: str) -> None:
        for batch in self._batches[name]:
            self._running = batch
            scores(model, batch)
        self._running = None

    def mask(self) -> Tensor | None:
        return None if self._running is None else self._running.inputs["attention_mask"]


def _only(adapter: Adapter, paths: Sequence[str]) -> Adapter:
    return Adapter({path: adapter.updates[path] for path in paths if path in adapter.updates})


def _layers(paths: Sequence[str]) -> list[list[str]]:
    """The modules of one layer together, in the order of the forward pass; one without a layer stands alone."""
    return [list(group) for _, group in groupby(paths, key=lambda path: layer_of(path) or path)]
