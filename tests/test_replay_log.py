"""`replay.jsonl` as a file: exact, small, appended to, cut, and not believed when it is damaged."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica import files
from lorica.errors import DataError
from lorica.optim import replay
from lorica.optim.replay import Header, LoggedRound, ReplayLog, checksum, read_log
from lorica.optim.schedules import multiplier

HEADER = Header("c0ffee00", "0123456789abcdef", {"num": 1, "distribution": "gaussian", "seed": 0}, {"torch": "2"})
DRAWN = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).tolist()
FLOAT32 = st.floats(width=32, allow_nan=False)


def written(path: Path, num_steps: int, *, rate: Any = lambda step: 1e-4, bad: tuple[int, ...] = ()) -> ReplayLog:
    """A log of so many steps, of which some were not applied."""
    log = ReplayLog(path, HEADER)
    for step, weight in enumerate(DRAWN[:num_steps], 1):
        log.step(step, None if step in bad else [weight], rate(step), "0" * 16 if step % 100 == 0 else None)
    return log


@given(st.lists(FLOAT32, max_size=5))
def test_weights_keep_every_bit(weights: list[float]) -> None:
    found = replay.unpacked(replay.packed(weights))
    assert struct.pack("<5d", *(*found, *[0.0] * (5 - len(found)))) == struct.pack(
        "<5d", *(*weights, *[0.0] * (5 - len(weights)))
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "replay.jsonl"
    log = written(path, 250, rate=lambda step: 1e-4 if step < 120 else 1e-5, bad=(7, 8))
    log.end_round(LoggedRound(250, 0, "patience", 180, False))
    log.flush(durable=True)
    found = read_log(path)
    assert found.header == HEADER and found.broken is None and not found.later
    assert [each.step for each in found.steps] == list(range(1, 251))
    assert [each.step for each in found.steps if each.weights is None] == [7, 8]
    assert [each.step for each in found.steps if each.checksum] == [100, 200]
    assert [each.rate for each in found.steps] == [1e-4] * 119 + [1e-5] * 131
    assert found.rounds == [LoggedRound(250, 0, "patience", 180, False)]
    expected = [(weight,) for step, weight in enumerate(DRAWN[:250], 1) if step not in (7, 8)]
    assert [each.weights for each in found.steps if each.weights] == expected


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_log_of_20000_steps_is_small_under_every_schedule(tmp_path: Path, schedule: str) -> None:
    """With eight directions a step, as a run has them unless something else is asked for, and every rate exact."""
    path, rates = tmp_path / schedule, [3e-4 * multiplier(schedule, step, 20_000, 0.1) for step in range(20_001)]
    log = ReplayLog(path, replace(HEADER, directions={**HEADER.directions, "num": 8}))
    for step, weight in enumerate(DRAWN, 1):
        log.step(step, [weight] * 8, rates[step], "0" * 16 if step % 100 == 0 else None)
    log.flush()
    assert path.stat().st_size < 1.95e6
    assert [each.rate for each in read_log(path).steps] == rates[1:]


def test_a_step_writes_nothing_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    original = files.append_lines

    def counted(path: Path, lines: str, *, durable: bool = False) -> None:
        calls.append(durable)
        original(path, lines, durable=durable)

    log = ReplayLog(tmp_path / "replay.jsonl", HEADER)
    monkeypatch.setattr(replay.files, "append_lines", counted)
    for step in range(1, 1001):
        log.step(step, [1.0], 1e-4)
    assert calls == [False] * 10, "one write for each 100 steps, and no wait for the disk"


@pytest.mark.parametrize("rate", [1e-4, 1e-4 / 3])
def test_a_log_gone_on_with_is_the_log_never_left(tmp_path: Path, rate: float) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    written(whole, 20, rate=lambda step: rate).flush()
    written(parts, 13, rate=lambda step: rate).flush()
    lines = parts.read_bytes().splitlines(keepends=True)
    files.write_atomic(parts, b"".join(lines[:11]))
    log = ReplayLog(parts, HEADER)
    for record in files.read_records(whole):
        if record["step"] > 10:
            log.step(record["step"], replay.unpacked(record["weights"]), rate)
    log.flush()
    assert parts.read_bytes() == whole.read_bytes()
    elsewhere = Header(HEADER.config, HEADER.base, HEADER.directions, {"torch": "3"})
    ReplayLog(parts, elsewhere)
    assert read_log(parts).later == {20: elsewhere}


def test_a_torn_tail_is_dropped_and_a_gap_ends_the_log(tmp_path: Path) -> None:
    path = tmp_path / "replay.jsonl"
    written(path, 20).flush()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[:-9])
    with pytest.warns(UserWarning, match="torn"):
        assert len(read_log(path).steps) == 19
    path.write_bytes(b"".join([*lines[:6], *lines[8:]]))
    found = read_log(path)
    assert len(found.steps) == 5
    assert found.broken == "line 7 has step 8 after step 5"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"step": 1, "weights": "AACAPw==AAAA"}, "line 2"),
        ({"step": 1, "weights": "AACAPwAAgD8="}, "2 weights for 1 directions"),
        ({"step": 1, "weights": "AAA="}, "line 2"),
        ({"step": 1, "weights": 7}, "line 2"),
        ({"step": 1, "weights": "AADAfw=="}, "line 2: a rate or a weight that is no number"),
        ({"step": 1, "weights": "AACAPw==", "rate": math.inf}, "line 2: a rate or a weight that is no number"),
        ({"step": 1, "weights": "AACAPw==", "rate": "much"}, "line 2"),
        ({"step": 1, "weights": "AACAPw==", "rate": "AACAPw=="}, "line 2"),
        ({"step": 1, "round": 0}, "not the end of a round"),
        ([1], "line 2"),
    ],
)
def test_lines_that_are_not_of_a_log_are_told_by_number(tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "replay.jsonl"
    ReplayLog(path, HEADER)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=message):
        read_log(path)


def header_with(**changes: Any) -> str:
    return files.record_line({"step": 0, "header": {**asdict(HEADER), **changes}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "begin with a header"),
        ('{"step": 1, "weights": "AACAPw=="}\n', "begin with a header"),
        ('{"step": 0, "header": {"format": 99}}\n', "format 99"),
        ('{"step": 0, "header": 3}\n', "format None"),
        ('{"step": 0, "header": {"format": 1, "surprise": 1}}\n', "header"),
        (header_with(directions=3), "header"),
        (header_with(model="x"), "header"),
    ],
)
def test_what_is_not_a_log_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "replay.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_log(path)


def test_a_checksum_sees_every_bit_name_shape_and_dtype() -> None:
    here = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}
    others = [
        {**here, "a": torch.tensor([1.0, 2.0 + 2**-22])},
        {**here, "a": torch.tensor([1.0, 2.0]).view(1, 2)},
        {**here, "b": torch.zeros(2, 2, dtype=torch.float16)},
        {**here, "b": -here["b"]},
        {"c": here["a"], "b": here["b"]},
    ]
    same = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T[:, 0].contiguous(), "b": here["b"].clone()}
    same["a"].copy_(here["a"])
    assert checksum(here) == checksum(same)
    assert len({checksum(each) for each in (here, *others)}) == 1 + len(others)
