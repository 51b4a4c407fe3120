"""An output appears whole or not at all, and a run that was killed goes on with the shards it has.

Several jobs may write one output, each its own shards; none waits for another, and whoever finds the set complete
publishes it. The order in which a finished set becomes an output: names with the shards' count, card, provenance (from
here on the set is finished, and a restart only goes on from here), removal of what a restart would need, rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.files import (
    LOCK_WAIT,
    TEMPORARY,
    atomic,
    discard,
    locked,
    notes_of_holders,
    read_json,
    remove,
    replace_folder,
    replaced,
    sync_folder,
    write_atomic,
    write_json,
)
from rlhf_pipeline.core.storage.identity import changes, check_same_run
from rlhf_pipeline.core.storage.layout import (
    CARD,
    IDENTITY,
    JOURNAL,
    PROVENANCE,
    SETTLED,
    SHARD,
    counts_of,
    lacking,
    lost_shards,
    partial_folder,
    shard_name,
    shards_among,
)
from rlhf_pipeline.core.storage.remote import Remote
from rlhf_pipeline.core.storage.shares import WHOLE, Share

if TYPE_CHECKING:
    import pyarrow as pa

NOTES = f"{JOURNAL}/notes"


class Output:
    """A dataset being written into `folder`, from `open_output`. `done`: the same run is already there, whole.

    share: this job's part of it. remote: what the Hub repo held that it is for, when this job began.
    """

    def __init__(
        self,
        final: Path,
        identity: dict[str, Any],
        *,
        done: bool,
        share: Share = WHOLE,
        remote: Remote | None = None,
    ):
        self.final = final
        self.identity = identity
        self.done = done
        self.share = share
        self.remote = remote
        self.folder = partial_folder(final)

    def has_shard(self, split: str, index: int) -> bool:
        """Whether it need not be made: it is here, or another job has pushed it."""
        if any((self.folder / "data").glob(f"{split}-{index:05d}*.parquet")):
            return True
        return self.remote is not None and (split, index) in self.remote.shards

    def write_shard(self, split: str, index: int, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        self._check_under_way()
        with atomic(self.folder / "data" / f"{split}-{index:05d}.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def _check_under_way(self) -> None:
        """Raise WorkFailed if another process has published the output: what is written now would be a new one."""
        if not (self.folder / IDENTITY).exists():
            raise WorkFailed(f"another process has finished {self.final} meanwhile: run the same command again.")

    def settle(self, name: str, value: Any) -> Any:
        """`value`, or what another process of this run, or an earlier one, settled for all under that name."""
        with _short_lock(self.final):
            self._check_under_way()
            settled = self.settled()
            if name not in settled:
                write_json(self.folder / SETTLED, {**settled, name: value})
            return settled.get(name, value)

    def settled(self) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.folder / SETTLED) or {}
        return found

    def expect(self, split: str, count: int) -> None:
        """Say how many shards a split will have. Raises BadUse where another job says otherwise."""
        settled = self.settle(f"shards of {split}", count)
        if settled != count:
            raise BadUse(
                f"{self.final} was begun with {settled} shards in split {split}, not {count}: give all its jobs the "
                "same --rows_per_shard and --num_shards, or pass --overwrite with other settings."
            )

    def counts(self) -> dict[str, int]:
        """{split: how many shards it will have}, as far as `expect` was told."""
        return counts_of(self.settled())

    def missing(self) -> dict[str, list[int]]:
        """{split: the shards that are not here yet}; splits that are whole are left out."""
        return lacking(self.counts(), shards_among(path.name for path in (self.folder / "data").glob("*.parquet")))

    def note(self, value: Any) -> None:
        """Keep something that the provenance of the whole will tell, such as the engine that this job uses."""
        path = self.folder / NOTES / f"{self.share}.json"
        notes = read_json(path) or []
        if value not in notes:
            write_json(path, [*notes, value])

    def notes(self) -> list[Any]:
        """What all jobs have noted, each once, in the jobs' order."""
        notes = [note for path in sorted((self.folder / NOTES).glob("*.json")) for note in read_json(path)]
        return [note for position, note in enumerate(notes) if note not in notes[:position]]

    def publish(self, provenance: dict[str, Any], card: str) -> Path:
        """Name the shards for their count, write card and provenance, and let the whole appear under its name.

        Of several workers that find the set of shards complete, the first publishes.
        """
        with _short_lock(self.final):
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
            path.rename(data / shard_name(match["split"], int(match["index"]), counts[match["split"]]))
        if shards:
            sync_folder(data)
        write_atomic(self.folder / CARD, card)
        write_json(self.folder / PROVENANCE, {"identity": self.identity, "shards": counts, **provenance})
        appear(self.folder, self.final)


def appear(partial: Path, final: Path) -> None:
    """Let a finished set appear under its name; may be repeated after a kill at any step."""
    for name in (JOURNAL, IDENTITY, SETTLED):
        remove(partial / name)
    for left in partial.rglob(TEMPORARY):
        left.unlink(missing_ok=True)
    replace_folder(partial, final)


@contextlib.contextmanager
def open_output(
    folder: Path,
    identity: dict[str, Any],
    *,
    overwrite: bool,
    share: Share = WHOLE,
    worker: int = 0,
    remote: Remote | None = None,
    wait: float = LOCK_WAIT,
) -> Iterator[Output]:
    """Hold the lock on this process's part of the output `folder`, and find what is there of this run.

    identity: JSON values, what decides the rows (what fields and fingerprints, never times). Nothing there: start.
    A part of the same run: go on. All of it: `done`. Another run's: BadUse naming what differs, unless `overwrite`.
    share, worker: this job's part, and this process's rank where several write it. They never wait for each other,
    but for a moment to settle what is there. Waits up to `wait` seconds, then refuses, for a process that has the same
    part, or that writes this output cut in another way.
    """
    existing_state(folder, identity, overwrite=overwrite)
    lock = folder.with_name(f"{_lock_name(folder)}{'' if share.count == 1 else f'.{share}'}.{worker}")
    about = f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]} {share.count}"
    with locked(lock, wait=wait, note=about):
        _wait_for_others(folder, about, wait)
        with _short_lock(folder):
            done = _settle(folder, identity, overwrite, share, remote)
        yield Output(folder, identity, done=done, share=share, remote=remote)


def existing_state(folder: Path, identity: dict[str, Any], *, overwrite: bool) -> str:
    """ "done", "partial" or "absent" for `--check`. Raises BadUse as `open_output` does."""
    partial = partial_folder(folder)
    if folder.is_dir() and any(folder.iterdir()):
        provenance = read_json(folder / PROVENANCE)
        if provenance is None:
            raise BadUse(f"{folder} exists and is not an output of rlhf_pipeline: name another output folder.")
        lost = lost_shards(folder, provenance)
        if not (overwrite and (lost or changes(provenance["identity"], identity))):
            check_same_run(folder, provenance["identity"], identity)
            if lost:
                raise BadUse(f"{folder} {lost}: pass --overwrite to make it anew.")
            return "done"
    recorded = _recorded(partial)
    if recorded is None or (overwrite and changes(recorded, identity)):
        return "absent"
    check_same_run(partial, recorded, identity)
    return "partial"


def _recorded(partial: Path) -> Any:
    """The identity of what is under way in `partial`; a finished set has it in its provenance."""
    finished = read_json(partial / PROVENANCE)
    return finished["identity"] if finished else read_json(partial / IDENTITY)


def _settle(folder: Path, identity: dict[str, Any], overwrite: bool, share: Share, remote: Remote | None) -> bool:
    """Make ready to write; True if there is nothing to write."""
    state, partial = existing_state(folder, identity, overwrite=overwrite), partial_folder(folder)
    if state == "done":
        remove(replaced(folder))
        return True
    if remote is not None and remote.state == "done":
        discard(folder)  # another run's or not whole: a push would put it in the place of what the repo has
        return True
    if state == "partial" and (partial / PROVENANCE).exists():
        appear(partial, folder)
        return True
    if state == "absent":
        remove(partial)
        partial.mkdir(parents=True)
        write_json(partial / IDENTITY, identity)
    here, there = read_json(partial / SETTLED) or {}, remote.settled if remote is not None else {}
    for name in sorted(here.keys() & there.keys() - {"num_shards"}):
        if here[name] != there[name]:
            raise BadUse(
                f"{partial} was begun with {name} {here[name]}, and on the Hub the same output with {there[name]}: "
                f"remove {partial} to go on with what the Hub has."
            )
    write_json(partial / SETTLED, {**there, **here, "num_shards": share.count})
    return False


def _lock_name(folder: Path) -> str:
    return f".{folder.name}.lock"


def _short_lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Held for moments only, by one process at a time of all that write this output."""
    return locked(folder.with_name(f".{folder.name}.settle"))


def _wait_for_others(folder: Path, about: str, wait: float) -> None:
    """Raise BadUse if after `wait` seconds a process still writes this output for another run or in another cut."""
    deadline = time.monotonic() + wait
    prefix = f"{_lock_name(folder)}."
    while True:
        locks = [path for path in folder.parent.iterdir() if path.name.startswith(prefix)]
        others = [holder for holder, note in notes_of_holders(locks).values() if note != about]
        if not others:
            return
        if time.monotonic() > deadline:
            raise BadUse(
                f"{folder} is held by process {others[0]}, which writes it with other settings or another "
                "--num_shards. Wait for it, or end it, then run the same command again."
            )
        time.sleep(0.2)
