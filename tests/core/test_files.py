"""Journals and locks that outlive a kill."""

import multiprocessing
import time
from pathlib import Path

import pytest

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import Journal, locked, replace_folder


def test_a_journal_torn_in_its_last_line_keeps_the_whole_ones(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append({"key": 1})
    journal.append({"key": 2})
    journal.close()
    path.write_bytes(path.read_bytes()[:-4])
    journal = Journal(path)
    assert journal.records == [{"key": 1}]
    journal.append({"key": 3})
    journal.close()
    assert Journal(path).records == [{"key": 1}, {"key": 3}]


def hold(path: Path, held) -> None:
    with locked(path):
        held.set()
        time.sleep(60)


def test_a_lock_names_its_holder_and_is_free_when_the_holder_is_killed(tmp_path):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "lock", held))
    holder.start()
    assert held.wait(30)
    with pytest.raises(BadUse, match=f"held by process {holder.pid}"), locked(tmp_path / "lock", wait=0.3):
        pass
    holder.kill()
    holder.join()
    with locked(tmp_path / "lock", wait=5):
        pass


def test_a_folder_whose_replacement_is_not_there_stays(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out").is_dir()
