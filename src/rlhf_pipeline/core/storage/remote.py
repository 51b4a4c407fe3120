"""What a Hub repo holds of an output, and how several jobs that share no disk fill one repo.

Every job commits its shards, and beside them its file under_way/INDEX-of-COUNT.json. A commit names the one that it
builds on, and the Hub refuses it if another came between; the job then looks again. So a job whose commit is taken
knows what the repo holds, and exactly one of those that finish at once finds the set complete: it fetches what other
jobs made, and commits card and provenance, and the removal of under_way/, as one last commit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf_pipeline.core import hub
from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.files import read_json
from rlhf_pipeline.core.storage.identity import changes, check_same_run
from rlhf_pipeline.core.storage.layout import PROVENANCE, SHARD, UNDER_WAY, shards_among

T = TypeVar("T")
TRIES = 30
"""Commits that other jobs may come between before we give up."""
NOT_DATA = (".gitattributes", "README.md")


@dataclass(frozen=True)
class Remote:
    """A repo at `commit`. names: the files of this output that count; stale: those of another, to be removed.

    settled, notes: as in `Output`, of all jobs that have pushed.
    """

    repo_id: str
    commit: str
    state: Literal["absent", "partial", "done"]
    names: frozenset[str] = frozenset()
    stale: frozenset[str] = frozenset()
    settled: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shards(self) -> set[tuple[str, int]]:
        return set(shards_among(name.removeprefix("data/") for name in self.names))


def look(repo_id: str, identity: Mapping[str, Any], *, overwrite: bool, flag: str) -> Remote:
    """What the repo holds of the run that `identity` describes.

    Raises BadUse if it holds another run's output (unless `overwrite`), or something that is not ours.
    """
    commit, names = hub.look_up(repo_id, "dataset", None, flag=flag)
    pieces = sorted(name for name in names if name.startswith(f"{UNDER_WAY}/"))
    if PROVENANCE not in names and not pieces:
        if others := sorted(set(names) - set(NOT_DATA)):
            raise BadUse(
                f"{flag} {repo_id} is a repo that holds no output of rlhf_pipeline ({others[0]}, ...): name another."
            )
        return Remote(repo_id, commit, "absent")
    wanted = [PROVENANCE] if PROVENANCE in names else pieces
    folder = hub.download(repo_id, "dataset", commit, patterns=wanted, flag=flag)
    found = {name: read_json(folder / name) for name in wanted}
    recorded = next(iter(found.values()))["identity"]
    if overwrite and changes(recorded, identity):
        return Remote(repo_id, commit, "absent", stale=frozenset(names) - set(NOT_DATA))
    check_same_run(f"{flag} {repo_id}", recorded, identity)
    if PROVENANCE in names:
        return Remote(repo_id, commit, "done", frozenset(names))
    settled: dict[str, Any] = {}
    for piece in found.values():
        settled |= piece["settled"]
    notes = {Path(name).stem: piece["notes"] for name, piece in found.items()}
    return Remote(repo_id, commit, "partial", frozenset(names), settled=settled, notes=notes)


def num_jobs(names: frozenset[str] | list[str]) -> int:
    """The --num_shards of the jobs that have pushed."""
    counts = [int(Path(name).stem.rpartition("-")[2]) for name in names if name.startswith(f"{UNDER_WAY}/")]
    return max(counts, default=1)


def counts_among(names: frozenset[str] | list[str]) -> dict[str, int]:
    """{split: how many shards it is to have} by the shards' names."""
    matches = (SHARD.fullmatch(Path(name).name) for name in names if name.startswith("data/"))
    return {match["split"]: int(match["count"]) for match in matches if match and match["count"]}


def in_turn(repo_id: str, commit: Callable[[], T], *, flag: str) -> T:
    """What `commit` returns once no other commit came between what it looked at and what it commits."""
    for attempt in range(TRIES):
        try:
            return commit()
        except hub.Overtaken:
            time.sleep(random.uniform(0, min(2.0**attempt, 30.0)) / 10)
    raise WorkFailed(
        f"{flag} {repo_id}: other commits came between {TRIES} times; run the same command again, nothing is lost."
    )
