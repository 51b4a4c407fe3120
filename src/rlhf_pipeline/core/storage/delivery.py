"""Bringing an output to where it belongs: under its name in a local folder, and from there to the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf_pipeline.core import hub
from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.files import atomic, locked, read_json, write_json
from rlhf_pipeline.core.progress import is_main, say
from rlhf_pipeline.core.storage import remote
from rlhf_pipeline.core.storage.layout import (
    JOURNAL,
    PROVENANCE,
    UNDER_WAY,
    counts_of,
    lacking,
    lost_shards,
    partial_folder,
    say_missing,
    shard_files,
    shard_name,
)
from rlhf_pipeline.core.storage.references import Ref, parse_ref
from rlhf_pipeline.core.storage.remote import Remote
from rlhf_pipeline.core.storage.writing import NOTES, Output

REPORT_WAIT = 600.0
"""Seconds that a process waits for another that is publishing the finished set."""
REPLACED = ("data/*", f"{UNDER_WAY}/*", "*.jsonl")
"""Of what a repo held before, what a push removes if the output does not have it."""


def prepare_delivery(
    output: Ref, identity: Mapping[str, Any], *, public: bool, overwrite: bool, flag: str
) -> Remote | None:
    """Before any work: for an output on the Hub, create the repo, which proves that we may write to it, and look.

    Raises BadUse if the repo holds another run's output, unless `overwrite`. None for a local output.
    """
    if output.repo_id is None:
        return None
    hub.create_repo(output.repo_id, "dataset", private=not public, flag=flag)
    return remote.look(output.repo_id, identity, overwrite=overwrite, flag=flag)


def check_delivery(output: Ref, *, flag: str = "--output_repo") -> None:
    """For --check, which creates no repo: raises BadUse if our token may not write to the owner of a Hub output."""
    if output.repo_id is not None:
        hub.check_write(output.repo_id, flag=flag)


def finish(
    output: Output,
    ref: Ref,
    describe: Callable[[dict[str, list[Path]]], tuple[dict[str, Any], str]],
    *,
    overwrite: bool,
    flag: str = "--output_repo",
) -> str | None:
    """Publish the output if its set of shards is whole, and deliver it. Returns where it is, else None.

    None: other jobs' shards lack, or another process has published it. describe: {split: files} of the whole set ->
    (provenance, card). Needs `Output.expect` for each split.
    """
    whole = None
    if ref.repo_id is not None and (output.share.count > 1 or (output.remote and output.remote.state == "partial")):
        if lacks_own(output):
            return None
        whole = remote.in_turn(ref.repo_id, lambda: _push_share(output, str(ref.repo_id), overwrite, flag), flag=flag)
        if whole is None:
            return None
    with locked(output.final.with_name(f".{output.final.name}.finish"), wait=REPORT_WAIT):
        if not output.folder.exists():
            return None
        if whole is not None:
            _fetch(output, whole, flag)
        if missing := output.missing():
            if output.share.count > 1:
                say(f"not whole  {say_missing(missing, output.counts(), output.share.count)}")
            return None
        output.publish(*describe(shard_files(output.folder, flag)))
        return deliver(ref, flag=flag)


def lacks_own(output: Output) -> bool:
    """Whether a shard of this job is still to be made, by another of its processes."""
    indices = ((split, i) for split, count in output.counts().items() for i in output.share.of(range(count)))
    return not all(output.has_shard(split, index) for split, index in indices)


def _push_share(output: Output, repo_id: str, overwrite: bool, flag: str) -> Remote | None:
    """Commit this job's shards that the repo lacks; what it holds then if all shards are there, else None.

    Raises hub.Overtaken if another job's commit came between.
    """
    now = remote.look(repo_id, output.identity, overwrite=overwrite, flag=flag)
    if now.state == "done":
        return None
    counts = output.counts()
    if now.settled and counts_of(now.settled) != counts:
        raise BadUse(
            f"{flag} {repo_id} was begun with {json.dumps(counts_of(now.settled))} shards, not "
            f"{json.dumps(counts)}: give all its jobs the same --rows_per_shard and --num_shards."
        )
    add: dict[str, Path | bytes] = {
        f"data/{shard_name(split, index, count)}": path
        for split, count in counts.items()
        for index in output.share.of(range(count))
        if (split, index) not in now.shards
        for path in (output.folder / "data").glob(f"{split}-{index:05d}*.parquet")
    }
    piece = f"{UNDER_WAY}/{output.share}.json"
    notes = read_json(output.folder / NOTES / f"{output.share}.json") or now.notes.get(str(output.share), [])
    if add or piece not in now.names or now.notes[str(output.share)] != notes:
        state = {"identity": output.identity, "settled": output.settled(), "notes": notes}
        add[piece] = json.dumps(state, indent=2).encode()
        commit = hub.commit_files(repo_id, "dataset", add=add, delete=now.stale, parent=now.commit, flag=flag)
    else:
        commit = now.commit
    pushed = Remote(repo_id, commit, "partial", now.names | set(add), notes={**now.notes, str(output.share): notes})
    missing = lacking(counts, pushed.shards)
    print(f"pushed     {len(add)} files to hf://datasets/{repo_id}@{commit}", flush=True)  # whatever our rank
    if missing:
        print(f"not whole  {say_missing(missing, counts, output.share.count)}", flush=True)
    return None if missing else pushed


def _fetch(output: Output, whole: Remote, flag: str) -> None:
    """Bring here what other jobs made: their shards and their notes."""
    missing = output.missing()
    names = {
        f"data/{shard_name(split, index, output.counts()[split])}": f"{split}-{index:05d}.parquet"
        for split, indices in missing.items()
        for index in indices
    }
    for name, notes in whole.notes.items():
        if notes:
            write_json(output.folder / NOTES / f"{name}.json", notes)
    if not names:
        return
    into = output.folder / JOURNAL / "fetched"
    hub.download(whole.repo_id, "dataset", whole.commit, patterns=sorted(names), flag=flag, into=into)
    for name, here in names.items():
        with atomic(output.folder / "data" / here) as temporary:
            shutil.move(into / name, temporary)


def deliver(output: Ref, *, flag: str = "--output_repo") -> str:
    """Push a published output to the Hub if that is where it belongs; says where it is."""
    if output.repo_id is None:
        return str(output.folder)
    if not output.folder.exists():  # another machine made it, and it is there
        commit, _ = hub.look_up(output.repo_id, "dataset", None, flag=flag)
    else:
        repo_id, folder = output.repo_id, output.folder
        try:
            commit = remote.in_turn(
                repo_id, lambda: hub.push(folder, repo_id, "dataset", replace=REPLACED, flag=flag), flag=flag
            )
        except (BadUse, WorkFailed) as error:
            raise type(error)(f"{error} The output is whole in {folder}; --push_only pushes it.") from error
    return f"hf://datasets/{output.repo_id}@{commit}"


def push_only(
    text: str | None, *, public: bool, overwrite: bool, check: bool = False, flag: str = "--output_repo"
) -> Path:
    """Push the output that `text` names and that is whole in its local folder; compute nothing. Returns the folder.

    check: only say what would be pushed. Raises BadUse for a local output, for one that is not whole, and if the repo
    holds another run's.
    """
    output = parse_ref(text, flag=flag, output=True) if text is not None else None
    if output is None or output.repo_id is None:
        raise BadUse(f"--push_only pushes to the Hub, and {flag} is {text}: name it as OWNER/NAME.")
    provenance = read_json(output.folder / PROVENANCE)
    if provenance is None:
        begun = ", only a part of one" if partial_folder(output.folder).is_dir() else ""
        raise BadUse(
            f"--push_only finds no whole output in {output.folder}{begun}: run the command without --push_only."
        )
    shard_files(output.folder, flag)
    if lost := lost_shards(output.folder, provenance):
        raise BadUse(f"{output.folder} {lost}: run the command with --overwrite to make it anew.")
    if check:
        check_delivery(output, flag=flag)
        say(f"output     {output}: whole in {output.folder}, to be pushed")
        return output.folder
    if not is_main():
        return output.folder
    prepare_delivery(output, provenance["identity"], public=public, overwrite=overwrite, flag=flag)
    say(f"pushed: {deliver(output, flag=flag)}")
    return output.folder
