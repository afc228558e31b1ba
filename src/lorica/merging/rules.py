"""An elementwise method run in the coordinates of another space: what `knots` and `core` have in common."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lorica.errors import ConfigError
from lorica.merging.coordinates import Space
from lorica.merging.method import METHODS, Method, load


def rule_in(space: Space, rule: str, rule_params: Mapping[str, Any] | None, num_adapters: int) -> Method:
    """The method called `rule` with its options, seeing `space`.

    Raises what `load` raises, and ConfigError for a method that has no spaces or an option that says another space.
    """
    params = dict(rule_params or {})
    if "space" not in inspect.signature(METHODS.load(rule, "merge")).parameters:
        able = [name for name in METHODS.names() if "space" in dict(METHODS.options(name, "merge"))]
        raise ConfigError(f"rule={rule} does not work entry by entry: give one of {', '.join(able)}")
    if "space" in params:
        raise ConfigError(f"rule_params has space={params['space']}, and the method {space} is the space: drop it")
    return load(rule, {**params, "space": space}, num_adapters)
