"""An output appears whole or not at all, and a run that was killed goes on with the shards it has."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import LOCK_WAIT, atomic, locked, read_json, remove, sync_folder, write_atomic, write_json
from rlhf_pipeline.core.storage.identity import check_same_run, differences
from rlhf_pipeline.core.storage.layout import CARD, IDENTITY, PROVENANCE, SHARD, partial_folder

if TYPE_CHECKING:
    import pyarrow as pa


class Output:
    """A dataset being written into `folder`, from `open_output`. `done`: the same run is already there, whole."""

    def __init__(self, final: Path, identity: dict[str, Any], *, done: bool):
        self.final = final
        self.identity = identity
        self.done = done
        self.folder = partial_folder(final)

    def has_shard(self, split: str, index: int) -> bool:
        return any((self.folder / "data").glob(f"{split}-{index:05d}*.parquet"))

    def write_shard(self, split: str, index: int, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        with atomic(self.folder / "data" / f"{split}-{index:05d}.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def publish(self, provenance: dict[str, Any], card: str) -> Path:
        """Name the shards for their count, write card and provenance, and let the whole appear under its name.

        Of several workers that find the set of shards complete, the first publishes.
        """
        with locked(self.final.with_name(f".{self.final.name}.publish")):
            if self.folder.exists():
                self._publish(provenance, card)
        return self.final

    def _publish(self, provenance: dict[str, Any], card: str) -> None:
        data = self.folder / "data"
        shards = [(path, match) for path in data.glob("*.parquet") if (match := SHARD.fullmatch(path.name))]
        counts: dict[str, int] = {}
        for _, match in shards:
            counts[match["split"]] = counts.get(match["split"], 0) + 1
        for path, match in shards:
            path.rename(data / f"{match['split']}-{match['index']}-of-{counts[match['split']]:05d}.parquet")
        write_atomic(self.folder / CARD, card)
        write_json(self.folder / PROVENANCE, {"identity": self.identity, **provenance})
        remove(self.folder / "journal")
        _replace_folder(self.folder, self.final)
        remove(self.final / IDENTITY)


@contextlib.contextmanager
def open_output(
    folder: Path, identity: dict[str, Any], *, overwrite: bool, worker: int = 0, wait: float = LOCK_WAIT
) -> Iterator[Output]:
    """Hold the lock on the output `folder`, and find what is there of the run that `identity` describes.

    identity: JSON values, what decides the rows (what fields and fingerprints, never times). Nothing there: start.
    A part of the same run: go on. All of it: `done`. Another run's: BadUse naming what differs, unless `overwrite`.
    `worker`: this process's rank when several write shards of one output; all but 0 wait for worker 0 to decide.
    """
    lock = folder.with_name(f".{folder.name}.lock" + (f"{worker}" if worker else ""))
    with locked(lock, wait=wait):
        if worker:
            _wait_for_start(folder, identity, wait)
        done = _settle(folder, identity, overwrite)
        yield Output(folder, identity, done=done)


def existing_state(folder: Path, identity: dict[str, Any], *, overwrite: bool) -> str:
    """ "done", "partial" or "absent" for `--check`. Raises BadUse as `open_output` does."""
    partial = partial_folder(folder)
    if folder.is_dir() and any(folder.iterdir()):
        provenance = read_json(folder / PROVENANCE)
        if provenance is None:
            raise BadUse(f"{folder} exists and is not an output of rlhf_pipeline: name another output folder.")
        if not (overwrite and differences(provenance["identity"], json.loads(json.dumps(identity)))):
            check_same_run(folder, provenance["identity"], identity)
            return "done"
    recorded = read_json(partial / IDENTITY)
    if recorded is None or (overwrite and differences(recorded, json.loads(json.dumps(identity)))):
        return "absent"
    check_same_run(partial, recorded, identity)
    return "partial"


def _settle(folder: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    state = existing_state(folder, identity, overwrite=overwrite)
    if state == "absent":
        partial = partial_folder(folder)
        remove(partial)
        partial.mkdir(parents=True)
        write_json(partial / IDENTITY, identity)
    return state == "done"


def _wait_for_start(folder: Path, identity: dict[str, Any], wait: float) -> None:
    deadline = time.monotonic() + wait
    while existing_state(folder, identity, overwrite=True) == "absent":
        if time.monotonic() > deadline:
            raise BadUse(f"worker 0 has not started on {folder} within {wait:.0f} s: see its messages.")
        time.sleep(0.2)


def _replace_folder(new: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.replaced")
    remove(old)
    if final.exists():
        final.rename(old)
    sync_folder(new)
    new.rename(final)
    sync_folder(final.parent)
    remove(old)
