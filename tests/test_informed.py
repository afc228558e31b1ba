"""A's first rows from what modules read: discriminants against scikit-learn, and what is left of the draw."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

from lorica.adapters import informed, injection
from lorica.adapters.informed import ALONE, FIRST, REST, Labelled, along, discriminants, fisher_directions

WIDTH = 12


def test_two_classes_give_fishers_direction() -> None:
    """scikit-learn's shrinkage has the same form: (1 - s) S + s mean(S) I is S and a ridge, up to a factor."""
    x, classes = _clusters(num_classes=2, each=300)
    ridge = informed.RIDGE
    reference = LinearDiscriminantAnalysis(solver="eigen", shrinkage=ridge / (1 + ridge)).fit(
        x.numpy(), classes.numpy()
    )
    found = fisher_directions(x, classes)
    assert found.shape == (1, WIDTH)
    assert abs(_cosine(found[0].numpy(), reference.coef_[0])) > 1 - 1e-6


@pytest.mark.parametrize("num_classes", [3, 5])
def test_there_is_one_direction_less_than_classes_strongest_first(num_classes: int) -> None:
    found = fisher_directions(*_clusters(num_classes, each=50))
    lengths = found.norm(dim=1)
    assert len(found) == num_classes - 1
    assert lengths[0] == pytest.approx(1.0)
    assert (lengths.diff() <= 0).all()
    inner = found @ found.T
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-9, rtol=0)


def test_a_rare_class_counts_by_its_share() -> None:
    """Of two classes that stand equally far from a common one, in directions of their own, the frequent one leads."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.tensor([0] * 400 + [1] * 380 + [2] * 20)
    x = torch.randn(len(classes), WIDTH, generator=generator, dtype=torch.float64)
    x[:, 0] += 3.0 * (classes == 1)
    x[:, 1] += 3.0 * (classes == 2)
    first = fisher_directions(x, classes)[0]
    assert first[0].abs() > 5 * first[1].abs()


def test_an_input_wider_than_its_examples_is_whitened_as_the_formula_says() -> None:
    x, classes = _clusters(num_classes=2, each=4)
    means = np.stack([x[classes == label].numpy().mean(axis=0) for label in (0, 1)])
    within = x.numpy() - means[classes.numpy()]
    covariance = within.T @ within / len(x)
    covariance += informed.RIDGE * np.trace(covariance) / WIDTH * np.eye(WIDTH)
    expected = np.linalg.solve(covariance, means[0] - means[1])
    assert abs(_cosine(fisher_directions(x, classes)[0].numpy(), expected)) > 1 - 1e-9


def test_classes_that_do_not_differ_have_no_direction() -> None:
    x = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0))
    assert len(fisher_directions(x, torch.zeros(20, dtype=torch.long))) == 0
    assert len(fisher_directions(torch.cat([x, x]), torch.arange(2).repeat_interleave(20))) == 0


def test_padding_and_batches_play_no_part() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 4))
    x, classes = _clusters(num_classes=2, each=16)
    tokens = x[:, None, :] + torch.randn(len(x), 8, WIDTH, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(8) < 2 + torch.arange(len(x))[:, None] % 5  # (n, 8): rows of 2 to 6 tokens
    pooled = torch.stack([row[kept].mean(dim=0) for row, kept in zip(tokens, mask, strict=True)])
    parts = [_batch(model, tokens[at], mask[at], classes[at]) for at in torch.arange(len(x)).split(8)]
    found = discriminants(model, ["0"], parts)["0"]
    torch.testing.assert_close(found.double(), fisher_directions(pooled, classes), atol=1e-5, rtol=1e-4)


def test_a_module_that_reads_something_else_has_no_directions() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, 2))
    x, classes = _clusters(num_classes=2, each=8)
    run = partial(model[0], x[:, None, :].float())
    found = discriminants(model, ["0", "1"], [Labelled(run, torch.ones(len(x), 1), classes)])
    assert list(found) == ["0"]
    assert not any(module._forward_pre_hooks for module in model)  # nothing stays behind


@pytest.mark.parametrize("first", [0, 1, 2])
def test_boosters_take_turns(first: int) -> None:
    directions = {"0": torch.tensor([[1.0, 0, 0], [0, 0.5, 0]])}
    new = injection.create(nn.Sequential(nn.Linear(3, 3)), ["0"], rank=1, alpha=1.0)
    expected = FIRST * torch.eye(3)[[first % 2]]
    torch.testing.assert_close(along(new, directions, first).updates["0"].A, expected)


def test_what_is_left_of_the_draw_is_small_and_other_modules_keep_theirs() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    new = injection.create(model, ["0", "1"], rank=3, alpha=6.0)
    laid = along(new, {"0": torch.eye(6)[:1]})
    torch.testing.assert_close(laid.updates["0"].A[1:], REST * new.updates["0"].A[1:])
    torch.testing.assert_close(laid.updates["1"].A, ALONE * new.updates["1"].A)
    assert all(torch.equal(laid.updates[path].B, new.updates[path].B) for path in new.updates)


def _clusters(num_classes: int, each: int) -> tuple[Tensor, Tensor]:
    """(n, in) float64 and (n,): classes with means of their own and one covariance."""
    generator = torch.Generator().manual_seed(num_classes)
    means = torch.randn(num_classes, WIDTH, generator=generator, dtype=torch.float64)
    shape = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_classes * each, WIDTH, generator=generator, dtype=torch.float64) @ shape
    classes = torch.arange(num_classes).repeat_interleave(each)
    return means[classes] + noise, classes


def _batch(model: nn.Module, tokens: Tensor, mask: Tensor, classes: Tensor) -> Labelled:
    return Labelled(partial(model, tokens.float()), mask, classes)


def _cosine(left: Any, right: Any) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))
