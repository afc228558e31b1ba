"""A folder of files as a catalogue of names: a plug-in is a file, and the file's name is its key.

Listing reads the folder and the files' docstrings as text, so it imports nothing; a plug-in is imported when it is
asked for by name.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.errors import UnknownNameError


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
        docstring = ast.get_docstring(ast.parse((self._folder() / f"{name}.py").read_text("utf-8")))
        return docstring.splitlines()[0] if docstring else ""

    def load(self, name: str, attribute: str) -> Any:
        """`attribute` of the plug-in called `name`; case and hyphens do not matter."""
        known = name.lower().replace("-", "_")
        if known not in self.names():
            raise UnknownNameError(unknown(self.kind, name, self.names()))
        return getattr(importlib.import_module(f"{self.package}.{known}"), attribute)

    def _folder(self) -> Path:
        spec = importlib.util.find_spec(self.package)
        assert spec is not None and spec.submodule_search_locations, f"{self.package} is not a package"
        return Path(spec.submodule_search_locations[0])


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
