"""How much of its base model an adapter trains: at once, and in all rounds of a chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorica import models
from lorica.adapters.adapter import Adapter
from lorica.analysis.portrait import numbers_by_kind
from lorica.config import ModelConfig, TrainConfig
from lorica.errors import ConfigError, LoricaError
from lorica.runs.training.lora import factors
from lorica.training.ledger import Booster


@dataclass(frozen=True)
class Share:
    """Numbers that are trained, by kind of module or head; a share is None, with the reason, without the base at hand.

    The trainable share is what is trained at once, as everywhere; the chain's is more where there are several rounds.
    """

    at_once: Mapping[str, int]  # of the rounds that were laid on, in the largest one
    in_chain: Mapping[str, int]  # in all of them
    num_parameters: int | None = None  # of the base model
    reason: str | None = None

    @property
    def num_trainable(self) -> int:
        return sum(self.at_once.values())

    @property
    def num_in_chain(self) -> int:
        return sum(self.in_chain.values())

    @property
    def trainable_share(self) -> float | None:
        return self.of_base(self.num_trainable)

    @property
    def chain_share(self) -> float | None:
        return self.of_base(self.num_in_chain)

    @property
    def is_chain(self) -> bool:
        """Whether the two differ."""
        return dict(self.at_once) != dict(self.in_chain)

    def of_base(self, count: int) -> float | None:
        """So many numbers over the base's."""
        return None if self.num_parameters is None else count / self.num_parameters

    def as_record(self) -> dict[str, Any]:
        at_once = {"num_trainable": self.num_trainable, "trainable_share": self.trainable_share}
        return asdict(self) | at_once | {"num_in_chain": self.num_in_chain, "chain_share": self.chain_share}


def share_of(
    adapter: Adapter, cfg: TrainConfig | None, boosters: Sequence[Booster], model: ModelConfig | None
) -> Share:
    """What is trained over what there is; the base's own head, if it has one, is counted as the adapter has it.

    `cfg` is of the run that made the adapter, and the boosters are its rounds, if it had any.
    """
    only_B = cfg is not None and factors(cfg) == "B"
    trained = at_once(rounds_of(adapter, boosters), only_B=only_B), numbers_by_kind(adapter, only_B=only_B)
    try:
        return Share(*trained, _num_parameters(adapter, model or (cfg.model if cfg else None)))
    except LoricaError as error:
        return Share(*trained, reason=str(error))


def rounds_of(adapter: Adapter, boosters: Sequence[Booster]) -> list[Adapter]:
    """What was trained together, each time: the boosters that were laid on, or the adapter in one piece."""
    return [Adapter(each.updates, each.heads) for each in boosters if each.entry.weight != 0] or [adapter]


def at_once(rounds: Sequence[Adapter], *, only_B: bool) -> dict[str, int]:
    """The numbers, by kind of module or head, that a step trains in the largest of the rounds."""
    return max((numbers_by_kind(each, only_B=only_B) for each in rounds), key=lambda found: sum(found.values()))


def _num_parameters(adapter: Adapter, named: ModelConfig | None) -> int:
    """Of the base, found on the meta device."""
    if named is None and not adapter.base_model:
        raise ConfigError("the adapter does not name its base model: give model=NAME")
    named = named or ModelConfig(name=str(adapter.base_model))
    kind = named.kind if named.kind != "auto" else "classification" if adapter.heads else None
    base = models.on_meta(named.name, kind=kind, revision=named.revision, trust_remote_code=named.trust_remote_code)
    heads = sum(value.numel() for head in adapter.heads.values() for value in head.values())
    inside = tuple(f"{path}." for path in adapter.heads)
    return heads + sum(each.numel() for name, each in base.model.named_parameters() if not name.startswith(inside))
