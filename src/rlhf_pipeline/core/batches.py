"""Trimmed token ids become tensors, and every rank's engine calls are planned from lengths alone.

A sequence is prompt and response without a gap. A padded batch has a row for each sequence, with padding on the right:
under a causal mask no real token can see it, so its ids are only data, replaced by one that every embedding has. A
packed batch has one row in which the sequences stand end to end, for attention that keeps them apart. A prompt that
several of them have stands there once, as a pair's responses do not change what the layers make of their prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

FILL_ID = 0
"""Stands under the padding: the pad id itself may lie outside the embedding (Llama 3's added [PAD] does)."""

TokenIds = Sequence[int] | npt.NDArray[np.integer]


class Packing(NamedTuple):
    """Where the sequences of a packed row are, for the attention that keeps them apart.

    The row has T tokens, the sequences with all their prompts have E.
    """

    boundaries: torch.Tensor
    """(B + 1,) int32: where each sequence begins among the E tokens, and E"""
    longest: int
    """tokens of the longest sequence"""
    expand: torch.Tensor | None
    """(E,) int64: the place in the row of each token of the sequences; None where no prompt is shared, E = T"""
    keep: torch.Tensor | None
    """(T,) int64: of each token of the row, its first place among the E"""


@dataclass(frozen=True)
class Batch:
    """B sequences, and where their M response tokens are, sequence after sequence."""

    input_ids: torch.Tensor
    """(B, T) int64, right-padded to the longest, or packed (1, T)"""
    prompt_lengths: torch.Tensor
    """(B,) int64, tokens"""
    response_lengths: torch.Tensor
    """(B,) int64, tokens"""
    positions: torch.Tensor
    """(M,) int64: index into the flattened input_ids of the token before each response token, its predictor"""
    labels: torch.Tensor
    """(M,) int64: the response tokens"""
    rows: torch.Tensor
    """(M,) int64: the sequence of each response token"""
    position_ids: torch.Tensor | None = None
    """(1, T) int64, of a packed batch: each token's place in its own sequence"""
    packing: Packing | None = None
    """of a packed batch"""

    def to(self, device: torch.device | str) -> Batch:
        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        values = {field.name: moved(getattr(self, field.name)) for field in fields(self)}
        if self.packing is not None:
            values["packing"] = Packing(*map(moved, self.packing))
        return Batch(**values)


def collate(
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    *,
    packed: bool = False,
    fill_id: int = FILL_ID,
    device: torch.device | str = "cpu",
) -> Batch:
    """One batch of B trimmed prompts and their responses. Raises ValueError for a prompt without tokens.

    An empty response is allowed: its sequence has no response tokens. A response's first token is predicted by
    the prompt's last, so a prompt can't be empty.
    """
    prompt_lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    response_lengths = np.array([len(response) for response in responses], dtype=np.int64)
    if prompt_lengths.min() == 0:
        raise ValueError(f"prompt {prompt_lengths.argmin()} of the batch has no tokens")
    lengths = prompt_lengths + response_lengths
    ends = np.cumsum(lengths)
    begins = ends - lengths if packed else np.arange(len(lengths)) * lengths.max()
    shape = (1, int(ends[-1])) if packed else (len(lengths), int(lengths.max()))
    ids = np.full(shape, fill_id, dtype=np.int64)
    flat = ids.reshape(-1)
    for begin, prompt, response in zip(begins, prompts, responses, strict=True):
        flat[begin : begin + len(prompt)] = prompt
        flat[begin + len(prompt) : begin + len(prompt) + len(response)] = response

    rows = np.repeat(np.arange(len(lengths)), response_lengths)
    within = np.arange(len(rows)) - (np.cumsum(response_lengths) - response_lengths)[rows]
    of_response = begins[rows] + prompt_lengths[rows] + within
    batch = Batch(
        input_ids=torch.from_numpy(ids),
        prompt_lengths=torch.from_numpy(prompt_lengths),
        response_lengths=torch.from_numpy(response_lengths),
        positions=torch.from_numpy(of_response - 1),
        labels=torch.from_numpy(flat[of_response]),
        rows=torch.from_numpy(rows),
    )
    return (_pack(batch, prompts, begins, lengths) if packed else batch).to(device)


def _pack(
    batch: Batch, prompts: Sequence[TokenIds], begins: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> Batch:
    """`batch`, whose sequences stand end to end with all their prompts, as a packed one."""
    places = np.arange(lengths.sum())
    first_alike = places.copy()
    first: dict[bytes, int] = {}
    for prompt, begin in zip(prompts, begins, strict=True):
        seen = first.setdefault(np.asarray(prompt, dtype=np.int64).tobytes(), begin)
        first_alike[begin : begin + len(prompt)] = np.arange(seen, seen + len(prompt))
    kept = np.flatnonzero(first_alike == places)
    keep, expand = torch.from_numpy(kept), torch.from_numpy(np.searchsorted(kept, first_alike))
    shared = len(kept) < len(places)
    boundaries = torch.from_numpy(np.append(begins, len(places)).astype(np.int32))
    return replace(
        batch,
        input_ids=batch.input_ids[:, keep],
        positions=expand[batch.positions],
        position_ids=torch.from_numpy(places - np.repeat(begins, lengths))[None, keep],
        packing=Packing(boundaries, int(lengths.max()), *((expand, keep) if shared else (None, None))),
    )


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes in one engine call."""

    indices: tuple[int, ...]
    """Which pairs, longest first."""
    weight: float
    """1.0, or 0.0 for a call that only keeps this rank in step with the others."""
    tokens: int
    """Tokens of the call, padding included."""


def plan_calls(
    lengths: npt.ArrayLike,
    *,
    world_size: int,
    max_pairs: int | None = None,
    max_tokens: int | None = None,
    packed: bool = False,
) -> list[list[MicroBatch]]:
    """Cut n pairs into engine calls: for each rank its micro-batches, as many on every rank.

    `lengths` (n, k) are the tokens of a pair's k sequences (prompt + chosen, prompt + rejected), or (n,)
    where there is one sequence each. Unless they are `packed`, all sequences of a call are padded to its longest.
    A call holds at most `max_pairs` pairs and at most `max_tokens` tokens, padding included; a pair that is
    longer alone gets a call of its own.

    Every pair is in exactly one micro-batch of weight 1. Where pairs don't go round, a rank repeats the
    shortest pair at weight 0. Pairs are sorted by length; the calls that ranks make at the same time cost
    about the same, and the dearest come first, so that memory runs out at once or never. The plan depends on
    nothing but its arguments.
    """
    table = np.asarray(lengths, dtype=np.int64)
    if len(table) == 0:
        return [[] for _ in range(world_size)]
    table = table.reshape(len(table), -1)
    sizes = table.sum(axis=1) if packed else table.shape[1] * table.max(axis=1)
    order = np.argsort(sizes, kind="stable")
    sizes = sizes[order]
    before = np.append(0, np.cumsum(sizes))

    def tokens(start: int, stop: int) -> int:
        return int(before[stop] - before[start]) if packed else (stop - start) * int(sizes[stop - 1])

    def micro_batch(start: int, stop: int, weight: float) -> MicroBatch:
        indices = tuple(int(index) for index in order[start:stop][::-1])
        return MicroBatch(indices, weight, tokens(start, stop))

    groups = _cut(tokens, len(order), world_size, max_pairs or len(order), max_tokens)
    calls = [micro_batch(start, stop, 1.0) for start, stop in groups]
    calls.sort(key=lambda call: (-call.tokens, call.indices))
    calls += [micro_batch(0, 1, 0.0)] * (-len(calls) % world_size)
    return _deal(calls, world_size)


def _cut(
    tokens: Callable[[int, int], int], count: int, world_size: int, max_pairs: int, max_tokens: int | None
) -> list[tuple[int, int]]:
    """(start, stop) of groups of `count` pairs of ascending size, a multiple of `world_size` if pairs suffice.

    `tokens(start, stop)` are those of a group. The number of calls per rank is the smallest that the limits allow;
    within it the dearest group is made as cheap as can be, and then the dearest groups are halved until no rank is
    short or every pair is alone.
    """

    def groups_within(limit: int) -> list[tuple[int, int]]:
        groups, start = [], 0
        for stop in range(1, count + 1):
            full = stop - start > max_pairs or tokens(start, stop) > limit
            if full and stop - start > 1:
                groups.append((start, stop - 1))
                start = stop - 1
        return [*groups, (start, count)]

    low, high = 1, tokens(0, count)
    if max_tokens is not None:
        high = min(high, max_tokens)
    wanted = -(-len(groups_within(high)) // world_size) * world_size
    while low < high:
        middle = (low + high) // 2
        if len(groups_within(middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    groups = groups_within(high)
    while len(groups) < min(wanted, count):
        several = [(start, stop) for start, stop in groups if stop - start > 1]
        start, stop = max(several, key=lambda group: tokens(*group))
        groups.remove((start, stop))
        groups += [(start, (start + stop) // 2), ((start + stop) // 2, stop)]
    return groups


def _deal(calls: list[MicroBatch], world_size: int) -> list[list[MicroBatch]]:
    """Deal calls of descending cost to the ranks, changing direction each turn so that their sums agree."""
    ranks: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    for turn, start in enumerate(range(0, len(calls), world_size)):
        hand = calls[start : start + world_size]
        for rank, call in enumerate(hand if turn % 2 == 0 else reversed(hand)):
            ranks[rank].append(call)
    return ranks


def order_of_rows(rows: int, updates: int, batch_size: int, seed: int) -> npt.NDArray[np.int64]:
    """(updates, batch_size) row indices: a fresh permutation per epoch, cut into updates.

    A function of its arguments, so that every rank and every resumed run agrees.
    """
    epochs = -(-updates * batch_size // rows)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)])
    return order[: updates * batch_size].reshape(updates, batch_size)
