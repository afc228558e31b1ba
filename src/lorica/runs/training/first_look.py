"""What a run looks at before its first step under adapter.init=discriminant: how its task's classes differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lorica import randomness
from lorica.adapters import bypass, informed
from lorica.adapters.informed import Labelled
from lorica.config import TrainConfig
from lorica.errors import ConfigError
from lorica.evaluation.probing import fit_probe
from lorica.evaluation.scoring import in_eval_mode
from lorica.runs.training.tuning import RunUnderWay
from lorica.runs.training.warm_start import FITTED
from lorica.tasks.base import Task
from lorica.tasks.batching import Batch
from lorica.tasks.objectives import scores
from lorica.tasks.prompting import Encoded

NUM_EXAMPLES = 800  # of the training data
HELD_OUT = 0.2  # of them, by which the strength of the head's penalty is chosen

DIRECTIONS = "directions of "  # of a module, in the names of a look's tensors


@dataclass(frozen=True)
class FirstLook:
    """What tells the classes apart for each module (k, in), a head's fitted layer, and how many batches it took."""

    directions: Mapping[str, Tensor] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    num_forwards: int = 0

    def as_tensors(self) -> dict[str, Tensor]:
        """For the log that replays a run without its examples."""
        directions = {f"{DIRECTIONS}{path}": found.bfloat16() for path, found in self.directions.items()}
        return {**directions, **self.head}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> FirstLook:
        """From what `as_tensors` gave."""
        directions = {key: value.float() for key, value in tensors.items() if key.startswith(DIRECTIONS)}
        head = {key: value for key, value in tensors.items() if not key.startswith((DIRECTIONS, FITTED))}
        return FirstLook({key.removeprefix(DIRECTIONS): value for key, value in directions.items()}, head)


def first_look(learning: RunUnderWay, paths: Sequence[str]) -> FirstLook:
    """Put some training examples through the bare base, once: A's first rows, and the last layer of a task's head.

    That layer starts as the linear probe of what comes in to it (Kumar et al. 2022, arXiv 2202.10054).
    """
    base, task = learning.ready.base, learning.ready.task
    if not has_classes(learning.cfg, task):
        return FirstLook()
    batches = _batches(learning)
    path = bypass.last_linear(base.model, base.heads, len(task.labels)) if base.heads else None
    seen: list[Tensor] = []
    with in_eval_mode(base.model), bypass.bypassed(base.model, path) if path else nullcontext():
        directions = informed.discriminants(base.model, paths, _labelled(learning, batches, seen))
    labels = torch.tensor([row.label for rows in batches for row in rows])
    directions = {name: found.bfloat16().float() for name, found in directions.items()}  # half the bytes in the log
    return FirstLook(directions, _fitted(learning, path, torch.cat(seen), labels) if path else {}, len(batches))


def has_classes(cfg: TrainConfig, task: Task) -> bool:
    """Whether a task has classes that all its examples share. ConfigError if the config asks for them in vain."""
    if task.train_as == "classification" and len(task.labels) > 1:
        return True
    if cfg.adapter.init == "discriminant":
        raise ConfigError(
            f"adapter.init=discriminant tells a task's classes apart, and {task.name} has none that all its "
            "examples share: use adapter.init=activations or kaiming"
        )
    return False


def _batches(learning: RunUnderWay) -> list[list[Encoded]]:
    """The examples in batches of the run's size, of similar lengths."""
    rows, size = learning.rows["train"], learning.cfg.batch_size
    picked = randomness.python_generator(learning.cfg.seed, "first look").sample(rows, min(len(rows), NUM_EXAMPLES))
    picked.sort(key=lambda row: row.length)
    return [picked[start : start + size] for start in range(0, len(picked), size)]


def _labelled(learning: RunUnderWay, batches: Sequence[Sequence[Encoded]], seen: list[Tensor]) -> Iterator[Labelled]:
    """The batches for the model; what it makes of each is added to `seen`."""
    collate = learning.ready.collate()
    for rows in batches:
        batch = collate(rows)
        mask = batch.inputs["attention_mask"]
        classes = batch.labels.repeat_interleave(len(mask) // len(batch.labels))  # a row an option, or a row an example
        yield Labelled(partial(_see, learning.ready.base.model, batch, seen), mask, classes)


def _see(model: nn.Module, batch: Batch, seen: list[Tensor]) -> None:
    seen.append(scores(model, batch).cpu())


def _fitted(learning: RunUnderWay, path: str, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The layer at `path` as fitted to features (n, d) and labels (n,); nothing if a class was not seen."""
    base, num_classes = learning.ready.base, len(learning.ready.task.labels)
    order = torch.randperm(len(labels), generator=randomness.torch_generator(learning.cfg.seed, "held out"))
    num_held = round(HELD_OUT * len(labels))
    held, kept = order[:num_held], order[num_held:]
    if len(set(labels[kept].tolist())) < num_classes:
        return {}
    intercept = base.model.get_submodule(path).bias is not None
    parts = (features[kept], labels[kept], features[held], labels[held])
    return fit_probe(*parts, num_classes=num_classes, intercept=intercept).at(path)
