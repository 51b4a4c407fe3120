"""Stages as processes of their own: printed as they can be pasted, and ended with the process that started them."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence

from rlhf_pipeline.core.command import EXIT_BAD_USE, BadUse, WorkFailed
from rlhf_pipeline.core.progress import say

END_WAIT = 30.0
"""Seconds that a stage may take to end after SIGTERM."""


def run_stage(command: Sequence[str], *, name: str) -> None:
    """Print a stage's command, run it and wait for it; what it says goes to this console.

    `name` says in an error which stage it was. Raises BadUse or WorkFailed as the stage did. If this process is
    interrupted or terminated the stage is terminated too and waited for; if it is killed, so is the stage.
    """
    say(f"\n$ {shlex.join(command)}")
    process = subprocess.Popen(command, env={**os.environ, "RLHF_PIPELINE_PARENT": "1"})
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            _end(process)
    if code == EXIT_BAD_USE:
        raise BadUse(f"{name} was refused: its message stands above.")
    if code != 0:
        raise WorkFailed(f"{name} ended with exit code {code}: its message stands above.")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_WAIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
