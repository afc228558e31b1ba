"""Problems of learned coefficients whose answers are known: models so small that their losses are formulas.

`Table` is logistic regression in c: a row is one token, the update of an adapter adds a number to each token's margin,
and that number is chosen freely. `Net` has two layers, a nonlinearity and a head of its own for each task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.adapters.delta import LowRank
from lorica.merging.fitting.problem import FittingTask, Problem
from lorica.merging.method import Update
from lorica.tasks.batching import collate
from lorica.tasks.prompting import Classified

PATH = "layers.0.margin"
COLLATE = partial(collate, pad_token_id=0)


class Table(nn.Module):
    """Token v -> the logits (-d_v/2, d_v/2) of its margin d."""

    def __init__(self, margins: Sequence[float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        linear = nn.Linear(len(margins), 2, bias=False).double()
        linear.weight.data = _as_logits(margins)
        self.layers[0].margin = linear

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        tokens = F.one_hot(input_ids[:, 0], self.layers[0].margin.in_features).double()  # (b, V)
        return SimpleNamespace(logits=self.layers[0].margin(tokens))


def _as_logits(margins: Sequence[float]) -> Tensor:
    row = torch.tensor(margins, dtype=torch.float64)
    return torch.stack([-row / 2, row / 2])  # (2, V)


def margin_update(margins: Sequence[float]) -> LowRank:
    """The update that adds `margins` to the tokens' margins."""
    row = torch.tensor([margins], dtype=torch.float64)
    return LowRank(row, torch.tensor([[-0.5], [0.5]], dtype=torch.float64))


def answers(token: int, odds: tuple[int, int]) -> list[Classified]:
    """Rows of one token: so many of label 0, so many of label 1. Their loss is least at the margin log(n1 / n0)."""
    return [Classified((token,), (), label) for label, count in enumerate(odds) for _ in range(count)]


def table_problem(
    base: Sequence[float],
    updates: Mapping[str, Sequence[float]],
    rows: Mapping[str, Sequence[Classified]],
    **more: Any,
) -> Problem:
    """A problem on a Table; each task is validated on the rows that it is fitted to."""
    model = Table(base)
    tasks = [FittingTask(name, model, own, COLLATE, validation=own) for name, own in rows.items()]
    made = {name: margin_update(margins) for name, margins in updates.items()}
    return Problem(model, tasks, [PATH], {name: partial(_at, {PATH: each}) for name, each in made.items()}, **more)


def planted(truth: Mapping[str, float], overlap: float = 0.25, **more: Any) -> Problem:
    """Every task's loss is least at c = `truth`: each token's labels have just the odds of its margin there.

    The task of adapter i has token 2i, which it moves by 2, and token 2i + 1, moved by -2; every other adapter moves
    them by `overlap`.
    """
    names = list(truth)
    size = 2 * len(names)
    moves = {name: [overlap] * size for name in names}
    for at, name in enumerate(names):
        moves[name][2 * at : 2 * at + 2] = [2.0, -2.0]
    odds = [(2, 6) if token % 2 == 0 else (5, 3) for token in range(size)]
    base = [
        math.log(odds[token][1] / odds[token][0]) - sum(truth[name] * moves[name][token] for name in names)
        for token in range(size)
    ]
    rows = {
        name: answers(2 * at, odds[2 * at]) + answers(2 * at + 1, odds[2 * at + 1]) for at, name in enumerate(names)
    }
    return table_problem(base, moves, rows, **more)


class Net(nn.Module):
    """tanh layers over a mean of embeddings, and a head. `body` is shared between the tasks' views."""

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.embedding, self.layers, self.head = body.embedding, body.layers, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = (self.embedding(input_ids) * attention_mask.unsqueeze(2)).sum(dim=1)  # (b, width)
        for layer in self.layers:
            x = torch.tanh(layer.dense(x))
        return SimpleNamespace(logits=self.head(x))


NET_PATHS = ("layers.0.dense", "layers.1.dense")
NET_RANKS = {"a": 2, "b": 3, "c": 1}


def net_problem(num_rows: int = 24, dtype: torch.dtype = torch.float64, **more: Any) -> Problem:
    """Three tasks with heads of 2, 3 and 4 classes on one body; labels are what a task's own adapter answers."""
    generator = torch.Generator().manual_seed(0)
    width, tokens = 6, 11
    body = nn.Module()
    body.embedding = nn.Embedding(tokens, width)
    body.layers = nn.ModuleList([nn.Module() for _ in NET_PATHS])
    for layer in body.layers:
        layer.dense = nn.Linear(width, width)
    views = [Net(body, nn.Linear(width, classes)) for classes in (2, 3, 4)]
    for view in views:
        for parameter in view.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.6
    updates = {
        name: {
            path: LowRank(
                torch.randn(rank, width, generator=generator, dtype=torch.float64).to(dtype),
                torch.randn(width, rank, generator=generator, dtype=torch.float64).to(dtype) * 0.5,
                0.7,
            )
            for path in NET_PATHS
        }
        for name, rank in NET_RANKS.items()
    }
    tasks = []
    for name, view in zip(NET_RANKS, views, strict=True):
        tokens_of = torch.randint(1, tokens, (num_rows, 5), generator=generator)
        rows = _answered(view, updates[name], tokens_of)
        tasks.append(FittingTask(name, view, rows[: num_rows // 2], COLLATE, validation=rows[num_rows // 2 :]))
    made = {name: partial(_at, own) for name, own in updates.items()}
    return Problem(views[0], tasks, NET_PATHS, made, **more)


def _answered(view: Net, updates: Mapping[str, LowRank], tokens: Tensor) -> list[Classified]:
    """The rows with what the view answers when it has the updates."""
    weights = {f"{path}.weight": view.get_submodule(path).weight + update.dense() for path, update in updates.items()}
    logits = torch.func.functional_call(view, weights, (tokens, torch.ones_like(tokens))).logits
    labels = logits.argmax(dim=1).tolist()
    return [Classified(tuple(row), (), label) for row, label in zip(tokens.tolist(), labels, strict=True)]


def _at(updates: Mapping[str, Update], path: str) -> Update:
    return updates[path]
