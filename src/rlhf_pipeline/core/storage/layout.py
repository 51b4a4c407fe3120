"""The files of a dataset folder, while it is written and when it is whole."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_pipeline.core.command import BadUse

PROVENANCE = "provenance.json"
CARD = "README.md"
IDENTITY = "identity.json"
"""In a folder under way: what decides its rows, by which a restart knows it."""
SHARD = re.compile(r"(?P<split>.+?)-(?P<index>\d{5})(-of-(?P<count>\d{5}))?\.parquet")


def partial_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def shard_files(folder: Path, flag: str) -> dict[str, list[Path]]:
    """{split: its parquet files in order} of a dataset folder. Raises BadUse naming the shards that are missing."""
    found: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for path in sorted((folder / "data").glob("*.parquet")):
        if match := SHARD.fullmatch(path.name):
            found.setdefault(match["split"], {})[int(match["index"])] = path
            counts[match["split"]] = int(match["count"] or 0)
    for split, count in counts.items():
        missing = [str(index) for index in range(count) if index not in found[split]]
        if missing:
            raise BadUse(
                f"{flag} {folder} is not whole: split {split} lacks shards {', '.join(missing)} of {count}; "
                "run the commands that write them."
            )
    return {split: [found[split][index] for index in sorted(found[split])] for split in found}
