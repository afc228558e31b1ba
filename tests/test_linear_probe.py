"""A linear probe: its features are what the last layer sees, and its fit is that of an independent optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tiny
from lorica.adapters import bypass
from lorica.errors import DataError, ModelError
from lorica.evaluation.probing import STRENGTHS, Fitted, fit_probe
from lorica.models import Base
from lorica.tasks.batching import HeadBatch
from lorica.tasks.objectives import scores

Load = Callable[..., Base]
LAST = {"bert": "classifier", "roberta": "classifier.out_proj", "opt": "score", "gpt2": "score", "llama": "score"}


@pytest.mark.parametrize("family", list(LAST))
def test_features_are_what_comes_in_to_the_last_layer(load: Load, family: str) -> None:
    """So the layer on the features is the model; a decoder's are those of the last token that is no padding."""
    base = load(family, "classification")
    path = bypass.last_linear(base.model, base.heads, tiny.NUM_LABELS)
    assert path == LAST[family]
    inputs = tiny.inputs(base.model)
    inputs["input_ids"][0, 5:], inputs["attention_mask"][0, 5:] = base.model.config.pad_token_id, 0
    one = HeadBatch(inputs, torch.tensor([0, 1, 2]))
    layer = base.model.get_submodule(path)
    with torch.no_grad():
        expected = scores(base.model, one)
        with bypass.bypassed(base.model, path):
            features = scores(base.model, one)
        torch.testing.assert_close(layer(features), expected, rtol=1e-5, atol=1e-5)
    assert features.shape == (3, tiny.WIDTH)
    assert base.model.get_submodule(path) is layer


def test_the_layer_is_back_after_an_error(load: Load) -> None:
    base = load("bert")
    layer = base.model.get_submodule("classifier")
    with pytest.raises(RuntimeError, match="out of memory"), bypass.bypassed(base.model, "classifier"):
        raise RuntimeError("out of memory")
    assert base.model.get_submodule("classifier") is layer


def test_a_head_without_such_a_layer_is_named(load: Load) -> None:
    base = load("bert")
    with pytest.raises(ModelError, match="classifier has 7 outputs"):
        bypass.last_linear(base.model, base.heads, 7)


def clouds(num_classes: int, rows: int = 300, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(rows, width) features around a centre for each class, on very different scales, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % num_classes
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(rows, width, generator=generator)
    return (centres[labels] + noise) * torch.logspace(-2, 2, width) + 3, labels


def penalised(fitted: Fitted, features: Tensor, labels: Tensor, strength: float, intercept: bool) -> Tensor:
    """What logistic regression minimises, in float64: C · Σ cross-entropy + ½‖W‖², W for standardised features."""
    x = features.double()
    mean, spread = (x.mean(dim=0) if intercept else torch.zeros_like(x[0])), x.std(dim=0, correction=0)
    weight = (fitted.weight.double() * spread).requires_grad_()
    bias = (fitted.bias.double() + fitted.weight.double() @ mean).requires_grad_()
    loss = strength * F.cross_entropy((x - mean) / spread @ weight.T + bias, labels, reduction="sum")
    if len(weight) == 2:  # of two classes the difference alone is penalised
        loss = loss + 0.5 * (weight[1] - weight[0]).square().sum()
    else:
        loss = loss + 0.5 * weight.square().sum()
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, [weight, bias] if intercept else [weight])])


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_fit_is_where_the_penalised_loss_has_no_slope(num_classes: int, intercept: bool) -> None:
    (features, labels), (dev, dev_labels) = clouds(num_classes), clouds(num_classes, seed=1)
    found = fit_probe(features, labels, dev, dev_labels, num_classes=num_classes, intercept=intercept)
    assert found.strength in STRENGTHS
    slope = penalised(found, features, labels, found.strength, intercept)
    start = Fitted(torch.zeros_like(found.weight), torch.zeros_like(found.bias), found.strength, 0.0)
    assert float(slope.norm()) < 1e-2 * float(penalised(start, features, labels, found.strength, intercept).norm())
    logits = dev @ found.weight.T + found.bias
    assert float(F.cross_entropy(logits, dev_labels)) == pytest.approx(found.dev_loss)
    assert intercept or not found.bias.any()


def test_dev_chooses_the_strength() -> None:
    """Few examples of pure noise want the strongest penalty, plain truth the weakest."""
    generator = torch.Generator().manual_seed(0)

    def noise(rows: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, 20, generator=generator), torch.randint(2, (rows,), generator=generator)

    options: dict[str, Any] = {"num_classes": 2, "intercept": True}
    assert fit_probe(*noise(30), *noise(300), **options).strength == STRENGTHS[0]
    features = torch.randn(400, 3, generator=generator)
    labels = (features[:, 0] > 0).long()
    assert fit_probe(features[:200], labels[:200], features[200:], labels[200:], **options).strength >= 10


def test_a_constant_feature_and_a_missing_label_are_no_accident() -> None:
    features, labels = clouds(3)
    features[:, 2] = 1.0
    found = fit_probe(features, labels, features, labels, num_classes=3, intercept=True)
    assert bool(torch.isfinite(found.weight).all())
    with pytest.raises(DataError, match="label number 3"):
        fit_probe(features, labels, features, labels, num_classes=4, intercept=True)
