"""What takes the steps of a stretch, made from the config: the same where a run is trained and where it is replayed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorica.adapters import injection
from lorica.adapters.injection import Live
from lorica.config import TrainConfig
from lorica.optim.coordinates import update_scales
from lorica.optim.directions import Directions
from lorica.optim.probes import Probing
from lorica.optim.scaling import Scaling
from lorica.optim.streamed import StreamedDescent, StreamedZerothOrder
from lorica.optim.updates import update_rule
from lorica.optim.zeroth_order import ZerothOrder
from lorica.training.stretch import Tunable

AnyZerothOrder = ZerothOrder | StreamedZerothOrder


def optimizer_of(
    cfg: TrainConfig, trainable: Mapping[str, nn.Parameter], estimator: AnyZerothOrder | None
) -> torch.optim.Optimizer:
    """A stretch's own optimizer, which remembers nothing of the one before; `estimator` is None under backprop."""
    assert cfg.optimizer and cfg.learning_rate is not None
    rates = {"learning_rate": cfg.learning_rate, "weight_decay": cfg.weight_decay}
    if isinstance(estimator, StreamedZerothOrder):
        return StreamedDescent(trainable, estimator, **rates)
    return update_rule(cfg.optimizer, trainable.values(), **rates)


def zeroth_order_of(cfg: TrainConfig, live: Tunable, probing: Probing | None = None) -> AnyZerothOrder:
    """A stretch's own estimator; its units, where they are the update's, are those of the stretch's beginning."""
    zo, probing = cfg.zo, probing or Probing()
    assert zo.estimator and zo.num_directions and zo.distribution
    directions, scaling = Directions(zo.num_directions, zo.distribution, cfg.seed), Scaling(zo.normalize, zo.clip)
    if cfg.adapter.kind == "full":
        return StreamedZerothOrder(zo.estimator, zo.epsilon, directions, scaling, probing.processes)
    scales = _scales(live) if zo.space == "update" else None
    return ZerothOrder(zo.estimator, zo.epsilon, directions, scaling, scales, probing)


def _scales(live: Tunable) -> Tensor:
    """The config asks for the update's units of low-rank updates alone."""
    assert isinstance(live, Live)
    return update_scales(injection.extract(live), live.trainable())
