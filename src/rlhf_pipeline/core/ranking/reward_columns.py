"""The columns that rank adds to a table of responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_pipeline.core import schema
from rlhf_pipeline.core.ranking.network_scorers import Score

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = {
    "response_{i}_reward": "the reward, float64; null where there is none",
    "response_{i}_reward_error": "why there is none: kind, colon, details",
    "response_{i}_objectives": "the named rewards behind the reward",
    "response_{i}_coefficients": "how much each of them counts: reward = sum of objective x coefficient",
}


def with_rewards(
    table: pa.Table, scores: Sequence[Sequence[Score]], objectives: Sequence[str], *, coefficients: bool
) -> pa.Table:
    """`table` with the reward columns of its responses, scores[i][row]; older columns of the same names are
    replaced.
    """
    import pyarrow as pa

    numbers = pa.struct([(name, pa.float64()) for name in objectives])
    for i, column in enumerate(scores):
        new = {
            schema.response_reward(i): pa.array([score.reward for score in column], pa.float64()),
            schema.response_reward_error(i): pa.array([score.error for score in column], pa.string()),
        }
        if objectives:
            new[schema.response_objectives(i)] = pa.array([score.objectives for score in column], numbers)
        if objectives and coefficients:
            new[response_coefficients(i)] = pa.array([score.coefficients for score in column], numbers)
        table = table.drop_columns([name for name in reward_columns(i) if name in table.column_names])
        for name, values in new.items():
            table = table.append_column(name, values)
    return table


def response_coefficients(i: int) -> str:
    return f"response_{i}_coefficients"


def reward_columns(i: int) -> tuple[str, ...]:
    """Every column that rank may write for response i."""
    return (
        schema.response_reward(i),
        schema.response_reward_error(i),
        schema.response_objectives(i),
        response_coefficients(i),
    )


def with_prompt_ids(table: pa.Table, ids: Sequence[str]) -> pa.Table:
    import pyarrow as pa

    if schema.PROMPT_ID in table.column_names:
        table = table.drop_columns([schema.PROMPT_ID])
    return table.add_column(0, schema.PROMPT_ID, pa.array(ids, pa.string()))
