"""What a merge method is, and how it is chosen by name with its options checked.

A method is one file in `methods/` that holds

- ``merge(updates, weights, site, *, option=default, ...)``: the merged update of one module. It is a function of
  updates alone and sees no model. A LowRank result is exact; a Tensor (out, in) is dense;
- optionally ``survey(modules, *, same options)``: what must be known of all modules before the first is merged; its
  result comes back as ``site.found``;
- optionally ``NUM_ADAPTERS``, where only so many can be merged; ``ALIASES``, other names of an option with the
  conversion; ``USES_WEIGHTS = False`` where weights have no meaning; ``NEEDS_GRAMS = True`` where the inputs of each
  module must be known, and ``GRAMS = "merged"`` where they are those behind merged layers; ``APPROXIMATES``, the exact
  method whose distance is worth telling; ``EQUAL_RANKS = True`` where the updates of a module must be of one rank;
  ``EXEMPT``, the laws of MATH section 6.4 that it cannot hold, each with the reason.

An option's type and bounds stand in the signature (``Annotated[float, Ge(0)]``); a trailing underscore is not part of
its name (``lambda_`` is set by ``lambda``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from lorica.adapters.delta import LowRank
from lorica.errors import ConfigError, ShapeError
from lorica.plugins import Catalogue, Conversions, checked_options

Update = LowRank | Tensor  # a Tensor is the update itself, (out, in)
Result = TypeVar("Result")
METHODS = Catalogue("lorica.merging.methods", "merge method")


@dataclass(frozen=True)
class Site:
    """Where a merge happens: what a method may know beside the updates of the module."""

    path: str
    names: tuple[str, ...]  # of the adapters, in the order of the updates; random masks are keyed by them
    found: Any = None  # what the method's own survey returned
    grams: tuple[Tensor, ...] = ()  # (in, in) each: X_iᵀX_i of the module's inputs under adapter i


@dataclass(frozen=True)
class Module:
    """One module to merge: where it is, the adapters' updates there, and their weights."""

    site: Site
    updates: Sequence[Update]
    weights: Sequence[float]


class Modules(Protocol):
    """All modules of a merge, each made when it is looked at and let go afterwards."""

    def map(self, function: Callable[[Module], Result]) -> list[Result]:
        """`function` of each module, in order; several are worked on at a time, each by one thread."""


@dataclass(frozen=True)
class OneModule:
    """One module as if it were all: for a method that looks at each by itself before it merges it."""

    module: Module

    def map(self, function: Callable[[Module], Result]) -> list[Result]:
        return [function(self.module)]


@dataclass(frozen=True)
class Method:
    """A merge method with its options settled."""

    name: str
    options: Mapping[str, Any]
    merge: Callable[..., Update]
    survey: Callable[..., Any] | None = None
    uses_weights: bool = True
    needs_grams: bool = False
    grams: Literal["own", "merged"] = "own"
    approximates: str | None = None
    equal_ranks: bool = False
    exempt: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, module: Module, **overrides: Any) -> Update:
        """The module's merged update; `overrides` are options that differ from module to module (a lambda policy)."""
        return self.merge(module.updates, module.weights, module.site, **{**self.options, **overrides})

    def surveyed(self, modules: Modules) -> Any:
        """What the method must know of all modules before it merges the first; None if nothing."""
        return None if self.survey is None else self.survey(modules, **self.options)


def load(name: str, params: Mapping[str, Any], num_adapters: int) -> Method:
    """The method called `name` with `params` checked against its signature.

    Raises UnknownNameError for a name or option that is not known, ConfigError for a value out of bounds or a number of
    adapters that the method cannot take.
    """
    get: partial[Any] = partial(METHODS.load, name)
    merge = get("merge")
    known = name.lower().replace("-", "_")
    needed = get("NUM_ADAPTERS", default=None)
    if needed is not None and num_adapters != needed:
        raise ConfigError(f"method={known} merges {needed} adapters, and was given {num_adapters}")
    aliases: Conversions = get("ALIASES", default={})
    options = checked_options(f"method {known}", merge, params, aliases)
    get("check", default=_no_check)(num_adapters, **options)
    return Method(
        name=known,
        options=options,
        merge=merge,
        survey=get("survey", default=None),
        uses_weights=get("USES_WEIGHTS", default=True),
        needs_grams=get("NEEDS_GRAMS", default=False),
        grams=get("GRAMS", default="own"),
        approximates=get("APPROXIMATES", default=None),
        equal_ranks=get("EQUAL_RANKS", default=False),
        exempt=get("EXEMPT", default={}),
    )


def check_equal_ranks(method: str, exact: str | None, path: str, ranks: Mapping[str, int]) -> None:
    """Raise ShapeError, pointing to the method `exact`, unless the updates at `path` have one rank (by adapter)."""
    if len(set(ranks.values())) > 1:
        said = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        raise ShapeError(f"method {method} needs equal ranks, and those at {path} are {said}: use method={exact}")


def _no_check(num_adapters: int, **options: Any) -> None:
    """Most methods' options are bounded one by one."""
