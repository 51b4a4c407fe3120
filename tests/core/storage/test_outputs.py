"""An output appears whole or not at all, and is read as it was written."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.storage import existing_state, open_output, open_source

IDENTITY = {"command": "rank", "what": {"seed": 1}, "inputs": {"prompts": "abc"}}


def write(folder: Path, rows: int = 5, *, shards: int = 2, identity: dict = IDENTITY) -> Path:
    with open_output(folder, identity, overwrite=False) as output:
        for shard in range(shards):
            values = range(shard * rows, (shard + 1) * rows)
            output.write_shard("train", shard, pa.table({"prompt": [f"p{i}" for i in values], "n": list(values)}))
        output.publish({"rows_out": rows * shards}, "---\nconfigs: []\n---\n# card\n")
    return folder


def test_rows_come_back_in_order_from_any_slice(tmp_path):
    source = open_source(str(write(tmp_path / "out", rows=5, shards=3)), flag="--input_repo")
    assert source.num_rows == 15
    assert [row["n"] for row in source.rows(["n"])] == list(range(15))
    batches = list(source.batches(["n"], size=2, start=3, stop=12))
    assert [row["n"] for batch in batches for row in batch] == list(range(3, 12))


def test_datasets_opens_what_we_write(tmp_path):
    import datasets

    with open_output(tmp_path / "out", IDENTITY, overwrite=False) as output:
        output.write_shard("train", 0, pa.table({"prompt": ["a", "b"]}))
        output.write_shard("test", 0, pa.table({"prompt": ["c"]}))
        card = (
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*.parquet\n"
        )
        output.publish({}, card + "  - split: test\n    path: data/test-*.parquet\n---\n# x\n")
    loaded = datasets.load_dataset(str(tmp_path / "out"))
    assert {name: list(split["prompt"]) for name, split in loaded.items()} == {"train": ["a", "b"], "test": ["c"]}


def test_the_same_run_is_done_and_another_is_refused_by_name(tmp_path):
    folder = write(tmp_path / "out")
    with open_output(folder, IDENTITY, overwrite=False) as output:
        assert output.done
    other = {**IDENTITY, "what": {"seed": 2}}
    with (
        pytest.raises(BadUse, match=r"another run \(what.seed was 1, now 2\).*--overwrite"),
        open_output(folder, other, overwrite=False),
    ):
        pass
    with open_output(folder, other, overwrite=True) as output:
        assert not output.done and not output.has_shard("train", 0)
        output.write_shard("train", 0, pa.table({"prompt": ["new"]}))
        output.publish({}, "")
    assert [row["prompt"] for row in open_source(str(folder), flag="--x").rows()] == ["new"]


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadUse, match="not an output of rlhf_pipeline"):
        existing_state(tmp_path / "mine", IDENTITY, overwrite=True)


def test_a_killed_run_goes_on_with_its_shards(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(RuntimeError), open_output(folder, IDENTITY, overwrite=False) as output:
        output.write_shard("train", 0, pa.table({"n": [0]}))
        raise RuntimeError("killed here")
    assert existing_state(folder, IDENTITY, overwrite=False) == "partial"
    with pytest.raises(BadUse, match="does not exist; it is being written"):
        open_source(str(folder), flag="--input_repo")
    with open_output(folder, IDENTITY, overwrite=False) as output:
        assert output.has_shard("train", 0) and not output.has_shard("train", 1)
        output.write_shard("train", 1, pa.table({"n": [1]}))
        output.publish({}, "")
    assert [row["n"] for row in open_source(str(folder), flag="--x").rows()] == [0, 1]


def test_a_missing_shard_is_named(tmp_path):
    folder = write(tmp_path / "out", shards=3)
    (folder / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(BadUse, match="split train lacks shards 1 of 3"):
        open_source(str(folder), flag="--input_repo")


@pytest.mark.parametrize("lost", ["train-00001-of-00002.parquet", "*"])
def test_a_finished_output_that_lost_files_is_refused_and_made_anew_when_asked(lost, tmp_path):
    folder = write(tmp_path / "out")
    for path in (folder / "data").glob(lost):
        path.unlink()
    with pytest.raises(BadUse, match=r"out is not whole any more, split train lacks shards .*1 of 2: pass --overwrite"):
        existing_state(folder, IDENTITY, overwrite=False)
    with open_output(folder, IDENTITY, overwrite=True) as output:
        assert not output.done and not output.has_shard("train", 0)
        output.write_shard("train", 0, pa.table({"prompt": ["new"]}))
        output.publish({}, "")
    assert [row["prompt"] for row in open_source(str(folder), flag="--x").rows()] == ["new"]
    assert existing_state(folder, IDENTITY, overwrite=False) == "done"


def test_files_of_two_outputs_in_one_folder_are_refused(tmp_path):
    folder = write(tmp_path / "out", shards=3)
    (folder / "data" / "train-00001-of-00003.parquet").rename(folder / "data" / "train-00001-of-00002.parquet")
    with pytest.raises(BadUse, match="mixes two outputs: split train has files of 2 shards and of 3"):
        open_source(str(folder), flag="--input_repo")


def test_an_empty_dataset_and_an_unknown_split_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadUse, match=r"--prompts .*empty.jsonl has no rows"):
        open_source(str(tmp_path / "empty.jsonl"), flag="--prompts")
    with pytest.raises(BadUse, match="has no split dev; it has train"):
        open_source(str(write(tmp_path / "out")), flag="--prompts", split="dev")


def test_tutorial_names_are_read_as_ours(tmp_path):
    with open_output(tmp_path / "out", IDENTITY, overwrite=False) as output:
        output.write_shard("train_prefs", 0, pa.table({"chosen": ["a"], "reject": ["b"], "reject_reward": [0.5]}))
        output.publish({}, "")
    source = open_source(str(tmp_path / "out"), flag="--input_repo", split="train")
    assert source.renamed == {"reject": "rejected", "reject_reward": "rejected_reward"}
    assert list(source.rows()) == [{"chosen": "a", "rejected": "b", "rejected_reward": 0.5}]


def test_the_fingerprint_follows_the_content_and_not_the_time(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    other = write(tmp_path / "c", rows=6)
    os.utime(next((second / "data").iterdir()), (1, 1))
    fingerprints = [open_source(str(folder), flag="--x").fingerprint for folder in (first, second, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
