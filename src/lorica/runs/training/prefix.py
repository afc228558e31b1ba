"""adapter.kind=prefix: keys and values before every prompt, in every layer of a causal model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from lorica import card, models, randomness
from lorica.adapters import prefix as prefixes
from lorica.adapters.prefix import LivePrefix, Prefix
from lorica.card import About
from lorica.errors import AdapterFormatError
from lorica.models import Base
from lorica.results import RunFolder
from lorica.runs.training.tuning import RunUnderWay
from lorica.training.ledger import Entry
from lorica.training.stretch import INTERRUPTED, TrainStretch, Undivided

RANDOM_STD = 0.02


@dataclass
class PrefixTuning:
    """A prefix over the frozen base."""

    learning: RunUnderWay
    first: Prefix = field(init=False)
    live: LivePrefix = field(init=False)

    def __post_init__(self) -> None:
        cfg = self.learning.cfg
        self.first = draw(self.learning.ready.base, cfg.prefix.num_tokens, init=cfg.prefix.init, seed=cfg.seed)

    def told(self) -> list[str]:
        cfg, values = self.learning.cfg, self.first.values
        network = ", made by a network" if cfg.prefix.reparameterize else ""
        begun = "real activations" if cfg.prefix.init == "real_activations" else "a random draw"
        lines = [
            f"prefix by {cfg.trainer}: {self.first.num_tokens} tokens before every prompt in {len(values)} layers, "
            f"{values.numel():,} numbers, begun from {begun}{network}"
        ]
        # Values enter in the base's dtype: a probe that moves them by less than its gaps measures the rounding alone.
        size, gap = float(values.square().mean().sqrt()), torch.finfo(self.learning.ready.base.model.dtype).eps
        if cfg.trainer == "zo" and not cfg.prefix.reparameterize and cfg.zo.epsilon < gap * size:
            lines.append(
                f"warning: zo.epsilon={cfg.zo.epsilon:g} is lost in the rounding of model.dtype={cfg.model.dtype}, in "
                f"which numbers of the prefix's size ({size:.2g}) lie {gap * size:.1g} apart: use zo.epsilon=0.1"
            )
        return lines

    def num_trainable(self) -> int:
        if not self.learning.cfg.prefix.reparameterize:
            return self.first.values.numel()
        network = prefixes.Reparameterized(self.first.values, self.learning.cfg.seed)
        return sum(parameter.numel() for parameter in network.parameters())

    def train(self, run: RunFolder, train_stretch: TrainStretch) -> PrefixOutcome | None:
        cfg, base = self.learning.cfg, self.learning.ready.base
        self.live = lay_on(base, self.first, reparameterize=bool(cfg.prefix.reparameterize), seed=cfg.seed)
        if train_stretch(Undivided(self.live)) == INTERRUPTED:
            return None
        # What is evaluated is what is written: the values alone, without the network that made them.
        outcome = self.as_it_stands()
        prefixes.remove(self.live)
        lay_on(base, outcome.prefix)
        return outcome

    def as_it_stands(self) -> PrefixOutcome:
        return PrefixOutcome(self.live.extract())

    def rounds(self) -> Sequence[Entry]:
        return ()


@dataclass(frozen=True)
class PrefixOutcome:
    """A prefix for a base model."""

    prefix: Prefix
    place: Literal["adapter"] = "adapter"

    def write(self, folder: Path) -> None:
        prefixes.write(self.prefix, folder)

    def about(self) -> About:
        values = self.prefix.values
        return card.prefix(
            base_model=self.prefix.base_model,
            num_tokens=self.prefix.num_tokens,
            num_layers=len(values),
            num_parameters=values.numel(),
        )


def draw(base: Base, num_tokens: int, *, init: Literal["real_activations", "random"], seed: int) -> Prefix:
    """A new prefix: what the base makes of random tokens of its vocabulary (as MeZO does), or N(0, 0.02²).

    Raises ModelError for a model that takes no prefix.
    """
    special = set(base.tokenizer.all_special_ids)
    words = [token for token in range(len(base.tokenizer)) if token not in special]
    drawn = randomness.python_generator(seed, "prefix").choices(words, k=num_tokens)
    values = models.past(base, torch.tensor(drawn))
    if init == "random":
        values.normal_(0.0, RANDOM_STD, generator=randomness.torch_generator(seed, "prefix", device=values.device))
    return Prefix(values, base.name)


def lay_on(base: Base, prefix: Prefix, *, reparameterize: bool = False, seed: int = 0) -> LivePrefix:
    """Put a prefix before everything that the base reads. Raises AdapterFormatError if it is of another shape."""
    fitting = models.past(base, torch.zeros(prefix.num_tokens, dtype=torch.long)).shape
    if prefix.values.shape != fitting:
        raise AdapterFormatError(
            f"the prefix has (layers, 2, heads, tokens, dim) {tuple(prefix.values.shape)}, and {base.name} takes "
            f"{tuple(fitting)}"
        )
    return prefixes.lay_on(base.model, prefix, partial(models.cache, base), reparameterize=reparameterize, seed=seed)
