"""Chosen/rejected pairs in memory: trimmed to their real tokens on read, whatever made them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlhf_pipeline.core import schema
from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.comparisons import texts_of
from rlhf_pipeline.core.storage import Source

if TYPE_CHECKING:
    import pyarrow as pa

Ids = npt.NDArray[np.int32]
TOKENS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
LENGTHS = ("prompt_length", "chosen_length", "rejected_length")


@dataclass(frozen=True)
class PairData:
    """n pairs of one split. Rewards are in the reward model's units; token arrays hold real tokens only."""

    prompt_ids: list[str]
    chosen_index: npt.NDArray[np.int64]
    """(n,) which of the prompt's responses was chosen; -1 where the data does not say"""
    rejected_index: npt.NDArray[np.int64]
    prompt: list[Ids]
    chosen: list[Ids]
    rejected: list[Ids]
    chosen_reward: npt.NDArray[np.float64]
    rejected_reward: npt.NDArray[np.float64]
    rewards: npt.NDArray[np.float64] | None
    """(n, N) rewards of all responses to the prompt, NaN for one without; None where the data has no such column"""
    chosen_logp: npt.NDArray[np.float64] | None
    """(n,) reference log-probs that the data itself brings (the published datasets do), nats"""
    rejected_logp: npt.NDArray[np.float64] | None

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def select(self, rows: Sequence[int]) -> PairData:
        """The pairs `rows`, in that order."""

        def taken(values: Any) -> Any:
            if values is None:
                return None
            return values[list(rows)] if isinstance(values, np.ndarray) else [values[i] for i in rows]

        return PairData(**{field.name: taken(getattr(self, field.name)) for field in fields(self)})

    def lengths(self, *, packed: bool = False) -> npt.NDArray[np.int64]:
        """(n, 2) tokens of prompt + chosen and of prompt + rejected; packed: (n, 1) of all three, in one row."""
        prompt, *responses = self._sizes
        return np.stack([prompt + sum(responses)] if packed else [prompt + response for response in responses], axis=1)

    @functools.cached_property
    def _sizes(self) -> tuple[npt.NDArray[np.int64], ...]:
        columns = (self.prompt, self.chosen, self.rejected)
        return tuple(np.array([len(ids) for ids in column], dtype=np.int64) for column in columns)

    def margins(self) -> npt.NDArray[np.float64]:
        """(n,) reward_margin: chosen minus rejected."""
        return self.chosen_reward - self.rejected_reward


def load_pairs(source: Source, *, pad_id: int, end_ids: Sequence[int]) -> PairData:
    """Read a split of tokenized pairs. Raises BadUse for missing columns and for rewards that are not finite.

    Pairs made elsewhere have no length columns: there, and only there, padding is what equals `pad_id` at the outer
    ends; where a tokenizer pads with an end-of-turn id (one of `end_ids`) the first of them belongs to the response.
    """
    needed = [*TOKENS, "chosen_reward", "rejected_reward"]
    schema.require(source, needed, written_by="filter", remedy="give filter the rewards first")
    data = _Columns(source, pad_id, frozenset(end_ids))
    for table in source.tables(data.names, size=2000):
        data.add(table)
    pairs = data.finish()
    finite = np.isfinite(pairs.chosen_reward) & np.isfinite(pairs.rejected_reward)
    if not finite.all():
        row = int(np.argmin(finite))
        raise BadUse(
            f"{source.name} has {int((~finite).sum())} pairs without a finite reward (the first: prompt_id "
            f"{pairs.prompt_ids[row]}); filter drops such rows: pass its output as --input_repo."
        )
    return pairs


class _Columns:
    """Collects the columns of PairData table by table."""

    def __init__(self, source: Source, pad_id: int, end_ids: frozenset[int]):
        self.optional = [
            name
            for name in (
                "prompt_id",
                "chosen_index",
                "rejected_index",
                "rewards",
                "chosen_logp",
                "rejected_logp",
                *LENGTHS,
            )
            if name in source.columns
        ]
        self.names = [*TOKENS, "chosen_reward", "rejected_reward", *self.optional]
        self.pad_id, self.end_ids = pad_id, end_ids
        self.tokens: dict[str, list[Ids]] = {name: [] for name in TOKENS}
        self.values: dict[str, list[object]] = {name: [] for name in self.names if name not in TOKENS}

    def add(self, table: pa.Table) -> None:
        for name in self.values:
            self.values[name] += table[name].to_pylist()
        for name, length in zip(TOKENS, LENGTHS, strict=True):
            stated = table[length].to_numpy() if length in self.optional else None
            from_left = name == "prompt_tokens"
            self.tokens[name] += list(trimmed(table[name], stated, from_left, self.pad_id, self.end_ids))

    def finish(self) -> PairData:
        count = len(self.tokens["prompt_tokens"])

        def floats(name: str) -> npt.NDArray[np.float64]:
            return np.array(self.values[name], dtype=np.float64)

        def indices(name: str) -> npt.NDArray[np.int64]:
            return np.array(self.values.get(name, [-1] * count), dtype=np.int64)

        ids = self.values.get("prompt_id") or schema.make_prompt_ids(
            [row.tolist() for row in self.tokens["prompt_tokens"]]
        )
        return PairData(
            prompt_ids=[str(item) for item in ids],
            chosen_index=indices("chosen_index"),
            rejected_index=indices("rejected_index"),
            prompt=self.tokens["prompt_tokens"],
            chosen=self.tokens["chosen_tokens"],
            rejected=self.tokens["rejected_tokens"],
            chosen_reward=floats("chosen_reward"),
            rejected_reward=floats("rejected_reward"),
            rewards=floats("rewards") if "rewards" in self.values else None,
            chosen_logp=floats("chosen_logp") if "chosen_logp" in self.values else None,
            rejected_logp=floats("rejected_logp") if "rejected_logp" in self.values else None,
        )


def trimmed(
    column: pa.ChunkedArray,
    lengths: npt.NDArray[np.int64] | None,
    left_padded: bool,
    pad_id: int,
    end_ids: frozenset[int],
) -> Iterator[Ids]:
    """The real tokens of each row of a padded column, copied; by `lengths` where given, else by `pad_id`."""
    for chunk_start, chunk in _chunks(column):
        values = chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
        ends = np.cumsum(chunk.value_lengths().to_numpy(zero_copy_only=False))
        for row, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            block = values[start:end]
            if lengths is not None:
                length = int(lengths[chunk_start + row])
                if not 0 < length <= len(block):
                    raise BadUse(
                        f"row {chunk_start + row} of --input_repo says that {length} of its {len(block)} tokens are "
                        "real; expected 1 or more, and no more than there are: pass filter's output."
                    )
            else:
                length = _length_by_pad(block[::-1] if left_padded else block, pad_id, end_ids, left_padded)
            yield (block[len(block) - length :] if left_padded else block[:length]).copy()


def _chunks(column: pa.ChunkedArray) -> Iterator[tuple[int, pa.Array]]:
    start = 0
    for chunk in column.chunks:
        yield start, chunk
        start += len(chunk)


def _length_by_pad(block: Ids, pad_id: int, end_ids: frozenset[int], prompt: bool) -> int:
    """Tokens before the run of `pad_id` with which `block` ends."""
    real = np.flatnonzero(block != pad_id)
    length = int(real[-1]) + 1 if len(real) else 0
    padded_with_end = pad_id in end_ids and not prompt and length < len(block)
    return length + int(padded_with_end)


def load_comparisons(source: Source, chat: Chat) -> PairData:
    """Pairs to learn a reward from: tokenized ones, or prompt, chosen and rejected as text or message lists.

    Text pairs bring no rewards: theirs are NaN. Raises BadUse for a dataset that has neither.
    """
    if set(TOKENS) <= set(source.columns):
        return load_pairs(source, pad_id=chat.pad_id, end_ids=chat.end_ids)
    schema.require(source, ("chosen", "rejected"), written_by="filter", remedy="name pairs with chosen and rejected")
    columns = [name for name in ("prompt_id", "prompt", "chosen", "rejected") if name in source.columns]
    rows = [_as_texts(row, number, source.name) for number, row in enumerate(source.rows(columns))]
    prompts = [prompt for prompt, _, _ in rows]
    none = np.full(len(rows), np.nan)
    unknown = np.full(len(rows), -1)

    def ids(texts: list[str]) -> list[Ids]:
        return [np.array(chat.response_ids(p, text), dtype=np.int32) for p, text in zip(prompts, texts, strict=True)]

    return PairData(
        prompt_ids=schema.make_prompt_ids(prompts),
        chosen_index=unknown,
        rejected_index=unknown,
        prompt=[np.array(row, dtype=np.int32) for row in chat.encode_prompts(prompts)],
        chosen=ids([chosen for _, chosen, _ in rows]),
        rejected=ids([rejected for _, _, rejected in rows]),
        chosen_reward=none,
        rejected_reward=none,
        rewards=None,
        chosen_logp=None,
        rejected_logp=None,
    )


def _as_texts(row: dict[str, Any], number: int, name: str) -> tuple[Any, str, str]:
    """(prompt, chosen, rejected) of a row whose chosen and rejected are texts, or whole conversations."""
    if texts := texts_of(row):
        return texts
    raise BadUse(
        f"row {number} of {name} is no pair: expected prompt, chosen and rejected as texts, or two conversations "
        "that differ in their last turn alone."
    )
