"""The order of the rooms: a file imports its own room and rooms above it, never below."""

from __future__ import annotations

import ast
from pathlib import Path

ROOMS = (
    *("errors", "randomness", "plugins", "files", "config", "results", "progress", "processes"),
    *("adapters", "swaps", "models", "tasks", "evaluation", "optim", "planning", "training", "studies", "analysis"),
    *("merging", "card", "report", "runs", "demo", "tables", "cli", "__main__"),
)
RUNS = ("training", "evaluating", "merging", "studying", "inspecting")
PACKAGE = Path(__file__).parents[1] / "src" / "lorica"


def test_arrows_run_one_way() -> None:
    upward = [
        f"{path.relative_to(PACKAGE)} imports {room}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for room in _imported_rooms(path)
        if ROOMS.index(room) > ROOMS.index(_room(path))
    ]
    assert upward == []


def test_arrows_inside_runs_run_one_way() -> None:
    upward = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in sorted((PACKAGE / "runs").rglob("*.py"))
        for name in sorted(_imports(path))
        if _place_in_runs(name) > _place_in_runs(_module(path))
    ]
    assert upward == []


def test_every_room_is_in_the_order() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms - {"__init__"} == set(ROOMS)
    assert {path.parent.name for path in PACKAGE.glob("runs/*/*.py")} == set(RUNS)


def test_adapters_know_neither_transformers_nor_tasks() -> None:
    for path in (PACKAGE / "adapters").glob("*.py"):
        heavy = {name.partition(".")[0] for name in _imports(path)} & {"transformers", "datasets", "pydantic", "peft"}
        assert not heavy, path.name


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def _place_in_runs(name: str) -> int:
    """The files at the top of runs/ come first, then its rooms; runs/__init__.py, which names the verbs, is last."""
    match name.split("."):
        case ["lorica", "runs"] | ["lorica", "runs", "__init__"]:
            return len(RUNS) + 1
        case ["lorica", "runs", room, *_] if room in RUNS:
            return RUNS.index(room) + 1
    return 0


def _imported_rooms(path: Path) -> set[str]:
    names = {name for name in _imports(path) if name.startswith("lorica.")}
    return {name.split(".")[1] for name in names} & set(ROOMS) if _room(path) != "__init__" else set()


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names
