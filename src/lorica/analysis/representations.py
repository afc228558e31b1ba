"""What a model makes of its inputs layer by layer, and how far that has moved from another model's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def hidden_states(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(layers + 1, b, d) float32: the mean over each text's tokens of the embeddings and of what each layer gives.

    Of an encoder-decoder, those of its encoder.
    """
    found = model(**inputs, output_hidden_states=True)
    states = found.encoder_hidden_states if "encoder_hidden_states" in found else found.hidden_states
    mask = inputs["attention_mask"].unsqueeze(-1).float()  # (b, t, 1)
    return torch.stack([(each.float() * mask).sum(dim=1) / mask.sum(dim=1) for each in states])


def linear_cka(X: Tensor, Y: Tensor) -> float:
    """‖YᵀX‖²_F / (‖XᵀX‖_F · ‖YᵀY‖_F) of centred features X (n, d), Y (n, e) of the same n examples; 0 of constants.

    Source: Kornblith et al. 2019, arXiv 1905.00414, section 3, by the n × n Grams, which give the same. It is 1 for
    features that differ by a rotation and a scale, and near 1 for any two where n is far below d.
    """
    K, L = _gram(X), _gram(Y)
    lengths = float(torch.linalg.vector_norm(K) * torch.linalg.vector_norm(L))
    return float((K * L).sum()) / lengths if lengths > 0 else 0.0


def relative_distance(X: Tensor, base: Tensor) -> float:
    """‖X - X0‖_F / ‖X0‖_F; the distance itself where X0 is zero."""
    length = float(torch.linalg.vector_norm(base.double()))
    return float(torch.linalg.vector_norm((X - base).double())) / (length or 1.0)


def _gram(features: Tensor) -> Tensor:
    """(n, n) float64, of features with their mean over the examples taken off."""
    centred = features.double() - features.double().mean(dim=0)
    return centred @ centred.T
