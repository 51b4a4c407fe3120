"""Which rows are sampled: slices and shuffles, and what is set aside instead of ending the run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.generation.prompts import Prompts, choose_rows, prepare, read_as_prompt
from rlhf_pipeline.core.storage import open_output, open_source


def test_slices_are_taken_of_the_rows_in_their_order():
    assert choose_rows(6) == [0, 1, 2, 3, 4, 5]
    assert choose_rows(6, start_idx=4) == [4, 5]
    assert choose_rows(6, end_idx=2) == [0, 1]
    assert choose_rows(6, start_idx=1, end_idx=5, num_prompts=2) == [1, 2]


def test_slices_of_one_shuffle_are_disjoint_and_cover_the_dataset():
    """Chunks for iterations: the shuffle comes before the slice, and its seed fixes it."""
    first, second = (choose_rows(10, start_idx=s, end_idx=s + 5, shuffle_seed=3) for s in (0, 5))
    assert sorted(first + second) == list(range(10))
    assert first != sorted(first)
    assert first == choose_rows(10, num_prompts=5, shuffle_seed=3) != choose_rows(10, num_prompts=5, shuffle_seed=4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"start_idx": 6}, "--start_idx 6 is none of the rows 0 to 5."),
        ({"start_idx": -1}, "--start_idx -1 is none of the rows 0 to 5."),
        ({"end_idx": 7}, "--end_idx 7 is past the last of 6 rows; -1 means the end."),
        ({"start_idx": 3, "end_idx": 3}, "--end_idx 3 leaves no rows after --start_idx 3"),
        ({"start_idx": 3, "end_idx": 1}, "--end_idx 1 leaves no rows after --start_idx 3"),
    ],
)
def test_a_range_without_rows_is_refused(options, sentence):
    with pytest.raises(BadUse) as error:
        choose_rows(6, **options)
    assert str(error.value).startswith(sentence)


def load(
    tmp_path: Path, rows: list[dict[str, Any]], policy: Path, *, column: str = "prompt", window: int = 40
) -> Prompts:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = read_as_prompt(open_source(str(path), flag="--prompts"), column)
    return prepare(source, Chat.load(policy), list(range(len(rows))), window)


def reasons(prompts: Prompts) -> dict[int, str]:
    return {item["row"]: item["reason"] for item in prompts.skipped}


def test_unusable_prompts_are_set_aside_and_the_others_kept(tmp_path, tiny_policy):
    rows: list[dict[str, Any]] = [
        {"prompt": text} for text in ("Hello!", "", None, "  \n", 17, "What is snow? " * 20, "Hello!", {"a": 1})
    ]
    rows.append({"prompt": [{"role": "user", "content": "Hi"}]})
    prompts = load(tmp_path, rows, tiny_policy)
    assert [(prompt.row, prompt.prompt) for prompt in prompts.kept] == [(0, "Hello!"), (6, "Hello!")]
    assert reasons(prompts) == {
        1: "empty",
        2: "empty",
        3: "empty",
        4: "neither text nor messages",
        5: "no room for a response in the window",
        7: "neither text nor messages",
        8: "text among messages, or messages among text",
    }
    assert prompts.repeated == 1
    assert len({prompt.prompt_id for prompt in prompts.kept}) == 2


def test_messages_that_no_answer_can_follow_are_set_aside(tmp_path, tiny_policy):
    good = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "?"},
    ]
    bad = {1: good[:2], 2: [{"content": "no role"}], 3: []}
    prompts = load(tmp_path, [{"prompt": good}, *({"prompt": turns} for turns in bad.values())], tiny_policy, window=60)
    assert [prompt.row for prompt in prompts.kept] == [0]
    assert prompts.kept[0].prompt == good
    assert reasons(prompts) == {1: "no conversation that an answer can follow"} | {
        2: "no conversation that an answer can follow",
        3: "empty",
    }


def test_content_in_parts_is_kept_as_text_and_pictures_are_set_aside(tmp_path, tiny_policy):
    """Beside content that is text: one column holds both."""
    texts = [[{"role": "user", "content": content}] for content in ("Hi", [{"type": "text", "text": "Hi"}])]
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}]}]
    prompts = load(tmp_path, [{"prompt": prompt} for prompt in (*texts, picture)], tiny_policy)
    assert [(prompt.row, prompt.prompt) for prompt in prompts.kept] == [(0, texts[0]), (1, texts[0])]
    assert prompts.kept[0].ids == prompts.kept[1].ids
    [skipped] = prompts.skipped
    assert (skipped["row"], skipped["reason"]) == (2, "no conversation that an answer can follow")
    assert "must be text, or a list of parts of type text, not" in skipped["detail"] and "x.png" in skipped["detail"]


def test_a_prompt_one_token_shorter_than_the_window_is_kept(tmp_path, tiny_policy):
    length = len(load(tmp_path, [{"prompt": "Hello!"}], tiny_policy).kept[0].ids)
    assert load(tmp_path, [{"prompt": "Hello!"}], tiny_policy, window=length + 1).longest == length
    with pytest.raises(BadUse, match=rf"none of the 1 prompts .* 1 x no room .* \({length} tokens, window {length}\)"):
        load(tmp_path, [{"prompt": "Hello!"}], tiny_policy, window=length)


def test_prompts_are_rendered_with_exactly_one_bos(tmp_path, tiny_policy):
    chat = Chat.load(tiny_policy)
    for prompt in load(tmp_path, [{"prompt": text} for text in ("Hello!", "What?")], tiny_policy).kept:
        assert [token for token in prompt.ids if token == chat.bos_id] == [prompt.ids[0]]


def test_ids_are_made_before_rows_are_chosen(tmp_path, tiny_policy):
    """The second 'Hello!' is -2 also where the first is not among the chosen rows."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hello!", "Hm", "Hello!")))
    source = open_source(str(path), flag="--prompts")
    (alone,) = prepare(source, Chat.load(tiny_policy), [2], 40).kept
    assert alone.prompt_id == source.prompt_ids()[2] == source.prompt_ids()[0] + "-2"


def test_rows_come_in_the_order_in_which_they_were_chosen(tmp_path, tiny_policy):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "category": i % 2}) + "\n" for i in range(600)))
    rows = choose_rows(600, shuffle_seed=1)[:400]
    kept = prepare(open_source(str(path), flag="--prompts"), Chat.load(tiny_policy), rows, 40).kept
    assert [prompt.row for prompt in kept] == rows
    assert [(int(prompt.prompt), prompt.category) for prompt in kept] == [(row, row % 2) for row in rows]


def test_another_column_can_hold_the_prompts(tmp_path, tiny_policy):
    rows = [{"prompt": "not this", "question": "Hello!"}]
    assert load(tmp_path, rows, tiny_policy, column="question").kept[0].prompt == "Hello!"
    with pytest.raises(BadUse, match=r"has no column text \(it has prompt, question\): .* --prompt_column"):
        load(tmp_path, rows, tiny_policy, column="text")


def write_as(kind: str, folder: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in a file of that kind, or as a dataset folder of ours."""
    path = folder / f"prompts.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with open_output(path, {}, overwrite=False) as output:
            output.write_shard("train", 0, pa.Table.from_pylist(rows))
            output.publish({}, "")
    return path


TEXTS = [{"prompt": 'Why, "oh" why?\nTell me.'}, {"prompt": "Grüß Gott"}, {"prompt": "Hello!"}]
TALKS = [
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    {
        "prompt": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Why?"},
        ]
    },
]


@pytest.mark.parametrize(
    ("kind", "rows"),
    [(kind, TEXTS) for kind in ("json", "csv", "parquet", "repo")]
    + [(kind, TALKS) for kind in ("json", "parquet", "repo")],
)
def test_prompts_are_the_same_wherever_they_are_kept(kind, rows, tmp_path, tiny_policy):
    chat = Chat.load(tiny_policy)
    expected = prepare(
        open_source(str(write_as("jsonl", tmp_path, rows)), flag="--prompts"), chat, range(len(rows)), 99
    )
    found = prepare(open_source(str(write_as(kind, tmp_path, rows)), flag="--prompts"), chat, range(len(rows)), 99)
    assert [(p.prompt, p.ids) for p in found.kept] == [(p.prompt, p.ids) for p in expected.kept]
    assert [p.prompt_id for p in found.kept] == [p.prompt_id for p in expected.kept]
    assert [p.prompt for p in found.kept] == [row["prompt"] for row in rows]


def test_a_system_prompt_and_a_template_of_ones_own_reach_the_ids(tmp_path, tiny_policy):
    """The system prompt goes where there is none; the template is the file's."""
    source = open_source(str(write_as("jsonl", tmp_path, TALKS)), flag="--prompts")
    file = tmp_path / "template.jinja"
    file.write_text(
        "{{ bos_token }}{% for turn in messages %}{{ turn.role }}={{ turn.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}assistant={% endif %}"
    )
    chat = Chat.load(tiny_policy, system_prompt="Be kind.", chat_template=str(file))
    texts = [chat.tokenizer.decode(prompt.ids) for prompt in prepare(source, chat, [0, 1], 99).kept]
    assert texts == [
        "<|begin_of_text|>system=Be brief.<|eot_id|>user=Hi<|eot_id|>assistant=",
        "<|begin_of_text|>system=Be kind.<|eot_id|>user=Hi<|eot_id|>assistant=Hello!<|eot_id|>user=Why?<|eot_id|>"
        "assistant=",
    ]


def test_without_a_chat_prompts_stay_as_they_are(tmp_path):
    """For an endpoint: nothing is measured, repeats are counted by their text, what no answer can follow is out."""
    rows = [{"prompt": text} for text in ("Hello!", "", "Why? " * 9000, "Hello!")]
    path = write_as("jsonl", tmp_path, rows)
    prompts = prepare(open_source(str(path), flag="--prompts"), None, range(4), None)
    assert [(prompt.row, len(prompt.ids)) for prompt in prompts.kept] == [(0, 0), (2, 0), (3, 0)]
    assert (prompts.repeated, prompts.reasons) == (1, {"empty": 1})
    talks = [*TALKS, {"prompt": TALKS[1]["prompt"][:2]}]
    prompts = prepare(open_source(str(write_as("json", tmp_path, talks)), flag="--prompts"), None, range(3), None)
    assert [prompt.row for prompt in prompts.kept] == [0, 1]
    assert reasons(prompts) == {2: "no conversation that an answer can follow"}
