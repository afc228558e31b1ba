"""The pages quote the records, where no figure was typed; a record says where it comes from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorica import results

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "write_tables.py"


def test_the_pages_say_what_the_records_say() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_origin_leaves_out_the_places_that_mean_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/a.py", "--work", "/tmp/here", "--steps", "3", "--work"])
    command = results.origin(0, "cpu", places=["--work"])["command"]
    assert command == ["python benchmarks/a.py", "--steps", "3"]
