"""What there is under a name, as tables."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from pydantic import BaseModel
from rich.table import Table

from lorica import config, plugins
from lorica.errors import UnknownNameError
from lorica.plugins import Catalogue
from lorica.tables.cells import columns

VERBS: Mapping[str, type[BaseModel]] = {
    "train": config.TrainConfig,
    "merge": config.MergeConfig,
    "sweep": config.SweepConfig,
    "compare": config.CompareConfig,
    "ablate": config.AblateConfig,
    "evaluate": config.EvaluateConfig,
    "inspect": config.InspectConfig,
    "verify": config.VerifyConfig,
    "report": config.ReportConfig,
    "plan": config.PlanConfig,
    "replay": config.ReplayConfig,
    "export": config.ExportConfig,
    "demo": config.DemoConfig,
}
LISTS = ("tasks", "methods", "transforms", "optimizers", "flags", "keys")


def listing(what: str) -> Table:
    """What there is under a name.

    `tasks`, merge `methods`, `transforms`, `optimizers` of coefficients, older tools' `flags`, or config `keys`.
    """
    if what == "tasks":
        catalogue = Catalogue("lorica.tasks.catalog", "task")
        return columns(("task", "what it asks"), [(name, catalogue.summary(name)) for name in catalogue.names()])
    if what == "methods":
        return _plugins(Catalogue("lorica.merging.methods", "merge method"), "merge")
    if what == "transforms":
        return _plugins(Catalogue("lorica.merging.transforms", "transform"), "transform")
    if what == "optimizers":
        learners = _plugins(Catalogue("lorica.merging.learned", "coefficient optimizer"), "learn")
        learners.caption = "the options that they share (variant, steps, learning_rate, ...) are in docs/merging.md"
        return learners
    if what == "flags":
        return columns(("flag", "sets"), _flags())
    if what == "keys":
        return columns(("key", "default", "meaning"), _keys())
    raise UnknownNameError(plugins.unknown("list", what, LISTS))


def _flags() -> list[tuple[str, str]]:
    studies: dict[str, type[config.StudyConfig]] = {"compare": config.CompareConfig, "ablate": config.AblateConfig}
    own = {f"{name} ({verb})": flag for verb, schema in studies.items() for name, flag in schema.flags.items()}
    return [(f"--{name}", _meaning(flag)) for name, flag in {**config.FLAGS, **own}.items()]


def _keys() -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every key, a verb's name before the meaning from the second verb on.

    What a verb takes as an earlier one does is not told again.
    """
    verbs: dict[tuple[str, str, str], str] = {}
    for verb, schema in VERBS.items():
        for row in config.documented(schema):
            verbs.setdefault(row, verb)
    return [
        (key, default, meaning if verb == "train" else f"{verb}: {meaning}".rstrip(": "))
        for (key, default, meaning), verb in verbs.items()
    ]


def _plugins(catalogue: Catalogue, function: str) -> Table:
    rows = []
    for name in catalogue.names():
        pairs = catalogue.options(name, function)
        options = ", ".join(f"{option}={default}" if default else option for option, default in pairs)
        constants = catalogue.constants(name)
        others = ", ".join(f"{alias} for {option}" for alias, option in _aliases(constants))
        told = [catalogue.summary(name), *_needs(constants)]
        rows.append((name, " ".join(told), f"{options} (or {others})" if others else options, catalogue.source(name)))
    return columns((catalogue.kind, "what it does", "options", "source"), rows)


def _aliases(constants: Mapping[str, ast.expr]) -> list[tuple[str, str]]:
    """(other word, option that it stands for) as ALIASES has them."""
    table = constants.get("ALIASES")
    pairs = zip(table.keys, table.values, strict=True) if isinstance(table, ast.Dict) else ()
    return [
        (ast.literal_eval(word), ast.literal_eval(meant.elts[0]))
        for word, meant in pairs
        if word is not None and isinstance(meant, ast.Tuple)
    ]


def _needs(constants: Mapping[str, ast.expr]) -> list[str]:
    """What a merge method asks of its adapters, in words."""
    said = []
    if "NUM_ADAPTERS" in constants:
        said.append(f"For {ast.unparse(constants['NUM_ADAPTERS'])} adapters alone.")
    if "EQUAL_RANKS" in constants:
        said.append("Of equal ranks.")
    if "NEEDS_GRAMS" in constants:
        said.append("Needs the inputs of the adapters' tasks.")
    return said


def _meaning(flag: config.Flag) -> str:
    if flag.always is not None:
        return f"nothing: {flag.always}"
    if flag.constant is not None:
        return f"{flag.key}={flag.constant}"
    words = "".join(f" ({old}: {new})" for old, new in (flag.words or {}).items())
    return f"{flag.key}{words}"
