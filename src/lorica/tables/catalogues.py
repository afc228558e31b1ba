"""What there is under a name, as tables."""

from __future__ import annotations

from rich.table import Table

from lorica import config, plugins
from lorica.errors import UnknownNameError
from lorica.plugins import Catalogue
from lorica.tables.cells import columns

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
        studies: dict[str, type[config.StudyConfig]] = {"compare": config.CompareConfig, "ablate": config.AblateConfig}
        own = {f"{name} ({verb})": flag for verb, schema in studies.items() for name, flag in schema.flags.items()}
        flags = {**config.FLAGS, **own}
        return columns(("flag", "sets"), [(f"--{name}", _meaning(flag)) for name, flag in flags.items()])
    if what == "keys":
        of_merges = config.documented(config.MergeConfig)
        merging = [(key, default, f"merge: {meaning}") for key, default, meaning in of_merges]
        of_sweeps = [row for row in config.documented(config.SweepConfig) if row not in of_merges]
        sweeping = [(key, default, f"sweep: {meaning}") for key, default, meaning in of_sweeps]
        studying = [(key, default, f"compare: {meaning}") for key, default, meaning in _own_of_studies()]
        rows = [*config.documented(config.TrainConfig), *merging, *sweeping, *studying]
        return columns(("key", "default", "meaning"), rows)
    raise UnknownNameError(plugins.unknown("list", what, LISTS))


def _own_of_studies() -> list[tuple[str, str, str]]:
    """The keys of both kinds of study, each once."""
    return list(dict.fromkeys([*config.documented(config.CompareConfig), *config.documented(config.AblateConfig)]))


def _plugins(catalogue: Catalogue, function: str) -> Table:
    rows = []
    for name in catalogue.names():
        pairs = catalogue.options(name, function)
        options = ", ".join(f"{option}={default}" if default else option for option, default in pairs)
        rows.append((name, catalogue.summary(name), options, catalogue.source(name)))
    return columns((catalogue.kind, "what it does", "options", "source"), rows)


def _meaning(flag: config.Flag) -> str:
    if flag.always is not None:
        return f"nothing: {flag.always}"
    if flag.constant is not None:
        return f"{flag.key}={flag.constant}"
    words = "".join(f" ({old}: {new})" for old, new in (flag.words or {}).items())
    return f"{flag.key}{words}"
