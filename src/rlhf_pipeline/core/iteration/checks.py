"""Every stage's own --check, one after another in one process of its interpreter, which loads the libraries once."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_pipeline.core.command import EXIT_BAD_USE, WorkFailed, die_with_parent

SERVER = "from rlhf_pipeline.core.iteration.checks import serve; serve()"
ERROR = "error: "


@dataclass(frozen=True)
class Checked:
    """How a --check ended: its exit code and all that it said."""

    code: int
    said: str

    @property
    def error(self) -> str:
        """Its error, the last that it said, or else all that it said: tyro's box about a flag."""
        _, error, sentence = f"\n{self.said}".rpartition(f"\n{ERROR}")
        return sentence.strip() if error else f"its flags are wrong:\n{sentence.strip()}"


class Checker:
    """A process of each interpreter that is asked, started with the first question. A context manager."""

    def __init__(self) -> None:
        self._servers: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers.values():
            server.kill()
            server.wait()

    def check(
        self,
        python: str,
        command: str,
        words: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        packages: Sequence[str] = (),
    ) -> Checked:
        """`python -m rlhf_pipeline.COMMAND WORDS`, WORDS holding --check, where `packages` must be installed.

        Raises WorkFailed if the check took its process with it.
        """
        server = self._servers.get(python) or self._start(python)
        question = {"command": command, "words": [*words], "environment": {**(environment or {})}}
        assert server.stdin is not None and server.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            server.stdin.write(json.dumps({**question, "packages": [*packages]}) + "\n")
            server.stdin.flush()
        answer = server.stdout.readline()
        if not answer:
            raise WorkFailed(f"{python} ended while it checked {command}: its message, if it had one, stands above.")
        return Checked(**json.loads(answer))

    def _start(self, python: str) -> subprocess.Popen[str]:
        self._servers[python] = subprocess.Popen(
            [python, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
            preexec_fn=die_with_parent,
        )
        return self._servers[python]


def serve() -> None:
    """Answer questions, a line of JSON each, from stdin to stdout, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints below Python must not come between the answers
    for line in sys.stdin:
        code, said = _answer(**json.loads(line))
        answers.write(json.dumps({"code": code, "said": said}) + "\n")
        answers.flush()


def _answer(
    command: str, words: Sequence[str], environment: Mapping[str, str], packages: Sequence[str]
) -> tuple[int, str]:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        return EXIT_BAD_USE, f"{ERROR}launching it needs {' and '.join(missing)}, not installed in {sys.executable}."
    said = io.StringIO()
    before = dict(os.environ)
    os.environ.update(environment)
    sys.argv = [command, *words]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module(f"rlhf_pipeline.{command}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return 0, said.getvalue()
