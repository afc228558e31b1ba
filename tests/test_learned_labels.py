"""What the losses of learned coefficients are taken of: answers that are aligned, options, tokens, or no labels."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planted
import tiny
from lorica.adapters.delta import LowRank
from lorica.merging.fitting import loading
from lorica.merging.fitting.losses import Losses
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.problem import FittingTask, Problem, mounted
from lorica.tasks import objectives
from lorica.tasks.batching import collate, repeated
from lorica.tasks.prompting import Choice, Classified

NUM_TOKENS = 12
PATH = "layers.0.next"
QUICK = {"steps": 60, "learning_rate": 0.05, "eval_steps": 20}


class Bigrams(nn.Module):
    """A causal model that knows one token: the logits at a position are a row of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].next = nn.Linear(NUM_TOKENS, NUM_TOKENS, bias=False).double()
        nn.init.zeros_(self.layers[0].next.weight)

    def get_output_embeddings(self) -> nn.Module:
        return self.layers[0].next

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.layers[0].next(F.one_hot(input_ids, NUM_TOKENS).double()))


def successor_problem() -> Problem:
    """Answers count upwards. Adapter `next` makes each token's successor likely, adapter `same` the token itself."""
    one = torch.eye(NUM_TOKENS, dtype=torch.float64)
    updates = {"next": LowRank(one, one.roll(1, dims=0) * 4), "same": LowRank(one, one * 4)}
    rows = [
        Choice(((0, start), (0, start)), ((start + 1, start + 2, start + 3), (start, start)), 0)
        for start in range(1, 8)
    ]
    gold = partial(collate, pad_token_id=0, gold_only=True)
    model = Bigrams()
    tasks = [FittingTask(name, model, rows, gold, train_as="lm", validation=rows) for name in updates]
    return Problem(model, tasks, [PATH], {name: lambda path, own=own: own for name, own in updates.items()})


def table_loss(c: dict[str, float], shift: int) -> float:
    """Cross-entropy of position t's logits with token t + `shift`, over whole sequences, in plain arithmetic."""
    losses = []
    for start in range(1, 8):
        sequence = torch.arange(start, start + 4)
        logits = c["same"] * 4 * F.one_hot(sequence, NUM_TOKENS) + c["next"] * 4 * F.one_hot(sequence + 1, NUM_TOKENS)
        losses.append(F.cross_entropy(logits[: 4 - shift].double(), sequence[shift:]))
    return float(torch.stack(losses).mean())


def test_causal_labels_are_shifted() -> None:
    """Without the shift the adapter that repeats its input would win."""
    found = loading.load("supermerge", QUICK)(successor_problem())
    c = dict(zip(("next", "same"), found.c.tolist(), strict=True))
    other = {"next": c["same"], "same": c["next"]}
    assert c["next"] > 0.8 > -0.3 > c["same"]
    assert table_loss(c, shift=1) < table_loss(other, shift=1)
    assert table_loss(c, shift=0) > table_loss(other, shift=0)


def test_the_loss_of_an_answer_is_that_of_its_tokens_after_the_prompt() -> None:
    problem = successor_problem()
    with mounted(problem, Descent()) as live:
        losses = Losses(problem, live, "cross_entropy")
        task = problem.tasks[0]
        found = losses.measured(task, torch.tensor([0.7, -0.2]), [task.collate(task.rows)]).loss
    assert found == pytest.approx(table_loss({"next": 0.7, "same": -0.2}, shift=1), rel=1e-6)


@pytest.mark.parametrize("family", ["opt", "llama", "t5"])
def test_token_entropy_is_taken_at_the_positions_that_predict_the_answer(family: str, load: Callable[..., Any]) -> None:
    base = load(family)
    model, is_t5 = base.model.double(), family == "t5"
    rows = [Choice(((5, 6, 7),), ((8, 9),), 0), Choice(((10,),), ((11, 12, 13),), 0), Choice(((5, 6),), ((7,),), 0)]
    start = {"decoder_start_token_id": 1} if is_t5 else {}
    batch = collate(rows, pad_token_id=1, gold_only=True, **start)
    found, answers = objectives.entropies(model, batch, "lm")
    for row, entropy, answer in zip(rows, found, answers, strict=True):
        prompt, option = row.prompts[0], row.options[0]
        if is_t5:
            given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([(1, *option[:-1])])}
        else:
            given = {"input_ids": torch.tensor([prompt + option[:-1]])}
        p = model(**given).logits[0, -len(option) :].softmax(dim=-1)
        torch.testing.assert_close(entropy, -(p * p.log()).sum(dim=1).mean(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(answer, p.mean(dim=0), rtol=1e-5, atol=1e-9)


def test_option_entropy_is_that_of_the_softmax_of_the_scores(load: Callable[..., Any]) -> None:
    model = load("opt").model
    rows = [Choice(((0, 5, 6),) * 2, ((8,), (9,)), 0), Choice(((0, 7),) * 2, ((8,), (9,)), 1)]
    batch = collate(rows, pad_token_id=1)
    found, answers = objectives.entropies(model, batch, "classification")
    p = objectives.scores(model, batch).softmax(dim=-1)
    torch.testing.assert_close(found, -(p * p.log()).sum(dim=-1))
    torch.testing.assert_close(answers, p)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_candidates_in_one_forward_are_what_they_are_one_by_one(num_tokens: int, load: Callable[..., Any]) -> None:
    """Options of one token and of several: a branch's rows lie together."""
    model = load("llama").model
    adapter = tiny.adapter(model, ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
    options = tuple((8 + at,) * num_tokens for at in range(3))
    rows = [Choice(((0, 5, 6 + at),) * 3, options, at % 3) for at in range(4)]
    task = FittingTask("a", model, rows, partial(collate, pad_token_id=1))
    problem = Problem(model, [task], list(adapter.updates), {"a": adapter.updates.__getitem__})
    with mounted(problem, Descent()) as live, torch.no_grad():
        losses = Losses(problem, live, "cross_entropy")
        batch = task.collate(rows)
        candidates = torch.tensor([[0.4], [-0.9], [1.5]])
        together = losses.of_candidates(task, candidates, batch)
        apart = torch.stack([losses.mean(task, c, batch) for c in candidates])
    assert len(repeated(batch, 3).labels) == 12
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    assert float((apart[0] - apart[1]).abs()) > 1e-3


def test_adamerging_never_looks_at_labels() -> None:
    problem = planted.net_problem()
    blind = dataclasses.replace(
        problem,
        tasks=[
            dataclasses.replace(task, rows=without_labels(task.rows), validation=without_labels(task.validation))
            for task in problem.tasks
        ],
    )
    learner = loading.load("adamerging", {"steps": 5, "variant": "layer"})
    assert not learner.needs_labels
    assert torch.equal(learner(problem).c, learner(blind).c)


def without_labels(rows: Sequence[Any]) -> list[Classified]:
    return [dataclasses.replace(row, label=-1) for row in rows]


def test_a_collapse_onto_one_label_is_warned_of_and_not_kept() -> None:
    """One adapter pushes all tokens to label 1: the entropy falls, and what falls with it is the use of the answers."""
    problem = planted.table_problem(
        [-0.5, 0.5], {"a": [3.0, 3.0]}, {"a": [*planted.answers(0, (4, 0)), *planted.answers(1, (0, 4))]}
    )
    params = {**QUICK, "eval_steps": 4, "init": 0.2}
    with pytest.warns(UserWarning, match="answers of a have collapsed onto one label"):
        found = loading.load("adamerging", params)(problem)
    assert "collapsed" in found.stopped
    entries = [entry for entry in found.history if "validation" in entry]
    assert found.best_step == entries[-2]["step"], "the last one before"
    assert entries[-1]["validation"] < entries[-2]["validation"]


def test_a_fall_of_entropy_alone_is_no_collapse() -> None:
    problem = planted.table_problem(
        [-0.5, 0.5], {"a": [-3.0, 3.0]}, {"a": [*planted.answers(0, (4, 0)), *planted.answers(1, (0, 4))]}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = loading.load("adamerging", {**QUICK, "steps": 20})(problem)
    assert float(found.c) > 0.8


def test_only_updates_for_plus_plus_are_to_be_filtered() -> None:
    assert loading.load("adamerging", {"plus_plus": True}).filters == "ties"
    assert loading.load("adamerging", {}).filters is None
    assert loading.load("supermerge", {}).filters is None
