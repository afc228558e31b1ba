"""adapter.kind=lora: one low-rank adapter, trained from the first step to the last."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from lorica import card, models
from lorica.adapters import informed, injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.injection import Live
from lorica.card import About
from lorica.config import AdapterConfig, TrainConfig
from lorica.errors import ConfigError
from lorica.models import Base
from lorica.results import RunFolder
from lorica.runs.ready import Ready
from lorica.runs.training.first_look import FirstLook, first_look
from lorica.runs.training.linear_probe import heads_with
from lorica.runs.training.tuning import RunUnderWay
from lorica.runs.training.warm_start import num_batches, planned, warm_started
from lorica.tasks.objectives import scores
from lorica.training.ledger import Entry
from lorica.training.stretch import INTERRUPTED, TrainStretch, Undivided

ResolvedInit = Literal["kaiming", "gaussian", "orthogonal", "activations", "discriminant"]


@dataclass
class Lora:
    """One adapter over the frozen base."""

    learning: RunUnderWay
    look: FirstLook = field(init=False)
    first: Adapter = field(init=False)
    live: Live = field(init=False)

    def __post_init__(self) -> None:
        paths = targets(self.learning.ready.base, self.learning.cfg.adapter)
        self.look = look(self.learning, paths)
        self.first = draw(self.learning, paths, self.look)

    def told(self) -> list[str]:
        return told(self.learning, self.first)

    def num_trainable(self) -> int:
        return num_trainable(self.learning.cfg, self.first)

    def train(self, run: RunFolder, train_stretch: TrainStretch) -> AdapterOutcome | None:
        cfg = self.learning.cfg
        count_look(self.learning, self.look)
        start = warm_started(self.learning, self.first)
        self.live = injection.inject(self.learning.ready.base.model, start, cfg.adapter.dropout)
        self.live.train_only(factors(cfg))
        return None if train_stretch(Undivided(self.live)) == INTERRUPTED else self.as_it_stands()

    def as_it_stands(self) -> AdapterOutcome:
        return AdapterOutcome(injection.extract(self.live), self.learning.ready, self.learning.cfg)

    def rounds(self) -> Sequence[Entry]:
        return ()


@dataclass(frozen=True)
class AdapterOutcome:
    """An adapter for a base model, and the config that it was trained by."""

    adapter: Adapter
    ready: Ready
    cfg: TrainConfig
    place: Literal["adapter"] = "adapter"

    def write(self, folder: Path) -> None:
        settings = self.cfg.adapter
        self.ready.write(self.adapter, folder, profile=settings.profile, dropout=settings.dropout)

    def about(self) -> About:
        base, alpha = self.ready.base, self.cfg.adapter.alpha
        assert alpha is not None
        return card.adapter(
            base_model=base.name,
            kind=base.kind,
            num_labels=len(self.ready.task.labels),
            modules=list(self.adapter.updates),
            rank=max(update.rank for update in self.adapter.updates.values()),
            alpha=alpha,
            heads=list(self.adapter.heads),
            num_parameters=self.adapter.num_parameters(),
        )


def targets(base: Base, settings: AdapterConfig) -> list[str]:
    """The modules that are adapted. Raises ConfigError where the adapter's profile could not carry what is trained."""
    if settings.profile == "portable" and base.heads:
        raise ConfigError(
            "adapter.profile=portable cannot carry a head, which this task trains: use adapter.profile=peft"
        )
    return models.target_modules(base, settings.targets)


def draw(
    learning: RunUnderWay,
    paths: Sequence[str],
    look: FirstLook,
    *,
    rank: int | None = None,
    round: int = 0,
    chain: Adapter | None = None,
) -> Adapter:
    """A new adapter for the modules at `paths`, as the config draws it, beside what is laid on already.

    Its scale does not depend on `rank`, which is the config's where none is given. `look` is of the bare base.
    """
    settings, base, init = learning.cfg.adapter, learning.ready.base, init_of(learning.cfg)
    assert settings.rank is not None and settings.alpha is not None
    rank = rank or settings.rank
    new = injection.create(
        base.model,
        paths,
        rank=rank,
        alpha=settings.alpha / settings.rank * rank,
        init="kaiming" if init == "activations" or init == "discriminant" else init,
        init_std=settings.init_std,
        seed=learning.cfg.seed,
        round=round,
        heads=base.heads,
        base_model=learning.cfg.model.name,
    )
    if init == "activations":
        return informed.along_inputs(base.model, new, lambda: _run_some_batches(learning), chain or Adapter({}))
    if init == "discriminant":
        return informed.along(
            Adapter(new.updates, heads_with(new.heads, look.head), new.base_model), look.directions, round * rank
        )
    if learning.cfg.boosting.orthogonal and chain is not None:
        return injection.orthogonal_to(new, chain)
    return new


def init_of(cfg: TrainConfig) -> ResolvedInit:
    """How A is drawn. Where the config leaves it open: along what tells the task's classes apart, if B alone is trained
    without gradients, for then A decides what can be learned, and how fast; else at random.
    """
    if cfg.adapter.init != "auto":
        return cfg.adapter.init
    suits = cfg.trainer == "zo" and factors(cfg) == "B" and cfg.zo.space == "parameter" and not cfg.boosting.orthogonal
    return "discriminant" if suits else "kaiming"


def look(learning: RunUnderWay, paths: Sequence[str]) -> FirstLook:
    """What a run by this config sees of its classes before it begins: nothing, but under init=discriminant."""
    if init_of(learning.cfg) != "discriminant":
        return FirstLook()
    if learning.decided is not None:
        return FirstLook.of(learning.looked)
    found = first_look(learning, paths)
    learning.looked = found.as_tensors()
    return found


def count_look(learning: RunUnderWay, look: FirstLook) -> None:
    """Count the forward passes of a first look, as a run begins."""
    if learning.progress.step == 0:
        learning.progress.forwards += look.num_forwards


def factors(cfg: TrainConfig) -> Literal["both", "B"]:
    """The factors that are trained; the two sections that say so agree where both do."""
    return "B" if "B" in (cfg.zo.train, cfg.boosting.train_factors) else "both"


def num_trainable(cfg: TrainConfig, first: Adapter) -> int:
    """How many of an adapter's numbers are trained."""
    frozen = sum(update.A.numel() for update in first.updates.values()) if factors(cfg) == "B" else 0
    return first.num_parameters() - frozen


def told(learning: RunUnderWay, first: Adapter) -> list[str]:
    """What is trained of `first`, and what of its scale a person should know."""
    cfg = learning.cfg
    rank, alpha = cfg.adapter.rank, cfg.adapter.alpha
    assert rank is not None and alpha is not None
    count, scale = num_trainable(cfg, first), alpha / rank
    total = sum(parameter.numel() for parameter in learning.ready.base.model.parameters())
    lines = [
        f"{cfg.adapter.kind} by {cfg.trainer}: {_size(cfg)}, scale {scale:g} on {len(first.updates)} "
        f"modules; {count:,} parameters trainable, {count / total:.2%} of the base's {total:,}"
        + (f"; A stays as drawn ({init_of(cfg)})" if count < first.num_parameters() else "")
    ]
    batches = planned(learning, first)
    if batches:
        lines.append(
            f"warm start: the last block's A and B fitted to {batches} batches by gradients that end there; "
            "zo.warm_start_steps=0 goes without"
        )
    elif num_batches(cfg, learning.num_steps):
        lines.append("warning: no target lies in the last block, so there is no warm start: choose one, or drop it")
    return lines + (
        _warnings_of_zeroth_order(cfg, scale, learning.ready.base.model.dtype) if cfg.trainer == "zo" else []
    )


def _warnings_of_zeroth_order(cfg: TrainConfig, scale: float, dtype: torch.dtype) -> list[str]:
    """What makes probes say little, or steps lead away."""
    lines, gap = list[str](), torch.finfo(dtype).eps
    if cfg.zo.space == "parameter" and scale > 4:
        lines.append(
            f"warning: alpha/rank = {scale:g} under zo: a step in weight space grows with its square, and "
            f"large ones diverge; alpha={cfg.adapter.rank} gives scale 1, and zo.space=update makes it play no part"
        )
    if cfg.zo.space == "parameter" and cfg.zo.estimator != "forward_gradient" and cfg.zo.epsilon < gap:
        lines.append(
            f"warning: zo.epsilon={cfg.zo.epsilon:g} is finer than {str(dtype).removeprefix('torch.')}, whose numbers "
            f"lie {gap:.1g} of their size apart: part of every slope is rounding; use zo.epsilon=1e-2"
        )
    if cfg.adapter.dropout:
        lines.append(f"warning: adapter.dropout={cfg.adapter.dropout:g} is off under zo: two probes would differ by it")
    return lines


def _size(cfg: TrainConfig) -> str:
    """Rank and alpha, or the ranks of the rounds, which share a scale."""
    if cfg.adapter.kind == "xgblora" and cfg.boosting.ranks:
        return f"rank {', then '.join(map(str, cfg.boosting.ranks))}"
    return f"rank {cfg.adapter.rank}, alpha {cfg.adapter.alpha:g}"


def _run_some_batches(learning: RunUnderWay, num_batches: int = 4) -> None:
    """The run's first batches through the model as it stands."""
    for batch in itertools.islice(learning.stream.indices(), num_batches):
        scores(learning.ready.base.model, learning.ready.collate()([learning.rows["train"][index] for index in batch]))
