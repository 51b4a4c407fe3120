"""The columns that rank adds to a table of responses."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from rlhf_pipeline.core import schema
from rlhf_pipeline.core.ranking.network_scorers import Score

if TYPE_CHECKING:
    import pyarrow as pa

MEANINGS = {
    "reward": "the reward, float64; null where there is none",
    "reward_error": "why there is none: kind, colon, details",
    "objectives": "the named rewards behind the reward",
    "coefficients": "how much each of them counts: reward = sum of objective x coefficient",
}


def with_rewards(
    table: pa.Table, scores: Mapping[str, Sequence[Score]], objectives: Sequence[str], *, coefficients: bool
) -> pa.Table:
    """`table` with the reward columns of its text columns, scores[name][row]; older columns of the same names are
    replaced.
    """
    import pyarrow as pa

    numbers = pa.struct([(name, pa.float64()) for name in objectives])
    for name, column in scores.items():
        reward, error, behind, counts = reward_columns(name)
        new = {
            reward: pa.array([score.reward for score in column], pa.float64()),
            error: pa.array([score.error for score in column], pa.string()),
        }
        if objectives:
            new[behind] = pa.array([score.objectives for score in column], numbers)
        if objectives and coefficients:
            new[counts] = pa.array([score.coefficients for score in column], numbers)
        table = table.drop_columns([old for old in reward_columns(name) if old in table.column_names])
        for new_name, values in new.items():
            table = table.append_column(new_name, values)
    return table


def reward_columns(name: str) -> tuple[str, ...]:
    """Every column that rank may write for the text column `name`, such as response_0."""
    return tuple(f"{name}_{suffix}" for suffix in MEANINGS)


def describe_columns(names: Sequence[str], written: Collection[str]) -> dict[str, str]:
    """{column: what it holds} of the reward columns that are among `written`; response_{i} stands for all responses."""
    found = {}
    for name in names:
        for suffix, meaning in MEANINGS.items():
            if f"{name}_{suffix}" in written:
                found[f"{re.sub(r'[0-9]+$', '{i}', name)}_{suffix}"] = meaning
    return found


def with_prompt_ids(table: pa.Table, ids: Sequence[str]) -> pa.Table:
    import pyarrow as pa

    if schema.PROMPT_ID in table.column_names:
        table = table.drop_columns([schema.PROMPT_ID])
    return table.add_column(0, schema.PROMPT_ID, pa.array(ids, pa.string()))
