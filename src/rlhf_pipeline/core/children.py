"""Child processes that work for hours: shown on the console, kept in a log, ended with this process and never before.

A child has a process group of its own, so that Ctrl-C reaches it once, from here. On a terminal it writes to a
pseudo-terminal, so that its progress bars live; the log keeps what such a bar showed last.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rlhf_pipeline.core.command import die_with_parent

POLL = 0.5
"""Seconds between looks at a child that says nothing."""
HEARTBEAT = 5.0
"""Seconds between calls of `on_beat`."""
_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]")


@dataclass(frozen=True)
class Ended:
    """code: as in subprocess, negative for a signal. asked: the signal that was passed on to it, if any."""

    code: int
    seconds: float
    asked: int | None


def run(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    on_beat: Callable[[float], None],
) -> Ended:
    """Run `command` to its end. SIGTERM is passed on to it, SIGINT to its process group; both are waited for.

    What it says goes to this console and, without a terminal's control codes, to the end of `log`. on_beat is told the
    seconds so far every HEARTBEAT. The child dies when this process does, however it does.
    """
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file, _console() as (ours, theirs), _passing_on() as (asked, children):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, **environment},
            process_group=0,
            preexec_fn=die_with_parent,
        )
        children.append(process)
        os.close(theirs)
        if asked:  # between the two lines above
            _tell(process, asked[-1])
        try:
            _copy(ours, process, Log(file), lambda: on_beat(time.monotonic() - started))
        except BaseException:  # this console broke down
            process.terminate()
            process.wait()
            raise
        code = process.wait()
    return Ended(code, time.monotonic() - started, asked[-1] if asked else None)


@contextlib.contextmanager
def _passing_on() -> Iterator[tuple[list[int], list[subprocess.Popen[bytes]]]]:
    """While it lasts SIGINT and SIGTERM go to the children in the second list and are noted in the first."""
    asked: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(signum: int, frame: types.FrameType | None) -> None:
        asked.append(signum)
        for process in children:
            _tell(process, signum)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked, children
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(process: subprocess.Popen[bytes], signum: int) -> None:
    """SIGTERM to a launcher alone, which ends its workers in order; Ctrl-C to the group, as a terminal would."""
    if process.poll() is not None:
        return
    if signum == signal.SIGINT:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)


@contextlib.contextmanager
def _console() -> Iterator[tuple[int, int]]:
    """(descriptor to read, descriptor for a child to write): a terminal's if we have one, else a pipe's.

    The caller closes the second.
    """
    if sys.stdout.isatty():
        ours, theirs = pty.openpty()
        columns, lines = shutil.get_terminal_size()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    else:
        ours, theirs = os.pipe()
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def _copy(ours: int, process: subprocess.Popen[bytes], log: Log, beat: Callable[[], None]) -> None:
    """Copy what the child says until it and all that share its output are gone, or it is gone and silent."""
    last = time.monotonic()
    while True:
        if select.select([ours], [], [], POLL)[0]:
            data = _read(ours)
            if not data:
                break
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            log.write(data)
        elif process.poll() is not None:  # something that it left behind still holds the output
            break
        if time.monotonic() - last > HEARTBEAT:
            last = time.monotonic()
            beat()
    log.flush()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # EIO: how a pseudo-terminal says that nobody writes any more
        return b""


class Log:
    """Lines for a file: of each line what a terminal would show of it in the end."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._line = b""

    def write(self, data: bytes) -> None:
        *whole, self._line = (self._line + data).split(b"\n")
        self._file.writelines(shown(line) + b"\n" for line in whole)
        self._file.flush()
        _, _, tail = self._line.rpartition(b"\r")
        self._line = tail or self._line  # a bar that is redrawn for hours is one line

    def flush(self) -> None:
        if self._line:
            self._file.write(shown(self._line) + b"\n")
        self._line = b""
        self._file.flush()


def shown(line: bytes) -> bytes:
    """What is left to see of a line in which carriage returns went back to its beginning."""
    return _CONTROL.sub(b"", line).rstrip(b"\r").rpartition(b"\r")[2]
