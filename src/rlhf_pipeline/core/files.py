"""Files that survive a crash: atomic writes, journals whose torn end is dropped, locks that die with their process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_pipeline.core.command import BadUse, WorkFailed

LOCK_WAIT = 60.0
"""Seconds a restart waits for the lock of the run that it follows."""
FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file is too large"}
TEMPORARY = ".*.tmp*"
"""What `atomic` leaves beside a file when it is killed, as a glob pattern."""


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename alone may be lost with the machine's power)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Raises WorkFailed with one sentence where the disk has no room for what the block writes to `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise WorkFailed(
            f"{path} can't be written, {FULL[error.errno]}: what was finished before is safe; make room and run the "
            "same command again to go on from here."
        ) from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what the block wrote there becomes `path` whole, or not at all.

    Raises WorkFailed where the disk is full.
    """
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
        try:
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in `path`, or None if the file is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


class Journal:
    """A .jsonl file that records finished pieces of work, one line each, and may end in the middle of a line.

    `records` is what whole lines it held when opened; the torn rest, if any, is cut off before the first append.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.path = path
        self.records, whole = _whole_lines(path.read_bytes())
        self._file = path.open("rb+", buffering=0)
        self._file.truncate(whole)
        self._file.seek(whole)

    def append(self, record: dict[str, Any]) -> None:
        """Raises WorkFailed where the disk is full."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with room_for(self.path):
            while line:  # a disk that becomes full takes a part of it first
                line = line[self._file.write(line) :]

    def close(self) -> None:
        with room_for(self.path):
            os.fsync(self._file.fileno())
        self._file.close()


def _whole_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """(records, bytes that hold them): up to the first line that is torn, or was never written to the disk."""
    records, position = [], 0
    for line in data.splitlines(keepends=True):
        try:
            records.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            records.pop()
            break
        position += len(line)
    return records, position


@contextlib.contextmanager
def locked(path: Path, *, wait: float = LOCK_WAIT, note: str = "") -> Iterator[None]:
    """Hold an exclusive lock on `path`, which the kernel gives back when the process ends, however it ends.

    note: what `notes_of_holders` tells others. Raises BadUse naming the holder after `wait` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        deadline = time.monotonic() + wait
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.readline().strip() or "unknown"
                raise BadUse(
                    f"{path} is held by process {holder}, which writes the same output. "
                    "Wait for it, or end it, then run the same command again."
                )
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n{note}\n")
        file.flush()
        yield


def notes_of_holders(paths: Iterable[Path]) -> dict[Path, tuple[str, str]]:
    """{path: (holder, note)} of those locks that are held at this moment."""
    held = {}
    for path in paths:
        with path.open() as file:
            if not _try_lock(file.fileno(), fcntl.LOCK_SH):
                holder, _, note = file.read().partition("\n")
                held[path] = (holder, note.strip())
    return held


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists():
        os.unlink(path)


def replace_folder(new: Path, final: Path) -> None:
    """Let `new` have the name `final`, and remove what had it; may be repeated after a kill at any step."""
    sync_folder(new)
    set_aside(final)
    new.rename(final)
    sync_folder(final.parent)
    remove(replaced(final))


def discard(folder: Path) -> None:
    """Remove `folder`, at once for all who look for it."""
    set_aside(folder)
    remove(replaced(folder))


def set_aside(folder: Path) -> None:
    """Let `folder` stand as `replaced`, in the place of what stood there."""
    remove(replaced(folder))
    if folder.exists():
        folder.rename(replaced(folder))


def replaced(folder: Path) -> Path:
    """Where a folder that is being replaced stands for the moment until the new one has its name."""
    return folder.with_name(f".{folder.name}.replaced")


def sha256_of(paths: Iterable[Path], *, relative_to: Path | None = None) -> str:
    """sha256 over the files' names (relative to a folder, if given) and contents, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(paths):
        name = path.relative_to(relative_to).as_posix() if relative_to else path.name
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{name} {content}\n".encode())
    return total.hexdigest()
