"""Trimmed token ids become tensors, and every rank's engine calls are planned from lengths alone.

A row of a batch is prompt and response without a gap, then padding on the right. Under a causal mask no real
token can see that padding, so its ids are only data, replaced by one that every embedding has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

FILL_ID = 0
"""Stands under the padding: the pad id itself may lie outside the embedding (Llama 3's added [PAD] does)."""

TokenIds = Sequence[int] | npt.NDArray[np.integer]


@dataclass(frozen=True)
class Batch:
    """B sequences, right-padded to T tokens, and where their M response tokens are, row after row."""

    input_ids: torch.Tensor
    """(B, T) int64"""
    prompt_lengths: torch.Tensor
    """(B,) int64, tokens"""
    response_lengths: torch.Tensor
    """(B,) int64, tokens"""
    positions: torch.Tensor
    """(M,) int64: index into the flattened (B * T) of the token before each response token, its predictor"""
    labels: torch.Tensor
    """(M,) int64: the response tokens"""
    rows: torch.Tensor
    """(M,) int64: the row of each response token"""

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def collate(
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    *,
    fill_id: int = FILL_ID,
    device: torch.device | str = "cpu",
) -> Batch:
    """One batch of B trimmed prompts and their responses. Raises ValueError for a prompt without tokens.

    An empty response is allowed: its row has no response tokens. A response's first token is predicted by the
    prompt's last, so a prompt can't be empty.
    """
    prompt_lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    response_lengths = np.array([len(response) for response in responses], dtype=np.int64)
    if prompt_lengths.min() == 0:
        raise ValueError(f"prompt {prompt_lengths.argmin()} of the batch has no tokens")
    lengths = prompt_lengths + response_lengths
    width = int(lengths.max())
    input_ids = np.full((len(lengths), width), fill_id, dtype=np.int64)
    for row, prompt, response in zip(input_ids, prompts, responses, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + len(response)] = response

    rows = np.repeat(np.arange(len(lengths)), response_lengths)
    starts = np.cumsum(response_lengths) - response_lengths
    within = np.arange(len(rows)) - starts[rows]
    first_of_response = rows * width + prompt_lengths[rows]
    batch = Batch(
        input_ids=torch.from_numpy(input_ids),
        prompt_lengths=torch.from_numpy(prompt_lengths),
        response_lengths=torch.from_numpy(response_lengths),
        positions=torch.from_numpy(first_of_response + within - 1),
        labels=torch.from_numpy(input_ids.reshape(-1)[first_of_response + within]),
        rows=torch.from_numpy(rows),
    )
    return batch.to(device)


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
    lengths: npt.ArrayLike, *, world_size: int, max_pairs: int | None = None, max_tokens: int | None = None
) -> list[list[MicroBatch]]:
    """Cut n pairs into engine calls: for each rank its micro-batches, as many on every rank.

    `lengths` (n, k) are the tokens of a pair's k sequences (prompt + chosen, prompt + rejected), or (n,)
    where there is one sequence each. All sequences of a call are padded to its longest. A call holds at most
    `max_pairs` pairs and at most `max_tokens` tokens, padding included; a pair that is longer alone gets a
    call of its own.

    Every pair is in exactly one micro-batch of weight 1. Where pairs don't go round, a rank repeats the
    shortest pair at weight 0. Pairs are sorted by length; the calls that ranks make at the same time cost
    about the same, and the dearest come first, so that memory runs out at once or never. The plan depends on
    nothing but its arguments.
    """
    table = np.asarray(lengths, dtype=np.int64)
    if len(table) == 0:
        return [[] for _ in range(world_size)]
    widths = table.reshape(len(table), -1).max(axis=1)
    per_pair = table.size // len(table)
    order = np.argsort(widths, kind="stable")
    groups = _cut(widths[order], per_pair, world_size, max_pairs or len(order), max_tokens)

    def micro_batch(start: int, stop: int, weight: float) -> MicroBatch:
        indices = tuple(int(index) for index in order[start:stop][::-1])
        return MicroBatch(indices, weight, per_pair * (stop - start) * int(widths[order[stop - 1]]))

    calls = [micro_batch(start, stop, 1.0) for start, stop in groups]
    calls.sort(key=lambda call: (-call.tokens, call.indices))
    calls += [micro_batch(0, 1, 0.0)] * (-len(calls) % world_size)
    return _deal(calls, world_size)


def _cut(
    widths: npt.NDArray[np.int64], per_pair: int, world_size: int, max_pairs: int, max_tokens: int | None
) -> list[tuple[int, int]]:
    """(start, stop) of contiguous groups of ascending `widths`, a multiple of `world_size` if pairs suffice.

    The number of calls per rank is the smallest that the limits allow; within it the dearest group is made as
    cheap as can be, and then the dearest groups are halved until no rank is short or every pair is alone.
    """

    def groups_within(limit: int) -> list[tuple[int, int]]:
        groups, start = [], 0
        for stop in range(1, len(widths) + 1):
            full = stop - start > max_pairs or per_pair * (stop - start) * int(widths[stop - 1]) > limit
            if full and stop - start > 1:
                groups.append((start, stop - 1))
                start = stop - 1
        return [*groups, (start, len(widths))]

    low, high = 1, per_pair * len(widths) * int(widths[-1])
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
    while len(groups) < min(wanted, len(widths)):
        several = [(start, stop) for start, stop in groups if stop - start > 1]
        start, stop = max(several, key=lambda group: (group[1] - group[0]) * int(widths[group[1] - 1]))
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
