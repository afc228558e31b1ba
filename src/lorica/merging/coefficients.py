"""Where coefficients come from: one λ for all modules, one for each layer, or a weight for each adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorica import plugins
from lorica.errors import ConfigError, UnknownNameError
from lorica.merging.layers import layer_of
from lorica.merging.method import Method


@dataclass(frozen=True)
class LambdaPolicy:
    """The method's option `lambda` for each module: `default`, but for the layers that `overrides` names.

    A key of `overrides` is a layer's index, in whatever tower, or `tower.index` for one tower alone (MATH section 6.1).
    """

    default: float
    overrides: Mapping[str, float] = field(default_factory=dict)

    def at(self, path: str) -> float:
        layer = layer_of(path)
        if layer is None:
            return self.default
        return self.overrides.get(str(layer), self.overrides.get(str(layer.index), self.default))

    def check_values(self, method: Method) -> None:
        """Raise ConfigError if the method has no lambda, or one of these values is not within its bounds."""
        if "lambda_" not in method.options:
            raise ConfigError(f"method {method.name} has no lambda: a lambda_policy does nothing there")
        owner = f"lambda_policy of method {method.name}"
        plugins.checked_options(owner, method.merge, {"lambda": self.default})
        for layer, value in self.overrides.items():
            plugins.checked_options(f"{owner}, layer {layer}", method.merge, {"lambda": value})

    def check_layers(self, paths: Sequence[str]) -> None:
        """Raise ConfigError if an override names a layer that none of the modules is in."""
        layers = {layer for layer in map(layer_of, paths) if layer is not None}
        known = {str(layer) for layer in layers} | {str(layer.index) for layer in layers}
        unused = [key for key in self.overrides if key not in known]
        if unused:
            indices = sorted({layer.index for layer in layers})
            raise ConfigError(f"lambda_policy.overrides has layer {unused[0]}, and the adapters' layers are {indices}")


def adapter_weights(given: Mapping[str, float] | Sequence[float] | None, names: Sequence[str]) -> list[float]:
    """One weight for each adapter: by name or in order, 1 where none is given. ConfigError if they do not fit."""
    if given is None:
        return [1.0] * len(names)
    if isinstance(given, Mapping):
        stranger = next((name for name in given if name not in names), None)
        if stranger is not None:
            raise UnknownNameError(plugins.unknown("adapter", stranger, names))
        return [float(given.get(name, 1.0)) for name in names]
    if len(given) != len(names):
        raise ConfigError(f"weights={list(given)} for {len(names)} adapters: give one each")
    return [float(weight) for weight in given]
