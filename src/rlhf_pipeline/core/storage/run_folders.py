"""A folder that a command fills in place: a policy with its checkpoints and metrics."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import locked, read_json, remove, replace_folder, write_atomic, write_json
from rlhf_pipeline.core.storage.identity import changes, check_same_run
from rlhf_pipeline.core.storage.layout import CARD, IDENTITY, PROVENANCE


def run_state(folder: Path, identity: dict[str, Any], *, overwrite: bool) -> str:
    """ "done", "partial" or "absent": what `folder` holds of the run that `identity` describes.

    Raises BadUse naming what differs if it holds another run (unless `overwrite`) or something that is not ours.
    """
    finished, started = read_json(folder / PROVENANCE), read_json(folder / IDENTITY)
    recorded = finished["identity"] if finished else started
    if recorded is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise BadUse(f"{folder} exists and is not an output of rlhf_pipeline: name another output folder.")
        return "absent"
    if overwrite and changes(recorded, identity):
        return "absent"
    check_same_run(folder, recorded, identity)
    return "done" if finished else "partial"


def start_run(folder: Path, identity: dict[str, Any], *, overwrite: bool) -> None:
    """Make `folder` ready for the run: as it is if it holds a part of it, empty if it is new or to be overwritten."""
    if run_state(folder, identity, overwrite=overwrite) == "absent":
        begun = folder.with_name(f".{folder.name}.begun")
        remove(begun)
        begun.mkdir(parents=True)
        write_json(begun / IDENTITY, identity)
        replace_folder(begun, folder)


def finish_run(folder: Path, identity: dict[str, Any], provenance: dict[str, Any], card: str) -> None:
    """Mark `folder` as whole: its card, then its provenance."""
    write_atomic(folder / CARD, card)
    write_json(folder / PROVENANCE, {"identity": identity, **provenance})
    remove(folder / IDENTITY)


def run_lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    return locked(folder.with_name(f".{folder.name}.lock"))
