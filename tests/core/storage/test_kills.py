"""A writer that is killed before anything it does leaves the old state or the new one, and a restart finishes it."""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import killed_writers
from conftest import run_process
from killed_writers import each_kill, in_process
from rlhf_pipeline.core import storage
from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.files import atomic

OLD, NEW = list(range(6)), list(range(100, 106))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder where syncing costs little: the tests below write thousands of files."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as folder:
        yield Path(folder)


def numbers(folder: Path) -> list[int] | None:
    """What a reader sees; None where it is told that there is nothing yet."""
    try:
        return [row["n"] for row in storage.open_source(str(folder / "out"), flag="--x").rows()]
    except BadUse as refusal:
        assert "does not exist" in str(refusal) or "is not whole" in str(refusal)
        return None


@pytest.mark.parametrize("writer", ["write_output", pytest.param("share_output", marks=pytest.mark.slow)])
def test_a_writer_killed_before_any_step_goes_on_to_the_same_output(writer, memory):
    work, seen = getattr(killed_writers, writer), []
    for step in each_kill(work, memory):
        here = memory / str(step)
        seen.append(numbers(here))
        assert in_process(work, here) == 0
        assert numbers(here) == OLD
        made = json.loads((here / "out" / "provenance.json").read_text())
        assert made["notes"] == [{"engine": "x"}] and made["identity"] == killed_writers.IDENTITY
        assert sorted(path.name for path in (here / "out").iterdir()) == ["README.md", "data", "provenance.json"]
        assert not any(".tmp" in path.name for path in (here / "out").rglob("*"))
        assert not (here / ".out.partial").exists()
    assert seen[0] is None and seen[-1] == OLD and len(seen) > 20
    assert all(rows in (None, OLD) for rows in seen)


@pytest.mark.slow
def test_an_overwriting_writer_killed_before_any_step_leaves_the_old_output_or_the_new(memory):
    seen = []
    for step in each_kill(killed_writers.overwrite_output, memory, prepare=killed_writers.write_output):
        here = memory / str(step)
        seen.append(numbers(here))
        assert in_process(killed_writers.overwrite_output, here) == 0
        assert numbers(here) == NEW
        assert not (here / ".out.replaced").exists() and not (here / ".out.partial").exists()
    assert seen[0] == OLD and seen[-1] == NEW
    assert all(rows in (None, OLD, NEW) for rows in seen)
    assert seen.count(None) <= 1  # between the two renames


def test_responses_killed_before_any_step_are_there_exactly_once(memory):
    for step in each_kill(killed_writers.write_responses, memory):
        here = memory / str(step)
        for journal in (here / ".out.partial" / "journal").glob("*.jsonl"):
            with journal.open("a") as file:
                file.write('{"key": 3, "token_i')  # what a kill in the middle of a write would leave
        assert in_process(killed_writers.write_responses, here) == 0
        rows = list(storage.open_source(str(here / "out"), flag="--x").rows())
        assert [row["prompt_id"] for row in rows] == [f"p{i}" for i in range(3)]
        assert [row[f"response_{i}"] for row in rows for i in range(2)] == [str(key) for key in range(6)]


def test_a_run_folder_killed_before_any_step_is_never_taken_for_whole(memory):
    for step in each_kill(killed_writers.fill_run_folder, memory):
        out = memory / str(step) / "out"
        state = storage.run_state(out, killed_writers.IDENTITY, overwrite=False)
        assert state != "done" or ((out / "weights").exists() and (out / "README.md").exists())
        assert in_process(killed_writers.fill_run_folder, memory / str(step)) == 0
        assert storage.run_state(out, killed_writers.IDENTITY, overwrite=False) == "done"


@pytest.mark.slow
def test_rank_killed_before_any_step_goes_on_to_the_rows_of_an_undisturbed_run(memory):
    def all_rows(folder: Path) -> list[Any]:
        return list(storage.open_source(str(folder / "out"), flag="--x").rows())

    steps = 0
    for step in each_kill(killed_writers.rank_rewards, memory, prepare=killed_writers.put_responses):
        here = memory / str(step)
        assert in_process(killed_writers.rank_rewards, here) == 0
        assert all_rows(here) == all_rows(memory / "warm")
        assert not any(".tmp" in path.name for path in (here / "out").rglob("*"))
        steps += 1
    assert steps > 20


def test_a_writer_killed_in_the_middle_of_a_shard_makes_that_shard_again(tmp_path):
    assert in_process(killed_writers.write_half_a_shard, tmp_path) == killed_writers.KILLED
    assert len(list((tmp_path / ".out.partial" / "data").glob("train*"))) == 1
    assert in_process(killed_writers.write_output, tmp_path) == 0
    assert numbers(tmp_path) == OLD
    assert not any(".tmp" in path.name for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(("room", "sampled_twice"), [(150, 1), (1500, 0)], ids=["journal", "shard"])
def test_a_full_disk_is_one_sentence_and_loses_no_response_but_the_one_it_had_in_hand(room, sampled_twice, tmp_path):
    """A limit on the size of files stands in for the full disk: of the journal's second line the kernel takes a
    part; or the journal has room, and the first shard has not."""
    work = functools.partial(killed_writers.write_responses_with_little_room, room=room)
    assert in_process(work, tmp_path) == 0
    said = (tmp_path / "said").read_text()
    assert said.startswith(str(tmp_path)) and "can't be written" in said and "run the same command again" in said
    assert in_process(killed_writers.write_responses, tmp_path) == 0
    rows = list(storage.open_source(str(tmp_path / "out"), flag="--x").rows())
    assert [row[f"response_{i}"] for row in rows for i in range(2)] == [str(key) for key in range(6)]
    assert len((tmp_path / "sampled").read_text().split()) == 6 + sampled_twice


def test_a_full_disk_under_a_shard_is_one_sentence_of_the_command_and_a_restart_finishes(run_command, tmp_path):
    rows = [{"prompt": f"{n}", "response_0": f"{n}" * 40, "response_1": f"{n + 1}" * 40} for n in range(40)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text("def length(rows):\n    return [len(row['response']) for row in rows]\n")
    args = ("--input_repo", "in.jsonl", "--reward_model", "./judge.py:length", "--num_responses", 2)
    limited = run_process(
        ["bash", "-c", 'ulimit -f 2; exec "$@"', "-", sys.executable, "-m", "rlhf_pipeline.rank", *args],
        dict(os.environ),
        cwd=tmp_path,
    )
    assert limited.returncode == 1, limited.stdout + limited.stderr
    lines = limited.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "train-00000.parquet can't be written" in lines[0]
    done = run_command("rank", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert storage.open_source(str(tmp_path / "in_armo"), flag="--x").num_rows == 40


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_and_no_quota_are_said_as_such(code, tmp_path):
    with (
        pytest.raises(WorkFailed, match=r"x can't be written, the (disk|quota) is (full|used up)"),
        atomic(tmp_path / "x"),
    ):
        raise OSError(code, "as the kernel says it")
    assert list(tmp_path.iterdir()) == []
