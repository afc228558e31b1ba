"""What is on the disk after a failure: the old content or the new, never half of either."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from lorica import files
from lorica.errors import DataError, MissingPathError, OutputExistsError

NAMES = (
    "../x",
    "/etc/passwd",
    "",
    "a" * 300,
    "a\nb",
    "a\0b",
    "[/red]",
    "</script>",
    "=1+1",
    "\u202eevil",
    "🙂",
    "..",
    ".",
)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    files.write_atomic(path, "old")
    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, _raise)
            with pytest.raises(OSError, match="no space"):
                files.write_atomic(path, "new")
        assert path.read_text() == "old"
        assert [each.name for each in tmp_path.iterdir()] == ["record.json"]


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    with files.staged_folder(path) as staging:
        (staging / "a").write_text("old")
    with pytest.raises(OSError, match="no space"), files.staged_folder(path) as staging:
        (staging / "a").write_text("new")
        _raise()
    assert (path / "a").read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["adapter"]
    with files.staged_folder(path) as staging:
        (staging / "b").write_text("new")
    assert [each.name for each in path.iterdir()] == ["b"]


def test_json_has_no_word_for_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_a_torn_tail_is_dropped_and_then_cut(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    files.append_record(path, {"n": 1})
    with open(path, "ab") as file:
        file.write(b'{"n": 2')
    with pytest.warns(UserWarning, match="torn"):
        assert files.read_records(path) == [{"n": 1}]
    files.append_record(path, {"n": 3})
    assert files.read_records(path) == [{"n": 1}, {"n": 3}]


def test_a_corrupt_middle_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"n": 1}\nnot json\n{"n": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        files.read_records(path)


def test_many_writers_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "index.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, writer)) for writer in range(4)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    found = sorted((record["writer"], record["n"]) for record in files.read_records(path))
    assert found == [(writer, n) for writer in range(4) for n in range(50)]


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    assert len({files.new_folder(tmp_path, "run") for _ in range(100)}) == 100


@pytest.mark.parametrize("name", NAMES)
def test_any_name_becomes_one_safe_component(tmp_path: Path, name: str) -> None:
    path = files.new_folder(tmp_path, name)
    assert path.parent == tmp_path and path.is_dir()
    assert path.name.isascii() and not path.name.startswith(".") and "/" not in path.name


def test_a_folder_in_use_is_not_taken(tmp_path: Path) -> None:
    assert files.claim_folder(tmp_path / "new").is_dir()
    assert files.claim_folder(tmp_path / "new").is_dir()
    (tmp_path / "new" / "x").touch()
    with pytest.raises(OutputExistsError, match="not empty"):
        files.claim_folder(tmp_path / "new")
    with pytest.raises(OutputExistsError, match="is a file"):
        files.claim_folder(tmp_path / "new" / "x")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    with files.open_regular(tmp_path / "real") as file:
        assert file.read() == b"12345"
    for name, told in (("link", "symbolic link"), ("pipe", "regular file")):
        with pytest.raises(DataError, match=told):
            files.open_regular(tmp_path / name)
    with pytest.raises(DataError, match="at most 4"):
        files.open_regular(tmp_path / "real", limit_bytes=4)
    with pytest.raises(MissingPathError):
        files.open_regular(tmp_path / "none")


def _raise(*_: object) -> None:
    raise OSError("no space left on device")


def _write_many(path: Path, writer: int) -> None:
    for n in range(50):
        files.append_record(path, {"writer": writer, "n": n, "text": "x" * 200})


def test_records_are_plain_json(tmp_path: Path) -> None:
    files.append_record(tmp_path / "a.jsonl", {"loss": 0.1 + 0.2})
    assert json.loads((tmp_path / "a.jsonl").read_text())["loss"] == 0.1 + 0.2
