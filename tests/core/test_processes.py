"""Stages as processes: how they end, and how they end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.processes import run_stage

PARENT = """
import signal, sys
from rlhf_pipeline.core.command import _raise_terminated
from rlhf_pipeline.core.processes import run_stage
signal.signal(signal.SIGTERM, _raise_terminated)
run_stage([sys.executable, "-c", sys.argv[1]], name="child")
"""
CHILD = """
import os, pathlib, time
from rlhf_pipeline.core.command import die_with_launcher
die_with_launcher()
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(60)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_stage_that_is_refused_or_fails_is_named(capfd: Any) -> None:
    run_stage(python("print('hello')"), name="one")
    printed = capfd.readouterr().out
    assert printed.startswith("\n$ ") and printed.endswith("hello\n")
    with pytest.raises(BadUse, match="two was refused"):
        run_stage(python("raise SystemExit(2)"), name="two")
    with pytest.raises(WorkFailed, match="three ended with exit code 7"):
        run_stage(python("raise SystemExit(7)"), name="three")


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_stage_ends_with_the_command_that_runs_it(
    ending: signal.Signals, command_environment: dict[str, str], tmp_path: Path
) -> None:
    parent = subprocess.Popen(
        [*python(PARENT), CHILD], cwd=tmp_path, env=command_environment, stdout=subprocess.DEVNULL
    )
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    child = int((tmp_path / "pid").read_text())
    assert is_alive(child)
    parent.send_signal(ending)
    assert parent.wait(20) == (143 if ending == signal.SIGTERM else -signal.SIGKILL)
    wait_until(lambda: not is_alive(child))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
