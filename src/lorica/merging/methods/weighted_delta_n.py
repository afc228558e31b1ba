"""The updates with a coefficient for each adapter and layer, ΔW = Σ c_i·Δ_i: exact, of rank Σ r_i.

Source: task arithmetic, Ilharco et al. 2023, arXiv 2212.04089, with coefficients by task and layer as in AdaMerging,
Yang et al. 2024, arXiv 2310.02575. It carries every learned coefficient.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence

from lorica import plugins
from lorica.errors import ConfigError, UnknownNameError
from lorica.merging.layers import layer_of
from lorica.merging.linear import combination
from lorica.merging.method import Modules, Site, Update

USES_WEIGHTS = False
EXEMPT = {"duplicate": "a copy has a coefficient of its own, and without normalising the coefficients add up"}
ROUNDING = 1e-12  # of Σ|c_i|: a smaller Σ c_i is zero but for the rounding of the sum

Coefficients = dict[str, float]  # by the adapter's name
LayerCoefficients = dict[int | str, Coefficients]  # by a layer's index in whatever tower, or by `tower.index`


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    task_coefficients: Coefficients | None = None,
    default_task_coefficients: Coefficients | None = None,
    layer_task_coefficients: LayerCoefficients | None = None,
    normalize_coefficients: bool = True,
    allow_negative_coefficients: bool = False,
    allow_unbounded: bool = False,
) -> Update:
    """Σ c_i·Δ_i, or Σ c_i·Δ_i / Σ c_i if normalised.

    An adapter's c is looked up in layer_task_coefficients (`tower.index` before the index alone), then in
    default_task_coefficients, then in task_coefficients; where none has it, it is 1/T. Raises UnknownNameError for a
    name that is no adapter's, ConfigError for a sum of zero that would have to be divided by.
    """
    tables = _tables(task_coefficients, default_task_coefficients, layer_task_coefficients)
    _check_names(tables, site.names)
    given = _given_at(site.path, tables)
    found = [given.get(name, 1 / len(updates)) for name in site.names]
    return combination(updates, _normalized(found, site) if normalize_coefficients else found)


def check(
    num_adapters: int,
    *,
    task_coefficients: Coefficients | None,
    default_task_coefficients: Coefficients | None,
    layer_task_coefficients: LayerCoefficients | None,
    normalize_coefficients: bool,
    allow_negative_coefficients: bool,
    allow_unbounded: bool,
) -> None:
    """Raise ConfigError for a coefficient out of bounds: [0, 1], or [-1, 1], or none, as the two switches say."""
    lowest = -1 if allow_negative_coefficients else 0
    for key, table in _tables(task_coefficients, default_task_coefficients, layer_task_coefficients).items():
        for name, value in table.items():
            if not allow_unbounded and not lowest <= value <= 1:
                switch = "allow_negative_coefficients" if -1 <= value < 0 else "allow_unbounded"
                raise ConfigError(
                    f"method weighted_delta_n: {key}.{name}={value} is not in [{lowest}, 1]: {switch}=true allows it"
                )


def survey(modules: Modules, *, layer_task_coefficients: LayerCoefficients | None, **others: object) -> None:
    """Raise ConfigError if layer_task_coefficients has a layer that no module is in."""
    if not layer_task_coefficients:
        return
    layers = {layer for layer in modules.map(lambda module: layer_of(module.site.path)) if layer is not None}
    known = {str(layer) for layer in layers} | {str(layer.index) for layer in layers}
    for key in layer_task_coefficients:
        if str(key) not in known:
            indices = sorted({layer.index for layer in layers})
            raise ConfigError(f"layer_task_coefficients has layer {key}, and the adapters' layers are {indices}")


def _tables(
    tasks: Coefficients | None, default: Coefficients | None, layers: LayerCoefficients | None
) -> dict[str, Coefficients]:
    """Every table of coefficients by its key in the config. A layer 0 and a layer "0" are one and the same."""
    tables: dict[str, Coefficients] = {}
    for layer, table in (layers or {}).items():
        key = _layer_key(layer)
        if key in tables:
            raise ConfigError(f"method weighted_delta_n: {key} is given twice, as a number and as text: drop one")
        tables[key] = table
    return tables | {"default_task_coefficients": default or {}, "task_coefficients": tasks or {}}


def _given_at(path: str, tables: Mapping[str, Coefficients]) -> Mapping[str, float]:
    """The coefficients given for the module at `path`, the more particular table first."""
    layer = layer_of(path)
    keys = [] if layer is None else [_layer_key(str(layer)), _layer_key(layer.index)]
    keys += ["default_task_coefficients", "task_coefficients"]
    return ChainMap(*(tables.get(key, {}) for key in keys))


def _layer_key(layer: int | str) -> str:
    return f"layer_task_coefficients.{layer}"


def _check_names(tables: Mapping[str, Coefficients], names: Sequence[str]) -> None:
    for key, table in tables.items():
        for name, value in table.items():
            if name not in names:
                message = plugins.unknown("adapter", name, names)
                raise UnknownNameError(f"method weighted_delta_n: {key}.{name}={value}: {message}")


def _normalized(coefficients: Sequence[float], site: Site) -> list[float]:
    total = math.fsum(coefficients)
    if abs(total) <= ROUNDING * math.fsum(map(abs, coefficients)):
        listed = ", ".join(f"{name}={value:g}" for name, value in zip(site.names, coefficients, strict=True))
        raise ConfigError(
            f"method weighted_delta_n: normalize_coefficients=true divides by the sum of the coefficients, and at "
            f"{site.path} it is {total:g} ({listed}): give others, or set normalize_coefficients=false"
        )
    return [each / total for each in coefficients]
