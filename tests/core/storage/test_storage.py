"""Storage: what a reference names, and that an output appears whole or not at all."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import Journal, locked
from rlhf_pipeline.core.storage import default_output, existing_state, open_output, open_source, parse_ref

IDENTITY = {"command": "rank", "what": {"seed": 1}, "inputs": {"prompts": "abc"}}


def write(folder: Path, rows: int = 5, *, shards: int = 2, identity: dict = IDENTITY) -> Path:
    with open_output(folder, identity, overwrite=False) as output:
        for shard in range(shards):
            values = range(shard * rows, (shard + 1) * rows)
            output.write_shard("train", shard, pa.table({"prompt": [f"p{i}" for i in values], "n": list(values)}))
        output.publish({"rows_out": rows * shards}, "---\nconfigs: []\n---\n# card\n")
    return folder


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("./a", True),
        ("../a/b", True),
        ("/tmp/x/y", True),
        ("~/a", True),
        ("a/b/c", True),
        ("runs/a", True),
        ("owner/name", False),
        ("owner/name@v1.0", False),
        ("hf://datasets/owner/name", False),
        ("hf://datasets/runs/name", False),
    ],
)
def test_a_reference_is_local_or_hub_by_its_form(text, local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (parse_ref(text, flag="--input_repo").path is not None) == local


def test_an_existing_folder_of_two_parts_is_local_and_only_an_output_may_be_new_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/old").mkdir(parents=True)
    assert parse_ref("data/old", flag="--input_repo").path is not None
    assert parse_ref("data/new", flag="--output_repo", output=True).path is not None
    assert parse_ref("data/new", flag="--input_repo").repo_id == "data/new"


def test_one_part_alone_is_refused_and_the_sentence_names_the_local_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadUse, match=r"--output_repo ranked is neither .* write \./ranked"):
        parse_ref("ranked", flag="--output_repo", output=True)


def test_revision_is_kept():
    ref = parse_ref("owner/name@refs/pr/3", flag="--model")
    assert (ref.repo_id, ref.revision) == ("owner/name", "refs/pr/3")


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


def test_an_empty_dataset_and_an_unknown_split_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadUse, match=r"--prompts .*empty.jsonl has no rows"):
        open_source(str(tmp_path / "empty.jsonl"), flag="--prompts")
    with pytest.raises(BadUse, match="has no split dev; it has train"):
        open_source(str(write(tmp_path / "out")), flag="--prompts", split="dev")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_prompts_are_read_from_a_file(tmp_path, suffix):
    rows = [{"prompt": "Say hello.", "category": "greet"}, {"prompt": "Count to 3.", "category": "count"}]
    path = tmp_path / f"prompts{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".csv":
        path.write_text("prompt,category\nSay hello.,greet\nCount to 3.,count\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert list(open_source(str(path), flag="--prompts").rows()) == rows


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


def test_default_output_lies_beside_a_local_input(tmp_path):
    assert (
        default_output(parse_ref(str(tmp_path / "responses"), flag="--x"), "_armo").folder
        == tmp_path / "responses_armo"
    )


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


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_column_that_is_null_for_a_thousand_rows_and_text_afterwards_is_one_column_of_text(tmp_path, suffix):
    """Tables come in pieces of 1,000 rows; each alone would make its own kind of the column."""
    rows = [{"prompt": f"p{i}", "category": None if i < 1500 else "late", "n": i} for i in range(2500)]
    path = tmp_path / f"prompts{suffix}"
    path.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(path), flag="--prompts")
    whole = pa.concat_tables(source.tables())
    assert whole.schema.field("category").type == pa.string()
    assert whole.to_pylist() == rows
    assert pa.concat_tables(source.tables(["category"], start=900, stop=1600)).to_pylist() == [
        {"category": row["category"]} for row in rows[900:1600]
    ]


def test_a_csv_with_short_rows_gives_nulls_and_with_long_ones_is_refused(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,category\nhello\nbye,x\n")
    rows = pa.concat_tables(open_source(str(tmp_path / "p.csv"), flag="--prompts").tables()).to_pylist()
    assert rows == [{"prompt": "hello", "category": None}, {"prompt": "bye", "category": "x"}]
    (tmp_path / "long.csv").write_text("prompt,category\nhello, world, again\n")
    with pytest.raises(BadUse, match=r"--prompts .*long\.csv has a row of more fields than its header"):
        open_source(str(tmp_path / "long.csv"), flag="--prompts")


def test_a_column_of_mixed_kinds_is_refused_by_its_name_where_a_table_is_read(tmp_path):
    rows = [{"prompt": "p", "n": 1}] * 1200 + [{"prompt": "p", "n": "one"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(tmp_path / "p.jsonl"), flag="--prompts")
    with pytest.raises(BadUse, match=r"--prompts .*p\.jsonl mixes kinds of values in its column n"):
        list(source.tables())
    assert len(pa.concat_tables(source.tables(["prompt"]))) == 1201
    assert sum(1 for _ in source.rows()) == 1201


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_generate_reads_every_kind_of_prompt_file(capsys, tiny_policy, tmp_path, suffix):
    """--check through the command, and the prompts as generate has them: the same from every kind of file."""
    from rlhf_pipeline import generate
    from rlhf_pipeline.core.chat import Chat
    from rlhf_pipeline.core.command import parse
    from rlhf_pipeline.core.generation import prompts

    rows = [
        {"prompt_id": f"p{i}", "prompt": f"Say {i}, please.", "category": "late" if i > 1 else None} for i in range(4)
    ]
    path = tmp_path / f"prompts{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        lines = [",".join(f'"{row[name] or ""}"' for name in ("prompt_id", "prompt", "category")) for row in rows]
        path.write_text("\n".join(["prompt_id,prompt,category", *lines]) + "\n")
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", tiny_policy, "--prompts", path, "--output_repo", tmp_path / "out", "--backend", "transformers"]
    generate.main(parse(generate.Config, [*map(str, words), "--check"]))
    assert "4 of 4 rows, 4 can be answered" in capsys.readouterr().out
    source = open_source(str(path), flag="--prompts")
    kept = prompts.prepare(source, Chat.load(tiny_policy), range(4), 128).kept
    assert [(prompt.prompt_id, prompt.prompt) for prompt in kept] == [(row["prompt_id"], row["prompt"]) for row in rows]
