"""Prompts from one file, of every kind."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_pipeline.core import schema
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.storage import open_source


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


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_belongs_to_no_column(tmp_path, suffix):
    text = {
        ".csv": "prompt,n\nGrüß Gott,1\n",
        ".jsonl": '{"prompt": "Grüß Gott"}\n',
        ".json": '[{"prompt": "Grüß Gott"}]',
    }
    path = tmp_path / f"prompts{suffix}"
    path.write_text(text[suffix], encoding="utf-8-sig")
    assert [row["prompt"] for row in open_source(str(path), flag="--prompts").rows()] == ["Grüß Gott"]


@pytest.mark.parametrize(("encoding", "byte"), [("cp1252", "0xfc"), ("utf-16-le", "0xfc"), ("utf-16", "0xff")])
def test_another_encoding_than_utf_8_is_refused(tmp_path, encoding, byte):
    for suffix in (".csv", ".jsonl", ".json"):
        path = tmp_path / f"prompts{suffix}"
        path.write_text("üprompt\nhello\n", encoding=encoding)
        with pytest.raises(BadUse, match=rf"--prompts {path} is not UTF-8 \(it has a byte {byte}\): save it in"):
            open_source(str(path), flag="--prompts")


def test_a_parquet_file_that_is_none_is_refused_by_name(tmp_path):
    """A pointer of git-lfs, a file that was cut off, one whose metadata is damaged, an empty one: alone, and in a
    folder of ours."""
    pq.write_table(pa.table({"prompt": ["hello"] * 100}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    alone = tmp_path / "p.parquet"
    shard = tmp_path / "ours" / "data" / "train-00000-of-00001.parquet"
    shard.parent.mkdir(parents=True)
    for content in (pointer, whole[:-20], whole[:-100] + b"\xff" * 92 + whole[-8:], b""):
        for name, path in ((alone, alone), (tmp_path / "ours", shard)):
            path.write_bytes(content)
            with pytest.raises(BadUse, match=rf"--prompts {path} can't be read as parquet \(.*\): .*`git lfs pull`"):
                open_source(str(name), flag="--prompts")


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


def test_prompt_ids_are_text_and_unique_as_text(tmp_path):
    """17 and "17" would be one id in the output, so there both get one made from their prompts."""
    path = tmp_path / "p.jsonl"
    for ids, expected in (([17, 18], ["17", "18"]), ([17, "17"], None), ([17, None], None)):
        rows = [{"prompt_id": prompt_id, "prompt": f"p{i}"} for i, prompt_id in enumerate(ids)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = schema.make_prompt_ids(row["prompt"] for row in rows)
        assert open_source(str(path), flag="--prompts").prompt_ids() == (expected or made)


def test_whole_numbers_as_prompt_ids_go_through_generate_and_rank(tmp_path, tiny_policy):
    from rlhf_pipeline import generate, rank
    from rlhf_pipeline.core.command import parse

    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt_id": i, "prompt": f"Say {i}."}) + "\n" for i in (17, 18)))
    judge = tmp_path / "judge.py"
    judge.write_text("def score(rows):\n    return [1.0 for row in rows]\n")
    words = ["--model", tiny_policy, "--prompts", path, "--output_repo", tmp_path / "out", "--backend", "transformers"]
    generate.main(parse(generate.Config, [*map(str, words), "--num_responses", "1", "--maxlen", "4"]))
    assert [row["prompt_id"] for row in open_source(str(tmp_path / "out"), flag="--x").rows()] == ["17", "18"]
    path.write_text("".join(json.dumps({"prompt_id": i, "prompt": "a", "response_0": "b"}) + "\n" for i in (17, 18)))
    rank.main(rank.Config(input_repo=str(path), reward_model=(f"{judge}:score",), num_responses=1))
    assert [row["prompt_id"] for row in open_source(str(tmp_path / "p_armo"), flag="--x").rows()] == ["17", "18"]
