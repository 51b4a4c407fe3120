"""The shapes in which preference pairs are published, read as prompt, chosen and rejected."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_pipeline.core.comparisons import texts_of

ASKED = [{"role": "user", "content": "Hi?"}]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi?", "chosen": "a", "rejected": "b"}, "Hi?"),
        ({"prompt": ASKED, "chosen": "a", "rejected": "b"}, ASKED),
        ({"prompt": ASKED, "chosen": [said("a")], "rejected": [said("b")]}, ASKED),
        ({"chosen": [*ASKED, said("a")], "rejected": [*ASKED, said("b")]}, ASKED),
        ({"prompt": "as text too", "chosen": [*ASKED, said("a")], "rejected": [*ASKED, said("b")]}, ASKED),
    ],
)
def test_texts_and_message_lists_are_read_alike(row: dict[str, Any], prompt: Any) -> None:
    assert texts_of(row) == (prompt, "a", "b")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "a", "rejected": "b"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": "Hi?", "chosen": "a", "rejected": None},
        {"prompt": "Hi?", "chosen": "a", "rejected": []},
        {"prompt": "Hi?", "chosen": ["a"], "rejected": ["b", "c"]},
        {"chosen": [*ASKED, said("a")], "rejected": [said("Hello"), said("b")]},
    ],
)
def test_what_is_no_pair_is_none(row: dict[str, Any]) -> None:
    assert texts_of(row) is None
