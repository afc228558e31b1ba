"""The examples run as they stand, are short, and use public names alone."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pytest

import lorica

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "3"])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_uses_public_names(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) < 60
    used = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorica")
        for alias in node.names
    }
    assert used <= {f"lorica.{name}" for name in lorica.__all__}
