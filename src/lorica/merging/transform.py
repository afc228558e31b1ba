"""What a transform of the updates before the merge is, and how it is chosen by name with its options checked.

A transform is one file in `transforms/` that holds

- ``transform(updates, site, *, option=default, ...)``: the T updates of one module made into T others. A dense one
  (Tensor) keeps the methods that work on factors from what follows, so factors are kept where they can be;
- optionally ``survey(modules, *, same options)``: what must be known of all modules before the first is transformed;
  its result comes back as ``site.found``;
- optionally ``ALIASES``, as in a method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorica.merging.method import Module, Modules, Update
from lorica.plugins import Catalogue, checked_options

TRANSFORMS = Catalogue("lorica.merging.transforms", "transform")


@dataclass(frozen=True)
class Transform:
    """A transform with its options settled."""

    name: str
    options: Mapping[str, Any]
    transform: Callable[..., list[Update]]
    survey: Callable[..., Any] | None = None

    def __call__(self, module: Module) -> list[Update]:
        """The module's updates, transformed."""
        return self.transform(module.updates, module.site, **self.options)

    def surveyed(self, modules: Modules) -> Any:
        """What the transform must know of all modules before it changes the first; None if nothing."""
        return None if self.survey is None else self.survey(modules, **self.options)


def load(name: str, params: Mapping[str, Any]) -> Transform:
    """The transform called `name` with `params` checked against its signature.

    Raises UnknownNameError for a name or option that is not known, ConfigError for a value out of bounds.
    """
    transform = TRANSFORMS.load(name, "transform")
    known = name.lower().replace("-", "_")
    aliases = TRANSFORMS.load(name, "ALIASES", default={})
    options = checked_options(f"transform {known}", transform, params, aliases)
    return Transform(known, options, transform, TRANSFORMS.load(name, "survey", default=None))
