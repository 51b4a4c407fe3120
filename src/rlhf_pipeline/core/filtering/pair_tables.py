"""Tables of pairs: made of rows with rewards, a block at a time, unpadded; padded when they are published."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlhf_pipeline.core import schema
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.filtering.selection import (
    PROMPT_NOT_ENCODABLE,
    PROMPT_TOO_LONG,
    Outcome,
    Response,
    Rules,
    reward_of,
    select,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from rlhf_pipeline.core.chat import Chat, Prompt

Ids = npt.NDArray[np.int32]
SPLIT_KEY = "split_key"
"""A prompt's place in the order by which the test split is drawn; not published."""


@dataclass(frozen=True)
class Column:
    """Response i to each of n prompts. tokens: None where the template can't encode the text, or nobody asked."""

    texts: list[str]
    rewards: list[float | None]
    truncated: list[bool]
    tokens: list[Ids | None]
    sampled: list[bool]

    def at(self, row: int) -> Response:
        tokens = self.tokens[row]
        length = None if tokens is None else len(tokens)
        return Response(self.texts[row], self.rewards[row], length, self.truncated[row])


@dataclass(frozen=True)
class Block:
    """Some prompts and all that is to be known of them. prompt_tokens: ids, or what the chat says against a prompt."""

    prompt_ids: Sequence[str]
    prompts: list[Prompt]
    prompt_tokens: list[list[int] | BadUse]
    columns: list[Column]


def input_columns(available: Sequence[str], num_responses: int) -> list[str]:
    """The columns that `read_block` looks at, of those that are there."""
    kinds = (schema.response, schema.response_reward, schema.response_finish_reason, schema.response_tokens)
    names = [schema.PROMPT, *(kind(i) for i in range(num_responses) for kind in kinds)]
    return [name for name in names if name in available]


def read_block(
    table: pa.Table, prompt_ids: Sequence[str], chat: Chat, *, num_responses: int, maxlen_prompt: int
) -> Block:
    """Encode a block's prompts, and those of its responses that come without sampled ids."""
    prompts = table.column(schema.PROMPT).to_pylist()
    prompt_tokens = _encode(chat.encode_prompts, prompts)
    fitting = [row for row, tokens in enumerate(prompt_tokens) if _unfit(tokens, maxlen_prompt) is None]
    columns = [_read_column(table, i, prompts, fitting, chat) for i in range(num_responses)]
    return Block(prompt_ids, prompts, prompt_tokens, columns)


def _encode(encode: Callable[..., Sequence[Any]], *columns: Sequence[Any]) -> list[Any]:
    """What `encode` gives for each row of the columns, or the BadUse that it raises for that row."""
    try:
        return list(encode(*columns))
    except BadUse as refusal:
        if len(columns[0]) == 1:
            return [refusal]
        rows = zip(*columns, strict=True)  # one of them at least: find out which
        return [item for row in rows for item in _encode(encode, *([value] for value in row))]


def _unfit(tokens: list[int] | BadUse, maxlen_prompt: int) -> str | None:
    """Why a prompt is dropped, whatever its responses."""
    if isinstance(tokens, BadUse):
        return PROMPT_NOT_ENCODABLE
    return PROMPT_TOO_LONG if len(tokens) > maxlen_prompt else None


def _read_column(table: pa.Table, i: int, prompts: Sequence[Prompt], fitting: Sequence[int], chat: Chat) -> Column:
    def values(name: str) -> list[Any]:
        return table.column(name).to_pylist() if name in table.column_names else [None] * len(table)

    texts = [text or "" for text in values(schema.response(i))]
    truncated = [reason == "length" for reason in values(schema.response_finish_reason(i))]
    name = schema.response_tokens(i)
    tokens: list[Ids | None] = [None] * len(table)
    if name in table.column_names:
        tokens = _token_rows(table.column(name))
    sampled = [ids is not None for ids in tokens]
    missing = [row for row in fitting if not sampled[row]]
    encoded = _encode_responses(chat, [prompts[row] for row in missing], [texts[row] for row in missing])
    for row, ids in zip(missing, encoded, strict=True):
        tokens[row] = None if ids is None else np.array(without_end(ids, truncated[row]), np.int32)
    return Column(texts, values(schema.response_reward(i)), truncated, tokens, sampled)


def _encode_responses(chat: Chat, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[list[int] | None]:
    """chat.encode_responses; None also where the template refuses the prompt with an answer."""
    return [None if isinstance(ids, BadUse) else ids for ids in _encode(chat.encode_responses, prompts, texts)]


def without_end(ids: list[int], truncated: bool) -> list[int]:
    """A template ends every response; one that was cut off has no end."""
    return ids[:-1] if truncated else ids


def _token_rows(column: pa.ChunkedArray) -> list[Ids | None]:
    import pyarrow as pa

    array = column.cast(pa.list_(pa.int32())).combine_chunks()
    values, offsets = array.values.to_numpy(), array.offsets.to_numpy()
    return [
        values[start:end] if valid else None
        for start, end, valid in zip(offsets[:-1], offsets[1:], array.is_valid().to_pylist(), strict=True)
    ]


def judge(block: Block, rules: Rules, maxlen_prompt: int) -> list[Outcome]:
    """What becomes of each prompt of the block."""
    return [
        Outcome((), reason, {})
        if (reason := _unfit(tokens, maxlen_prompt))
        else select([column.at(row) for column in block.columns], rules, prompt_id)
        for row, (prompt_id, tokens) in enumerate(zip(block.prompt_ids, block.prompt_tokens, strict=True))
    ]


def make_pairs(block: Block, outcomes: Sequence[Outcome], prompts: pa.ChunkedArray, rules: Rules) -> pa.Table:
    """The block's pairs, unpadded, with their SPLIT_KEY. `prompts`: the prompt column, whose type they keep."""
    import pyarrow as pa

    places = [(row, c, r) for row, outcome in enumerate(outcomes) for c, r in outcome.pairs]
    rows = [row for row, _, _ in places]
    chosen = [block.columns[c].at(row) for row, c, _ in places]
    rejected = [block.columns[r].at(row) for row, _, r in places]
    tokens = {
        "prompt": _list_array([np.array(block.prompt_tokens[row], np.int32) for row in rows]),
        "chosen": _list_array([_known(block.columns[c].tokens[row]) for row, c, _ in places]),
        "rejected": _list_array([_known(block.columns[r].tokens[row]) for row, _, r in places]),
    }
    rewards = [[_finite(reward_of(column.at(row), rules)) for column in block.columns] for row in rows]
    columns = {
        schema.PROMPT_ID: pa.array([block.prompt_ids[row] for row in rows], pa.string()),
        schema.PROMPT: prompts.take(pa.array(rows, pa.int64())),
        "chosen": pa.array([response.text for response in chosen], pa.string()),
        "rejected": pa.array([response.text for response in rejected], pa.string()),
        "chosen_reward": pa.array([reward_of(response, rules) for response in chosen], pa.float64()),
        "rejected_reward": pa.array([reward_of(response, rules) for response in rejected], pa.float64()),
        "rewards": pa.array(rewards, pa.list_(pa.float64())),
        **{f"{name}_tokens": array for name, array in tokens.items()},
        **{f"{name}_length": array.value_lengths() for name, array in tokens.items()},
        "chosen_index": pa.array([c for _, c, _ in places], pa.int32()),
        "rejected_index": pa.array([r for _, _, r in places], pa.int32()),
        SPLIT_KEY: pa.array([split_key(block.prompts[row], rules.seed) for row in rows], pa.string()),
    }
    return pa.table(columns)


def _known(tokens: Ids | None) -> Ids:
    assert tokens is not None, "a response without ids does not survive"
    return tokens


def _finite(reward: float) -> float | None:
    return reward if np.isfinite(reward) else None


def _list_array(rows: Sequence[Ids]) -> pa.ListArray:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate([np.zeros(0, np.int32), *rows]))


def split_key(prompt: Prompt, seed: int) -> str:
    """Where a prompt stands in the seeded order: by what it says, so in every iteration the same are held out."""
    return hashlib.sha256(f"{seed} {json.dumps(prompt, sort_keys=True)}".encode()).hexdigest()


def count_round_trip_changes(block: Block, outcomes: Sequence[Outcome], chat: Chat) -> tuple[int, int]:
    """(pairs with sampled ids, those of them where the text of a response would be encoded as other ids)."""
    pairs = [{(row, c), (row, r)} for row, outcome in enumerate(outcomes) for c, r in outcome.pairs]
    sampled = sorted(place for place in set().union(*pairs) if block.columns[place[1]].sampled[place[0]])
    encoded = _encode_responses(
        chat, [block.prompts[row] for row, _ in sampled], [block.columns[i].texts[row] for row, i in sampled]
    )
    changed = {
        (row, i)
        for (row, i), ids in zip(sampled, encoded, strict=True)
        if ids is None
        or without_end(ids, block.columns[i].truncated[row]) != _known(block.columns[i].tokens[row]).tolist()
    }
    with_ids = set(sampled)
    return sum(bool(pair & with_ids) for pair in pairs), sum(bool(pair & changed) for pair in pairs)


def tally(block: Block, outcomes: Sequence[Outcome], first_row: int) -> dict[str, Any]:
    """Counts of what became of the prompts, and a line for each that was dropped. `first_row`: the block's, in the
    input."""
    skipped = [
        {
            "prompt_id": block.prompt_ids[row],
            "row": first_row + row,
            "reason": outcome.reason,
            "responses": {str(i): fault for i, fault in outcome.faults.items()},
            **({"detail": str(tokens)} if isinstance(tokens, BadUse) else {}),
        }
        for row, (outcome, tokens) in enumerate(zip(outcomes, block.prompt_tokens, strict=True))
        if outcome.reason is not None
    ]
    return {
        "prompts": len(outcomes),
        "dropped": Counter(outcome.reason for outcome in outcomes if outcome.reason is not None),
        "faults": Counter(fault for outcome in outcomes for fault in outcome.faults.values()),
        "liftable": sum(outcome.liftable for outcome in outcomes),
        "tied_best": sum(outcome.tied_best for outcome in outcomes),
        "tied_worst": sum(outcome.tied_worst for outcome in outcomes),
        "skipped": skipped,
    }


# What is published


def pad(table: pa.Table, *, maxlen_prompt: int, maxlen: int, pad_id: int) -> pa.Table:
    """The columns of schema.PAIR_COLUMNS: prompts left-padded to maxlen_prompt, responses right-padded to maxlen."""
    for name, width in (
        ("prompt_tokens", maxlen_prompt),
        ("chosen_tokens", maxlen),
        ("rejected_tokens", maxlen),
    ):
        padded = _padded(table.column(name), width, pad_id, left=name == "prompt_tokens")
        table = table.set_column(table.column_names.index(name), name, padded)
    return table.select(list(schema.PAIR_COLUMNS))


def _padded(column: pa.ChunkedArray, width: int, pad_id: int, *, left: bool) -> pa.ListArray:
    import pyarrow as pa

    array = column.combine_chunks()
    values, offsets = array.values.to_numpy(), array.offsets.to_numpy()
    rows = np.full((len(array), width), pad_id, np.int32)
    for row, start, end in zip(rows, offsets[:-1], offsets[1:], strict=True):
        place = slice(width - (end - start), width) if left else slice(0, end - start)
        row[place] = values[start:end]
    ends = np.arange(len(array) + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(ends, rows.reshape(-1))


def with_tutorial_columns(table: pa.Table, chat: Chat) -> pa.Table:
    """`table` with the columns of the tutorial's trainer beside ours, and the texts that go with its tokens."""
    import pyarrow as pa

    for theirs, ours in schema.TUTORIAL_NAMES.items():
        if ours in table.column_names:
            table = table.append_column(theirs, table.column(ours))
    for name, ours in (("llama_prompt", "prompt"), ("llama_chosen", "chosen"), ("llama_reject", "rejected")):
        texts = [
            chat.tokenizer.decode(tokens[-length:] if ours == "prompt" else tokens[:length])
            for tokens, length in zip(
                table.column(f"{ours}_tokens").to_pylist(),
                table.column(f"{ours}_length").to_pylist(),
                strict=True,
            )
        ]
        table = table.append_column(name, pa.array(texts, pa.string()))
    return table


def cut(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `size` rows, but for the last."""
    import pyarrow as pa

    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(map(len, waiting)) >= size:
            whole = pa.concat_tables(waiting, promote_options="permissive")
            yield whole.slice(0, size)
            waiting = [whole.slice(size)]
    if any(map(len, waiting)):
        yield pa.concat_tables(waiting, promote_options="permissive")
