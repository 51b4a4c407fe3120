"""The files of a dataset folder, while it is written and when it is whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.core.command import BadUse

PROVENANCE = "provenance.json"
CARD = "README.md"
IDENTITY = "identity.json"
"""In a folder under way: what decides its rows, by which a restart knows it."""
SETTLED = "settled.json"
"""In a folder under way: what its first process settled for all, such as how many shards a split has."""
JOURNAL = "journal"
"""Folder of what a run under way keeps beside its shards; gone when the output appears."""
UNDER_WAY = "under_way"
"""Folder of a Hub repo that several jobs fill: a file of each job that has pushed its shards."""
SHARD = re.compile(r"(?P<split>.+?)-(?P<index>\d{5})(-of-(?P<count>\d{5}))?\.parquet")


def partial_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def shard_name(split: str, index: int, count: int) -> str:
    return f"{split}-{index:05d}-of-{count:05d}.parquet"


def shard_files(folder: Path, flag: str) -> dict[str, list[Path]]:
    """{split: its parquet files in order} of a dataset folder. Raises BadUse naming the shards that are missing."""
    found: dict[str, dict[int, Path]] = {}
    counts: dict[str, set[int]] = {}
    for path in sorted((folder / "data").glob("*.parquet")):
        if match := SHARD.fullmatch(path.name):
            found.setdefault(match["split"], {})[int(match["index"])] = path
            counts.setdefault(match["split"], set()).update([int(match["count"])] if match["count"] else [])
    for split, named in counts.items():
        if len(named) > 1:
            raise BadUse(
                f"{flag} {folder} mixes two outputs: split {split} has files of {min(named)} shards and of "
                f"{max(named)}; remove those of one."
            )
        missing = {split: [index for count in named for index in range(count) if index not in found[split]]}
        if any(missing.values()):
            raise BadUse(
                f"{flag} {folder} is not whole: {say_missing(missing, {split: max(named)})}; "
                "run the commands that write them."
            )
    return {split: [found[split][index] for index in sorted(found[split])] for split in found}


def say_missing(missing: Mapping[str, Sequence[int]], counts: Mapping[str, int], num_jobs: int = 1) -> str:
    """What a reader or a job is told of an incomplete set, with the jobs of `--num_shards` whose work it is."""
    parts = [
        f"split {split} lacks shards {', '.join(map(str, indices[:8]))}{' ...' if len(indices) > 8 else ''} "
        f"of {counts[split]}"
        for split, indices in missing.items()
        if indices
    ]
    if num_jobs > 1:
        jobs = sorted({index % num_jobs for indices in missing.values() for index in indices})
        parts.append(f"they are those of --shard_index {', '.join(map(str, jobs))} with --num_shards {num_jobs}")
    return "; ".join(parts)


def lacking(counts: Mapping[str, int], present: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    """{split: indices of the shards that are not `present`}, splits that are whole left out."""
    there = set(present)
    found = {split: [index for index in range(count) if (split, index) not in there] for split, count in counts.items()}
    return {split: indices for split, indices in found.items() if indices}


def lost_shards(folder: Path, provenance: Mapping[str, Any]) -> str:
    """What is to be said of a finished output that has not all its shards any more; "" if it has them."""
    counts = provenance.get("shards", {})
    missing = lacking(counts, shards_among(path.name for path in (folder / "data").glob("*.parquet")))
    return f"is not whole any more, {say_missing(missing, counts)}" if missing else ""


def shards_among(names: Iterable[str]) -> list[tuple[str, int]]:
    """(split, index) of those file names, folders left out, that are shards."""
    matches = (SHARD.fullmatch(name) for name in names)
    return [(match["split"], int(match["index"])) for match in matches if match]


def counts_of(settled: Mapping[str, Any]) -> dict[str, int]:
    """{split: how many shards it will have} of what was settled."""
    prefix = "shards of "
    return {name.removeprefix(prefix): count for name, count in settled.items() if name.startswith(prefix)}
