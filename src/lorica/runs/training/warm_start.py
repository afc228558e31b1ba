"""Where a zeroth-order run begins: its last block's factors, fitted by gradients that end at that block."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from lorica.adapters import branches, injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.adapters.injection import Live
from lorica.config import TrainConfig
from lorica.errors import NonFiniteLossError
from lorica.evaluation.scoring import in_eval_mode
from lorica.optim.backprop import backprop
from lorica.optim.updates import update_rule
from lorica.progress import tracked
from lorica.runs.training.tuning import RunUnderWay
from lorica.tasks.batching import Batch
from lorica.tasks.objectives import LossModule
from lorica.training.fit import Progress, fit

MOST_BATCHES, FEWEST_BATCHES = 200, 4  # unless a number is asked for
LARGEST_SHARE = 0.1  # of the forward passes of the run's steps, or of its time, that a warm start may take
PASSES = 2  # that a batch counts as: one forward, and a backward through the last block and what comes behind it
LEARNING_RATE = 5e-3  # at first; it falls to zero

FITTED = "fitted "  # in the names of what a log keeps of it


def num_batches(cfg: TrainConfig, num_steps: int) -> int:
    """How many batches a resolved config's run of so many steps begins with."""
    if not cfg.warm_starts():
        return 0
    if cfg.zo.warm_start_steps is not None:
        return cfg.zo.warm_start_steps
    assert cfg.zo.num_directions
    per_step = cfg.zo.num_directions * (1 if cfg.zo.estimator == "one_sided" else 2) * cfg.gradient_accumulation_steps
    count = min(MOST_BATCHES, int(LARGEST_SHARE * num_steps * per_step / PASSES))
    return count if count >= FEWEST_BATCHES else 0


def num_compared(count: int) -> int:
    """Of the last of so many batches, how many are asked for their loss at the beginning again."""
    return -(-count // 4)


def num_forwards(count: int) -> int:
    """What a warm start of so many batches counts as: a few of them are asked for their loss at the beginning too."""
    return PASSES * count + num_compared(count)


def planned(learning: RunUnderWay, new: Adapter) -> int:
    """How many batches a run that trains `new` first begins with: none where nothing of it lies in the last block."""
    count = num_batches(learning.cfg, learning.num_steps)
    return count if count and (new.heads or _paths(learning, new)) else 0


def warm_started(learning: RunUnderWay, new: Adapter) -> Adapter:
    """`new`, which is about to be trained first, with both factors in the last block, and the heads, fitted.

    Nothing below the last block keeps activations or has a gradient. A fit that does not lower the loss of its batches
    is left out. The passes are counted, and `looked` has what was fitted; a run that is taken again by its log takes it
    from there.
    """
    count = planned(learning, new)
    if learning.decided is None and count:
        found = learning.processes.of_first(_fitted(learning, new, count))
        learning.looked = {**learning.looked, **{f"{FITTED}{name}": value for name, value in found.items()}}
    looked = learning.looked.items()
    return _with(new, {name.removeprefix(FITTED): value for name, value in looked if name.startswith(FITTED)})


def _paths(learning: RunUnderWay, new: Adapter) -> list[str]:
    return branches.of_last_block(learning.ready.base.model, list(new.updates))


def _fitted(learning: RunUnderWay, new: Adapter, count: int) -> dict[str, Tensor]:
    """Name -> bfloat16 value of what was fitted to the run's first batches; nothing if that was in vain."""
    model, losses, progress = learning.ready.base.model, list[float](), Progress()
    objective, last = LossModule(model, learning.train_as), deque[Batch](maxlen=num_compared(count))
    paths, live = _paths(learning, new), injection.inject(model, new)
    trainable = _only(live, paths)
    try:
        with in_eval_mode(model):
            fit(
                objective,
                trainable,
                tracked(_batches(learning, count, last), count, "warm start"),
                estimator=backprop,
                optimizer=update_rule("adamw", trainable.values(), learning_rate=LEARNING_RATE),
                learning_rate=lambda step: LEARNING_RATE * (1 - step / count),
                num_steps=count,
                num_seconds=LARGEST_SHARE * learning.num_seconds,
                progress=progress,
                on_step=lambda step: losses.append(step.loss),
            )
            found = {name: value.detach().bfloat16().cpu() for name, value in trainable.items()}
            live.put(new)
            with torch.no_grad():
                before = sum(float(objective(batch)) for batch in last)
            is_lower = sum(losses[-len(last) :]) < before
    except NonFiniteLossError:
        is_lower = False
    finally:
        injection.remove(live)
    _count(learning.progress, progress)
    if is_lower:
        return found
    said = f"warning: the warm start of {count} batches did not lower their loss: it is left out"
    learning.say.print(said, highlight=False, soft_wrap=True)
    return {}


def _only(live: Live, paths: Collection[str]) -> dict[str, nn.Parameter]:
    """What is trained of a live adapter: both factors of the modules at `paths`, and the heads."""
    for path, layer in live.layers.items():
        layer.A.requires_grad_(path in paths)
        layer.B.requires_grad_(path in paths)
    return live.trainable()


def _batches(learning: RunUnderWay, count: int, last: deque[Batch]) -> Iterator[Batch]:
    """The batches that the run's first steps meet; the newest stay in `last`."""
    rows, collate = learning.rows["train"], learning.ready.collate(gold_only=learning.train_as == "lm")
    for indices in itertools.islice(learning.stream.indices(), count):
        last.append(collate([rows[index] for index in indices]))
        yield last[-1]


def _count(progress: Progress, own: Progress) -> None:
    """Add what the warm start took; a run that goes on from a checkpoint has it already."""
    if progress.has_warm_start:
        return
    progress.has_warm_start = True
    progress.forwards += num_forwards(own.step)
    progress.tokens += own.tokens
    progress.seconds += own.seconds


def _with(new: Adapter, fitted: Mapping[str, Tensor]) -> Adapter:
    """`new` with the values that were fitted in their places."""

    def value(name: str, drawn: Tensor) -> Tensor:
        return fitted[name].to(drawn.dtype) if name in fitted else drawn

    updates = {
        path: LowRank(value(f"{path}.A", update.A), value(f"{path}.B", update.B), update.scale)
        for path, update in new.updates.items()
    }
    heads = {
        path: {name: value(f"{path}.{name}", old) for name, old in head.items()} for path, head in new.heads.items()
    }
    return Adapter(updates, heads, new.base_model)
