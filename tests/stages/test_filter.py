"""filter through its real functions and as a command, on the tiny Llama 3 tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_pipeline import filter as stage
from rlhf_pipeline.core import schema, storage
from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import BadUse, RunFlags
from rlhf_pipeline.core.filtering import pair_blocks
from rlhf_pipeline.core.training.pairs import load_pairs
from tutorial_dataset import tutorial_pairs, write_tutorial_dataset

Row = dict[str, Any]


@pytest.fixture(scope="module")
def chat(tiny_policy: Path) -> Chat:
    return Chat.load(tiny_policy)


def write_rewards(folder: Path, rows: Sequence[Row], provenance: Row | None = None, types: Row | None = None) -> Path:
    """A dataset as rank leaves it: a parquet file, and a provenance where given."""
    (folder / "data").mkdir(parents=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: pa.array([row.get(name) for row in rows], (types or {}).get(name)) for name in names})
    pq.write_table(table, folder / "data" / "train-00000-of-00001.parquet", row_group_size=100)
    if provenance is not None:
        (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def scored(prompt_id: str, prompt: Any, responses: Sequence[str | None], rewards: Sequence[float | None]) -> Row:
    row = {"prompt_id": prompt_id, "prompt": prompt}
    for i, (text, reward) in enumerate(zip(responses, rewards, strict=True)):
        row |= {schema.response(i): text, schema.response_reward(i): reward}
    return row


def many(count: int, num_responses: int = 3) -> list[Row]:
    """Prompts whose best response is 0 and whose worst is the last, with margins 2, 2.01, 2.02, ..."""
    return [
        scored(f"p{k}", f"Question {k}?", [f"answer {k} {i}" for i in range(num_responses)],
               [2 + k / 100, *[1.0] * (num_responses - 2), 0.0])
        for k in range(count)
    ]  # fmt: skip


def sampled(rows: Sequence[Row], chat: Chat, reasons: dict[str, str] | None = None) -> list[Row]:
    """The same rows with ids and finish_reason, as generate would write them had it sampled these texts."""
    for row in rows:
        for i in range(schema.count_responses(list(row))):
            reason = (reasons or {}).get(f"{row['prompt_id']}.{i}", "stop")
            ids = chat.response_ids(row["prompt"], row[schema.response(i)])
            row[schema.response_tokens(i)] = ids if reason == "stop" else ids[:-1]
            row[schema.response_finish_reason(i)] = reason
    return list(rows)


def run(source: Path, model: Path, output: Path, **flags: Any) -> Row:
    """Run the command in this process. Returns the provenance of its output."""
    settings = {"num_responses": 3, "maxlen": 30, "maxlen_prompt": 40, "test_size": 1} | flags
    stage.main(stage.Config(input_repo=str(source), output_repo=str(output), model=str(model), **settings))
    provenance: Row = json.loads((output / "provenance.json").read_text())
    return provenance


def read(output: Path, splits: Sequence[str] = ("train", "test")) -> dict[str, Row]:
    """{prompt_id of a row: the row}, of both splits."""
    rows = [row for split in splits for row in storage.open_source(str(output), flag="-", split=split).rows()]
    return {row["prompt_id"]: row for row in rows}


LONG = "word " * 60


def faulty_rows() -> list[Row]:
    return [
        scored("kept", "What?", ["a", "b", "c"], [1.0, 3.0, 2.0]),
        scored("kept too", "Why?", ["a", "b", "c"], [1.0, -1.0, -2.0]),
        scored("prompt", LONG, ["a", "b", "c"], [1.0, 3.0, 2.0]),
        scored("null", "Who?", ["a", "b", "c"], [1.0, None, 2.0]),
        scored("nan", "Whom?", ["a", "b", "c"], [float("nan"), 2.0, 2.0]),
        scored("cut", "When?", ["a", "b", "c"], [1.0, 3.0, 2.0]),
        scored("empty", "Where?", ["a", " ", "c"], [1.0, 3.0, 2.0]),
        scored("long", "How?", ["a", "b", LONG], [1.0, 3.0, 2.0]),
        scored("two faults", "Is it?", [LONG, None, "c"], [1.0, 3.0, 2.0]),
        scored("tied", "Are they?", ["a", "b", "c"], [1.0, 1.0, 1.0]),
        scored("same", "Is she?", ["a", "a", "c"], [1.0, 3.0, 2.0]),
    ]


def test_each_rule_drops_its_prompt_with_one_reason_and_a_line_in_skipped(tiny_policy, tmp_path):
    """Of eleven prompts two are kept. With --min_responses 2 null, cut, empty and long would stay; nan would be
    tied, two faults has one survivor."""
    rows = faulty_rows()
    for row in rows:
        row |= {schema.response_finish_reason(i): "stop" for i in range(3)}
    rows[5]["response_0_finish_reason"] = "length"
    made = run(write_rewards(tmp_path / "rewards", rows), tiny_policy, tmp_path / "pairs")
    assert made["rows_in"] == 11
    assert made["rows_out"] == made["prompts_out"] == {"train": 1, "test": 1}
    assert made["dropped"] == {
        "prompt_too_long": 1,
        "response_without_reward": 2,
        "response_truncated": 1,
        "response_empty": 2,
        "response_too_long": 1,
        "tied": 1,
        "same_text": 1,
    }
    assert made["responses_not_surviving"] == {"without_reward": 2, "truncated": 1, "empty": 2, "too_long": 2}
    assert made["kept_with_min_responses_2"] == 4
    lines = [json.loads(line) for line in (tmp_path / "pairs" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["prompt_id"], line["row"]) for line in lines] == [
        (row["prompt_id"], number) for number, row in enumerate(rows) if number >= 2
    ]
    assert lines[6]["responses"] == {"0": "too_long", "1": "empty"}
    assert lines[6]["reason"] == "response_empty"
    assert set(read(tmp_path / "pairs")) == {"kept", "kept too"}


def test_min_responses_2_keeps_what_was_promised(tiny_policy, tmp_path):
    """null keeps 0 and 2: 2 is chosen. The rewards of all three stay in the row, null where there is none."""
    source = write_rewards(tmp_path / "rewards", faulty_rows())
    strict = run(source, tiny_policy, tmp_path / "strict")
    made = run(source, tiny_policy, tmp_path / "pairs", min_responses=2)
    assert sum(made["prompts_out"].values()) == 3 + strict["kept_with_min_responses_2"]
    row = read(tmp_path / "pairs")["null"]
    assert (row["chosen_index"], row["rejected_index"], row["rewards"]) == (2, 0, [1.0, None, 2.0])


def test_the_columns_hold_the_pair(chat, tiny_policy, tmp_path):
    made = run(write_rewards(tmp_path / "rewards", faulty_rows()), tiny_policy, tmp_path / "pairs")
    row = read(tmp_path / "pairs")["kept"]
    prompt, chosen, rejected = (
        chat.prompt_ids("What?"),
        chat.response_ids("What?", "b"),
        chat.response_ids("What?", "a"),
    )
    pad = chat.pad_id
    assert tuple(row) == schema.PAIR_COLUMNS
    assert row == {
        "prompt_id": "kept", "prompt": "What?", "chosen": "b", "rejected": "a",
        "chosen_reward": 3.0, "rejected_reward": 1.0, "rewards": [1.0, 3.0, 2.0],
        "prompt_tokens": [pad] * (40 - len(prompt)) + prompt,
        "chosen_tokens": chosen + [pad] * (30 - len(chosen)),
        "rejected_tokens": rejected + [pad] * (30 - len(rejected)),
        "prompt_length": len(prompt), "chosen_length": len(chosen), "rejected_length": len(rejected),
        "chosen_index": 1, "rejected_index": 0,
    }  # fmt: skip
    assert made["chat"] == chat.describe()
    column = pq.read_schema(next((tmp_path / "pairs" / "data").glob("train*"))).field("chosen_tokens")
    assert column.type.value_type == pa.int32()


def tutorial_rows(count: int = 40) -> list[Row]:
    """Texts of every length, some over the limits, white space at the ends, ties and equal texts among them."""
    draw = np.random.default_rng(0)
    rows = []
    for k in range(count):
        texts = [f" {'a ' * draw.integers(0, 18)}{k} {i}\n" for i in range(5)]
        if k % 7 == 0:
            texts = ["same"] * 5
        rewards = draw.integers(0, 4, 5) / 4.0
        rows.append(scored(f"p{k}", "a " * draw.integers(1, 14) + str(k), texts, rewards.tolist()))
    return rows


def test_the_pairs_are_those_of_the_tutorial(chat, tiny_policy, tmp_path):
    rows, lengths = tutorial_rows(), {"maxlen_prompt": 30, "maxlen": 40}
    theirs = {row["prompt_id"]: row for row in tutorial_pairs(rows, chat.tokenizer, **lengths)}
    source = write_rewards(tmp_path / "rewards", rows)
    run(source, tiny_policy, tmp_path / "pairs", num_responses=5, test_size=3, **lengths)
    ours = read(tmp_path / "pairs")
    assert 5 < len(theirs) < 35, "both sides of the limits are to be seen"
    assert set(ours) == set(theirs)
    names = {
        "chosen": "chosen", "reject": "rejected", "chosen_reward": "chosen_reward",
        "reject_reward": "rejected_reward", "llama_prompt_tokens": "prompt_tokens",
        "llama_chosen_tokens": "chosen_tokens", "llama_reject_tokens": "rejected_tokens",
    }  # fmt: skip
    for key, row in theirs.items():
        assert {name: ours[key][name] for name in names.values()} == {names[name]: row[name] for name in names}

    blank_line, end = chat.prompt_ids("a")[-1], chat.response_ids("a", "b")[-1]
    for row in ours.values():  # the tutorial's own assertions
        assert len(row["prompt_tokens"]) == 30
        assert row["prompt_tokens"][0] in (chat.bos_id, chat.pad_id)
        assert row["prompt_tokens"][-1] == blank_line
        for name in ("chosen_tokens", "rejected_tokens"):
            assert len(row[name]) == 40
            assert row[name][-1] in (end, chat.pad_id)


def test_sampled_ids_are_kept_as_sampled_and_changes_are_counted(chat, tiny_policy, tmp_path, capsys):
    """In p0 the chosen response was sampled byte by byte, in p1 only an unused one: one pair of four changes."""
    rows = sampled(many(4), chat)
    spelled = [*chat.tokenizer.convert_tokens_to_ids(list("word")), chat.end_ids[-1]]
    assert spelled != chat.response_ids("a", "word")
    rows[0] |= {"response_0": "word", "response_0_tokens": spelled}
    rows[1] |= {"response_1": "word", "response_1_tokens": spelled}
    made = run(write_rewards(tmp_path / "rewards", rows), tiny_policy, tmp_path / "pairs")
    row = read(tmp_path / "pairs")["p0"]
    assert row["chosen_tokens"][: row["chosen_length"]] == spelled
    assert made["round_trip"] == {"sampled_pairs": 4, "changed_pairs": 1}
    assert "in 1 of 4 pairs the text would be encoded as other ids" in capsys.readouterr().out


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_truncated_response_that_is_kept_gets_no_end(with_ids, chat, tiny_policy, tmp_path):
    rows = sampled(many(2), chat, {"p0.0": "length"})
    if not with_ids:
        rows = [{name: row[name] for name in row if not name.endswith("_tokens")} for row in rows]
    made = run(write_rewards(tmp_path / "rewards", rows), tiny_policy, tmp_path / "pairs", keep_truncated=True)
    row = read(tmp_path / "pairs")["p0"]
    ids = chat.response_ids("Question 0?", "answer 0 0")
    assert row["chosen_tokens"][: row["chosen_length"]] == ids[:-1]
    assert made["round_trip"] == {"sampled_pairs": 2 if with_ids else 0, "changed_pairs": 0}


def test_a_conversation_stays_one_and_is_encoded_with_all_its_turns(chat, tiny_policy, tmp_path):
    turns = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Why?"},
    ]
    rows = [
        scored(f"p{k}", [*turns[:2], {"role": "user", "content": f"Why {k}?"}], "abc", [1.0, 2.0, 3.0])
        for k in range(2)
    ]
    run(write_rewards(tmp_path / "rewards", rows), tiny_policy, tmp_path / "pairs")
    row = read(tmp_path / "pairs")["p1"]
    assert row["prompt"] == rows[1]["prompt"]
    assert row["prompt_tokens"][-row["prompt_length"] :] == chat.prompt_ids(rows[1]["prompt"])


PARTICULAR = """\
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}{{ raise_exception('Tools are not known here') }}{% endif %}
    {%- if message['role'] == 'assistant' and messages[0]['role'] == 'system' and loop.index0 == 1 %}
        {{- raise_exception('A user must speak before the assistant') }}
    {%- endif %}
{%- endfor %}"""


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_prompt_that_can_not_be_encoded_is_dropped_alone(with_ids, chat, tiny_policy, tmp_path, capsys):
    """Of seven prompts three are plain. One is rendered but takes no answer: only its sampled ids can make a pair, and
    they are none that the text would be encoded as."""
    template = tmp_path / "particular.jinja"
    template.write_text(PARTICULAR + chat.template)
    user, tool, system, answer = ({"role": role, "content": "Hi."} for role in ("user", "tool", "system", "assistant"))
    prompts = {
        "null": None, "one": [user], "answered": [user, answer], "two": [user], "tool": [user, tool],
        "no user": [system], "three": [user],
    }  # fmt: skip
    rows = [scored(name, prompt, ["a", "b", "c"], [1.0, 3.0, 2.0]) for name, prompt in prompts.items()]
    if with_ids:
        ids = {schema.response_tokens(i): chat.response_ids("Hi.", text) for i, text in enumerate("abc")}
        rows = [row | ids for row in rows]
    source = write_rewards(tmp_path / "rewards", rows)
    made = run(source, tiny_policy, tmp_path / "pairs", chat_template=str(template))
    assert made["dropped"] == {"prompt_not_encodable": 3} | ({} if with_ids else {"response_not_encodable": 1})
    assert made["round_trip"] == {"sampled_pairs": 4 * with_ids, "changed_pairs": 1 * with_ids}
    assert set(read(tmp_path / "pairs")) == {"one", "two", "three", *(["no user"] if with_ids else [])}
    lines = [json.loads(line) for line in (tmp_path / "pairs" / "skipped.jsonl").read_text().splitlines()]
    assert {line["prompt_id"]: line["row"] for line in lines if "detail" in line} == {
        "null": 0,
        "answered": 2,
        "tool": 4,
    }
    assert "Tools are not known here" in next(line["detail"] for line in lines if line["prompt_id"] == "tool")
    assert "the first that can't be encoded: prompt null: " in capsys.readouterr().out


# Splits


def test_the_split_depends_on_the_prompts_and_the_seed_alone(tiny_policy, tmp_path):
    """Not on the order of rows, the number of processes, or the limits, as far as they keep the prompts."""
    rows = many(1100)
    source = write_rewards(tmp_path / "rewards", rows)
    shuffled = write_rewards(tmp_path / "shuffled", [rows[k] for k in np.random.default_rng(1).permutation(1100)])
    run(source, tiny_policy, tmp_path / "one", test_size=50)
    held_out = set(read(tmp_path / "one", ["test"]))
    assert len(held_out) == 50
    assert held_out.isdisjoint(read(tmp_path / "one", ["train"]))

    made = run(source, tiny_policy, tmp_path / "two", test_size=50, num_proc=2)
    assert made["identity"] == json.loads((tmp_path / "one" / "provenance.json").read_text())["identity"]
    for name in sorted(path.name for path in (tmp_path / "one" / "data").iterdir()):
        assert (tmp_path / "one" / "data" / name).read_bytes() == (tmp_path / "two" / "data" / name).read_bytes()

    run(shuffled, tiny_policy, tmp_path / "three", test_size=50)
    assert set(read(tmp_path / "three", ["test"])) == held_out
    run(source, tiny_policy, tmp_path / "four", test_size=50, min_margin=2.5)
    assert held_out & set(read(tmp_path / "four")) <= set(read(tmp_path / "four", ["test"]))
    run(source, tiny_policy, tmp_path / "five", test_size=50, seed=1)
    assert set(read(tmp_path / "five", ["test"])) != held_out


def test_all_pairs_of_a_prompt_are_on_the_same_side(tiny_policy, tmp_path):
    """Margins 2+, 1 and 0 < 1: three pairs a prompt; 0.25 of 20 prompts is 5."""
    source = write_rewards(tmp_path / "rewards", many(20))
    made = run(source, tiny_policy, tmp_path / "pairs", select="all_pairs", test_size=0.25)
    assert made["rows_out"] == {"train": 45, "test": 15}
    assert made["prompts_out"] == {"train": 15, "test": 5}
    sides = [
        Counter(row["prompt_id"] for row in storage.open_source(str(tmp_path / "pairs"), flag="-", split=split).rows())
        for split in ("train", "test")
    ]
    assert not sides[0].keys() & sides[1].keys()
    assert set((sides[0] | sides[1]).values()) == {3}


def test_the_picture_of_the_data(tiny_policy, tmp_path):
    """Margins 2.00 to 2.10 in eleven even steps: mean and median 2.05; response 0 always wins, 2 always loses."""
    made = run(write_rewards(tmp_path / "rewards", many(11)), tiny_policy, tmp_path / "pairs")
    data = made["data"]
    assert data["reward_margin"] == pytest.approx(
        {"mean": 2.05, "min": 2.0, "p5": 2.005, "p25": 2.025, "p50": 2.05, "p75": 2.075, "p95": 2.095, "max": 2.1}
    )
    assert (data["chosen_index"], data["rejected_index"]) == ([11, 0, 0], [0, 0, 11])
    assert (data["chosen_longer"], data["chosen_shorter"]) == (0.0, 0.0)
    lengths = [row["prompt_length"] for row in read(tmp_path / "pairs").values()]
    assert data["prompt_length"]["mean"] == pytest.approx(np.mean(lengths))


# Restart


def test_a_killed_run_goes_on_with_the_blocks_that_are_there(tiny_policy, tmp_path, chat):
    """Block 0 is done under the same identity, then marked by hand; the finished output carries the mark. A prompt
    of the second block is dropped, under its row of the input."""
    rows = many(600)
    rows[555]["response_0"] = LONG
    source = write_rewards(tmp_path / "rewards", rows)
    config = stage.Config(
        input_repo=str(source), output_repo=str(tmp_path / "pairs"), model=str(tiny_policy),
        num_responses=3, maxlen=30, maxlen_prompt=40, test_size=1,
    )  # fmt: skip
    plan = stage.make_plan(config)
    with storage.open_output(tmp_path / "pairs", plan.identity, overwrite=False) as output:
        work = pair_blocks.Work(plan.chat, plan.rules, 3, 40, output.folder / "journal")
        first = pa.concat_tables(plan.source.tables(start=0, stop=pair_blocks.BLOCK_ROWS))
        pair_blocks.do_block(work, 0, first, ["marked", *(f"p{k}" for k in range(1, pair_blocks.BLOCK_ROWS))])
    stage.main(config)
    pairs = read(tmp_path / "pairs")
    assert len(pairs) == 599
    assert "marked" in pairs
    (line,) = (tmp_path / "pairs" / "skipped.jsonl").read_text().splitlines()
    assert (json.loads(line)["prompt_id"], json.loads(line)["row"]) == ("p555", 555)


def test_num_proc_finishes_what_one_process_began(tiny_policy, tmp_path):
    source = write_rewards(tmp_path / "rewards", many(1600))
    run(source, tiny_policy, tmp_path / "whole")
    plan = stage.make_plan(
        stage.Config(
            input_repo=str(source), output_repo=str(tmp_path / "pairs"), model=str(tiny_policy),
            num_responses=3, maxlen=30, maxlen_prompt=40, test_size=1,
        )
    )  # fmt: skip
    with storage.open_output(tmp_path / "pairs", plan.identity, overwrite=False) as output:
        work = pair_blocks.Work(plan.chat, plan.rules, 3, 40, output.folder / "journal")
        third = pa.concat_tables(plan.source.tables(start=1024, stop=1536))
        pair_blocks.do_block(work, 2, third, [f"p{k}" for k in range(1024, 1536)])
    run(source, tiny_policy, tmp_path / "pairs", num_proc=2)
    assert read(tmp_path / "pairs") == read(tmp_path / "whole")


# Other people's datasets


def test_tutorial_columns_are_what_the_authors_trainer_reads(chat, tiny_policy, tmp_path):
    import datasets

    source = write_rewards(tmp_path / "rewards", tutorial_rows())
    run(source, tiny_policy, tmp_path / "pairs", num_responses=5, maxlen=40, maxlen_prompt=30, tutorial_columns=True)
    loaded = datasets.load_dataset(str(tmp_path / "pairs"), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "test"}
    theirs = {
        row["prompt_id"]: row for row in tutorial_pairs(tutorial_rows(), chat.tokenizer, maxlen=40, maxlen_prompt=30)
    }
    used = ("llama_prompt_tokens", "llama_chosen_tokens", "llama_reject_tokens", "chosen_reward", "reject_reward")
    for row in loaded["train"]:
        assert {name: row[name] for name in used} == {name: theirs[row["prompt_id"]][name] for name in used}
        for name in ("llama_prompt", "llama_chosen", "llama_reject"):
            assert row[name] == theirs[row["prompt_id"]][name].replace("[PAD]", "")
    tensors = loaded["train"].with_format("torch")[0:2]
    assert tensors["llama_chosen_tokens"].shape == (2, 40)


def test_the_published_datasets_load_as_pairs(chat, tmp_path):
    pairs = write_tutorial_dataset(tmp_path / "published", tutorial_rows(), chat.tokenizer, maxlen=40, maxlen_prompt=30)
    source = storage.open_source(str(tmp_path / "published"), flag="--input_repo", split="train")
    assert source.split == "train_prefs"
    data = load_pairs(source, pad_id=chat.pad_id, end_ids=chat.end_ids)
    assert len(data) == len(pairs) - 2
    for k, pair in enumerate(pairs[:-2]):
        assert data.prompt[k].tolist() == chat.prompt_ids(pair["prompt"])
        assert data.chosen[k].tolist() == chat.response_ids(pair["prompt"], pair["chosen"])
        assert data.rejected[k].tolist() == chat.response_ids(pair["prompt"], pair["reject"])
        assert (data.chosen_reward[k], data.rejected_reward[k]) == (pair["chosen_reward"], pair["reject_reward"])
    assert data.chosen_logp is not None
    assert data.chosen_logp[:2].tolist() == [-1.0, -3.0]


def test_the_published_datasets_can_be_filtered_again(chat, tiny_policy, tmp_path):
    pairs = write_tutorial_dataset(tmp_path / "published", tutorial_rows(), chat.tokenizer, maxlen=40, maxlen_prompt=30)
    run(tmp_path / "published", tiny_policy, tmp_path / "pairs", num_responses=5, maxlen=40, maxlen_prompt=30)
    assert set(read(tmp_path / "pairs")) == {pair["prompt_id"] for pair in pairs[:-2]}


# Refusals


def test_bad_values_are_refused_by_flag(tmp_path):
    for flags, sentence in (
        ({"num_responses": 1}, "--num_responses is 1; expected 2 or more"),
        ({"min_responses": 6}, "--min_responses is 6; expected 2 to 5"),
        ({"test_size": 0}, "--test_size is 0; expected a number of prompts, or a fraction"),
        ({"test_size": 1.5}, "--test_size is 1.5; expected"),
        ({"min_margin": 2.0, "max_margin": 1.0}, "--min_margin 2 is above --max_margin 1"),
        ({"null_reward": float("nan")}, "--null_reward is nan"),
    ):
        with pytest.raises(BadUse, match=sentence):
            stage.main(stage.Config(input_repo=str(tmp_path), **flags))


def test_missing_columns_are_named_with_the_command_that_writes_them(tiny_policy, tmp_path):
    source = write_rewards(tmp_path / "rewards", many(3))
    with pytest.raises(BadUse, match=r"no column response_3 .*generate writes it.*lower --num_responses \(now 4\)"):
        run(source, tiny_policy, tmp_path / "pairs", num_responses=4)
    rows = [{name: row[name] for name in row if name != "response_2_reward"} for row in many(3)]
    with pytest.raises(BadUse, match=r"no column response_2_reward .*rlhf_pipeline\.rank writes it"):
        run(write_rewards(tmp_path / "unscored", rows), tiny_policy, tmp_path / "pairs")


def test_too_large_a_test_split_is_refused_with_one_that_works_and_leaves_nothing(tiny_policy, tmp_path):
    """20 rows against the default 1000: refused before any work. 18 of 20 kept against 19: after it."""
    rows = many(20)
    rows[3]["response_0"] = rows[4]["response_0"] = LONG
    source = write_rewards(tmp_path / "rewards", rows)
    with pytest.raises(BadUse, match=r"--test_size 1000 leaves nothing .* 20 prompts: pass --test_size 2 or"):
        run(source, tiny_policy, tmp_path / "pairs", test_size=1000)
    with pytest.raises(BadUse, match=r"--test_size 19 leaves nothing .*after filtering there are 18 prompts"):
        run(source, tiny_policy, tmp_path / "pairs", test_size=19)
    made = run(source, tiny_policy, tmp_path / "pairs", test_size=2)
    assert made["prompts_out"] == {"train": 16, "test": 2}


def test_nothing_left_is_refused_with_the_reasons(tiny_policy, tmp_path):
    source = write_rewards(tmp_path / "rewards", many(5))
    with pytest.raises(BadUse, match=r"no prompt of .* is left \(margin_too_small 5\)"):
        run(source, tiny_policy, tmp_path / "pairs", min_margin=9.0)
    run(source, tiny_policy, tmp_path / "pairs")


def test_a_chat_other_than_the_one_of_sampling_is_refused(chat, tiny_policy, tmp_path):
    sampling = {"model": "the/sampler", "temperature": 0.7}
    came = {"identity": {}, "chat": chat.describe(), "sampling": sampling}
    source = write_rewards(tmp_path / "rewards", many(5), came)
    made = run(source, tiny_policy, tmp_path / "pairs")
    assert made["sampling"] == sampling
    with pytest.raises(BadUse, match=r"sampled by the/sampler with another system prompt .*--system_prompt as"):
        run(source, tiny_policy, tmp_path / "other", system_prompt="Be brief.")
    for key, words in (
        ("tokenizer_hash", "another tokenizer .* give --model as generate had it"),
        ("template_hash", "another chat template .* give --model and --chat_template as"),
    ):
        other = {**came, "chat": {**chat.describe(), key: "0" * 64}}
        with pytest.raises(BadUse, match=words):
            run(write_rewards(tmp_path / key, many(5), other), tiny_policy, tmp_path / "other")


def test_text_that_the_template_can_not_encode_is_refused_before_any_work(tiny_policy, tmp_path):
    template = tmp_path / "opens_a_thought.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    )
    source = write_rewards(tmp_path / "rewards", many(5))
    with pytest.raises(BadUse, match=rf"template of {template} can't encode .*--chat_template"):
        run(source, tiny_policy, tmp_path / "pairs", chat_template=str(template))


def test_the_system_prompt_of_sampling_is_the_one_of_training(tiny_policy, tmp_path):
    chat = Chat.load(tiny_policy, system_prompt="Be brief.")
    source = write_rewards(tmp_path / "rewards", many(5), {"identity": {}, "chat": chat.describe()})
    made = run(source, tiny_policy, tmp_path / "pairs")
    row = read(tmp_path / "pairs")["p1"]
    assert row["prompt_tokens"][-row["prompt_length"] :] == chat.prompt_ids("Question 1?")
    assert made["chat"]["system_prompt"] == "Be brief."


# The command


def test_check_prints_the_plan_and_writes_nothing(tiny_policy, tmp_path, capsys):
    source = write_rewards(tmp_path / "rewards", many(5))
    flags: Row = {"num_responses": 3, "output_repo": str(tmp_path / "pairs"), "test_size": 1}
    checks = RunFlags(check=True)
    stage.main(stage.Config(input_repo=str(source), model=str(tiny_policy), run=checks, **flags))
    printed = capsys.readouterr().out
    assert "5 prompts with 3 responses each" in printed
    assert "encoded from text by the chat template" in printed
    assert "no finish_reason: every response counts as finished" in printed
    pending = RunFlags(check=True, pending=("./to/come=7", f"{tmp_path}/policy=0"))
    stage.main(stage.Config(input_repo="./to/come", model=f"{tmp_path}/policy", run=pending, **flags))
    assert "./to/come: 7 prompts" in capsys.readouterr().out
    with pytest.raises(BadUse, match=r"--test_size 7 leaves nothing to train on"):
        stage.main(stage.Config(input_repo="./to/come", run=pending, **{**flags, "test_size": 7}))
    assert not (tmp_path / "pairs").exists()


def test_the_command_runs_says_done_the_second_time_and_refuses_another_run(run_command, tiny_policy, tmp_path):
    import datasets

    source = write_rewards(tmp_path / "rewards", faulty_rows())
    line = (
        "filter", "--input_repo", source, "--output_repo", tmp_path / "pairs", "--model", tiny_policy,
        "--pairs", 3, "--maxlen", 30, "--maxlen-prompt", 40, "--test_size", 1,
    )  # fmt: skip
    first = run_command(*line)
    assert first.returncode == 0, first.stderr
    assert "kept       3 of 11 prompts" in first.stdout
    assert "3 of them (27.3%) would stay with --min_responses 2" in first.stdout
    loaded = datasets.load_dataset(str(tmp_path / "pairs"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 2, "test": 1}
    written = (tmp_path / "pairs" / "provenance.json").stat().st_mtime_ns

    second = run_command(*line)
    assert second.returncode == 0
    assert "done before" in second.stdout
    assert (tmp_path / "pairs" / "provenance.json").stat().st_mtime_ns == written

    other = run_command(*line, "--maxlen", 29)
    assert other.returncode == 2
    assert other.stderr.startswith("error: ")
    assert other.stderr.count("\n") == 1
    assert "maxlen was 30, now 29" in other.stderr
    assert "--overwrite" in other.stderr


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_pairs(run_command, command_environment, tiny_policy, tmp_path):
    """Killed by SIGKILL when 2, 5 and 9 of 16 blocks are there; its worker processes end with it."""
    source = write_rewards(tmp_path / "rewards", many(16 * pair_blocks.BLOCK_ROWS))
    run(source, tiny_policy, tmp_path / "whole", num_proc=2)
    flags = [
        "--input_repo", source, "--output_repo", tmp_path / "pairs", "--model", tiny_policy, "--num_responses", 3,
        "--maxlen", 30, "--maxlen_prompt", 40, "--test_size", 1, "--num_proc", 2,
    ]  # fmt: skip
    journal = storage.partial_folder(tmp_path / "pairs") / "journal"
    for blocks in (2, 5, 9):
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_pipeline.filter", *map(str, flags)],
            env=command_environment,
            start_new_session=True,
        )
        while len(list(journal.glob("block-*.parquet"))) < blocks:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        assert len(workers) == 2
        deadline = time.monotonic() + 10
        while any(is_running(worker) for worker in workers):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)
    finished = run_command("filter", *flags)
    assert finished.returncode == 0, finished.stderr
    for path in sorted((tmp_path / "whole" / "data").iterdir()):
        assert (tmp_path / "pairs" / "data" / path.name).read_bytes() == path.read_bytes()


def is_running(pid: str) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
