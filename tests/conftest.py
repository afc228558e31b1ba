"""What every test gets: no network, a cache of its own, and tiny checkpoints that are made once and loaded afresh."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported, so before anything else

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import tiny
from lorica import models
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


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and workers that run side by side lose by them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, kind) -> the folder of a tiny checkpoint; the kind is the family's own where none is given."""
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

    def loaded(family: str, kind: str | None = None, dtype: str = "float32") -> Base:
        kind = kind or tiny.KINDS[family]
        num_labels = tiny.NUM_LABELS if kind == "classification" else None
        return models.load(str(tiny_models(family, kind)), kind=kind, num_labels=num_labels, dtype=dtype)

    return loaded
