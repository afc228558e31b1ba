"""A folder of files as a catalogue of names: a plug-in is a file, and the file's name is its key.

Listing reads the folder and the files as text, so it imports nothing; a plug-in is imported when it is asked for by
name. The options of a plug-in are the keyword-only parameters of its function: the signature is the schema.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pydantic

from lorica.errors import ConfigError, UnknownNameError

Conversions = Mapping[str, tuple[str, Callable[[Any], Any]]]  # alias -> (option, its value from the alias's value)
REQUIRED = object()


@dataclass(frozen=True)
class Catalogue:
    """The plug-ins in one package's folder; `kind` is the word that errors call them by."""

    package: str
    kind: str

    def names(self) -> list[str]:
        """Every plug-in's name, sorted, without importing any."""
        return sorted(path.stem for path in self._folder().glob("[!_]*.py"))

    def summary(self, name: str) -> str:
        """The first line of the plug-in's docstring, read as text."""
        docstring = ast.get_docstring(self._parsed(name))
        return docstring.splitlines()[0] if docstring else ""

    def source(self, name: str) -> str:
        """What stands behind `Source:` in the plug-in's docstring, as far as the first arXiv number if there is one."""
        docstring = " ".join((ast.get_docstring(self._parsed(name)) or "").split())
        found = re.search(r"Source: (.*?arXiv \d{4}\.\d{5}|[^.:;]*)", docstring)
        return found[1] if found else ""

    def options(self, name: str, function: str) -> list[tuple[str, str]]:
        """(option, default as written) of the plug-in's `function`, read as text."""
        defined = (node for node in self._parsed(name).body if isinstance(node, ast.FunctionDef))
        arguments = next(node.args for node in defined if node.name == function)
        pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        return [(_spelled(argument.arg), ast.unparse(default) if default else "") for argument, default in pairs]

    def constants(self, name: str) -> dict[str, ast.expr]:
        """What the plug-in assigns to names in capitals, read as text."""
        assigned = (node for node in self._parsed(name).body if isinstance(node, ast.Assign))
        named = ((target, node.value) for node in assigned for target in node.targets if isinstance(target, ast.Name))
        return {target.id: value for target, value in named if target.id.isupper()}

    def load(self, name: str, attribute: str, default: Any = REQUIRED) -> Any:
        """`attribute` of the plug-in called `name`; case and hyphens do not matter."""
        known = name.lower().replace("-", "_")
        if known not in self.names():
            raise UnknownNameError(unknown(self.kind, name, self.names()))
        plugin = importlib.import_module(f"{self.package}.{known}")
        return getattr(plugin, attribute) if default is REQUIRED else getattr(plugin, attribute, default)

    def _parsed(self, name: str) -> ast.Module:
        return ast.parse((self._folder() / f"{name}.py").read_text("utf-8"))

    def _folder(self) -> Path:
        spec = importlib.util.find_spec(self.package)
        assert spec is not None and spec.submodule_search_locations, f"{self.package} is not a package"
        return Path(spec.submodule_search_locations[0])


def checked_options(
    owner: str, function: Callable[..., Any], given: Mapping[str, Any], aliases: Conversions | None = None
) -> dict[str, Any]:
    """The keyword-only options of `function`: given ones checked against its annotations, the others at their default.

    Raises UnknownNameError for an option that `owner` does not have, ConfigError for a value that does not fit, an
    option given twice (under an alias), or one that is missing.
    """
    parameters = inspect.signature(function).parameters.values()
    options = {each.name: each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    chosen: dict[str, Any] = {}
    for word, value in given.items():
        meant, convert = (aliases or {}).get(word, (word, _unchanged))
        name = next((each for each in options if _spelled(each) == meant), None)
        if name is None:
            known = [*map(_spelled, options), *(aliases or {})]
            raise UnknownNameError(
                unknown(f"option of {owner}", word, known)
                if known
                else f"{owner} has no options, and was given {word!r}"
            )
        if name in chosen:
            raise ConfigError(f"{owner}: {word} and another word for it are both given: drop one")
        chosen[name] = _converted(owner, word, value, convert)
    hints = get_type_hints(function, include_extras=True)
    for name, option in options.items():
        if name not in chosen and option.default is inspect.Parameter.empty:
            raise ConfigError(f"{owner} needs {_spelled(name)}")
        chosen[name] = _valid(owner, name, hints[name], chosen[name]) if name in chosen else option.default
    return chosen


def _valid(owner: str, name: str, annotation: Any, value: Any) -> Any:
    strict = pydantic.ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
    try:
        model = pydantic.create_model("Options", __config__=strict, value=(annotation, ...))
        return getattr(model(value=value), "value")  # noqa: B009 - the model is made on the spot
    except pydantic.ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{owner}: {_spelled(name)}={value!r}: {message[0].lower()}{message[1:]}") from None


def _converted(owner: str, word: str, value: Any, convert: Callable[[Any], Any]) -> Any:
    try:
        return convert(value)
    except TypeError:
        raise ConfigError(f"{owner}: {word}={value!r} is not a number") from None


def _unchanged(value: Any) -> Any:
    return value


def _spelled(parameter: str) -> str:
    """`lambda_` is written `lambda`: the word is taken in Python."""
    return parameter.removesuffix("_")


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known: the nearest names, or all of them when none is near."""
    known = list(known)
    near = nearest(name, known)
    if near:
        return f"unknown {kind} {name!r}: did you mean {' or '.join(near)}?"
    return f"unknown {kind} {name!r}: known are {', '.join(known)}"


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Up to `limit` names that are spelled like `name`, best first."""
    by_lower = {each.lower(): each for each in known}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, limit, 0.6)]
