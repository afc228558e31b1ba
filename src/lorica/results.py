"""The store, and the waist of the program: runs write records here; comparing and reporting only read them.

A run folder holds `config.yaml`, `origin.json`, `record.json` and the JSON Lines that grow while it runs. The folder's
parent holds `index.jsonl`, one line for each finished run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lorica
from lorica import files
from lorica.errors import MissingPathError

LIBRARIES = ("torch", "transformers", "safetensors", "datasets", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps everything; the names of its files are decided here alone."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def origin(self) -> Path:
        return self.path / "origin.json"

    @property
    def record(self) -> Path:
        return self.path / "record.json"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def training_loss(self) -> Path:
        return self.path / "training_loss.jsonl"

    @property
    def replay(self) -> Path:
        return self.path / "replay.jsonl"

    @property
    def eval_loss(self) -> Path:
        return self.path / "eval_loss.jsonl"

    @property
    def adapter(self) -> Path:
        return self.outcome("adapter")

    @property
    def model(self) -> Path:
        return self.outcome("model")

    def outcome(self, place: Literal["adapter", "model"]) -> Path:
        """Where what was trained is kept."""
        return self.path / place

    def best(self, place: Literal["adapter", "model"]) -> Path:
        """Where it is kept as it stood at the best dev loss."""
        return self.path / f"best_{place}"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def trainer_state(self) -> Path:
        return self.path / "trainer_state.json"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    def evaluation(self, split: str) -> Path:
        return self.path / f"eval_results_{split}.json"

    def predictions(self, split: str) -> Path:
        return self.path / f"predictions_{split}.parquet"


def new_run(output_dir: str | None, name: str) -> RunFolder:
    """A fresh run folder: `output_dir` if given (new or empty), else `runs/<name>-<time>-<random>`."""
    if output_dir is None:
        return RunFolder(files.new_folder(Path("runs"), name))
    return RunFolder(files.claim_folder(Path(output_dir)))


def check_free(output_dir: str) -> None:
    """Ask before any work is done: raise OutputExistsError or ConfigError if a run could not take `output_dir`."""
    path = Path(output_dir)
    if not os.path.lexists(path):  # Path.exists raises where a name is too long
        files.check_makeable(path)
    elif not path.is_dir() or any(path.iterdir()):
        files.claim_folder(path)


def open_run(path: str | Path) -> RunFolder:
    """A run folder that is there. Raises MissingPathError if `path` holds no `config.yaml`."""
    run = RunFolder(Path(path))
    if not run.config.is_file():
        raise MissingPathError(f"{str(path)!r} is not a run folder: it has no config.yaml")
    return run


def origin(seed: int, device: str, places: Sequence[str] = ()) -> dict[str, Any]:
    """Where a result comes from: command, code and library versions, device, seed, time. No environment, no secrets.

    `places` are options of the command whose values are folders that mean nothing elsewhere: they are left out.
    """
    return {
        "command": [_program(), *_without(sys.argv[1:], places)],
        "lorica": lorica.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": dict(_versions()),
        "device": device,
        "num_cpus": len(os.sched_getaffinity(0)),
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _program() -> str:
    """What was typed to run this: the installed command, or a script by its name."""
    name, own = Path(sys.argv[0]).name, ("lorica", "cli.py", "__main__.py", "")
    return "lorica" if name in own else f"python {Path(sys.argv[0]).parent.name}/{name}"


def _without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """The words but for these options, each with the word behind it."""
    left_out = {at + step for at, word in enumerate(words) if word in options for step in (0, 1)}
    return [word for at, word in enumerate(words) if at not in left_out]


@functools.cache
def _commit() -> str | None:
    """The commit of the checkout that this code runs from; None when it runs from an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def artifacts(folder: Path, base: str) -> dict[str, Any]:
    """What tells whether a run's outcome and base are still what they were: SHA-256 of each file, and of the base."""
    found = {}
    for path in sorted(each for each in folder.iterdir() if each.is_file()):
        with files.open_regular(path) as file:
            found[f"{folder.name}/{path.name}"] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"base": base, "files": found}


def finish(
    run: RunFolder,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    timing: Mapping[str, float],
    artifacts: Mapping[str, Any] | None = None,
    efficiency: Mapping[str, Any] | None = None,
) -> None:
    """Write the run's record, then its line in the index beside it: what the index names is complete."""
    record = {
        "config": config,
        "metrics": metrics,
        "origin": json.loads(run.origin.read_text("utf-8")),
        "timing": timing,
        "efficiency": efficiency,
        "artifacts": artifacts,
    }
    files.write_json(run.record, record)
    line = {"run": run.path.name, "finished": time.time(), "metrics": metrics, "timing": timing}
    files.append_record(run.path.parent / "index.jsonl", line)
