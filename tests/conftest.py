"""What every test gets: no network, a cache of its own, and tiny checkpoints that are made once and loaded afresh."""

from __future__ import annotations

import os

# Read when libraries are imported, so set before anything else, and passed on to every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices gain nothing from threads, and workers side by side lose by them
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:  # imported where it is used: the process that hands the tests out would pay seconds for it
    from lorica.models import Base

# The same examples on every machine and in every run, and no clock: a shared machine is slow at times.
settings.register_profile("lorica", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("lorica")


@pytest.fixture(autouse=True)
def sealed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads or leaves anything outside its own folder."""
    monkeypatch.setenv("LORICA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # artifacts/ and runs/ are looked for, and left, where a command is run


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, kind) -> the folder of a tiny checkpoint; the kind is the family's own where none is given."""
    import tiny

    made: dict[tuple[str, str], Path] = {}

    def folder(family: str, kind: str | None = None) -> Path:
        key = family, kind or tiny.KINDS[family]
        if key not in made:
            made[key] = tiny.save(tmp_path_factory.mktemp("-".join(key)), *key)
        return made[key]

    return folder


@pytest.fixture
def load(tiny_models: Callable[..., Path]) -> Callable[..., Base]:
    """(family, kind, dtype) -> a base model freshly loaded by lorica, of which a test may do as it likes."""
    import tiny
    from lorica import models

    def loaded(family: str, kind: str | None = None, dtype: str = "float32") -> Base:
        kind = kind or tiny.KINDS[family]
        num_labels = tiny.NUM_LABELS if kind == "classification" else None
        return models.load(str(tiny_models(family, kind)), kind=kind, num_labels=num_labels, dtype=dtype)

    return loaded
