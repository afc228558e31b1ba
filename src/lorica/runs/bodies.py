"""Base models that tasks share: each is loaded once, and every task has a head of its own on it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lorica import models
from lorica.config import ModelConfig, TaskConfig
from lorica.errors import ModelError
from lorica.models import Base, Kind
from lorica.runs.ready import Ready, load_base, loaded_task, ready
from lorica.tasks.base import Task


@dataclass(frozen=True)
class Bodies:
    """The base models that a command works with, on one device; what a checkpoint lacks is drawn with `seed`."""

    device: str
    seed: int
    _loaded: dict[ModelConfig, Base] = field(default_factory=dict, init=False, repr=False)

    def prepare(self, model: ModelConfig, task: TaskConfig) -> Ready:
        """As `ready.prepare`; the model of a config that was seen before is the same body with the task's own head."""
        return self.with_task(model, *loaded_task(model, task), task)

    def with_task(self, model: ModelConfig, kind: Kind, asked: Task, cfg: TaskConfig, num_prefix: int = 0) -> Ready:
        """The same, of a task that is loaded already; inputs leave `num_prefix` of the model's positions free."""
        on, named = models.choose_device(self.device), model.model_copy(update={"kind": kind})
        if named not in self._loaded:
            self._loaded[named] = load_base(named, kind, on, self.seed)
        return ready(sharing(self._loaded[named], len(asked.labels), self.seed), asked, cfg, on, num_prefix)


@torch.no_grad()
def sharing(base: Base, num_labels: int, seed: int = 0) -> Base:
    """The same base model for another task: the body is the very one of `base`, the head of `num_labels` its own.

    What is laid on a module of the body shows in both. The head is as `models.load` leaves it: of the checkpoint where
    that fits, else drawn with `seed`. A base without a head (causal, seq2seq) is returned as it is.
    """
    if base.kind != "classification":
        return base
    body, prefix = base.model.base_model, base.model.base_model_prefix
    if body is base.model:
        raise ModelError(f"model.name={base.name!r} has no body apart from its head: tasks cannot share it")
    config = copy.deepcopy(base.model.config)
    config.num_labels = num_labels
    with torch.device("meta"), models.quiet():
        view = type(base.model)(config).eval()
    for name, module in view.named_children():
        if name != prefix:
            module.to_empty(device=base.model.device).to(base.model.dtype).requires_grad_(False)
    inner = [path.removeprefix(f"{prefix}.") for path in base.heads if path.startswith(f"{prefix}.")]
    setattr(view, prefix, _branched(body, inner) if inner else body)
    resized = _take_head(view, base)
    new = {*base.new, *resized}
    models.draw_new(view, [key for key in new if any(key.startswith(head + ".") for head in base.heads)], seed)
    return Base(view, base.tokenizer, base.kind, base.name, base.heads, tuple(sorted(new)))


def _take_head(view: Any, base: Base) -> list[str]:
    """Copy the base's head into the view's; what has another shape there is zero, and its names are returned."""
    theirs, resized = base.model.state_dict(), []
    for name, value in view.state_dict().items():
        if name.startswith(f"{view.base_model_prefix}."):
            continue
        own = theirs[name]
        if own.dtype != value.dtype:
            raise ModelError(f"model.name={base.name!r}: its head's {name} is {own.dtype}: tasks cannot share the body")
        if own.shape == value.shape:
            value.copy_(own)
        else:
            value.zero_()  # a bias has a number for each class and starts at zero; a matrix is drawn afterwards
            resized.append(name)
    return resized


def _branched(module: nn.Module, paths: Sequence[str]) -> nn.Module:
    """A module whose insides are the very same but for those at `paths`, which are copies."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    for name in dict.fromkeys(path.partition(".")[0] for path in paths):
        deeper = [path.partition(".")[2] for path in paths if path.partition(".")[0] == name]
        inside = module.get_submodule(name)
        setattr(made, name, copy.deepcopy(inside) if "" in deeper else _branched(inside, deeper))
    return made
