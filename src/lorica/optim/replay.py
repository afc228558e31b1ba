"""`replay.jsonl`: what rebuilds a zeroth-order run from its base model, without data and without a forward pass.

The first line is the header. A line of what the examples have shown may stand before the steps of a round: a first
look's, a warm start's. Each step has a line: the float32 weights of its directions, or none if it was not applied; the
learning rate where it changes, as its eight bytes where its digits are more; every 100 steps a checksum of what is
trained. A boosting round that ends has a line of what was decided. The directions themselves follow from the seed and
the step (MATH section 3).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lorica import files, randomness
from lorica.errors import DataError

FORMAT_VERSION = 1
SEGMENT = 100  # steps from one checksum to the next, and the lines that are kept back at most


@dataclass(frozen=True)
class Header:
    """What a log is of: hashes of the config and of the base model, and the machine kind that took the steps."""

    config: str
    base: str
    directions: Mapping[str, Any]  # num, distribution, seed
    numerics: Mapping[str, str]
    model: Mapping[str, Any] = field(default_factory=dict)  # how the base was loaded, as far as the data decided it
    format: int = FORMAT_VERSION


@dataclass(frozen=True)
class LoggedStep:
    """A step as it was taken; `weights` is None if it was not applied, `checksum` if none was taken after it."""

    step: int
    weights: tuple[float, ...] | None
    rate: float
    checksum: str | None = None


@dataclass(frozen=True)
class LoggedRound:
    """What the end of a boosting round decided; `kept` is the step whose booster was taken, rolled back to or last."""

    step: int
    round: int
    reason: str
    kept: int
    accepted: bool


@dataclass(frozen=True)
class Log:
    """A log as far as it goes: steps 1, 2, … without a gap. `later` are headers of processes that went on elsewhere."""

    header: Header
    steps: Sequence[LoggedStep]
    rounds: Sequence[LoggedRound]
    later: Mapping[int, Header]
    looked: Mapping[str, Tensor] = field(default_factory=dict)
    broken: str | None = None  # why nothing after the last of `steps` can be used


class ReplayLog:
    """The log of a run under way. Lines are kept back, at most those of 100 steps, until `flush` or the block's end.

    A log that is there is gone on with; `before` is its last header where that differs from the one given.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.num_rounds = 0
        self.before: dict[str, Any] | None = None
        self._waiting: list[str] = []
        self._rate: float | None = None
        self._looked: set[str] = set()
        self._begin(asdict(header))

    def __enter__(self) -> ReplayLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush(durable=True)

    def step(self, step: int, weights: Sequence[float] | None, rate: float, checksum: str | None = None) -> None:
        """Note a step, numbered from 1; without weights if it was not applied."""
        line: dict[str, Any] = {"step": step}
        if weights is not None:
            line["weights"] = packed(weights)
        if rate != self._rate:
            line["rate"], self._rate = _short(rate), rate
        if checksum is not None:
            line["checksum"] = checksum
        self._waiting.append(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
        if len(self._waiting) >= SEGMENT:
            self.flush()

    def look(self, step: int, looked: Mapping[str, Tensor]) -> None:
        """Note what the examples have shown until after a step, as far as the log does not have it."""
        new = {name: tensor.contiguous() for name, tensor in looked.items() if name not in self._looked}
        if new:
            self._looked |= set(new)
            content = base64.b64encode(save(new)).decode()
            self._waiting.append(files.record_line({"step": step, "looked": content}))

    def end_round(self, ended: LoggedRound) -> None:
        """Note what the end of a round decided."""
        self.num_rounds += 1
        self._waiting.append(files.record_line(asdict(ended)))

    def flush(self, *, durable: bool = False) -> None:
        """Write what waits."""
        files.append_lines(self.path, "".join(self._waiting), durable=durable)
        self._waiting = []

    def _begin(self, header: dict[str, Any]) -> None:
        """Write the header where there is none, or where the log goes on in a process that is not of its kind."""
        records = files.read_records(self.path) if self.path.exists() else []
        headers = [record["header"] for record in records if "header" in record]
        self.num_rounds = sum("round" in record for record in records)
        for number, record in enumerate(records, 1):
            self._looked |= set(_looked(self.path, number, record["looked"]) if "looked" in record else ())
        self._rate = next((_rate(record["rate"]) for record in reversed(records) if "rate" in record), None)
        if not headers or headers[-1] != header:
            self.before = headers[-1] if headers else None
            files.append_record(self.path, {"step": records[-1]["step"] if records else 0, "header": header})


def read_log(path: Path) -> Log:
    """The log of a run. Raises DataError if it has no header of a known format, or a line that is none of its kinds."""
    headers: dict[int, Header] = {}
    steps: list[LoggedStep] = []
    rounds: list[LoggedRound] = []
    broken, looked = None, dict[str, Tensor]()
    for number, record in enumerate(files.read_records(path), 1):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise DataError(f"{path}, line {number}: not a line of a replay log")
        if "header" in record:
            headers[record["step"]] = _header(path, record["header"])
        elif 0 not in headers:
            break
        elif "looked" in record:
            looked |= _looked(path, number, record["looked"])
        elif "round" in record:
            rounds.append(_ended(path, number, record))
        elif record["step"] == len(steps) + 1:
            steps.append(_taken(path, number, record, steps[-1].rate if steps else 0.0, headers[0]))
        else:
            broken = f"line {number} has step {record['step']} after step {len(steps)}"
            break
    if 0 not in headers:
        raise DataError(f"{path} does not begin with a header: it cannot be replayed")
    return Log(headers.pop(0), steps, rounds, headers, looked, broken)


def packed(weights: Sequence[float]) -> str:
    """float32 weights as base64 of their little-endian bytes: 8 characters for one, 16/3 for each of many."""
    return base64.b64encode(struct.pack(f"<{len(weights)}f", *weights)).decode()


def unpacked(text: str) -> tuple[float, ...]:
    """The weights of `packed`, bit for bit. Raises ValueError."""
    content = base64.b64decode(text, validate=True)
    return struct.unpack(f"<{len(content) // 4}f", content)


def _short(rate: float) -> float | str:
    """A rate as JSON takes it, exact: as it is or, where that is shorter, its little-endian bytes in base64."""
    text = base64.b64encode(struct.pack("<d", rate)).decode()
    return text if len(text) + 2 < len(repr(rate)) else rate


def _rate(found: Any) -> float:
    """The rate of `_short`. Raises ValueError, TypeError or struct.error."""
    if isinstance(found, str):
        return float(struct.unpack("<d", base64.b64decode(found, validate=True))[0])
    return float(found)


def checksum(parameters: Mapping[str, Tensor]) -> str:
    """A hash of names and bytes: the same for parameters that are the same, bit for bit."""
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        content = parameter.detach().reshape(-1).cpu().view(torch.uint8)
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(content.numpy().data)
    return digest.hexdigest()[:16]


def numerics(device: str) -> dict[str, str]:
    """What decides how numbers round here: versions, device, instruction set, and what a fixed draw comes to."""
    drawn = [randomness.normals(0, "numerics", size=4096), randomness.signs(0, "numerics", size=4096)]
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "draw": checksum({"normals": drawn[0], "signs": drawn[1]}),
    }


def _header(path: Path, record: Any) -> Header:
    if not isinstance(record, dict) or record.get("format") != FORMAT_VERSION:
        found = record.get("format") if isinstance(record, dict) else None
        raise DataError(f"{path} is of format {found!r}, and this lorica replays {FORMAT_VERSION}")
    try:
        header = Header(**record)
    except TypeError as error:
        raise DataError(f"{path}: the header is not one of a replay log ({error})") from None
    if not all(isinstance(each, dict) for each in (header.directions, header.numerics, header.model)):
        raise DataError(f"{path}: the header is not one of a replay log (directions, numerics, model)")
    return header


def _looked(path: Path, number: int, text: Any) -> dict[str, Tensor]:
    try:
        return load(base64.b64decode(text, validate=True))
    except (TypeError, ValueError, SafetensorError):
        raise DataError(f"{path}, line {number}: not what a look at the examples has shown") from None


def _ended(path: Path, number: int, record: Mapping[str, Any]) -> LoggedRound:
    try:
        return LoggedRound(**record)
    except TypeError:
        raise DataError(f"{path}, line {number}: not the end of a round") from None


def _taken(path: Path, number: int, record: Mapping[str, Any], rate: float, header: Header) -> LoggedStep:
    """A step's line; `rate` is that of the step before."""
    text, num = record.get("weights"), header.directions.get("num")
    try:
        weights = None if text is None else unpacked(text)
        rate = _rate(record.get("rate", rate))
    except (ValueError, TypeError, struct.error, binascii.Error):
        raise DataError(f"{path}, line {number}: not a step of a replay log") from None
    if weights is not None and len(weights) != num:
        raise DataError(f"{path}, line {number}: {len(weights)} weights for {num} directions")
    if not all(map(math.isfinite, (rate, *(weights or ())))):
        raise DataError(f"{path}, line {number}: a rate or a weight that is no number, which no step had")
    return LoggedStep(record["step"], weights, rate, record.get("checksum"))
