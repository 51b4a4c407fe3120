"""How every command begins and ends: flags, exit codes, errors in one sentence.

A command's Config is a frozen dataclass. Each field says whether it decides the rows or the weights (`What`) or
only how they are computed (`How`: GPUs, memory, batching, trackers). A restart compares `what_fields` alone.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

WHAT = "what"
HOW = "how"
T = TypeVar("T")
What = Annotated[T, WHAT]
How = Annotated[T, HOW]

EXIT_WORK_FAILED = 1
EXIT_BAD_USE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class BadUse(Exception):
    """What the user asked for can't be done: one sentence with the value, what was expected and the flag. Exit 2."""


class WorkFailed(Exception):
    """The work itself failed; what was computed stays, and the same command goes on from there. Exit 1."""


@dataclass(frozen=True)
class RunFlags:
    check: How[bool] = False
    """Parse, resolve, look at machine and inputs, print the plan and exit; load no model."""
    pending: How[tuple[str, ...]] = ()
    """REF=ROWS: inputs or models that an earlier stage will write; with --check their absence is no error."""
    overwrite: How[bool] = False
    """Replace an existing output of another run."""
    debug: How[bool] = False
    """Show the traceback of an error."""

    def pending_rows(self) -> dict[str, int]:
        """`--pending` as {reference: rows}. Raises BadUse for anything not of the form REF=ROWS."""
        rows = {}
        for item in self.pending:
            ref, separator, count = item.rpartition("=")
            if not separator or not ref or not count.isdigit():
                raise BadUse(f"--pending {item} is not of the form REF=ROWS, for example ./runs/a/pairs=600.")
            rows[ref] = int(count)
        return rows


RUN = Annotated[RunFlags, tyro.conf.arg(name="")]
"""The type of a Config's `run` field: --check, --pending, --overwrite and --debug without a prefix."""


def parse(config_type: type[T], args: list[str] | None = None) -> T:
    """The Config that `args` (default: sys.argv) stand for; tyro's own errors exit with 2."""
    return tyro.cli(config_type, args=args, **_style(config_type))


def parse_known(config_type: type[T], args: list[str], *, default: T | None = None) -> tuple[T, list[str]]:
    """As `parse`, with the words that are none of the Config's flags returned beside it.

    default: a Config whose values hold where `args` say nothing.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(config_type, args=args, return_unknown_args=True, **given, **_style(config_type))


def _style(config_type: type) -> dict[str, Any]:
    module = sys.modules[config_type.__module__]
    return {
        "prog": f"python -m rlhf_pipeline.{Path(module.__file__ or '').stem}",
        "description": module.__doc__,
        "use_underscores": True,  # tyro's dashes would refuse the tutorial's --task.input_repo; dashes still parse
        "config": (tyro.conf.FlagCreatePairsOff,),
    }


def entry(main: Callable[[Any], object], config_type: Any) -> NoReturn:
    """Parse the flags, run `main`, and turn how it ended into DESIGN's exit codes.

    A Config with a class method `from_words` is made by it of the command line's words; it may raise BadUse.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    die_with_launcher()
    debug = "--debug" in sys.argv
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        from_words = getattr(config_type, "from_words", None)
        main(from_words(sys.argv[1:]) if from_words else parse(config_type))
    except BadUse as error:
        _finish(error, EXIT_BAD_USE, debug)
    except (WorkFailed, OSError) as error:
        _finish(error, EXIT_WORK_FAILED, debug)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on from here", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


def _finish(error: Exception, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


def _raise_terminated(signum: int, frame: types.FrameType | None) -> NoReturn:
    print("terminated: run the same command again to go on from here", file=sys.stderr)
    sys.exit(EXIT_TERMINATED)


def die_with_launcher() -> None:
    """End this process when the launcher or `iterate` that started it dies: an orphaned rank must not go on writing.

    A command typed into a shell has neither variable and outlives its shell as any program under nohup does.
    """
    if {"LOCAL_RANK", "RLHF_PIPELINE_PARENT"} & os.environ.keys():
        die_with_parent()


def die_with_parent() -> None:
    """Have the kernel end this process, and what it becomes by exec, when its parent dies. Linux only."""
    if sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    parent = os.getppid()
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # the launcher died before the signal was armed
        os.kill(os.getpid(), signal.SIGKILL)


def what_fields(config: Any) -> dict[str, Any]:
    """The fields that decide the rows or the weights, nested ones as "engine.dtype", as JSON values.

    Raises TypeError for a field marked neither What nor How.
    """
    return {name: value for name, role, value in fields_with_roles(config) if role == WHAT}


def fields_with_roles(config: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted name, WHAT or HOW, JSON value) of every leaf field of a Config instance."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_with_roles(value, name + ".")
            continue
        roles = {WHAT, HOW} & set(_annotations(hints[field.name]))
        if len(roles) != 1:
            raise TypeError(f"{type(config).__name__}.{field.name} must be marked What or How")
        yield name, roles.pop(), list(value) if isinstance(value, tuple) else value


def _annotations(hint: Any) -> list[Any]:
    return [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, str)]
