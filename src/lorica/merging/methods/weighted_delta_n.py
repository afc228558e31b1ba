"""The updates with a coefficient for each adapter and layer or module, ΔW = Σ c_i·Δ_i: exact, of rank Σ r_i.

Source: task arithmetic, Ilharco et al. 2023, arXiv 2212.04089, with coefficients by task and layer as in AdaMerging,
Yang et al. 2024, arXiv 2310.02575. It carries every learned coefficient, down to one of each rank-1 direction.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence

from lorica import plugins
from lorica.adapters.delta import LowRank
from lorica.errors import ConfigError, UnknownNameError
from lorica.merging.layers import layer_of
from lorica.merging.linear import combination
from lorica.merging.method import Modules, Site, Update

USES_WEIGHTS = False
EXEMPT = {"duplicate": "a copy has a coefficient of its own, and without normalising the coefficients add up"}
ROUNDING = 1e-12  # of Σ|c_i|: a smaller Σ c_i is zero but for the rounding of the sum

Coefficients = dict[str, float]  # by the adapter's name
LayerCoefficients = dict[int | str, Coefficients]  # by a layer's index in whatever tower, or by `tower.index`
Coefficient = float | list[float]  # of an update, or of each of its rank-1 directions
ModuleCoefficients = dict[str, dict[str, Coefficient]]  # by the module's path
Table = Mapping[str, Coefficient]


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    task_coefficients: Coefficients | None = None,
    default_task_coefficients: Coefficients | None = None,
    layer_task_coefficients: LayerCoefficients | None = None,
    module_task_coefficients: ModuleCoefficients | None = None,
    normalize_coefficients: bool = True,
    allow_negative_coefficients: bool = False,
    allow_unbounded: bool = False,
) -> Update:
    """Σ c_i·Δ_i, or Σ c_i·Δ_i / Σ c_i if normalised.

    An adapter's c is looked up in module_task_coefficients (there it may be a list, one for each of its rank-1
    directions), then in layer_task_coefficients (`tower.index` before the index alone), then in
    default_task_coefficients, then in task_coefficients; where none has it, it is 1/T. Raises UnknownNameError for a
    name that is no adapter's, ConfigError for a sum of zero that would have to be divided by, and for a list that does
    not fit the update.
    """
    tables = _tables(task_coefficients, default_task_coefficients, layer_task_coefficients, module_task_coefficients)
    _check_names(tables, site.names)
    given = _given_at(site.path, tables)
    found = [given.get(name, 1 / len(updates)) for name in site.names]
    return _combination(updates, _normalized(found, site) if normalize_coefficients else found, site)


def check(
    num_adapters: int,
    *,
    task_coefficients: Coefficients | None,
    default_task_coefficients: Coefficients | None,
    layer_task_coefficients: LayerCoefficients | None,
    module_task_coefficients: ModuleCoefficients | None,
    normalize_coefficients: bool,
    allow_negative_coefficients: bool,
    allow_unbounded: bool,
) -> None:
    """Raise ConfigError for a coefficient out of bounds: [0, 1], or [-1, 1], or none, as the two switches say.

    The coefficients of directions are not normalised: they have no sum that an update's coefficient could be told from.
    """
    tables = _tables(task_coefficients, default_task_coefficients, layer_task_coefficients, module_task_coefficients)
    lowest = -1 if allow_negative_coefficients else 0
    for key, table in tables.items():
        for name, given in table.items():
            if isinstance(given, list) and normalize_coefficients:
                raise ConfigError(
                    f"method weighted_delta_n: {key}.{name} lists coefficients of directions, which are not "
                    f"normalised: set normalize_coefficients=false"
                )
            for value in given if isinstance(given, list) else [given]:
                if not allow_unbounded and not lowest <= value <= 1:
                    raise ConfigError(f"method weighted_delta_n: {key}.{name}={value} {_out_of_bounds(value, lowest)}")


def survey(
    modules: Modules,
    *,
    layer_task_coefficients: LayerCoefficients | None,
    module_task_coefficients: ModuleCoefficients | None,
    **others: object,
) -> None:
    """Raise ConfigError for coefficients of a layer that no module is in, UnknownNameError for those of no module."""
    if not layer_task_coefficients and not module_task_coefficients:
        return
    paths = modules.map(lambda module: module.site.path)
    for path in module_task_coefficients or {}:
        if path not in paths:
            raise UnknownNameError(f"module_task_coefficients: {plugins.unknown('module', path, paths)}")
    layers = {layer for layer in map(layer_of, paths) if layer is not None}
    known = {str(layer) for layer in layers} | {str(layer.index) for layer in layers}
    for key in layer_task_coefficients or {}:
        if str(key) not in known:
            indices = sorted({layer.index for layer in layers})
            raise ConfigError(f"layer_task_coefficients has layer {key}, and the adapters' layers are {indices}")


def _out_of_bounds(value: float, lowest: int) -> str:
    switch = "allow_negative_coefficients" if -1 <= value < 0 else "allow_unbounded"
    return f"is not in [{lowest}, 1]: {switch}=true allows it"


def _tables(
    tasks: Coefficients | None,
    default: Coefficients | None,
    layers: LayerCoefficients | None,
    modules: ModuleCoefficients | None,
) -> dict[str, Table]:
    """Every table of coefficients by its key in the config. A layer 0 and a layer "0" are one and the same."""
    tables: dict[str, Table] = {}
    for layer, table in (layers or {}).items():
        key = _layer_key(layer)
        if key in tables:
            raise ConfigError(f"method weighted_delta_n: {key} is given twice, as a number and as text: drop one")
        tables[key] = table
    tables |= {_module_key(path): each for path, each in (modules or {}).items()}
    return tables | {"default_task_coefficients": default or {}, "task_coefficients": tasks or {}}


def _given_at(path: str, tables: Mapping[str, Table]) -> Table:
    """The coefficients given for the module at `path`, the more particular table first."""
    layer = layer_of(path)
    keys = [] if layer is None else [_layer_key(str(layer)), _layer_key(layer.index)]
    keys = [_module_key(path), *keys, "default_task_coefficients", "task_coefficients"]
    return ChainMap(*(dict(tables.get(key, {})) for key in keys))


def _module_key(path: str) -> str:
    return f"module_task_coefficients.{path}"


def _layer_key(layer: int | str) -> str:
    return f"layer_task_coefficients.{layer}"


def _check_names(tables: Mapping[str, Table], names: Sequence[str]) -> None:
    for key, table in tables.items():
        for name, value in table.items():
            if name not in names:
                message = plugins.unknown("adapter", name, names)
                raise UnknownNameError(f"method weighted_delta_n: {key}.{name}={value}: {message}")


def _normalized(coefficients: Sequence[Coefficient], site: Site) -> list[float]:
    single = [each for each in coefficients if not isinstance(each, list)]  # all of them: `check` refuses lists here
    total = math.fsum(single)
    if abs(total) <= ROUNDING * math.fsum(map(abs, single)):
        listed = ", ".join(f"{name}={value:g}" for name, value in zip(site.names, single, strict=True))
        raise ConfigError(
            f"method weighted_delta_n: normalize_coefficients=true divides by the sum of the coefficients, and at "
            f"{site.path} it is {total:g} ({listed}): give others, or set normalize_coefficients=false"
        )
    return [each / total for each in single]


def _combination(updates: Sequence[Update], coefficients: Sequence[Coefficient], site: Site) -> Update:
    """Σ c_i·Δ_i, where c_i may be a list, one for each direction of Δ_i."""
    scaled = [
        _by_direction(update, given, name, site.path) if isinstance(given, list) else update
        for update, given, name in zip(updates, coefficients, site.names, strict=True)
    ]
    return combination(scaled, [1.0 if isinstance(given, list) else given for given in coefficients])


def _by_direction(update: Update, coefficients: list[float], name: str, path: str) -> LowRank:
    """Each direction of the update, a column of B by a row of A, times its own coefficient."""
    rank = update.rank if isinstance(update, LowRank) else None
    if not isinstance(update, LowRank) or rank != len(coefficients):
        found = "dense" if rank is None else f"of rank {rank}"
        raise ConfigError(
            f"method weighted_delta_n: {_module_key(path)}.{name} lists {len(coefficients)} coefficients of "
            f"directions, and the update is {found}: give one coefficient"
        )
    return LowRank(update.A, update.B * update.B.new_tensor(coefficients), update.scale)
