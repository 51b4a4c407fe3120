"""What a run shows while it works: lines on the console, a bar with time left, metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

QUIET_INTERVAL = 30.0
"""Seconds between lines of progress where the console is no terminal."""


def is_main() -> bool:
    """True on the one process of a launch that speaks."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """Print a line, on rank 0 only."""
    if is_main():
        print(text, flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def amount(number: float, unit: str = "") -> str:
    """1234567 as 1.2 M, with a unit 1.2 MB."""
    for prefix in ("", "k", "M", "G"):
        if number < 1000:
            digits = 1 if prefix and number < 100 else 0
            return f"{number:.{digits}f} {prefix}{unit}".rstrip()
        number /= 1000
    return f"{number:,.1f} T{unit}"


@contextlib.contextmanager
def bar(total: int, unit: str, description: str, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields `advance(count)`. In a terminal a bar with time left; elsewhere a line every QUIET_INTERVAL seconds.

    total, done: in `unit`s, all of the work and what an earlier run of it has already finished.
    """
    if not is_main():
        yield lambda count: None
    elif sys.stdout.isatty():
        with _rich_bar(total, unit, description, done) as advance:
            yield advance
    else:
        yield _line_printer(total, unit, description, done)


@contextlib.contextmanager
def _rich_bar(total: int, unit: str, description: str, done: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(description, total=total, completed=done)
        yield lambda count: progress.advance(task, count)


def _line_printer(total: int, unit: str, description: str, done: int) -> Callable[[int], None]:
    started = last = time.monotonic()
    first, position = done, done

    def advance(count: int) -> None:
        nonlocal last, position
        position += count
        now = time.monotonic()
        if now - last >= QUIET_INTERVAL or position >= total > first:
            last = now
            rate = (position - first) / max(now - started, 1e-9)
            left = f", {duration((total - position) / rate)} left" if rate and position < total else ""
            say(f"{description}: {position:,} of {total:,} {unit} in {duration(now - started)}{left}")

    return advance


class Metrics:
    """metrics.jsonl: a line of numbers per update; TensorBoard and Weights & Biases as well, if asked. Rank 0 only.

    Opened anew by a run that resumes, it drops the lines of updates after `after`, which will be written again.
    """

    def __init__(self, path: Path, *, after: int = 0, tensorboard: bool = False, wandb: str | None = None):
        self.path = path
        self._trackers: list[Callable[[Mapping[str, float], int], None]] = []
        if not is_main():
            return
        kept = [line for line in read_metrics(path) if line["update"] <= after]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        if tensorboard:
            self._trackers.append(_tensorboard(path.parent / "tensorboard", after))
        if wandb:
            self._trackers.append(_wandb(wandb, path.parent))

    def write(self, numbers: Mapping[str, float]) -> None:
        """Append one update's numbers, among them "update"."""
        if not is_main():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(numbers)) + "\n")
        for track in self._trackers:
            track(numbers, int(numbers["update"]))


def _tensorboard(folder: Path, after: int) -> Callable[[Mapping[str, float], int], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=after + 1)

    def track(numbers: Mapping[str, float], update: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, update)
        writer.flush()

    return track


def _wandb(project: str, folder: Path) -> Callable[[Mapping[str, float], int], None]:
    import wandb

    run = wandb.init(
        project=project,
        dir=str(folder),
        name=folder.name,
        id=folder.resolve().as_posix().replace("/", "-"),
        resume="allow",
    )
    return lambda numbers, update: run.log(dict(numbers), step=update)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; an absent file and a torn last line give nothing."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
