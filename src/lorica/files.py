"""Files that survive a crash: a reader sees the old content or the new one, never half of either.

A file is written to a temporary name beside its own, flushed to the disk and renamed; a folder is staged in a sibling
and renamed whole. Records are appended as whole lines under a lock that the kernel releases when its holder dies.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from lorica.errors import ConfigError, DataError, FolderInUseError, MissingPathError, OutputExistsError

Record = Mapping[str, Any]


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content`, durably. On any failure the old file stays and no temporary one is left."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write; it becomes `path`, durably, when the block ends without an error, and else it is gone."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written atomically. NaN and infinity are refused: JSON has no word for them."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """The rows as CSV, written atomically; text that a spreadsheet would compute is marked as text by an apostrophe."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(head)
    lines.writerows([_inert(value) for value in row] for row in rows)
    write_atomic(path, text.getvalue())


def _inert(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


@contextlib.contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A new empty folder to fill; it becomes `path` in one rename when the block ends without an error.

    A folder already at `path` is set aside by a rename, comes back if the new one cannot take its place, and is deleted
    last. A kill between those two renames leaves both beside `path`, whole, under hidden names. After an error nothing
    is left, parents made for it included. Raises ConfigError where no folder can be made.
    """
    with _staging_for(path) as staging:
        yield staging
        for file in staging.rglob("*"):
            _sync(file)
        sync_folder(staging)
        _swap_in(staging, path)


def check_makeable(path: Path) -> None:
    """Raise ConfigError unless a folder can be made at `path`, which making one beside it tells; nothing is left."""
    with _staging_for(path):
        pass


@contextlib.contextmanager
def _staging_for(path: Path) -> Iterator[Path]:
    """A new folder beside `path`; where it is not renamed it goes at the end, and the parents made for it with it."""
    if path.name in ("", ".."):
        raise ConfigError(f"{str(path)!r} does not name a new folder: give one a name")
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}.staging")
    missing = [parent for parent in staging.parents if not os.path.lexists(parent)]
    try:
        _make_folder(staging, path)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):  # something lies in it: what was made, or another process's
                parent.rmdir()


def _make_folder(staging: Path, path: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):  # another process has just taken away parents that it had made
            return staging.mkdir(parents=True)
        staging.mkdir(parents=True)
    except OSError as error:
        nearest = next(each for each in path.parents if each.exists())
        reason = f"{str(nearest)!r} is a file" if not nearest.is_dir() else (error.strerror or str(error)).lower()
        raise ConfigError(f"no folder can be made at {str(path)!r}: {reason}; name another one") from None


def _swap_in(staging: Path, path: Path) -> None:
    trash = path.with_name(f".{path.name}.{secrets.token_hex(4)}.trash")
    if path.exists():
        path.rename(trash)
    try:
        staging.rename(path)
    except BaseException:
        if trash.exists():
            trash.rename(path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(trash, ignore_errors=True)


def link_or_copy(target: Path, link: Path) -> None:
    """Make `link` a relative symbolic link to `target`, or a copy of it where the file system has no links."""
    try:
        link.symlink_to(os.path.relpath(target, link.parent))
    except OSError:
        write_atomic(link, target.read_bytes())


def sync_folder(path: Path) -> None:
    """Ask the disk to keep the folder's own entries (names, renames)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def new_folder(parent: Path, name: str) -> Path:
    """Make `parent/<name>-<time>-<random>`; two processes in the same second get two folders."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = dated(parent, name)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path


def dated(parent: Path, name: str) -> Path:
    """`parent/<name>-<time>-<random>`, a path that nothing is at yet."""
    return parent / f"{slug(name)}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def claim_folder(path: Path) -> Path:
    """Make `path`, or take it if it is empty. Raises OutputExistsError if anything is in it."""
    if path.exists() and not path.is_dir():
        raise OutputExistsError(f"output_dir={str(path)!r} is a file: name a new folder")
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise OutputExistsError(f"output_dir={str(path)!r} is not empty: name a new folder, nothing is written over")
    return path


@contextlib.contextmanager
def locked_folder(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the folder against every other process. The kernel lets go when the holder dies.

    With `wait` it stands in line for it, and else raises FolderInUseError where somebody holds it.
    """
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        if not _locked(descriptor, wait):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            raise FolderInUseError(f"{path} is in use by {holder}: wait for it, or stop it")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def hold(path: Path, *, wait: bool = False) -> BinaryIO | None:
    """A file that is there, open and locked until it is closed or its holder dies; None if it is held, without `wait`.

    Raises FileNotFoundError. What was waited for may have been deleted meanwhile.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if _locked(descriptor, wait):
            return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _locked(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises MissingPathError or DataError."""
    with open_regular(path) as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from None


def content_hash(value: Any) -> str:
    """Eight hexadecimal digits that stand for a JSON value: the same for equal values, whatever their keys' order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def slug(name: str, limit: int = 80) -> str:
    """`name` as one safe path component: letters, digits, '.', '_' and '-', never empty, never hidden."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-.")[:limit].strip("-.") or "unnamed"


def open_regular(path: Path, limit_bytes: int | None = None) -> BufferedReader:
    """Open a file from elsewhere for reading: a regular file, no FIFO or device, of at most `limit_bytes`.

    A link is refused, but for one of the hub's cache, from a snapshot to a blob of the same repository.
    """
    real = _blob(path) if path.is_symlink() else path
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MissingPathError(f"no file {str(real)!r}") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            told = "is a symbolic link, and none is followed outside or out of the hub's cache: give the file itself"
            raise DataError(f"{str(path)!r} {told}") from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise DataError(f"{str(path)!r} is not a regular file")
    if limit_bytes is not None and status.st_size > limit_bytes:
        os.close(descriptor)
        raise DataError(f"{str(path)!r} has {status.st_size} bytes: at most {limit_bytes} are read")
    return os.fdopen(descriptor, "rb")


def _blob(link: Path) -> Path:
    """Where a link really ends, if that is among the blobs of the snapshot's repository; else the link itself."""
    folder, end = Path(os.path.realpath(link.parent)), Path(os.path.realpath(link))
    repository = end.parent.parent
    cached = end.parent.name == "blobs" and repository.name.startswith("models--")
    return end if cached and folder.is_relative_to(repository / "snapshots") else link


def append_record(path: Path, record: Record) -> None:
    """Append one JSON line, whole: one write under a lock, after a torn line of a killed writer is cut away."""
    append_lines(path, record_line(record))


def append_lines(path: Path, lines: str, *, durable: bool = False) -> None:
    """Append whole lines as `append_record` appends one; `durable` waits until the disk has them."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _cut_torn_tail(descriptor)
        os.write(descriptor, lines.encode())
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record_line(record: Record) -> str:
    """The record as the one line that it is in a JSON Lines file."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _cut_torn_tail(descriptor: int) -> None:
    end = os.fstat(descriptor).st_size
    keep = end
    while keep > 0:
        start = max(0, keep - 65536)
        newline = os.pread(descriptor, keep - start, start).rfind(b"\n")
        keep = start + newline + 1 if newline >= 0 else start
        if newline >= 0:
            break
    if keep < end:
        os.ftruncate(descriptor, keep)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every record of a JSON Lines file. A torn last line is dropped with a warning; any other bad line is an error."""
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise DataError(f"{path}, line {number}: not a JSON record") from None
            warnings.warn(f"{path}: the last line is torn and was dropped", stacklevel=2)
    return records
