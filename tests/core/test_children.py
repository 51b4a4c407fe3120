"""Child processes: what they say, what they are told, and that they do not outlive us."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_pipeline.core import children


def run(script: str, log: Path) -> children.Ended:
    return children.run([sys.executable, "-c", script], log=log, environment={"WORD": "hello"}, on_beat=print)


def test_what_a_child_says_is_shown_and_logged_and_its_code_returned(tmp_path: Path, capfdbinary) -> None:
    script = "import os, sys; print(os.environ['WORD']); print('error', file=sys.stderr); sys.exit(3)"
    ended = run(script, tmp_path / "a.log")
    assert (ended.code, ended.asked) == (3, None)
    assert sorted((tmp_path / "a.log").read_text().split()) == ["error", "hello"]
    assert sorted(capfdbinary.readouterr().out.split()) == [b"error", b"hello"]


def test_a_log_keeps_what_a_terminal_would_show_in_the_end() -> None:
    """A bar goes back to the beginning of its line; \\x1b[2K clears it, \\x1b[1m is bold."""
    file = io.BytesIO()
    log = children.Log(file)
    for piece in (b"one\r\n\x1b[1mtwo\x1b[0m\n", b"\r\x1b[2Kbar 1", b"\r\x1b[2Kbar 2", b"\r\x1b[2Kbar 3\n", b"last"):
        log.write(piece)
    log.flush()
    assert file.getvalue() == b"one\ntwo\nbar 3\nlast\n"


def test_a_bar_that_is_redrawn_for_hours_does_not_pile_up() -> None:
    log = children.Log(io.BytesIO())
    for step in range(1000):
        log.write(b"\rstep %d" % step)
    assert log._line == b"step 999"


PARENT = """
import sys
from pathlib import Path
from rlhf_pipeline.core import children
child = "import sys, time; print('started', flush=True); time.sleep(float(sys.argv[1]))"
command = [sys.executable, "-c", child, sys.argv[1]]
ended = children.run(command, log=Path(sys.argv[2]), environment={}, on_beat=print)
print("code", ended.code, "asked", ended.asked, flush=True)
"""


def start_parent(seconds: str, log: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PARENT, seconds, str(log)]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    assert parent.stdout is not None and parent.stdout.readline() == "started\n"
    return parent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_child_waited_for(
    number: signal.Signals, tmp_path: Path, command_environment
) -> None:
    """A Python child without a handler ends by SIGTERM with code -15, and upon Ctrl-C with -2."""
    parent = start_parent("60", tmp_path / "a.log", command_environment)
    parent.send_signal(number)
    out, _ = parent.communicate(timeout=20)
    assert out.splitlines()[-1] == f"code -{number.value} asked {number.value}"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_child_dies_with_a_killed_parent(tmp_path: Path, command_environment) -> None:
    seconds = f"60.{os.getpid()}"  # by which to find it
    parent = start_parent(seconds, tmp_path / "a.log", command_environment)
    assert alive(seconds)
    os.killpg(parent.pid, signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 10
    while alive(seconds) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(seconds)


def alive(argument: str) -> list[str]:
    """Processes that have `argument` as a whole word of their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if argument.encode() in words:
            found.append(path.parent.name)
    return found


def test_on_a_terminal_the_child_has_one_too(tmp_path: Path, command_environment) -> None:
    """So that its bars live, and break at our width; 24 lines of 100 columns here."""
    script = "import os, sys; print(sys.stdout.isatty(), os.get_terminal_size().columns)"
    parent = f"""
import sys
from pathlib import Path
from rlhf_pipeline.core import children
children.run([sys.executable, "-c", {script!r}], log=Path(sys.argv[1]), environment={{}}, on_beat=print)
"""
    ours, theirs = pty.openpty()
    environment = {**command_environment, "COLUMNS": "100", "LINES": "24"}
    words = [sys.executable, "-c", parent, str(tmp_path / "a.log")]
    subprocess.run(words, stdout=theirs, env=environment, timeout=20, check=True)
    os.close(theirs)
    assert os.read(ours, 100).split() == [b"True", b"100"]
    os.close(ours)
    assert (tmp_path / "a.log").read_text() == "True 100\n"
