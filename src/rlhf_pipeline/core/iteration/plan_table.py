"""A run's plan as a person reads it: a table of its stages, and commands that can be pasted."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_pipeline.core import storage
from rlhf_pipeline.core.files import read_json
from rlhf_pipeline.core.iteration import estimates
from rlhf_pipeline.core.iteration.stages import Stage
from rlhf_pipeline.core.iteration.survey import Look, folder_of
from rlhf_pipeline.core.preflight import existing_parent
from rlhf_pipeline.core.progress import amount, duration

HEAD = ("stage", "reads", "writes", "rows", "tokens", "disk", "time", "state")
NUMBERS = ("rows", "tokens", "disk", "time")
MOST_REFS = 2
WEIGHTS_INDEX = "model.safetensors.index.json"


def lines(looks: Sequence[Look], folder: str, model: str, seconds: Mapping[str, float]) -> list[str]:
    """The table. seconds: {stage: its time so far}; what has not run is told by the last of its kind that has."""
    weights = weights_size(model)
    rows = [row(look, folder, weights, expected_seconds(look, looks, seconds)) for look in looks]
    return aligned([HEAD, *rows])


def row(look: Look, folder: str, weights: int | None, time: tuple[float, bool] | None) -> tuple[str, ...]:
    stage = look.stage
    tokens = estimates.tokens_written(stage, look.rows) if look.rows is not None and not look.finished else None
    size = size_of(look, weights)
    return (
        stage.name,
        reads([short(ref, folder) for ref in dict.fromkeys(stage.inputs)]),
        short(stage.output, folder),
        "" if not look.rows else f"{look.rows:,}",
        "" if tokens is None else f"<= {amount(tokens)}",
        "" if size is None else ("" if look.finished else "<= ") + f"{amount(size, 'B')}",
        "" if time is None else ("~ " if time[1] else "") + duration(time[0]),
        look.state + (", eta of iteration 1" if stage.eta_from else ""),
    )


def reads(refs: Sequence[str]) -> str:
    more = len(refs) - MOST_REFS
    return ", ".join([*refs[:MOST_REFS], *([f"{more} more"] if more > 0 else [])]) or "-"


def short(ref: str, folder: str) -> str:
    """A reference without the run's folder."""
    return ref.removeprefix(f"{folder}/")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns two spaces apart, those of NUMBERS to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    adjust = [str.rjust if name in NUMBERS else str.ljust for name in HEAD]
    return [
        "  ".join(to(cell, width) for to, cell, width in zip(adjust, row, widths, strict=True)).rstrip() for row in rows
    ]


def expected_seconds(look: Look, looks: Sequence[Look], seconds: Mapping[str, float]) -> tuple[float, bool] | None:
    """(seconds, whether they are a guess): measured, or those of the last stage of its kind that has finished."""
    stage = look.stage
    if look.finished:
        return (seconds[stage.name], False) if stage.name in seconds else None
    if stage.iteration is None:
        return None
    kin = [
        other.stage.name
        for other in looks
        if other.finished and other.stage.iteration and other.stage.command == stage.command
    ]
    measured = [seconds[name] for name in kin if name in seconds]
    return (measured[-1], True) if measured else None


# Sizes


def size_of(look: Look, weights: int | None) -> int | None:
    """Bytes: of what is there; at most so many of what is not; `weights` for a policy."""
    if look.finished:
        return folder_size(look.stage)
    if look.stage.command == "train":
        return weights
    return None if look.rows is None else estimates.bytes_written(look.stage, look.rows)


def folder_size(stage: Stage) -> int | None:
    folders = [folder_of(ref) for ref in stage.writes]
    return sum(path.stat().st_size for folder in folders for path in (folder, *folder.rglob("*")) if path.is_file())


def weights_size(model: str) -> int | None:
    """Bytes of a model's weights: those of a folder, or what the index of a Hub model says that is in the cache."""
    ref = storage.parse_ref(model, flag="--model")
    if ref.repo_id is None:
        return sum(path.stat().st_size for path in ref.folder.glob("*.safetensors")) or None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(ref.repo_id, WEIGHTS_INDEX, revision=ref.revision)
    return int(read_json(Path(path))["metadata"]["total_size"]) if isinstance(path, str) else None


def disk(looks: Sequence[Look], folder: str, model: str) -> str:
    """What is still to be written, at most, and what there is room for."""
    weights = weights_size(model)
    left = [look for look in looks if not look.finished]
    sizes = [size_of(look, weights) for look in left]
    free = shutil.disk_usage(existing_parent(Path(folder))).free
    unknown = weights is None and any(look.stage.command == "train" for look in left)
    total = sum(size for size in sizes if size is not None)
    more = " and the policies, whose size is not known yet" if unknown else ""
    return f"disk       at most {amount(total, 'B')} still to be written{more}; {amount(free, 'B')} free"


# Commands


def pasted(words: Sequence[str], width: int = 116) -> str:
    """A command as a shell takes it, folded at flags into lines of about `width`."""
    lines, line = [], ""
    for group in groups(words):
        if line and len(line) + len(group) + 1 > width:
            lines.append(line)
            line = "    " + group
        else:
            line = f"{line} {group}" if line else group
    return " \\\n".join([*lines, line])


def groups(words: Sequence[str]) -> list[str]:
    """The words of a command, a flag and its values in one."""
    found: list[list[str]] = []
    for word in words:
        if not found or word.startswith("--"):
            found.append([])
        found[-1].append(word)
    return [shlex.join(group) for group in found]
