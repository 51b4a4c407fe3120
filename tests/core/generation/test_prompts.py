"""Which rows are sampled: slices and shuffles, and what is set aside instead of ending the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.generation.prompts import Prompts, choose_rows, prepare, read_as_prompt
from rlhf_pipeline.core.storage import open_source


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
