"""A linear classifier fitted on features: logistic regression, its L2 strength chosen on held-out examples."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.errors import DataError

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)  # C: the larger, the weaker the penalty
MAX_ITERATIONS = 200  # of L-BFGS, for each


@dataclass(frozen=True)
class Fitted:
    """A linear map from features to logits: weight (classes, d), bias (classes,), and the C that it was fitted with."""

    weight: Tensor
    bias: Tensor
    strength: float
    dev_loss: float

    def at(self, path: str) -> dict[str, Tensor]:
        """The parameters of the linear layer at `path`, under their names in the model."""
        return {f"{path}.weight": self.weight, f"{path}.bias": self.bias}


def fit_probe(
    features: Tensor, labels: Tensor, dev_features: Tensor, dev_labels: Tensor, *, num_classes: int, intercept: bool
) -> Fitted:
    """The logistic regression whose cross-entropy on dev is the least over `STRENGTHS`.

    Features (n, d) are brought to mean 0 (with an intercept) and standard deviation 1 first, so that the penalty treats
    them alike; the map that is returned takes them as they are. Raises DataError if a class has no training example.
    """
    check_classes(labels.tolist(), num_classes)
    mean = features.mean(dim=0) if intercept else torch.zeros(features.shape[1])
    spread = features.std(dim=0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    found = []
    for strength, weight, bias in _path((features - mean) / spread, labels, intercept):
        weight = weight / spread
        bias = bias - weight @ mean
        loss = float(F.cross_entropy(dev_features @ weight.T + bias, dev_labels))
        found.append(Fitted(weight, bias, strength, loss))
    return min(found, key=lambda fitted: fitted.dev_loss)


def check_classes(labels: Collection[int], num_classes: int) -> None:
    """Raise DataError if one of the classes has no training example."""
    missing = sorted(set(range(num_classes)) - set(labels))
    if missing:
        raise DataError(f"no training example has label number {missing[0]}: a linear probe needs some of every label")


def _path(features: Tensor, labels: Tensor, intercept: bool) -> Iterator[tuple[float, Tensor, Tensor]]:
    """(C, weight (classes, d), bias (classes,)), float32, for each of `STRENGTHS`: each begins where the last ended."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(fit_intercept=intercept, max_iter=MAX_ITERATIONS, warm_start=True)
    inputs, targets = features.double().numpy(), labels.numpy()
    for strength in STRENGTHS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # dev decides whether a weak penalty was worth it
            model.set_params(C=strength).fit(inputs, targets)
        weight = torch.from_numpy(model.coef_.copy()).float()
        bias = torch.from_numpy(np.broadcast_to(model.intercept_, len(weight)).copy()).float()
        if len(weight) == 1:  # of two classes, the log-odds alone
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        yield strength, weight, bias
