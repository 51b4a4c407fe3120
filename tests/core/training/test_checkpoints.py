"""Checkpoint folders: which is the newest whole one, which go, and for which launch one is."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import write_json
from rlhf_pipeline.core.training import checkpoints
from rlhf_pipeline.core.training.distributed import make_accelerator

LAUNCH = {"name": "deepspeed", "zero_stage": 3, "world_size": 8, "mixed_precision": "bf16", "device": "any"}


def write(folder: Path, update: int, *, whole: bool = True) -> Path:
    """A checkpoint folder; without its state it is one that a killed save left."""
    path = folder / f"update-{update}"
    path.mkdir(parents=True)
    if whole:
        write_json(path / checkpoints.STATE, {"update": update, "launch": LAUNCH})
    return path


def test_the_newest_whole_checkpoint_counts_by_number(tmp_path):
    assert checkpoints.latest(tmp_path) is None and checkpoints.updates_done(tmp_path) == 0
    for update in (900, 1000):
        write(tmp_path, update)
    write(tmp_path, 1100, whole=False)
    (tmp_path / ".update-1200.tmp").mkdir()
    assert checkpoints.updates_done(tmp_path) == 1000


def test_old_checkpoints_go(tmp_path):
    for update in (2, 10, 9):
        write(tmp_path, update)
    checkpoints.remove_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update-10", "update-9"]


def test_what_killed_saves_left_is_gone_before_a_new_one_is_written(tmp_path, monkeypatch):
    """There may be no room for both."""
    accelerator = make_accelerator(max_grad_norm=None)
    (tmp_path / ".update-11.tmp").mkdir()
    there: list[str] = []

    def save_state(folder, **_):
        there.extend(path.name for path in tmp_path.iterdir())
        Path(folder).mkdir()

    monkeypatch.setattr(accelerator, "save_state", save_state)
    checkpoints.save(accelerator, tmp_path, 12, keep=1)
    assert there == []
    assert [path.name for path in tmp_path.iterdir()] == ["update-12"]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"world_size": 4}, r"saved with world size 8, this launch has 4: start it as before, or pass --overwrite"),
        ({"zero_stage": 2}, r"saved with zero stage 3, this launch has 2"),
        ({"name": "one process"}, r"saved with name deepspeed, this launch has one process"),
        ({"mixed_precision": "no"}, r"saved with mixed precision bf16, this launch has no"),
    ],
)
def test_a_checkpoint_of_another_launch_is_refused_naming_both(tmp_path, changed, sentence):
    with pytest.raises(BadUse, match=sentence):
        checkpoints.check_launch(write(tmp_path, 1), {**LAUNCH, **changed})


def test_another_graphics_card_is_no_other_launch(tmp_path):
    checkpoints.check_launch(write(tmp_path, 1), {**LAUNCH, "device": "another"})
