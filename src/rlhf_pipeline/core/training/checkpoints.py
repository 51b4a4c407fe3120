"""Training state that is whole or absent: written beside, renamed, resumed from; SIGTERM asks for one more."""

from __future__ import annotations

import math
import re
import shutil
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.core.command import EXIT_TERMINATED, BadUse, WorkFailed
from rlhf_pipeline.core.files import read_json, sync_file, sync_folder, write_json
from rlhf_pipeline.core.progress import bar, say
from rlhf_pipeline.core.training.distributed import (
    any_rank,
    describe_launch,
    from_main,
    is_deepspeed,
    main_process_first,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE = "state.json"
"""Written last: a checkpoint folder that has it is whole."""
_NAME = re.compile(r"update-(\d+)")
LAUNCH_KEYS = ("name", "zero_stage", "world_size", "mixed_precision")
"""What of the launch a checkpoint is cut for."""


def latest(folder: Path) -> Path | None:
    """The whole checkpoint of the most updates in `folder`, or None."""
    whole = [path for path in folder.glob("update-*") if _NAME.fullmatch(path.name) and (path / STATE).exists()]
    return max(whole, key=lambda path: int(path.name.removeprefix("update-")), default=None)


def save(accelerator: Accelerator, folder: Path, update: int, *, keep: int) -> None:
    """Save model, optimizer and RNG state after `update` updates as folder/update-N; keep the newest `keep`.

    Collective. Killed at any moment it leaves the earlier checkpoints as they were.
    """
    final = folder / f"update-{update}"
    temporary = folder / f".update-{update}.tmp"
    main_process_first(accelerator, lambda: _clear_unfinished(folder))
    _save_state(accelerator, temporary)
    accelerator.wait_for_everyone()
    launch = {key: describe_launch(accelerator)[key] for key in LAUNCH_KEYS}
    main_process_first(accelerator, lambda: _commit(temporary, final, {"update": update, "launch": launch}, keep))


def _clear_unfinished(folder: Path) -> None:
    """Delete what killed saves left, of whatever update: there may not be room for it beside a new one."""
    for path in folder.glob(".update-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _save_state(accelerator: Accelerator, folder: Path) -> None:
    """accelerate's save_state without frozen weights: nothing changes them, so the starting model still has them."""
    hook = accelerator.register_save_state_pre_hook(_leave_out_frozen)
    try:
        leave_out = {"exclude_frozen_parameters": True} if is_deepspeed(accelerator) else {}
        accelerator.save_state(str(folder), safe_serialization=True, **leave_out)
    finally:
        hook.remove()


def _leave_out_frozen(prepared: list[Any], weights: list[dict[str, Any]], folder: str) -> None:
    for model, state_dict in zip(prepared, weights, strict=False):  # DeepSpeed writes its own, and leaves none here
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                state_dict.pop(name, None)


def _commit(temporary: Path, final: Path, state: dict[str, Any], keep: int) -> None:
    for path in temporary.rglob("*"):
        if path.is_file():
            sync_file(path)
    write_json(temporary / STATE, state)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_folder(final.parent)
    remove_old(final.parent, keep)


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    whole = sorted(folder.glob("update-*"), key=lambda path: int(path.name.removeprefix("update-")))
    for path in whole[: len(whole) - keep]:
        shutil.rmtree(path, ignore_errors=True)


def check_launch(checkpoint: Path, launch: dict[str, Any]) -> None:
    """Raise BadUse if `checkpoint` was cut for another launch than `launch` (from describe_launch)."""
    saved = read_json(checkpoint / STATE)["launch"]
    for key in LAUNCH_KEYS:
        if saved[key] != launch[key]:
            raise BadUse(
                f"{checkpoint} was saved with {key.replace('_', ' ')} {saved[key]}, this launch has {launch[key]}: "
                "start it as before, or pass --overwrite to begin again."
            )


def load(accelerator: Accelerator, checkpoint: Path) -> None:
    """Restore model, optimizer and RNG state (after prepare). Raises BadUse for another launch's checkpoint."""
    check_launch(checkpoint, describe_launch(accelerator))
    # frozen weights are not in it
    lenient = {"load_module_strict": False} if is_deepspeed(accelerator) else {"strict": False}
    accelerator.load_state(str(checkpoint), **lenient)


def updates_done(folder: Path) -> int:
    """Updates that the newest whole checkpoint in `folder` holds; 0 without one."""
    saved = latest(folder)
    return int(saved.name.removeprefix("update-")) if saved else 0


def updates(accelerator: Accelerator, folder: Path, total: int, *, save_every: int, keep: int) -> Iterator[int]:
    """Yield 0, 1, ..., total - 1, from where the newest checkpoint in `folder` stands, which it loads first.

    Collective. After the caller's body has run it saves every `save_every` updates (0: not), after the last, and when
    the process was asked to stop (SIGTERM), upon which it raises SystemExit with DESIGN's exit code.
    """
    stop = StopRequest()
    done = int(from_main(accelerator, updates_done(folder)))
    if done:
        load(accelerator, folder / f"update-{done}")
        say(f"resumed    after update {done}")
    with bar(total, "updates", "train", done=done) as advance:
        for update in range(done, total):
            yield update
            advance(1)
            finished = update + 1
            asked = any_rank(accelerator, stop.asked)
            if asked or finished == total or (save_every and finished % save_every == 0):
                save(accelerator, folder, finished, keep=keep)
            if asked and finished < total:
                say(f"terminated after update {finished}, saved: run the same command again to go on from here")
                raise SystemExit(EXIT_TERMINATED)


def check_finite(numbers: dict[str, float], folder: Path) -> None:
    """Raise WorkFailed if `numbers` (of one update) have a loss or gradient norm that is no number any more."""
    if math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"]):
        return
    raise WorkFailed(
        f"update {numbers['update']} has loss {numbers['loss']} and gradient norm {numbers['grad_norm']}; the last "
        f"good state is {latest(folder) or 'the starting model'}. Lower --lr or set --max_grad_norm 1, and begin again "
        "with --overwrite."
    )


class StopRequest:
    """Remembers a SIGTERM, so that the update under way can end and be saved. Install before the training loop."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, signum: int, frame: types.FrameType | None) -> None:
        self.asked = True
