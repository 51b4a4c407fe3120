"""The part of an output that one job of several writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from rlhf_pipeline.core.command import BadUse

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Of `count` jobs the one numbered `index`: its shards are every count-th, from the index-th."""

    index: int = 0
    count: int = 1

    def of(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.index :: self.count]

    def __str__(self) -> str:
        return f"{self.index:05d}-of-{self.count:05d}"


WHOLE = Share()
"""All of an output, by one job."""


def choose_share(shard_index: int | None, num_shards: int) -> Share:
    """What --shard_index and --num_shards ask for. Raises BadUse for a job that can't be."""
    if num_shards < 1:
        raise BadUse(f"--num_shards is {num_shards}; expected 1 or more.")
    if shard_index is None and num_shards > 1:
        raise BadUse(f"--num_shards {num_shards} needs --shard_index: which of them, 0 to {num_shards - 1}, this is.")
    if shard_index is not None and not 0 <= shard_index < num_shards:
        raise BadUse(
            f"--shard_index is {shard_index}; expected 0 to {num_shards - 1}, below --num_shards {num_shards}."
        )
    return Share(shard_index or 0, num_shards)


def even_shards(num_rows: int, rows_per_shard: int, jobs: int) -> int:
    """Rows of each shard, at most `rows_per_shard`, so that every of several jobs gets as many shards as the others."""
    if jobs == 1:
        return rows_per_shard
    rounds = -(-num_rows // (rows_per_shard * jobs))
    return max(1, -(-num_rows // (rounds * jobs)))
