"""Which rows of a dataset are prompts to answer: chosen, rendered to ids, and set aside with a reason if
unusable."""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rlhf_pipeline.core import schema
from rlhf_pipeline.core.chat import Chat, turns_of
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.storage import Source

BLOCK = 256
"""Prompts rendered in one call of the tokenizer."""

EMPTY = "empty"
NOT_TEXT = "neither text nor messages"
OTHER_KIND = "text among messages, or messages among text"
NO_CONVERSATION = "no conversation that an answer can follow"
TOO_LONG = "no room for a response in the window"


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer. row: its place in the dataset. ids: what the model sees, in 4 bytes each; none for an
    endpoint."""

    row: int
    prompt_id: str
    prompt: Any
    category: Any
    ids: array[int]


@dataclass(frozen=True)
class Prompts:
    """`kept` and `skipped` together are the chosen rows, in their order.

    skipped: {row, prompt_id, reason, detail}. repeated: kept prompts that render to the ids of an earlier
    one; without ids, that equal it.
    """

    kept: list[Prompt]
    skipped: list[dict[str, Any]]

    @property
    def reasons(self) -> dict[str, int]:
        return dict(Counter(item["reason"] for item in self.skipped))

    @property
    def repeated(self) -> int:
        return len(self.kept) - len({prompt.ids.tobytes() or json.dumps(prompt.prompt) for prompt in self.kept})

    @property
    def longest(self) -> int:
        return max(len(prompt.ids) for prompt in self.kept)


def choose_rows(
    num_rows: int,
    *,
    start_idx: int = 0,
    end_idx: int = -1,
    num_prompts: int | None = None,
    shuffle_seed: int | None = None,
) -> list[int]:
    """Row numbers: all of them, shuffled if a seed is given, then start_idx to end_idx (-1: the end), then
    the first num_prompts. Raises BadUse for a range that is empty or runs past the dataset.
    """
    end = num_rows if end_idx == -1 else end_idx
    if start_idx < 0 or start_idx >= num_rows:
        raise BadUse(f"--start_idx {start_idx} is none of the rows 0 to {num_rows - 1}.")
    if end > num_rows:
        raise BadUse(f"--end_idx {end_idx} is past the last of {num_rows} rows; -1 means the end.")
    if end <= start_idx:
        raise BadUse(f"--end_idx {end_idx} leaves no rows after --start_idx {start_idx}; it must be larger, or -1.")
    rows = list(range(num_rows))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(rows)
    return rows[start_idx:end][:num_prompts]


def read_as_prompt(source: Source, column: str) -> Source:
    """The same source with `column` as its prompt. Raises BadUse if there is no such column."""
    if column not in source.columns:
        raise BadUse(
            f"{source.name} has no column {column} (it has {', '.join(source.columns)}): "
            "name the one that holds the prompts with --prompt_column."
        )
    if column == schema.PROMPT:
        return source
    original = {ours: theirs for theirs, ours in source.renamed.items()}.get(column, column)
    others = {theirs: ours for theirs, ours in source.renamed.items() if ours not in (column, schema.PROMPT)}
    columns = (schema.PROMPT if name == column else name for name in source.columns if name != schema.PROMPT)
    return replace(source, columns=tuple(columns), renamed={**others, original: schema.PROMPT})


def prepare(source: Source, chat: Chat | None, rows: Sequence[int], window: int | None) -> Prompts:
    """Read `rows`, and render them with the chat. window: tokens of prompt and response together, at most.

    Without a chat prompts stay text and messages, and are not measured. Raises BadUse if none can be used, or if the
    chat template writes other than one BOS.
    """
    kept: list[Prompt] = []
    skipped: list[dict[str, Any]] = []
    ids_of_rows = source.prompt_ids()
    kind: type | None = None

    def set_aside(number: int, reason: str, detail: str = "") -> None:
        skipped.append({"row": number, "prompt_id": ids_of_rows[number], "reason": reason, "detail": detail})

    for block in _blocks(source, rows):
        usable = []
        for number, row in block:
            reason = _unusable(row[schema.PROMPT], kind)
            if reason is not None:
                set_aside(number, reason)
                continue
            kind = kind or type(row[schema.PROMPT])
            usable.append((number, row))
        encode = _take_as_they_are if chat is None else partial(_encode, chat)
        encoded = encode([row[schema.PROMPT] for _, row in usable])
        for (number, row), ids in zip(usable, encoded, strict=True):
            if isinstance(ids, BadUse):
                set_aside(number, NO_CONVERSATION, str(ids))
            elif window is not None and len(ids) >= window:
                set_aside(number, TOO_LONG, f"{len(ids)} tokens, window {window}")
            else:
                if chat is not None:
                    chat.check_one_bos(ids)
                kept.append(
                    Prompt(
                        number,
                        ids_of_rows[number],
                        _with_text(row[schema.PROMPT]),
                        row.get(schema.CATEGORY),
                        array("i", ids),
                    )
                )
    prompts = Prompts(kept, skipped)
    if not kept:
        counts = ", ".join(f"{count} x {reason}" for reason, count in prompts.reasons.items())
        detail = next((f" ({item['detail']})" for item in skipped if item["detail"]), "")
        raise BadUse(f"none of the {len(rows)} prompts of {source.name} can be answered: {counts}{detail}.")
    return prompts


def _blocks(source: Source, rows: Sequence[int]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """(row number, row) in the order of `rows`, BLOCK at a time; the dataset is read once, in its own
    order."""
    columns = [name for name in (schema.PROMPT, schema.CATEGORY) if name in source.columns]
    first, wanted = min(rows), set(rows)
    found = source.rows(columns, start=first, stop=max(rows) + 1)
    read = {number: row for number, row in enumerate(found, first) if number in wanted}
    for start in range(0, len(rows), BLOCK):
        yield [(number, read.pop(number)) for number in rows[start : start + BLOCK]]


def _with_text(prompt: Any) -> Any:
    """The prompt with text as each message's content: a column can't hold text in some rows and parts in others."""
    return prompt if isinstance(prompt, str) else turns_of(prompt, None)


def _unusable(prompt: Any, kind: type | None) -> str | None:
    """Why `prompt` can't be used, if that shows before it is rendered. kind: of the first one that could."""
    if prompt is None or prompt == [] or (isinstance(prompt, str) and not prompt.strip()):
        return EMPTY
    if not isinstance(prompt, str | list):
        return NOT_TEXT
    return OTHER_KIND if kind is not None and not isinstance(prompt, kind) else None


def _encode(chat: Chat, prompts: Sequence[Any]) -> list[list[int] | BadUse]:
    """The ids of each prompt, or what its chat says against it."""
    try:
        return list(chat.encode_prompts(prompts))
    except BadUse:  # one of them at least: find out which
        return [_encode_one(chat, prompt) for prompt in prompts]


def _take_as_they_are(prompts: Sequence[Any]) -> list[list[int] | BadUse]:
    """No ids for a prompt that an answer can follow, and what there is to say against any other."""
    found: list[list[int] | BadUse] = []
    for prompt in prompts:
        try:
            turns_of(prompt, None)
            found.append([])
        except BadUse as error:
            found.append(error)
    return found


def _encode_one(chat: Chat, prompt: Any) -> list[int] | BadUse:
    try:
        return chat.prompt_ids(prompt)
    except BadUse as error:
        return error
