"""The names of columns and splits: ours, and the table by which other people's names are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from rlhf_pipeline.core.command import BadUse

PROMPT_ID = "prompt_id"
PROMPT = "prompt"
CATEGORY = "category"
"""Optional column of a prompt dataset; carried along so that evaluate can report per category."""

PAIR_COLUMNS = (
    PROMPT_ID,
    PROMPT,
    "chosen",
    "rejected",
    "chosen_reward",
    "rejected_reward",
    "rewards",
    "prompt_tokens",
    "chosen_tokens",
    "rejected_tokens",
    "prompt_length",
    "chosen_length",
    "rejected_length",
    "chosen_index",
    "rejected_index",
)
"""What filter writes, in this order."""

TUTORIAL_NAMES = {
    "reject": "rejected",
    "reject_reward": "rejected_reward",
    "llama_prompt_tokens": "prompt_tokens",
    "llama_chosen_tokens": "chosen_tokens",
    "llama_reject_tokens": "rejected_tokens",
    "chosen_logprob": "chosen_logp",
    "reject_logprob": "rejected_logp",
}
"""The names in the tutorial's code and its published datasets -> ours."""

TUTORIAL_SPLITS = {"train": "train_prefs", "test": "test_prefs"}
"""Our split -> its name in the published datasets."""


class Columns(Protocol):
    """What `require` looks at: a dataset, under the name by which the user knows it."""

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> tuple[str, ...]: ...


def response(i: int) -> str:
    return f"response_{i}"


def response_tokens(i: int) -> str:
    return f"response_{i}_tokens"


def response_finish_reason(i: int) -> str:
    return f"response_{i}_finish_reason"


def response_reward(i: int) -> str:
    return f"response_{i}_reward"


def response_reward_error(i: int) -> str:
    return f"response_{i}_reward_error"


def response_objectives(i: int) -> str:
    return f"response_{i}_objectives"


def count_responses(columns: Sequence[str]) -> int:
    """How many of response_0, response_1, ... there are without a gap."""
    count = 0
    while response(count) in columns:
        count += 1
    return count


def require(source: Columns, names: Iterable[str], *, written_by: str, remedy: str) -> None:
    """Raise BadUse if `source` lacks a column, naming the command that writes it and what else would do.

    `remedy` completes "pass <written_by>'s output, or ...".
    """
    missing = [name for name in names if name not in source.columns]
    if missing:
        noun = "column" if len(missing) == 1 else "columns"
        raise BadUse(
            f"{source.name} has no {noun} {', '.join(missing)} (it has {_some(source.columns)}). "
            f"rlhf_pipeline.{written_by} writes it: pass {written_by}'s output, or {remedy}."
        )


def renamed(columns: Sequence[str]) -> dict[str, str]:
    """{name in the data: our name} for the columns that go by a tutorial name here and not also by ours."""
    return {old: new for old, new in TUTORIAL_NAMES.items() if old in columns and new not in columns}


def make_prompt_ids(prompts: Iterable[Any]) -> list[str]:
    """The first 16 hex digits of sha256 of each prompt's canonical JSON; -2, -3 for repeats in row order."""
    seen: dict[str, int] = {}
    ids = []
    for prompt in prompts:
        canonical = json.dumps(prompt, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        seen[digest] = seen.get(digest, 0) + 1
        ids.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return ids


def _some(columns: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(columns[:limit])
    return shown + ", ..." if len(columns) > limit else shown
